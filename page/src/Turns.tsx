/** The turns of a chat: what was asked, what was answered, and their versions. */

import { memo, useMemo, useState } from "react";
import { Answer, Sure } from "./Answer";
import { versions, type AssistantTurn, type Chat, type Mode, type Problem, type Reply, type Seen, type Turn, type UserTurn } from "./chat";
import { Composer } from "./Composer";
import { Copy, Details, rate, seconds } from "./Details";
import { download, type Format } from "./download";
import { Figure } from "./Figure";
import { boxConfidence, readable } from "./grounding";
import type { Say, Word } from "./i18n";
import { IconButton } from "./Icon";
import type { Picture } from "./pictures";
import { isNano } from "./prompts";
import { answer, chooseVersion, retry, set, submit, useSay, useStore, type Draft } from "./store";

export const UserView = memo(function UserView({ chat, turn }: { chat: Chat; turn: UserTurn }) {
  const say = useSay();
  const [draft, setDraft] = useState<Draft | null>(null);
  const known = useStore((now) => now.pictures);
  const busy = useStore((now) => Object.keys(now.running).length > 0);
  if (draft) {
    return (
      <div role="group" className="turn user editing" aria-label={say("edit")}>
        <Composer
          draft={draft}
          change={(how) => setDraft((old) => (old ? how(old) : old))}
          running={busy}
          onCancel={() => setDraft(null)}
          onSubmit={(changed) => {
            setDraft(null);
            void submit(changed, turn.parent);
          }}
        />
      </div>
    );
  }
  const begin = () => setDraft({ text: turn.text, mode: turn.mode, pictures: turn.pictures, pageByPage: turn.pageByPage });
  return (
    <div role="group" className="turn user" aria-label={say("you")} data-testid="user">
      {turn.pictures.length > 0 && (
        <div className={`shots ${turn.pictures.length === 1 ? "single" : ""}`}>
          {turn.pictures.map((id, index) => {
            const picture = known[id];
            return (
              picture && (
                <button key={`${id}${index}`} type="button" className="shot" aria-label={`${say("open")}: ${picture.name}`} onClick={() => set({ panel: { kind: "viewer", picture: id, turn: null, reply: 0 } })}>
                  <img src={picture.url} alt={picture.name} />
                </button>
              )
            );
          })}
        </div>
      )}
      <div className="said">
        <div className="bar">
          <Versions chat={chat} turn={turn} />
          <Copy content={turn.text} />
          <IconButton icon="edit" label={say("edit")} disabled={busy} onClick={begin} />
        </div>
        <div className="bubble">
          {turn.mode !== "ask" && <span className="mode">{say(turn.mode)}</span>}
          {readable(turn.text)}
        </div>
      </div>
    </div>
  );
});

export const AssistantView = memo(function AssistantView({ chat, turn }: { chat: Chat; turn: AssistantTurn }) {
  const say = useSay();
  const running = useStore((now) => now.running[turn.id] !== undefined);
  const busy = useStore((now) => Object.keys(now.running).length > 0);
  const asked = chat.turns[turn.parent];
  const question = asked?.role === "user" ? asked : null;
  const done = turn.replies.filter((reply) => reply.state === "done").length;
  return (
    <div role="group" className="turn assistant" aria-label={say("assistant")} aria-busy={running} data-testid="assistant">
      {turn.replies.length > 1 && (
        <div className="pages" role="status">
          <progress max={turn.replies.length} value={done} aria-label={say("pagesProgress", { done, of: turn.replies.length })} />
          <span>{say("pagesProgress", { done, of: turn.replies.length })}</span>
        </div>
      )}
      {turn.replies.map((reply, index) => (
        <ReplyView key={index} reply={reply} turn={turn.id} model={turn.model} index={index} chat={chat.id} question={question}>
          {index === turn.replies.length - 1 && (
            <>
              <Versions chat={chat} turn={turn} />
              {question && (
                <IconButton icon="again" label={say("regenerate")} disabled={busy} onClick={() => void answer(chat.id, question)} />
              )}
            </>
          )}
        </ReplyView>
      ))}
    </div>
  );
});

interface ReplyProps {
  reply: Reply;
  /** Ids of the chat and of the turn, and whose answer it is. */
  chat: string;
  turn: string;
  model: string;
  index: number;
  question: UserTurn | null;
  children: React.ReactNode;
}

