/** Where a question is written: pictures by drop, paste, file, camera or address, in order; what to do; send. */

import { useEffect, useRef, useState } from "react";
import { fetchPicture, Failure } from "./api";
import type { Mode } from "./chat";
import { Choice } from "./Choice";
import { Icon, IconButton } from "./Icon";
import { cut, isLong, isPdf, open, pagesOf, PictureError, type Picture } from "./pictures";
import { unsaid } from "./prompts";
import { get, keepPicture, say as sayNow, set, stop, useSay, useStore, type Draft } from "./store";

export const MODES: Mode[] = ["ask", "describe", "read", "locate", "grounded", "compare"];
const PLACES = {
  ask: "placeAsk",
  describe: "placeDescribe",
  read: "placeRead",
  locate: "placeLocate",
  grounded: "placeGrounded",
  compare: "placeCompare",
} as const;

type Change = (how: (draft: Draft) => Draft) => void;

interface Props {
  draft: Draft;
  change: Change;
  onSubmit: (draft: Draft) => void;
  /** Leaves the editing of a turn; the composer at the foot of the page has none. */
  onCancel?: () => void;
  running: boolean;
}

/** Whether a draft may be sent. */
export function complete(draft: Draft, model: string, lang: "en" | "zh"): boolean {
  if (draft.mode === "compare" && draft.pictures.length !== 2) return false;
  return draft.text.trim() !== "" || (unsaid(draft.mode, model, lang) !== "" && draft.pictures.length > 0);
}

export function Composer({ draft, change, onSubmit, onCancel, running }: Props) {
  const say = useSay();
  const lang = useStore((now) => now.lang);
  const model = useStore((now) => now.model);
  const progress = useStore((now) => now.progress);
  const field = useRef<HTMLTextAreaElement>(null);
  const files = useRef<HTMLInputElement>(null);
  const [source, setSource] = useState<"url" | "camera" | null>(null);
  const main = onCancel === undefined;
  const ready = complete(draft, model, lang) && !running && progress === null && model !== "";

  useEffect(() => {
    const element = field.current;
    if (!element) return;
    element.style.height = "auto";
    element.style.height = `${Math.min(element.scrollHeight, 220)}px`;
  }, [draft.text]);

  const send = () => {
    if (ready) onSubmit(draft);
  };
  const take = (list: Iterable<File>) => void addFiles([...list], change);

  return (
    <form
      className="composer"
      aria-label={say("ask")}
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
      onPaste={(event) => {
        if (event.clipboardData.files.length > 0) {
          event.preventDefault();
          take(event.clipboardData.files);
        }
      }}
    >
      <Strip draft={draft} change={change} />
      {progress && (
        <p className="progress" role="status">
          {progress}
        </p>
      )}
      {draft.mode === "compare" && draft.pictures.length !== 2 && (
        <p className="progress" role="status">
          {say("compareTwo", { n: draft.pictures.length })}
        </p>
      )}
      {source === "url" && <FromUrl done={() => setSource(null)} change={change} />}
      {source === "camera" && <Camera done={() => setSource(null)} change={change} />}
      <textarea
        ref={field}
        id={main ? "question" : undefined}
        rows={1}
        value={draft.text}
        autoFocus={!main}
        placeholder={say(PLACES[draft.mode])}
        aria-label={say(PLACES[draft.mode])}
        onChange={(event) => {
          const text = event.target.value;
          change((old) => ({ ...old, text }));
        }}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing) {
            event.preventDefault();
            send();
          }
          if (event.key === "Escape" && onCancel) {
            event.stopPropagation();
            onCancel();
          }
        }}
      />
      <div className="tools">
        <input
          ref={files}
          type="file"
          hidden
          multiple
          accept="image/*,application/pdf"
          data-testid={main ? "files" : undefined}
          onChange={(event) => {
            take(event.target.files ?? []);
            event.target.value = "";
          }}
        />
        <IconButton icon="picture" label={say("addFile")} onClick={() => files.current?.click()} />
        <IconButton icon="camera" label={say("camera")} aria-expanded={source === "camera"} onClick={() => setSource(source === "camera" ? null : "camera")} />
        <IconButton icon="link" label={say("fromUrl")} aria-expanded={source === "url"} onClick={() => setSource(source === "url" ? null : "url")} />
        <Choice
          className="modes"
          label={say("mode")}
          options={MODES.map((mode) => [mode, say(mode)] as const)}
          value={draft.mode}
          onChange={(mode, pointed) => {
            change((old) => ({ ...old, mode }));
            if (pointed) field.current?.focus();
          }}
        />
        {onCancel && (
          <button type="button" className="quiet" onClick={onCancel}>
            {say("cancel")}
          </button>
        )}
        {running && main ? (
          <button type="button" className="send" aria-label={say("stop")} title={say("stop")} onClick={stop}>
            <Icon name="stop" />
          </button>
        ) : (
          <button type="submit" className="send" aria-label={say("send")} title={say("send")} disabled={!ready}>
            <Icon name="send" />
          </button>
        )}
      </div>
    </form>
  );
}

