/** The page: head, history, the chat, and where one asks. */

import { useEffect, useRef, useState } from "react";
import { path, said, type Turn } from "./chat";
import { addFiles, changeDraft, Composer, MODES } from "./Composer";
import { readable } from "./grounding";
import { IconButton } from "./Icon";
import { Panels } from "./Panels";
import { Sidebar } from "./Sidebar";
import {
  answerAgain, chatOf, EMPTY, focusQuestion, get, modelOf, set, setLang, setModel, setTheme, startChat, stop, submit, used, useSay,
  useStore, type State,
} from "./store";
import { AssistantView, UserView } from "./Turns";
import { Welcome } from "./Welcome";

export function App() {
  const say = useSay();
  const sidebar = useStore((now) => now.sidebar);
  const dropping = useDrop();
  useKeys();
  return (
    <div className={`app ${sidebar ? "with-sidebar" : ""}`}>
      <a className="skip" href="#question">
        {say("skip")}
      </a>
      <Head />
      {sidebar && <Sidebar />}
      {sidebar && <button type="button" className="scrim" aria-label={say("close")} onClick={() => set({ sidebar: false })} />}
      <Conversation />
      <Announcer />
      <Foot />
      <Panels />
      {dropping && (
        <div className="dropping" aria-hidden="true">
          <p>{say("dropHere")}</p>
        </div>
      )}
    </div>
  );
}

function Head() {
  const say = useSay();
  const { phase, models, model, lang, theme, sidebar } = useStore((now) => now);
  return (
    <header className="head">
      <IconButton icon="menu" label={say("showHistory")} aria-expanded={sidebar} onClick={() => set({ sidebar: !sidebar })} />
      <strong className="brand">seekvl</strong>
      <label className="model">
        <span className={`lamp ${phase}`} title={phaseLine(phase, say)} />
        <span className="sr">{say("model")}</span>
        {models.length > 1 ? (
          <select value={model} onChange={(event) => setModel(event.target.value)}>
            {models.map(({ id }) => (
              <option key={id}>{id}</option>
            ))}
          </select>
        ) : (
          <span className="modelname" title={model}>
            {model.split("/").at(-1) || phaseLine(phase, say)}
          </span>
        )}
      </label>
      <span className="gap" />
      <button type="button" className="quiet" onClick={() => setLang(lang === "en" ? "zh" : "en")} lang={lang === "en" ? "zh" : "en"}>
        {say("language")}
      </button>
      <IconButton icon="sun" label={say("theme")} onClick={() => setTheme(theme === "light" ? "dark" : "light")} />
      <IconButton icon="keyboard" label={say("shortcuts")} className="desk" onClick={() => set({ panel: { kind: "shortcuts" } })} />
      <IconButton icon="sliders" label={say("parameters")} onClick={() => set({ panel: { kind: "params" } })} />
      <IconButton icon="plus" label={say("newChat")} onClick={startChat} />
    </header>
  );
}

function phaseLine(phase: string, say: ReturnType<typeof useSay>): string {
  if (phase === "ready" || phase === "starting" || phase === "away") return say(phase);
  return say("busyPhase", { phase });
}

function Conversation() {
  const say = useSay();
  const chat = useStore(chatOf);
  const turns = path(chat);
  const main = useRef<HTMLElement>(null);
  const stuck = useRef(true);
  useEffect(() => {
    const element = main.current;
    if (element && stuck.current) element.scrollTop = turns.length > 0 ? element.scrollHeight : 0;
  }, [chat, turns.length]);
  useEffect(() => {
    stuck.current = true;
  }, [chat.id]);
  const key = (turn: Turn) => `${turn.parent ?? ""}/${turn.role}/${turn.id}`;
  return (
    <main
      ref={main}
      className="conversation"
      onScroll={(event) => {
        const { scrollTop, scrollHeight, clientHeight } = event.currentTarget;
        stuck.current = scrollHeight - scrollTop - clientHeight < 80;
      }}
    >
      <div className="column">
        {turns.length === 0 ? <Welcome /> : <h1 className="sr">{chat.title || say("untitled")}</h1>}
        {turns.map((turn) =>
          turn.role === "user" ? (
            <UserView key={key(turn)} chat={chat} turn={turn} />
          ) : (
            <AssistantView key={key(turn)} chat={chat} turn={turn} />
          ),
        )}
      </div>
    </main>
  );
}

