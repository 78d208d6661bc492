/** A picture with its boxes and what the model saw of it: one SVG, sharp at every size. */

import { useEffect, useRef, useState } from "react";
import type { Seen } from "./chat";
import { measure } from "./download";
import { colours, pixels, type Box } from "./grounding";
import type { Picture } from "./pictures";
import type { Say } from "./i18n";
import { useSay } from "./store";

/** A part of the picture's plane, in px of the picture. */
export interface View {
  x: number;
  y: number;
  width: number;
  height: number;
}

interface Props {
  picture: Picture;
  boxes: Box[];
  confidences: (number | null)[];
  /** Index of the box that is lit; null: none. */
  lit: number | null;
  onLight?: (index: number | null) => void;
  seen?: Seen | null;
  /** What is shown; without it the whole picture. */
  view?: View;
  region?: [number, number, number, number] | null;
  label: string;
}

const LETTERS = 12; // px of a label on the screen

export function Figure(props: Props) {
  const { picture, boxes, confidences, lit, onLight, seen, region, label } = props;
  const say = useSay();
  const svg = useRef<SVGSVGElement>(null);
  const width = useWidth(svg);
  const view = props.view ?? (seen ? around(picture, seen) : whole(picture));
  const unit = width.w > 0 ? Math.max(view.width / width.w, view.height / width.h) : 1; // px of the picture for one of the screen
  const inks = colours(boxes);
  const labels = plates(boxes, confidences, picture, unit);
  return (
    <svg
      ref={svg}
      className="figure"
      role="img"
      aria-label={label}
      viewBox={`${view.x} ${view.y} ${view.width} ${view.height}`}
      preserveAspectRatio="xMidYMid meet"
    >
      {seen && <Padding picture={picture} seen={seen} unit={unit} />}
      <image href={picture.url} width={picture.width} height={picture.height} />
      {seen && <Tiles picture={picture} seen={seen} unit={unit} />}
      {boxes.map((box, index) => {
        const [x1, y1, x2, y2] = pixels(box, picture.width, picture.height);
        const shape = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
        const dimmed = lit !== null && lit !== index;
        return (
          <g
            key={index}
            className={`box ${dimmed ? "dimmed" : ""} ${lit === index ? "lit" : ""}`}
            data-box={index}
            color={inks[index]}
            onPointerEnter={() => onLight?.(index)}
            onPointerLeave={() => onLight?.(null)}
          >
            <title>{title(box, confidences[index] ?? null, say)}</title>
            <rect className="halo" {...shape} vectorEffect="non-scaling-stroke" />
            <rect className="outline" {...shape} vectorEffect="non-scaling-stroke" />
          </g>
        );
      })}
      {labels.map(
        (plate, index) =>
          plate && (
            <g key={index} className={`plate ${lit !== null && lit !== index ? "dimmed" : ""}`} color={inks[index]} aria-hidden="true">
              <rect x={plate.x} y={plate.y} width={plate.width} height={plate.height} rx={3 * unit} />
              <text x={plate.x + 5 * unit} y={plate.y + (LETTERS + 1.5) * unit} fontSize={LETTERS * unit}>
                {plate.text}
              </text>
            </g>
          ),
      )}
      {region && (
        <rect
          className="region"
          x={Math.min(region[0], region[2])}
          y={Math.min(region[1], region[3])}
          width={Math.abs(region[2] - region[0])}
          height={Math.abs(region[3] - region[1])}
          vectorEffect="non-scaling-stroke"
        />
      )}
    </svg>
  );
}

export const percent = (value: number) => `${Math.round(value * 100)}\u2009%`;

/** What a box is and how sure the model was of it, in words. */
export const title = (box: Box, sure: number | null, say: Say) =>
  `${box.label} ${box.corners.join(" ")}${sure === null ? "" : ` · ${say("edges", { p: percent(sure) })}`}`;

