/** What an empty chat shows: examples that the bundled model answers. */

import { useState } from "react";
import type { Mode } from "./chat";
import type { Word } from "./i18n";
import { open } from "./pictures";
import { keepPicture, set, submit, useSay, useStore } from "./store";

interface Example {
  pictures: string[];
  mode: Mode;
  text: string;
}

const EXAMPLES: Example[] = [
  { pictures: ["chart.png"], mode: "ask", text: "Which bar is tallest?" },
  { pictures: ["sign.png"], mode: "read", text: "What does the sign say?" },
  { pictures: ["sign.png"], mode: "locate", text: "the sign" },
  { pictures: ["shapes.png"], mode: "locate", text: "the red ring" },
  { pictures: ["shapes.png"], mode: "describe", text: "Describe the picture." },
  { pictures: ["shapes.png", "sign.png"], mode: "compare", text: "What does the sign in the second picture say?" },
];

export function Welcome() {
  const say = useSay();
  const ready = useStore((now) => now.phase === "ready" && now.model !== "");
  const [busy, setBusy] = useState(false);
  const run = async (example: Example) => {
    setBusy(true);
    try {
      const pictures: string[] = [];
      for (const name of example.pictures) {
        const file = await (await fetch(`/page/examples/${name}`)).blob();
        const picture = await open(file, name);
        await keepPicture(picture);
        pictures.push(picture.id);
      }
      void submit({ text: example.text, mode: example.mode, pictures, pageByPage: false }, null);
    } catch (error) {
      set({ notice: String(error) });
    } finally {
      setBusy(false);
    }
  };
  return (
    <div className="welcome">
      <h1>{say("welcome")}</h1>
      <p>{say("welcomeText")}</p>
      <h2>{say("examples")}</h2>
      <ul className="examples">
        {EXAMPLES.map((example) => (
          <li key={example.text}>
            <button type="button" disabled={!ready || busy} onClick={() => void run(example)}>
              <span className="pair">
                {example.pictures.map((name) => (
                  <img key={name} src={`/page/examples/${name}`} alt="" />
                ))}
              </span>
              <span className="mode">{say(example.mode satisfies Word)}</span>
              <span>{example.text}</span>
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}