/** Reads an answer aloud when it has ended, and not while it grows. */
function Announcer() {
  const last = path(useStore(chatOf)).at(-1);
  const over = last?.role === "assistant" && last.replies.every(({ state }) => state !== "waiting" && state !== "streaming");
  return (
    <p className="sr" role="status" data-testid="announced">
      {over && readable(said(last))}
    </p>
  );
}

const contextOf = (now: State) => modelOf(now)?.context_length ?? null;
/** Share of the context from which a warning is shown. */
const NEAR = 0.75;

function Foot() {
  const say = useSay();
  const chat = useStore(chatOf);
  const draft = useStore((now) => now.draft);
  const notice = useStore((now) => now.notice);
  const running = useStore((now) => Object.keys(now.running).length > 0);
  const context = useStore(contextOf);
  const taken = used(chat);
  return (
    <div className="foot">
      {notice && (
        <p className="notice" role="alert">
          {notice}
          <IconButton icon="close" label={say("close")} onClick={() => set({ notice: null })} />
        </p>
      )}
      {context !== null && taken > NEAR * context && <p className="note">{say("near", { n: taken, of: context })}</p>}
      <Composer
        draft={draft}
        change={changeDraft}
        running={running}
        onSubmit={(sent) => {
          set({ draft: { ...EMPTY, mode: sent.mode === "compare" ? "ask" : sent.mode } });
          void submit(sent, path(chat).at(-1)?.id ?? null);
        }}
      />
    </div>
  );
}

/** Files that are dropped anywhere go to the question; tells whether some are above the page. */
function useDrop(): boolean {
  const [dropping, setDropping] = useState(false);
  useEffect(() => {
    const brings = (event: DragEvent) => event.dataTransfer?.types.includes("Files") ?? false;
    const over = (event: DragEvent) => {
      if (!brings(event)) return;
      event.preventDefault();
      setDropping(true);
    };
    const leave = (event: DragEvent) => {
      if (event.relatedTarget === null) setDropping(false);
    };
    const drop = (event: DragEvent) => {
      setDropping(false);
      if (!brings(event)) return;
      event.preventDefault();
      void addFiles([...(event.dataTransfer?.files ?? [])], changeDraft);
    };
    const paste = (event: ClipboardEvent) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (files.length === 0 || event.defaultPrevented) return;
      event.preventDefault();
      void addFiles(files, changeDraft);
    };
    addEventListener("dragover", over);
    addEventListener("dragleave", leave);
    addEventListener("drop", drop);
    addEventListener("paste", paste);
    return () => {
      removeEventListener("dragover", over);
      removeEventListener("dragleave", leave);
      removeEventListener("drop", drop);
      removeEventListener("paste", paste);
    };
  }, []);
  return dropping;
}

/** The keys of the page; those of a large picture are in the viewer. */
function useKeys(): void {
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (get().panel !== null) return;
      const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLTextAreaElement;
      if (event.key === "Escape") return stop();
      if (event.altKey && !event.ctrlKey && !event.metaKey) {
        const mode = MODES[Number(event.code.replace("Digit", "")) - 1];
        if (event.code === "KeyN") startChat();
        else if (event.code === "KeyR") answerAgain();
        else if (mode) changeDraft((draft) => ({ ...draft, mode }));
        else return;
        event.preventDefault();
      } else if (!typing && (event.key === "/" || event.key === "?")) {
        event.preventDefault();
        if (event.key === "/") focusQuestion();
        else set({ panel: { kind: "shortcuts" } });
      }
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
}