export const whole = (picture: Picture): View => ({ x: 0, y: 0, width: picture.width, height: picture.height });

/** The square, or the canvas of tiles, that the model saw the picture in. */
function canvas(picture: Picture, seen: Seen): View & { side: number } {
  const [sw, sh] = seen.scaled;
  const scale = Math.max(picture.width / sw, picture.height / sh);
  const [columns, rows] = [seen.columns * seen.tile, seen.rows * seen.tile];
  return {
    x: -Math.floor((columns - sw) / 2) * scale,
    y: -Math.floor((rows - sh) / 2) * scale,
    width: columns * scale,
    height: rows * scale,
    side: seen.tile * scale,
  };
}

export function around(picture: Picture, seen: Seen): View {
  const { x, y, width, height } = canvas(picture, seen);
  const [left, top] = [Math.min(0, x), Math.min(0, y)];
  return {
    x: left,
    y: top,
    width: Math.max(picture.width, x + width) - left,
    height: Math.max(picture.height, y + height) - top,
  };
}

interface Overlay {
  picture: Picture;
  seen: Seen;
  unit: number;
}

function Padding({ picture, seen }: Overlay) {
  const { x, y, width, height } = canvas(picture, seen);
  return <rect className="padding" {...{ x, y, width, height }} />;
}

function Tiles({ picture, seen, unit }: Overlay) {
  const { x, y, side } = canvas(picture, seen);
  const say = useSay();
  const tiles = Array.from({ length: seen.columns * seen.rows }, (_, index) => ({
    x: x + (index % seen.columns) * side,
    y: y + Math.floor(index / seen.columns) * side,
  }));
  return (
    <g className="tiles" aria-hidden="true">
      {tiles.map((tile, index) => (
        <g key={index}>
          <rect {...tile} width={side} height={side} vectorEffect="non-scaling-stroke" />
          <text x={tile.x + 6 * unit} y={tile.y + side - 7 * unit} fontSize={12 * unit} strokeWidth={2.5 * unit}>
            {index + 1} · {say("tokens", { n: seen.tile_tokens })}
          </text>
        </g>
      ))}
    </g>
  );
}

interface Plate extends View {
  text: string;
}

/** Places for labels that do not overlap: above the box, inside of it, below, or moved down; else none. */
function plates(boxes: Box[], confidences: (number | null)[], picture: Picture, unit: number): (Plate | null)[] {
  const taken: Plate[] = [];
  return boxes.map((box, index) => {
    const sure = confidences[index];
    const text = [box.label, sure == null ? "" : percent(sure)].filter(Boolean).join(" ");
    if (!text) return null;
    const [x1, y1, x2, y2] = pixels(box, picture.width, picture.height);
    const width = (measure(text, LETTERS) * 1.06 + 10) * unit;
    const height = (LETTERS + 6) * unit;
    const left = Math.max(0, Math.min(x1, picture.width - width));
    const right = Math.max(0, x2 - width);
    const spots = [
      [left, y1 - height], [left, y1], [right, y1 - height], [left, y2], [left, y2 - height], [right, y2],
    ] as const;
    const free = spots
      .map(([x, y]): Plate => ({ x, y, width, height, text }))
      .find((plate) => plate.y >= 0 && plate.y + height <= picture.height && !taken.some((other) => overlap(plate, other)));
    if (free) taken.push(free);
    return free ?? null;
  });
}

const overlap = (a: View, b: View) =>
  a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;

/** Width and height of an element on the screen in px, as they change. */
function useWidth(element: React.RefObject<Element | null>): { w: number; h: number } {
  const [size, setSize] = useState({ w: 0, h: 0 });
  useEffect(() => {
    if (!element.current) return;
    const observer = new ResizeObserver(([entry]) => {
      if (entry) setSize({ w: entry.contentRect.width, h: entry.contentRect.height });
    });
    observer.observe(element.current);
    return () => observer.disconnect();
  }, [element]);
  return size;
}