/** One answer; those of other pages stay as they are while one grows. */
const ReplyView = memo(function ReplyView({ reply, chat, turn, model, index, question, children }: ReplyProps) {
  const say = useSay();
  const [lit, setLit] = useState<number | null>(null);
  const [sure, setSure] = useState(false);
  const [saw, setSaw] = useState(false);
  const [open, setOpen] = useState(false);
  const over = reply.state !== "waiting" && reply.state !== "streaming";
  const lines = told(reply, reply.page ? 1 : (question?.pictures.length ?? 0), say);
  const boxless = reply.state === "done" && reply.boxes.length === 0 && BOXED.has(question?.mode ?? "ask");
  return (
    <article className="reply" data-state={reply.state}>
      {reply.page && <h2 className="page">{say("pageOf", { n: reply.page.number, of: reply.page.of })}</h2>}
      <Drawn reply={reply} turn={turn} index={index} lit={lit} onLight={setLit} saw={saw} />
      {reply.state === "waiting" && (
        <p className="waiting" role="status">
          <span className="dots" aria-hidden="true">
            <i />
            <i />
            <i />
          </span>
          {say("waiting")}
        </p>
      )}
      {sure && over ? <Sure reply={reply} /> : <Answer reply={reply} lit={lit} onLight={setLit} />}
      {reply.state === "stopped" && <p className="muted small">{say("stopped")}</p>}
      {reply.finish === "length" && !lines.includes(say("contextFull")) && <p className="muted small">{say("cutShort")}</p>}
      {reply.problem && <Trouble problem={reply.problem} onRetry={() => void retry(chat, turn, index)} />}
      {boxless && <p className="muted small">{say(isNano(model) ? "noBoxesNano" : "noBoxes")}</p>}
      {lines.length > 0 && (
        <ul className="muted small">
          {lines.map((line) => (
            <li key={line}>{line}</li>
          ))}
        </ul>
      )}
      {over && (
        <div className="bar">
          {children}
          <Copy content={readable(reply.text)} />
          {reply.tokens.length > 0 && <IconButton icon="sure" label={say("sure")} text={say("sure")} aria-pressed={sure} onClick={() => setSure(!sure)} />}
          {reply.seen.length > 0 && <IconButton icon="grid" label={say("saw")} text={say("saw")} aria-pressed={saw} onClick={() => setSaw(!saw)} />}
          <button type="button" className="quiet facts" aria-expanded={open} onClick={() => setOpen(!open)}>
            {facts(reply, say) || say("details")}
          </button>
        </div>
      )}
      {open && <Details reply={reply} />}
    </article>
  );
});

/** Modes whose answers should have boxes. */
const BOXED = new Set<Mode>(["locate", "grounded"]);
const SCALED = /^picture (\d+) of (\d+)x(\d+) px was scaled down to (\d+)x(\d+) px$/;
const TILED = /^picture (\d+) was cut into (\d+)x(\d+) tiles; alone and without a bound it would have had (\d+)x(\d+)$/;

/** The server's notices in the words of the page; of earlier turns' pictures they were read already. */
function told(reply: Reply, own: number, say: Say): string[] {
  return reply.notices.flatMap((line) => {
    const scaled = SCALED.exec(line);
    const [, n = "", a = "", b = "", c = "", d = ""] = scaled ?? TILED.exec(line) ?? [];
    if (n && Number(n) <= reply.shown.length - own) return [];
    if (scaled) return [say("scaledDown", { n, w: a, h: b, sw: c, sh: d })];
    if (n) return [say("fewerTiles", { n, c: a, r: b, fc: c, fr: d })];
    return [line.endsWith("the context of the model is full") ? say("contextFull") : line];
  });
}

/** The one line below an answer. */
function facts(reply: Reply, say: Say): string {
  const speed = rate(reply);
  return [
    reply.usage && say("tokens", { n: reply.usage.total_tokens }),
    reply.first !== null && say("firstShort", { n: seconds(reply.first / 1000) }),
    speed !== null && say("perSecond", { n: speed }),
  ]
    .filter(Boolean)
    .join(" · ");
}

interface DrawnProps {
  reply: Reply;
  turn: string;
  index: number;
  lit: number | null;
  onLight: (index: number | null) => void;
  saw: boolean;
}

