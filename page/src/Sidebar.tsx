/** The chats of this browser: open, delete, take away as a file, bring back. */

import { useRef } from "react";
import { save } from "./download";
import { IconButton } from "./Icon";
import { deleteChats, exported, imported, openChat, set, startChat, useSay, useStore } from "./store";

export function Sidebar() {
  const say = useSay();
  const chats = useStore((now) => now.chats);
  const current = useStore((now) => now.current);
  const lang = useStore((now) => now.lang);
  const files = useRef<HTMLInputElement>(null);
  const kept = chats.filter((chat) => Object.keys(chat.turns).length > 0);
  const ids = kept.map((chat) => chat.id);

  const bring = async (file: File | undefined) => {
    if (!file) return;
    try {
      set({ notice: say("importDone", { n: await imported(file) }) });
    } catch {
      set({ notice: say("importBad") });
    }
  };

  return (
    <aside className="sidebar" aria-label={say("history")}>
      <button type="button" className="solid wide" onClick={startChat}>
        {say("newChat")}
      </button>
      <nav>
        <ul>
          {kept.map((chat) => (
            <li key={chat.id} className={chat.id === current ? "current" : ""}>
              <button type="button" className="chat" aria-current={chat.id === current} onClick={() => void openChat(chat.id)}>
                <span>{chat.title || say("untitled")}</span>
                <time dateTime={new Date(chat.updated).toISOString()}>{when(chat.updated, lang)}</time>
              </button>
              <IconButton
                icon="trash"
                label={say("deleteChat")}
                onClick={() => {
                  if (confirm(say("sureOne"))) void deleteChats([chat.id]);
                }}
              />
            </li>
          ))}
        </ul>
        {kept.length === 0 && <p className="muted small">{say("noHistory")}</p>}
      </nav>
      <footer>
        <IconButton icon="download" label={say("export")} text={say("export")} disabled={ids.length === 0} onClick={() => void exported(ids).then((blob) => save(blob, "seekvl-chats.json"))} />
        <IconButton icon="upload" label={say("import")} text={say("import")} onClick={() => files.current?.click()} />
        <IconButton
          icon="trash"
          label={say("deleteAll")}
          disabled={ids.length === 0}
          onClick={() => {
            if (confirm(say("sureAll"))) void deleteChats(ids);
          }}
        />
        <input
          ref={files}
          type="file"
          hidden
          accept="application/json"
          data-testid="import"
          onChange={(event) => {
            void bring(event.target.files?.[0]);
            event.target.value = "";
          }}
        />
      </footer>
    </aside>
  );
}

function when(time: number, lang: string): string {
  const date = new Date(time);
  const today = date.toDateString() === new Date().toDateString();
  const form: Intl.DateTimeFormatOptions = today ? { hour: "2-digit", minute: "2-digit" } : { month: "short", day: "numeric" };
  return date.toLocaleString(lang === "zh" ? "zh-CN" : "en-GB", form);
}
