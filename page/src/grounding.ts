/** Boxes in answers: read while they stream, placed in the text, coloured, and how sure the model was. */

export interface Token {
  text: string;
  /** First letter and end in the answer, in UTF-16 units. */
  start: number;
  end: number;
  logprob: number;
  top: { text: string; logprob: number }[];
}

export interface Box {
  label: string;
  /** Index among the pictures of the request. */
  picture: number;
  /** x1, y1, x2, y2, each 0..999 of the picture. */
  corners: [number, number, number, number];
  /** Where it stands in the answer, in UTF-16 units; null where that is not known. */
  span: [number, number] | null;
}

export const TOP = 999;

const TAGGED = /(?:<\|ref\|>([^]*?)<\|\/ref\|>\s*)?<\|det\|>([^]*?)<\|\/det\|>/g;
/** The same, also with a list that does not end. */
const BEGUN = /(?:<\|ref\|>([^]*?)<\|\/ref\|>\s*)?<\|det\|>[^]*?(?:<\|\/det\|>|$)/g;
const INNERMOST = /\[([^[\]]*)\]/g;
const NUMBER = /^\s*([+-]?[0-9]{1,9}(?:\.[0-9]*)?)\s*$/;
/** The beginning of a mark at the end of an answer that still grows. */
const UNFINISHED = /<(?:\|(?:\/?(?:r(?:e(?:f\|?)?)?|d(?:e(?:t\|?)?)?|g[a-z]*\|?)?)?)?$/;

/** A stretch of an answer: words, or a label with its boxes. */
export interface Stretch {
  text: string;
  start: number;
  end: number;
  /** Indices of its boxes; null for plain words. */
  boxes: number[] | null;
}

/** Reads what stands in square brackets as a box; null for what is none. */
function corners(inner: string): Box["corners"] | null {
  const numbers = inner.split(",").slice(0, 4).map((part) => NUMBER.exec(part)?.[1]);
  if (numbers.length < 4 || numbers.some((number) => number === undefined)) return null;
  const [a = 0, b = 0, c = 0, d = 0] = numbers.map(Number);
  const [x1, x2] = [Math.min(a, c), Math.max(a, c)];
  const [y1, y2] = [Math.min(b, d), Math.max(b, d)];
  if (x2 < 0 || y2 < 0 || x1 > TOP || y1 > TOP) return null;
  const cut = (value: number) => Math.round(Math.min(Math.max(value, 0), TOP));
  return [cut(x1), cut(y1), cut(x2), cut(y2)];
}

/** The finished boxes of an answer that is still growing; the server's own list replaces them at its end. */
export function parse(text: string, picture: number): Box[] {
  const boxes: Box[] = [];
  for (const found of text.matchAll(TAGGED)) {
    const span: [number, number] = [found.index, found.index + found[0].length];
    for (const [, inner = ""] of (found[2] ?? "").matchAll(INNERMOST)) {
      const read = corners(inner);
      if (read) boxes.push({ label: unmarked(found[1] ?? ""), picture, corners: read, span });
    }
  }
  return boxes;
}

/** The server's boxes; its places count characters, ours UTF-16 units. */
export function fromServer(list: ServerBox[], text: string): Box[] {
  const offsets: number[] = [];
  let at = 0;
  for (const letter of text) {
    offsets.push(at);
    at += letter.length;
  }
  offsets.push(at);
  return list.map((box) => {
    const start = box.start === undefined ? undefined : offsets[box.start];
    const end = box.end === undefined ? undefined : offsets[box.end];
    const span: Box["span"] = start === undefined || end === undefined ? null : [start, end];
    return { label: box.label, picture: box.image, corners: box.box, span };
  });
}

export interface ServerBox {
  label: string;
  image: number;
  box: Box["corners"];
  start?: number;
  end?: number;
}

