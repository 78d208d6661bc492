/** A picture large: zoom, pan, what the model saw, a region to ask about, another picture beside it. */

import { useEffect, useMemo, useRef, useState } from "react";
import { path, type Reply } from "./chat";
import { changeDraft } from "./Composer";
import { around, Figure, whole, type View } from "./Figure";
import { boxConfidence } from "./grounding";
import { IconButton } from "./Icon";
import { marked, type Picture } from "./pictures";
import { aboutRegion, IN_CONTEXT } from "./prompts";
import { chatOf, focusQuestion, get, keepPicture, set, useSay, useStore, type Draft } from "./store";
import { Downloads, sawLine } from "./Turns";

interface Props {
  picture: string;
  turn: string | null;
  reply: number;
}

type Region = [number, number, number, number];

/** Share of the sides by which an arrow key moves or stretches a region, and the least it may cover. */
const NUDGE = 0.02;

/** A region moved, or with `stretch` made larger or smaller; the first one lies in the middle. */
function nudged(old: Region | null, { width, height }: Picture, [x, y]: [number, number], stretch: boolean): Region {
  const [dx, dy] = [x * NUDGE * width, y * NUDGE * height];
  if (!old) return [0.375 * width, 0.375 * height, 0.625 * width, 0.625 * height];
  const [x1, y1, x2, y2] = old;
  const fit = (value: number, least: number, most: number) => Math.min(Math.max(value, least), most);
  if (stretch) return [x1, y1, fit(x2 + dx, x1 + NUDGE * width, width), fit(y2 + dy, y1 + NUDGE * height, height)];
  const [left, top] = [fit(x1 + dx, 0, width - (x2 - x1)), fit(y1 + dy, 0, height - (y2 - y1))];
  return [left, top, left + x2 - x1, top + y2 - y1];
}

const ARROWS: Record<string, [number, number]> = {
  ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
};

const MOST_ZOOM = 40;
const STEP = 1.3;

/** Zoom and place as shares of the picture, so that two pictures of other sizes move together. */
interface Eye {
  zoom: number;
  x: number;
  y: number;
}
const FIT: Eye = { zoom: 1, x: 0.5, y: 0.5 };

const within = (eye: Eye): Eye => {
  const half = 0.5 / eye.zoom;
  const kept = (value: number) => Math.min(Math.max(value, Math.min(half, 0.5)), Math.max(1 - half, 0.5));
  return { zoom: eye.zoom, x: kept(eye.x), y: kept(eye.y) };
};

function viewOf(full: View, eye: Eye): View {
  const [width, height] = [full.width / eye.zoom, full.height / eye.zoom];
  return { x: full.x + eye.x * full.width - width / 2, y: full.y + eye.y * full.height - height / 2, width, height };
}