/** Opens files one after the other and hangs them to a draft; says which could not be. */
export async function addFiles(files: File[], change: Change): Promise<void> {
  for (const file of files) {
    try {
      if (isPdf(file)) await addPdf(file, change);
      else await hang(await open(file, file.name), change);
    } catch (error) {
      const word = file.type.startsWith("image/") ? "notPicture" : "notFile";
      const message = error instanceof Failure ? `${file.name}: ${error.message}` : sayNow(word, { name: file.name });
      set({ notice: message });
    } finally {
      set({ progress: null });
    }
  }
}

async function hang(picture: Picture, change: Change): Promise<void> {
  await keepPicture(picture);
  change((draft) => ({ ...draft, pictures: [...draft.pictures, picture.id] }));
}

async function addPdf(file: File, change: Change): Promise<void> {
  set({ progress: sayNow("drawing", { page: 1, pages: "…", name: file.name }) });
  let [drawn, all] = [0, 0];
  for await (const { picture, page, pages } of pagesOf(file, file.name)) {
    [drawn, all] = [page, pages];
    set({ progress: sayNow("drawing", { page, pages, name: file.name }) });
    await hang(picture, change);
  }
  change((draft) => ({ ...draft, pageByPage: draft.pictures.length > 1 }));
  if (drawn < all) set({ notice: sayNow("pdfCut", { name: file.name, pages: all, n: drawn }) });
}

interface StripProps {
  draft: Draft;
  change: Change;
}

/** The pictures of a draft, in order; they move by dragging, by their buttons, or with Alt and arrows. */
function Strip({ draft, change }: StripProps) {
  const say = useSay();
  const known = useStore((now) => now.pictures);
  const dragged = useRef<number | null>(null);
  if (draft.pictures.length === 0) return null;

  const move = (from: number, to: number) =>
    change((old) => {
      const pictures = [...old.pictures];
      const [id] = pictures.splice(from, 1);
      if (id === undefined || to < 0 || to > pictures.length) return old;
      pictures.splice(to, 0, id);
      return { ...old, pictures };
    });
  const remove = (at: number) =>
    change((old) => ({ ...old, pictures: old.pictures.filter((_, index) => index !== at) }));
  const split = async (at: number, picture: Picture) => {
    set({ progress: say("drawing", { page: 1, pages: "…", name: picture.name }) });
    try {
      const pages = await cut(picture);
      for (const page of pages) await keepPicture(page);
      const ids = pages.map((page) => page.id);
      change((old) => ({ ...old, pictures: old.pictures.toSpliced(at, 1, ...ids), pageByPage: true }));
    } catch (error) {
      set({ notice: error instanceof PictureError ? say("notPicture", { name: picture.name }) : String(error) });
    } finally {
      set({ progress: null });
    }
  };

  return (
    <>
      <ol className="strip" aria-label={say("pictures")}>
        {draft.pictures.map((id, index) => {
          const picture = known[id];
          if (!picture) return null;
          return (
            <li
              key={id}
              tabIndex={0}
              aria-label={`${say("pictureN", { n: index + 1 })}: ${picture.name}`}
              draggable
              onDragStart={(event) => {
                dragged.current = index;
                event.dataTransfer.effectAllowed = "move";
              }}
              onDragOver={(event) => {
                if (dragged.current !== null) event.preventDefault();
              }}
              onDrop={(event) => {
                if (dragged.current === null) return;
                event.preventDefault();
                event.stopPropagation();
                move(dragged.current, index);
                dragged.current = null;
              }}
              onDragEnd={() => (dragged.current = null)}
              onKeyDown={(event) => {
                if (event.altKey && event.key === "ArrowLeft") move(index, index - 1);
                else if (event.altKey && event.key === "ArrowRight") move(index, index + 1);
                else if (event.key === "Delete" && event.target === event.currentTarget) remove(index);
                else return;
                event.preventDefault();
              }}
            >
              <button type="button" className="thumb" aria-label={say("open")} title={picture.name} onClick={() => set({ panel: { kind: "viewer", picture: id, turn: null, reply: 0 } })}>
                <img src={picture.url} alt="" />
              </button>
              <span className="number" aria-hidden="true">
                {index + 1}
              </span>
              <span className="handles">
                <IconButton icon="left" label={say("moveLeft")} disabled={index === 0} onClick={() => move(index, index - 1)} />
                <IconButton icon="right" label={say("moveRight")} disabled={index === draft.pictures.length - 1} onClick={() => move(index, index + 1)} />
                {isLong(picture) && <IconButton icon="scissors" label={say("split")} onClick={() => void split(index, picture)} />}
                <IconButton icon="close" label={say("remove")} onClick={() => remove(index)} />
              </span>
            </li>
          );
        })}
      </ol>
      {draft.pictures.length > 1 && (
        <label className="check">
          <input
            type="checkbox"
            checked={draft.pageByPage}
            onChange={(event) => {
              const pageByPage = event.target.checked;
              change((old) => ({ ...old, pageByPage }));
            }}
          />
          {say("pageByPage")}
        </label>
      )}
    </>
  );
}

