/** The words of an answer: Markdown without HTML and remote pictures, labels that light their boxes. */

import { memo } from "react";
import Markdown, { type Components } from "react-markdown";
import remarkGfm from "remark-gfm";
import type { Reply } from "./chat";
import { percent, title } from "./Figure";
import { boxConfidence, colours, confidence, stretches, type Box } from "./grounding";
import { useSay } from "./store";

interface Props {
  reply: Reply;
  lit: number | null;
  onLight: (index: number | null) => void;
}

const PLACE = "#box-";

/** Written as a link to its first box, which `link` below shows as a label. */
function asLink(label: string, boxes: number[], unnamed: string): string {
  const text = (label.trim() || unnamed).replace(/[\\`*_{}[\]()#+\-.!|<>~&]/g, "\\$&").replace(/\n/g, " ");
  return `[${text}](${PLACE}${boxes.join("-")})`;
}

/** Only web and mail addresses, and places of boxes, stay links. */
const safe = (url: string) => (url.startsWith(PLACE) || /^(?:https?:|mailto:)/i.test(url) ? url : "");

export const Answer = memo(function Answer({ reply, lit, onLight }: Props) {
  const say = useSay();
  const inks = colours(reply.boxes);
  const source = stretches(reply.text, reply.boxes, reply.state === "streaming")
    .map((part) => (part.boxes?.length ? asLink(part.text, part.boxes, say("noLabel")) : part.text))
    .join("");
  const components: Components = {
    a: ({ href, children }) => {
      if (!href?.startsWith(PLACE)) {
        return (
          <a href={href} target="_blank" rel="noopener noreferrer nofollow">
            {children}
          </a>
        );
      }
      const boxes = href.slice(PLACE.length).split("-").map(Number).filter((index) => index in reply.boxes);
      const [first = null] = boxes;
      return <Phrase {...{ first, boxes, inks, reply, lit, onLight }}>{children}</Phrase>;
    },
    img: ({ alt }) => <span className="muted">[{alt}]</span>,
  };
  return (
    <div className="words" data-testid="words">
      <Markdown remarkPlugins={[remarkGfm]} components={components} urlTransform={safe} skipHtml>
        {source}
      </Markdown>
    </div>
  );
});

interface PhraseProps extends Props {
  first: number | null;
  boxes: number[];
  inks: string[];
  children: React.ReactNode;
}

function Phrase({ first, boxes, inks, reply, lit, onLight, children }: PhraseProps) {
  const say = useSay();
  const box: Box | undefined = first === null ? undefined : reply.boxes[first];
  const sure = box ? boxConfidence(reply.tokens, box) : null;
  return (
    <button
      type="button"
      className={`phrase ${lit !== null && boxes.includes(lit) ? "lit" : ""}`}
      style={{ "--ink": first === null ? "currentColor" : inks[first] } as React.CSSProperties}
      title={box ? title(box, sure, say) : undefined}
      onPointerEnter={() => onLight(first)}
      onPointerLeave={() => onLight(null)}
      onFocus={() => onLight(first)}
      onBlur={() => onLight(null)}
    >
      {children}
    </button>
  );
}

/** The answer token by token, each as strong as the model was unsure of it. */
export function Sure({ reply }: { reply: Reply }) {
  const say = useSay();
  const hidden = reply.boxes.flatMap((box) => (box.span ? [box.span] : []));
  const parts: React.ReactNode[] = [];
  let at = 0;
  while (at < reply.text.length) {
    const span = hidden.find(([start, end]) => start <= at && at < end);
    if (span) {
      const index = reply.boxes.findIndex((box) => box.span?.[0] === span[0]);
      const box = reply.boxes[index];
      const sure = box ? boxConfidence(reply.tokens, box) : null;
      parts.push(
        <Token key={at} sure={sure ?? 1} title="">
          {box?.label || say("noLabel")}
        </Token>,
      );
      at = span[1];
      continue;
    }
    const token = reply.tokens.find((each) => each.start <= at && each.end > at);
    const end = token ? token.end : at + 1;
    const sure = token ? confidence(reply.tokens, token.start, token.end) : null;
    const others = token?.top
      .filter((other) => other.text !== token.text)
      .map((other) => `${JSON.stringify(other.text)} ${percent(Math.exp(other.logprob))}`)
      .join(", ");
    parts.push(
      <Token key={at} sure={sure ?? 1} title={others ? say("alternatives", { list: others }) : ""}>
        {reply.text.slice(at, end)}
      </Token>,
    );
    at = end;
  }
  const words = reply.tokens.filter(
    ({ text, start, end }) => text.trim() && end > start && !hidden.some(([from, to]) => from < end && start < to),
  );
  const least = words.reduce((a, b) => (b.logprob < a.logprob ? b : a), words[0] ?? null);
  return (
    <>
      <p className="words sure" data-testid="sure">
        {parts}
      </p>
      <p className="muted small">
        {say("sureLegend")} {least && say("sureLeast", { word: least.text.trim(), p: percent(Math.exp(least.logprob)) })}
      </p>
    </>
  );
}

function Token({ sure, title, children }: { sure: number; title: string; children: React.ReactNode }) {
  return (
    <span className="token" style={{ "--unsure": 1 - sure } as React.CSSProperties} title={`${percent(sure)}${title ? ` · ${title}` : ""}`}>
      {children}
    </span>
  );
}