/** Cuts an answer into words and labels, without marks and coordinates; one that grows may end inside of a mark. */
export function stretches(text: string, boxes: Box[], growing = false): Stretch[] {
  const found: Stretch[] = [];
  let at = 0;
  const plain = (end: number) => {
    if (end > at) found.push({ text: unmarked(text.slice(at, end)), start: at, end, boxes: null });
  };
  for (const span of text.matchAll(BEGUN)) {
    const [start, end] = [span.index, span.index + span[0].length];
    plain(start);
    const own = boxes.flatMap((box, index) => (box.span && box.span[0] === start ? [index] : []));
    found.push({ text: unmarked(span[1] ?? ""), start, end, boxes: own });
    at = end;
  }
  plain(text.length - (growing ? (UNFINISHED.exec(text)?.[0].length ?? 0) : 0));
  return found.filter((stretch) => stretch.text !== "" || stretch.boxes !== null);
}

const unmarked = (text: string) => text.replace(/<\|\/?(?:ref|det|grounding)\|>/g, "");

/** The answer as one would read it aloud. */
export function readable(text: string): string {
  return stretches(text, []).map((stretch) => stretch.text).join("").trim();
}

/** How sure the model was of the letters from `start` to `end`: the geometric mean of its tokens, 0..1. */
export function confidence(tokens: Token[], start: number, end: number): number | null {
  const inside = tokens.filter((token) => token.start < end && token.end > start && token.end > token.start);
  if (inside.length === 0) return null;
  return Math.exp(inside.reduce((sum, token) => sum + token.logprob, 0) / inside.length);
}

/** How sure it was of a box: of the digits of its list, for commas and brackets are always sure. */
export function boxConfidence(tokens: Token[], box: Box): number | null {
  if (!box.span) return null;
  const [start, end] = box.span;
  const digits = tokens.filter(
    (token) => token.start >= start && token.end <= end && /^\s*[0-9]+\s*$/.test(token.text),
  );
  if (digits.length === 0) return confidence(tokens, start, end);
  return Math.exp(digits.reduce((sum, token) => sum + token.logprob, 0) / digits.length);
}

const COLOURS = [
  "#e6194b", "#006ee6", "#14963c", "#f58214", "#911eb4", "#0096a0", "#d73caa", "#82551e", "#c79a00", "#3c3c3c",
];

/** A colour for each label, the same ones that `seekvl ask --draw` uses. */
export function colours(boxes: Box[]): string[] {
  const labels = [...new Set(boxes.map((box) => box.label))];
  return boxes.map((box) => {
    const index = labels.indexOf(box.label);
    return COLOURS[index] ?? `hsl(${(index * 137) % 360} 70% 38%)`;
  });
}

/** x1, y1, x2, y2 in px of a picture of this size. */
export function pixels(box: Box, width: number, height: number): Box["corners"] {
  const [x1, y1, x2, y2] = box.corners;
  return [(x1 / TOP) * width, (y1 / TOP) * height, (x2 / TOP) * width, (y2 / TOP) * height];
}

/** Gathers the tokens of a stream with their places in the answer. */
export class TokenReader {
  readonly tokens: Token[] = [];
  private decoder = new TextDecoder();
  private at = 0;

  push(entry: ServerToken): void {
    const text = this.decoder.decode(new Uint8Array(entry.bytes), { stream: true });
    const start = this.at;
    this.at += text.length;
    const top = entry.top_logprobs.map((other) => ({ text: other.token, logprob: other.logprob }));
    this.tokens.push({ text: text || entry.token, start, end: this.at, logprob: entry.logprob, top });
  }

  /** The tokens with places in `answer`, from which blanks in front were taken. */
  placed(answer: string): Token[] {
    const whole = this.tokens.map((token) => (token.end > token.start ? token.text : "")).join("");
    const shift = Math.max(0, whole.indexOf(answer.slice(0, 24)));
    return this.tokens.map((token) => ({
      ...token,
      start: Math.min(Math.max(0, token.start - shift), answer.length),
      end: Math.min(Math.max(0, token.end - shift), answer.length),
    }));
  }
}

export interface ServerToken {
  token: string;
  logprob: number;
  bytes: number[];
  top_logprobs: { token: string; logprob: number }[];
}