export function Viewer({ picture: id, turn, reply: index }: Props) {
  const say = useSay();
  const known = useStore((now) => now.pictures);
  const chat = useStore(chatOf);
  const draft = useStore((now) => now.draft);
  const picture = known[id];
  const [eye, setEye] = useState<Eye>(FIT);
  const [saw, setSaw] = useState(false);
  const [marking, setMarking] = useState(false);
  const [region, setRegion] = useState<Region | null>(null);
  const [beside, setBeside] = useState("");
  const [lit, setLit] = useState<number | null>(null);

  const answered = turn === null ? null : chat.turns[turn];
  const reply: Reply | null = answered?.role === "assistant" ? (answered.replies[index] ?? null) : null;
  const others = useMemo(() => {
    const shown = path(chat).flatMap((each) => (each.role === "user" ? each.pictures : []));
    return [...new Set([...shown, ...draft.pictures])].filter((other) => other !== id && known[other]);
  }, [chat, draft.pictures, id, known]);

  const zoom = (factor: number) =>
    setEye((old) => within({ ...old, zoom: Math.min(MOST_ZOOM, Math.max(1, old.zoom * factor)) }));
  const pan = (x: number, y: number) =>
    setEye((old) => within({ ...old, x: old.x + (x * 0.1) / old.zoom, y: old.y + (y * 0.1) / old.zoom }));

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.target instanceof HTMLSelectElement || event.ctrlKey || event.metaKey || event.altKey) return;
      const does: Record<string, () => void> = {
        "+": () => zoom(STEP),
        "=": () => zoom(STEP),
        "-": () => zoom(1 / STEP),
        "0": () => setEye(FIT),
        t: () => setSaw((old) => !old),
        r: () => setMarking((old) => !old),
      };
      const arrow = ARROWS[event.key];
      if (!arrow && !does[event.key]) return;
      event.preventDefault();
      if (!arrow) does[event.key]?.();
      else if (marking && picture) setRegion((old) => nudged(old, picture, arrow, event.shiftKey));
      else pan(...arrow);
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, [marking, picture]);

  if (!picture) return null;
  const seenOf = (of: string) => {
    const at = reply?.shown.lastIndexOf(of) ?? -1;
    return saw && reply && at >= 0 ? (reply.seen[at] ?? null) : null;
  };
  const pane = (shown: Picture, first: boolean) => (
    <Pane
      key={first ? "first" : "second"}
      picture={shown}
      reply={reply}
      seen={seenOf(shown.id)}
      eye={eye}
      setEye={(how) => setEye((old) => within(how(old)))}
      marking={marking && first}
      region={first ? region : null}
      setRegion={setRegion}
      lit={lit}
      onLight={setLit}
    />
  );
  const at = reply?.shown.lastIndexOf(id) ?? -1;
  const hasSeen = (reply?.seen[at] ?? null) !== null;
  const seen = seenOf(id);
  const boxes = reply ? reply.boxes.filter((box) => box.picture === at) : [];
  const second = known[beside];

  return (
    <div className="viewer" data-testid="viewer">
      <div className="panes">
        {pane(picture, true)}
        {second && pane(second, false)}
      </div>
      {seen && <p className="saw">{sawLine(seen, say)}</p>}
      {marking && !region && (
        <p className="saw" role="status">
          {say("regionHint")}
        </p>
      )}
      {region && <RegionBar picture={picture} region={region} others={others} clear={() => setRegion(null)} />}
      <div className="controls" role="toolbar" aria-label={say("viewer", { name: picture.name })}>
        <IconButton icon="minus" label={say("zoomOut")} onClick={() => zoom(1 / STEP)} />
        <span className="zoom">{Math.round(eye.zoom * 100)}%</span>
        <IconButton icon="plus" label={say("zoomIn")} onClick={() => zoom(STEP)} />
        <IconButton icon="expand" label={say("fit")} onClick={() => setEye(FIT)} />
        {hasSeen && <IconButton icon="grid" label={say("saw")} aria-pressed={saw} onClick={() => setSaw(!saw)} />}
        <IconButton icon="region" label={say("region")} text={say("region")} aria-pressed={marking} onClick={() => setMarking(!marking)} />
        {others.length > 0 && (
          <label className="pick">
            {say("besides")}
            <select value={beside} onChange={(event) => setBeside(event.target.value)}>
              <option value="">{say("none")}</option>
              {others.map((other) => (
                <option key={other} value={other}>
                  {known[other]?.name}
                </option>
              ))}
            </select>
          </label>
        )}
        {reply && boxes.length > 0 && (
          <Downloads picture={picture} reply={reply} at={at} confidences={boxes.map((box) => boxConfidence(reply.tokens, box))} />
        )}
      </div>
    </div>
  );
}

interface PaneProps {
  picture: Picture;
  reply: Reply | null;
  seen: Reply["seen"][number] | null;
  eye: Eye;
  setEye: (how: (old: Eye) => Eye) => void;
  marking: boolean;
  region: Region | null;
  setRegion: (region: Region | null) => void;
  lit: number | null;
  onLight: (index: number | null) => void;
}