/** The pictures that an answer has boxes in, or all it saw where that is asked for. */
function Drawn({ reply, turn, index, lit, onLight, saw }: DrawnProps) {
  const say = useSay();
  const known = useStore((now) => now.pictures);
  const sure = useMemo(() => reply.boxes.map((box) => boxConfidence(reply.tokens, box)), [reply.boxes, reply.tokens]);
  const shown = reply.shown
    .map((id, at) => ({ picture: known[id], at }))
    .filter(({ at }) => saw || reply.boxes.some((box) => box.picture === at) || (reply.page && at === reply.shown.length - 1));
  if (shown.length === 0) return null;
  return (
    <div className={`figures ${shown.length > 1 ? "several" : ""}`}>
      {shown.map(({ picture, at }) => {
        if (!picture) return null;
        const own = reply.boxes.flatMap((box, place) => (box.picture === at ? [place] : []));
        const boxes = own.flatMap((place) => reply.boxes[place] ?? []);
        const confidences = own.map((place) => sure[place] ?? null);
        const seen = saw ? (reply.seen[at] ?? null) : null;
        const inside = lit === null ? -1 : own.indexOf(lit);
        return (
          <figure key={at} className="drawn">
            <div className="frame" style={{ "--ratio": picture.width / picture.height } as React.CSSProperties}>
              <Figure
                picture={picture}
                boxes={boxes}
                confidences={confidences}
                lit={inside < 0 ? null : inside}
                onLight={(place) => onLight(place === null ? null : (own[place] ?? null))}
                seen={seen}
                label={`${picture.name}. ${boxes.map((box) => box.label).join(", ")}`}
              />
              <span className="corner">
                <IconButton icon="expand" label={say("open")} onClick={() => set({ panel: { kind: "viewer", picture: picture.id, turn, reply: index } })} />
              </span>
            </div>
            {seen && <figcaption>{sawLine(seen, say)}</figcaption>}
            {boxes.length > 0 && <Downloads picture={picture} reply={reply} at={at} confidences={confidences} />}
          </figure>
        );
      })}
    </div>
  );
}

export function sawLine(seen: Seen, say: Say): string {
  const [w, h] = seen.size;
  const [sw, sh] = seen.scaled;
  const values = { w, h, sw, sh, c: seen.columns, r: seen.rows, t: seen.tile, n: seen.tokens, each: seen.tile_tokens };
  if (seen.columns * seen.rows === 1) return say("sawOne", values);
  return `${say("sawText", values)}. ${say("sawWhole")}`;
}

interface DownloadsProps {
  picture: Picture;
  reply: Reply;
  /** Which picture of the request it is. */
  at: number;
  confidences: (number | null)[];
}

const FORMATS: [Format, string][] = [
  ["png", "PNG"],
  ["svg", "SVG"],
  ["json", "JSON"],
  ["coco", "COCO"],
];

export function Downloads({ picture, reply, at, confidences }: DownloadsProps) {
  const say = useSay();
  const boxes = reply.boxes.filter((box) => box.picture === at);
  return (
    <div className="downloads">
      <span className="muted small">{say("download")}</span>
      {FORMATS.map(([format, name]) => (
        <button key={format} type="button" className="chip small" aria-label={`${say("download")} ${name}`} onClick={() => void download(format, picture, boxes, confidences)}>
          {name}
        </button>
      ))}
    </div>
  );
}

/** ‹ 2 / 3 › */
function Versions({ chat, turn }: { chat: Chat; turn: Turn }) {
  const say = useSay();
  const all = versions(chat, turn);
  if (all.length < 2) return null;
  const at = all.indexOf(turn.id);
  const go = (to: number) => {
    const id = all[to];
    if (id) chooseVersion(turn, id);
  };
  return (
    <span className="versions" role="group" aria-label={say("version", { n: at + 1, of: all.length })}>
      <IconButton icon="left" label={say("earlier")} disabled={at === 0} onClick={() => go(at - 1)} />
      <span>
        {at + 1} / {all.length}
      </span>
      <IconButton icon="right" label={say("later")} disabled={at === all.length - 1} onClick={() => go(at + 1)} />
    </span>
  );
}

function remedy({ status, code }: Problem): Word {
  if (code === "context_length_exceeded") return "whatContext";
  if (code === "invalid_image" || code === "image_too_large" || code === "too_many_images") return "whatImage";
  const known: Record<number, Word> = { 0: "what0", 401: "what401", 413: "what413", 429: "what429", 503: "what503" };
  return known[status] ?? (status >= 500 || status < 0 ? "what500" : "what400");
}

function Trouble({ problem, onRetry }: { problem: Problem; onRetry: () => void }) {
  const say = useSay();
  return (
    <div className="trouble" role="alert">
      <p>{problem.message}</p>
      <p>
        {say(remedy(problem))} {problem.retryAfter !== null && say("after", { n: problem.retryAfter })}
      </p>
      <div className="bar">
        <button type="button" className="solid" onClick={onRetry}>
          {say("retry")}
        </button>
        {problem.status === 401 && (
          <button type="button" className="quiet" onClick={() => set({ panel: { kind: "key" } })}>
            {say("key")}
          </button>
        )}
        {problem.requestId && <code className="muted small">{problem.requestId}</code>}
      </div>
    </div>
  );
}
