/** What lies over the page: parameters, shortcuts, the key, a large picture. */

import { useEffect, useRef, useState } from "react";
import { IconButton } from "./Icon";
import type { Word } from "./i18n";
import { DEFAULTS, modelOf, set, setKey, setParams, useSay, useStore, type Params } from "./store";
import { Viewer } from "./Viewer";

export function Panels() {
  const say = useSay();
  const panel = useStore((now) => now.panel);
  const pictures = useStore((now) => now.pictures);
  if (!panel) return null;
  if (panel.kind === "viewer") {
    return (
      <Dialog title={say("viewer", { name: pictures[panel.picture]?.name ?? "" })} wide>
        <Viewer key={panel.picture} picture={panel.picture} turn={panel.turn} reply={panel.reply} />
      </Dialog>
    );
  }
  if (panel.kind === "params") {
    return (
      <Dialog title={say("parameters")}>
        <Parameters />
      </Dialog>
    );
  }
  if (panel.kind === "key") {
    return (
      <Dialog title={say("key")}>
        <Key />
      </Dialog>
    );
  }
  return (
    <Dialog title={say("shortcuts")}>
      <Shortcuts />
    </Dialog>
  );
}

/** The browser's own modal: it keeps the focus inside and closes with Escape. */
function Dialog({ title, wide = false, children }: { title: string; wide?: boolean; children: React.ReactNode }) {
  const say = useSay();
  const element = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    if (element.current && !element.current.open) element.current.showModal();
  }, []);
  const close = () => element.current?.close(); // gives the focus back to where it was
  return (
    <dialog
      ref={element}
      className={wide ? "wide" : ""}
      aria-label={title}
      onClose={() => set({ panel: null })}
      onClick={(event) => {
        if (event.target === event.currentTarget) close();
      }}
    >
      <div className="sheet">
        <header>
          <h2>{title}</h2>
          <IconButton icon="close" label={say("close")} onClick={close} />
        </header>
        {children}
      </div>
    </dialog>
  );
}

interface NumberField {
  field: "temperature" | "topP" | "topK" | "penalty" | "most" | "seed" | "tiles";
  label: Word;
  why: Word;
  min: number;
  max: number;
  step: number;
  slider: boolean;
}

const NUMBERS: NumberField[] = [
  { field: "temperature", label: "pTemperature", why: "wTemperature", min: 0, max: 2, step: 0.1, slider: true },
  { field: "topP", label: "pTopP", why: "wTopP", min: 0, max: 1, step: 0.05, slider: true },
  { field: "penalty", label: "pPenalty", why: "wPenalty", min: 0.5, max: 2, step: 0.05, slider: true },
  { field: "most", label: "pMost", why: "wMost", min: 1, max: 4096, step: 1, slider: false },
  { field: "topK", label: "pTopK", why: "wTopK", min: 1, max: 1000, step: 1, slider: false },
  { field: "seed", label: "pSeed", why: "wSeed", min: 0, max: 2 ** 31, step: 1, slider: false },
  { field: "tiles", label: "pTiles", why: "wTiles", min: 1, max: 64, step: 1, slider: false },
];

function Parameters() {
  const say = useSay();
  const params = useStore((now) => now.params);
  const model = useStore(modelOf);
  const change = (values: Partial<Params>) => setParams({ ...params, ...values });
  const bounds: Partial<Record<keyof Params, number | null>> = { most: model?.context_length, tiles: model?.max_tiles };
  return (
    <div className="params">
      {NUMBERS.map(({ field, label, why, min, max: most, step, slider }) => {
        if (field === "tiles" && !model?.max_tiles) return null; // it sees every picture whole
        const max = bounds[field] ?? most;
        const value = params[field];
        const read = (text: string) => {
          const number = Number(text);
          if (text === "" && !slider) change({ [field]: null });
          else if (text !== "" && Number.isFinite(number)) change({ [field]: Math.min(max, Math.max(min, step === 1 ? Math.round(number) : number)) });
        };
        return (
          <div key={field} className="param">
            <label htmlFor={`p-${field}`}>{say(label)}</label>
            {slider && <input type="range" aria-hidden="true" tabIndex={-1} min={min} max={max} step={step} value={value ?? min} onChange={(event) => read(event.target.value)} />}
            <input id={`p-${field}`} type="number" min={min} max={max} step={step} value={value ?? ""} aria-describedby={`w-${field}`} onChange={(event) => read(event.target.value)} />
            <p id={`w-${field}`}>{say(why)}</p>
          </div>
        );
      })}
      <div className="param tall">
        <label htmlFor="p-system">{say("pSystem")}</label>
        <textarea id="p-system" rows={2} value={params.system} aria-describedby="w-system" onChange={(event) => change({ system: event.target.value })} />
        <p id="w-system">{say("wSystem")}</p>
      </div>
      <div className="param">
        <label htmlFor="p-logprobs">{say("pLogprobs")}</label>
        <input id="p-logprobs" type="checkbox" checked={params.logprobs} aria-describedby="w-logprobs" onChange={(event) => change({ logprobs: event.target.checked })} />
        <p id="w-logprobs">{say("wLogprobs")}</p>
      </div>
      <button type="button" className="solid" onClick={() => setParams(DEFAULTS)}>
        {say("reset")}
      </button>
    </div>
  );
}

function Key() {
  const say = useSay();
  const [value, setValue] = useState("");
  return (
    <form
      className="params"
      onSubmit={(event) => {
        event.preventDefault();
        setKey(value);
      }}
    >
      <p>{say("keyAsked")}</p>
      <input type="password" autoFocus autoComplete="off" aria-label={say("key")} value={value} onChange={(event) => setValue(event.target.value)} />
      <p className="muted small">{say("keyWhy")}</p>
      <button type="submit" className="solid">
        {say("save")}
      </button>
    </form>
  );
}

const KEYS: [string[], Word][] = [
  [["Enter"], "kSend"],
  [["Shift", "Enter"], "kLine"],
  [["Esc"], "kStop"],
  [["/"], "kFocus"],
  [["Alt", "N"], "kNew"],
  [["Alt", "1…6"], "kModes"],
  [["Alt", "← →"], "kReorder"],
  [["Alt", "R"], "kAgain"],
  [["+ − 0"], "kZoom"],
  [["← ↑ → ↓"], "kPan"],
  [["T R"], "kTiles"],
  [["← ↑ → ↓"], "kRegion"],
  [["Shift", "← ↑ → ↓"], "kRegionSize"],
  [["?"], "kHelp"],
];

function Shortcuts() {
  const say = useSay();
  return (
    <table className="keys">
      <tbody>
        {KEYS.map(([keys, word]) => (
          <tr key={word}>
            <th scope="row">
              {keys.map((name) => (
                <kbd key={name}>{name}</kbd>
              ))}
            </th>
            <td>{say(word)}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