function FromUrl({ done, change }: { done: () => void; change: Change }) {
  const say = useSay();
  const [url, setUrl] = useState("");
  const [failed, setFailed] = useState("");
  const [busy, setBusy] = useState(false);
  const add = async () => {
    setBusy(true);
    setFailed("");
    try {
      const name = decodeURIComponent(new URL(url).pathname.split("/").pop() || "picture");
      await hang(await open(await fetchPicture(url), name), change);
      done();
    } catch (error) {
      setFailed(error instanceof Error ? error.message : String(error));
      setBusy(false);
    }
  };
  return (
    <div className="source">
      <input
        type="url"
        autoFocus
        value={url}
        placeholder="https://"
        aria-label={say("urlLabel")}
        onChange={(event) => setUrl(event.target.value)}
        onKeyDown={(event) => {
          if (event.key === "Enter") {
            event.preventDefault();
            void add();
          }
        }}
      />
      <button type="button" className="solid" disabled={!url || busy} onClick={() => void add()}>
        {say("add")}
      </button>
      <IconButton icon="close" label={say("close")} onClick={done} />
      {failed && (
        <p className="wrong" role="alert">
          {failed}
        </p>
      )}
    </div>
  );
}

/** The camera, where the browser grants one; else the device's own camera program through a file. */
function Camera({ done, change }: { done: () => void; change: Change }) {
  const say = useSay();
  const video = useRef<HTMLVideoElement>(null);
  const [failed, setFailed] = useState(false);
  const [live, setLive] = useState(false);
  useEffect(() => {
    let stream: MediaStream | null = null;
    let over = false;
    const devices = navigator.mediaDevices as MediaDevices | undefined; // missing on plain http
    const asked = devices?.getUserMedia({ video: { facingMode: "environment" } }) ?? Promise.reject(new Error("none"));
    asked
      .then((given) => {
        stream = given;
        if (over) given.getTracks().forEach((track) => track.stop());
        else if (video.current) video.current.srcObject = given;
      })
      .catch(() => setFailed(true));
    return () => {
      over = true;
      stream?.getTracks().forEach((track) => track.stop());
    };
  }, []);
  const take = async () => {
    const element = video.current;
    if (!element?.videoWidth) return;
    const canvas = document.createElement("canvas");
    canvas.width = element.videoWidth;
    canvas.height = element.videoHeight;
    canvas.getContext("2d")?.drawImage(element, 0, 0);
    const blob = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
    if (blob) await hang(await open(blob, `camera-${new Date().toISOString().slice(11, 19).replaceAll(":", "")}.jpg`), change);
    done();
  };
  return (
    <div className="source camera">
      {failed ? (
        <>
          <p>{say("noCamera")}</p>
          <input
            type="file"
            accept="image/*"
            capture="environment"
            aria-label={say("camera")}
            onChange={(event) => {
              void addFiles([...(event.target.files ?? [])], change).then(done);
            }}
          />
        </>
      ) : (
        <>
          <video ref={video} autoPlay playsInline muted aria-label={say("camera")} onLoadedData={() => setLive(true)} />
          <button type="button" className="solid" disabled={!live} onClick={() => void take()}>
            {say("takePicture")}
          </button>
        </>
      )}
      <IconButton icon="close" label={say("close")} onClick={done} />
    </div>
  );
}

/** Changes the draft at the foot of the page. */
export const changeDraft: Change = (how) => set({ draft: how(get().draft) });
