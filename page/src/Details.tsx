/** What stands behind an answer: the bill of tokens, the request as code, request and reply as they were. */

import { useEffect, useId, useRef, useState } from "react";
import type { Reply } from "./chat";
import { Choice } from "./Choice";
import { code, raw, unsayable, type Language } from "./code";
import { IconButton } from "./Icon";
import { save, text } from "./download";
import { modelOf, useSay, useStore, type State } from "./store";
import type { Word } from "./i18n";

const TABS = ["bill", "codeTab", "request", "reply"] as const;
type Tab = (typeof TABS)[number];

export function Details({ reply }: { reply: Reply }) {
  const say = useSay();
  const [tab, setTab] = useState<Tab>("bill");
  const pictures = useStore((now) => now.pictures);
  const element = useRef<HTMLDivElement>(null);
  const panel = useId();
  useEffect(() => {
    void element.current?.scrollIntoView({ block: "nearest" }); // a promise in newer browsers
  }, [tab]);
  return (
    <div ref={element} className="details">
      <Choice
        kind="tab"
        className="tabs"
        label={say("details")}
        options={TABS.map((name) => [name, say(name)] as const)}
        value={tab}
        onChange={setTab}
        controls={panel}
      />
      <div id={panel} role="tabpanel" aria-label={say(tab)}>
        {tab === "bill" && <Bill reply={reply} />}
        {tab === "codeTab" && <Code reply={reply} />}
        {tab === "request" && reply.sent && <Block content={raw(reply.sent, pictures)} name="request.json" />}
        {tab === "reply" && <Block content={[reply.requestId && `x-request-id: ${reply.requestId}`, ...reply.raw].filter(Boolean).join("\n")} name="reply.txt" />}
      </div>
    </div>
  );
}

const contextOf = (now: State) => modelOf(now)?.context_length ?? null;

function Bill({ reply }: { reply: Reply }) {
  const say = useSay();
  const context = useStore(contextOf);
  const { usage, timings } = reply;
  const rows: [Word, string, boolean?][] = [];
  if (usage) {
    const { cached_tokens: cached = 0, image_tokens: images = 0 } = usage.prompt_tokens_details ?? {};
    rows.push(["tPrompt", `${usage.prompt_tokens}`], ["tPictures", `${images}`, true], ["tCached", `${cached}`, true]);
    rows.push(["tAnswer", `${usage.completion_tokens}`]);
    const total = `${usage.total_tokens}${context ? ` ${say("tContext", { n: context })}` : ""}`;
    rows.push(["tTotal", total]);
  }
  if (reply.first !== null) rows.push(["first", say("seconds", { n: seconds(reply.first / 1000) })]);
  const speed = rate(reply);
  if (speed !== null) rows.push(["rate", say("perSecond", { n: speed })]);
  const timed = { preprocess: "timePreprocess", vision: "timeVision", prefill: "timePrefill", decode: "timeDecode" } as const;
  for (const [name, word] of Object.entries(timed)) {
    const value = timings?.[name];
    if (value !== undefined) rows.push([word, say("seconds", { n: seconds(value) }), true]);
  }
  return (
    <table className="bill">
      <tbody>
        {rows.map(([word, value, small]) => (
          <tr key={word} className={small ? "small" : ""}>
            <th scope="row">{say(word)}</th>
            <td>{value}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

export const seconds = (value: number) => (value === 0 ? "0" : value.toPrecision(value < 1 ? 2 : 3));

/** Tokens a second, from the server's own clock. */
export function rate(reply: Reply): number | null {
  const decode = reply.timings?.decode;
  const count = reply.usage?.completion_tokens;
  if (!decode || !count) return null;
  return Math.round(count / decode);
}

const LANGUAGES: [Language, string][] = [
  ["curl", "curl"],
  ["openai", "Python · openai"],
  ["replicate", "Python · replicate"],
  ["seekvl", "Python · seekvl"],
];

function Code({ reply }: { reply: Reply }) {
  const say = useSay();
  const [language, setLanguage] = useState<Language>("curl");
  const pictures = useStore((now) => now.pictures);
  if (!reply.sent) return null;
  const why = unsayable(language, reply.sent);
  return (
    <>
      <Choice className="modes" label={say("answerCode")} options={LANGUAGES} value={language} onChange={setLanguage} />
      {why ? (
        <p className="note">{say(why)}</p>
      ) : (
        <Block content={code(language, reply.sent, pictures)} name={language === "curl" ? "request.sh" : "request.py"} />
      )}
    </>
  );
}

function Block({ content, name }: { content: string; name: string }) {
  const say = useSay();
  return (
    <div className="block">
      <pre tabIndex={0}>{content}</pre>
      <span className="corner">
        <Copy content={content} />
        <IconButton icon="download" label={`${say("download")} ${name}`} onClick={() => save(text(content, "text/plain"), name)} />
      </span>
    </div>
  );
}

export function Copy({ content }: { content: string }) {
  const say = useSay();
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(content);
    } catch {
      copyOldWay(content); // plain http has no clipboard
    }
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return <IconButton icon="copy" label={copied ? say("copied") : say("copy")} text={copied ? say("copied") : undefined} onClick={() => void copy()} />;
}

function copyOldWay(content: string): void {
  const field = document.createElement("textarea");
  field.value = content;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}