function Pane({ picture, reply, seen, eye, setEye, marking, region, setRegion, lit, onLight }: PaneProps) {
  const element = useRef<HTMLDivElement>(null);
  const pointers = useRef(new Map<number, { x: number; y: number }>());
  const start = useRef<[number, number] | null>(null);
  const full = seen ? around(picture, seen) : whole(picture);
  const view = viewOf(full, eye);
  const at = reply?.shown.lastIndexOf(picture.id) ?? -1;
  const own = reply ? reply.boxes.flatMap((box, place) => (box.picture === at ? [place] : [])) : [];

  /** Where a point of the screen lies in the picture, in px of the picture. */
  const place = (event: { clientX: number; clientY: number }): [number, number] => {
    const rect = element.current?.getBoundingClientRect() ?? new DOMRect();
    const scale = Math.min(rect.width / view.width, rect.height / view.height);
    const x = view.x + (event.clientX - rect.left - (rect.width - view.width * scale) / 2) / scale;
    const y = view.y + (event.clientY - rect.top - (rect.height - view.height * scale) / 2) / scale;
    return [Math.min(Math.max(x, 0), picture.width), Math.min(Math.max(y, 0), picture.height)];
  };
  const scaleNow = () => {
    const rect = element.current?.getBoundingClientRect() ?? new DOMRect();
    return Math.min(rect.width / view.width, rect.height / view.height);
  };

  useEffect(() => {
    const node = element.current;
    if (!node) return;
    const onWheel = (event: WheelEvent) => {
      event.preventDefault(); // React's own listener may not
      setEye((old) => ({ ...old, zoom: Math.min(MOST_ZOOM, Math.max(1, old.zoom * (event.deltaY < 0 ? 1.12 : 1 / 1.12))) }));
    };
    node.addEventListener("wheel", onWheel, { passive: false });
    return () => node.removeEventListener("wheel", onWheel);
  });

  return (
    <div
      ref={element}
      className={`pane ${marking ? "marking" : ""}`}
      onPointerDown={(event) => {
        event.currentTarget.setPointerCapture(event.pointerId);
        pointers.current.set(event.pointerId, { x: event.clientX, y: event.clientY });
        if (!marking) return;
        start.current = place(event);
        setRegion(null);
      }}
      onPointerMove={(event) => {
        const before = pointers.current.get(event.pointerId);
        if (!before) return;
        if (marking && start.current) {
          setRegion([...start.current, ...place(event)]);
          return;
        }
        const others = [...pointers.current].filter(([other]) => other !== event.pointerId).map(([, point]) => point);
        pointers.current.set(event.pointerId, { x: event.clientX, y: event.clientY });
        const [other] = others;
        if (other) {
          const was = Math.hypot(before.x - other.x, before.y - other.y);
          const is = Math.hypot(event.clientX - other.x, event.clientY - other.y);
          setEye((old) => ({ ...old, zoom: Math.min(MOST_ZOOM, Math.max(1, (old.zoom * is) / Math.max(was, 1))) }));
          return;
        }
        const scale = scaleNow();
        const [dx, dy] = [(event.clientX - before.x) / scale / full.width, (event.clientY - before.y) / scale / full.height];
        setEye((old) => ({ ...old, x: old.x - dx, y: old.y - dy }));
      }}
      onPointerUp={(event) => {
        pointers.current.delete(event.pointerId);
        if (!marking || !start.current) return;
        const [x1, y1] = start.current;
        const [x2, y2] = place(event);
        start.current = null;
        const big = Math.abs(x2 - x1) > 3 && Math.abs(y2 - y1) > 3;
        setRegion(big ? [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)] : null);
      }}
      onPointerCancel={(event) => pointers.current.delete(event.pointerId)}
      onDoubleClick={() => setEye((old) => (old.zoom > 1 ? FIT : { ...old, zoom: 2.5 }))}
    >
      <Figure
        picture={picture}
        boxes={own.flatMap((index) => reply?.boxes[index] ?? [])}
        confidences={own.map((index) => (reply?.boxes[index] ? boxConfidence(reply.tokens, reply.boxes[index]) : null))}
        lit={lit === null || !own.includes(lit) ? null : own.indexOf(lit)}
        onLight={(index) => onLight(index === null ? null : (own[index] ?? null))}
        seen={seen}
        view={view}
        region={region}
        label={picture.name}
      />
    </div>
  );
}

interface RegionProps {
  picture: Picture;
  region: Region;
  others: string[];
  clear: () => void;
}

/** What can be asked about a region: what it is, or where the like of it is in another picture. */
function RegionBar({ picture, region, others, clear }: RegionProps) {
  const say = useSay();
  const known = useStore((now) => now.pictures);
  const [target, setTarget] = useState(picture.id);
  const put = async (draft: (copy: Picture) => Draft) => {
    const copy = await marked(picture, region);
    await keepPicture(copy);
    changeDraft(() => draft(copy));
    set({ panel: null });
    focusQuestion();
  };
  const question = () => aboutRegion(get().model, get().lang);
  return (
    <div className="regionbar">
      <button
        type="button"
        className="solid"
        onClick={() => void put((copy) => ({ text: question(), mode: "ask", pictures: [copy.id], pageByPage: false }))}
      >
        {say("regionAsk")}
      </button>
      <button
        type="button"
        className="solid"
        onClick={() => void put((copy) => ({ text: IN_CONTEXT, mode: "grounded", pictures: [copy.id, target], pageByPage: false }))}
      >
        {say("regionFind")}
      </button>
      <select value={target} aria-label={say("regionFind")} onChange={(event) => setTarget(event.target.value)}>
        <option value={picture.id}>{say("samePicture")}</option>
        {others.map((other) => (
          <option key={other} value={other}>
            {known[other]?.name}
          </option>
        ))}
      </select>
      <IconButton icon="close" label={say("cancel")} onClick={clear} />
    </div>
  );
}
