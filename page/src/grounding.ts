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
  /** Where its label and list stand in the answer, in UTF-16 units; null where they are not one after the other. */
  span: [number, number] | null;
  /** Where its own four numbers stand; chats of older pages do not say. */
  numbers?: [number, number] | null;
}

export const TOP = 999;

/** What Python calls a blank: these patterns are those of `seekvl.processing.grounding`, letter by letter. */
const BLANK = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]*";
/** The last letter of a text, or the one before a last line break. */
const END = "(?=\\n?$)";
const MARK = /<\|(?:\/?ref|\/?det|grounding)\|>/g;
/** A label with its boxes, or boxes alone; the list may still be growing. */
const TAGGED = new RegExp(`(?:<\\|ref\\|>([^]*?)<\\|/ref\\|>${BLANK})?<\\|det\\|>[^]*?(?:<\\|/det\\|>|${END})`, "g");
const INNERMOST = /\[([^[\]]*)\]/g;
const NUMBER = new RegExp(`^${BLANK}([+-]?[0-9]{1,9}(?:\\.[0-9]*)?)${BLANK}$`);
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

/** What stands after <|ref|> or <|det|>, up to its end. */
interface Span {
  mark: "<|ref|>" | "<|det|>";
  text: string;
  /** Where pieces of it begin: in `text`, and in the answer. */
  pieces: [number, number][];
}

/** Cuts an answer into its labels and lists, in order; a new one ends the one before, if it was left open. */
function spansOf(answer: string): Span[] {
  const spans: Span[] = [];
  let inside = "";
  const marks = [...answer.matchAll(MARK)];
  for (const [index, { 0: mark, index: at }] of marks.entries()) {
    if ((mark === "<|ref|>" || mark === "<|det|>") && mark !== inside) {
      spans.push({ mark, text: "", pieces: [] });
      inside = mark;
    } else if ((mark === "<|/ref|>" && inside === "<|ref|>") || (mark === "<|/det|>" && inside === "<|det|>")) {
      inside = "";
    }
    const open = spans.at(-1);
    if (!inside || !open) continue;
    open.pieces.push([open.text.length, at + mark.length]);
    open.text += answer.slice(at + mark.length, marks[index + 1]?.index);
  }
  return inside === "<|ref|>" ? spans.slice(0, -1) : spans;
}

/** Gives each list its label: in order where there are as many, else the label right before a list is its own. */
function labelled(spans: Span[]): [string, Span][] {
  const labels = spans.filter((span) => span.mark === "<|ref|>");
  const lists = spans.filter((span) => span.mark === "<|det|>");
  if (labels.length === lists.length) return lists.map((list, index) => [labels[index]?.text ?? "", list]);
  const pairs: [string, Span][] = [];
  let label = "";
  for (const span of spans) {
    if (span.mark === "<|det|>") pairs.push([label, span]);
    label = span.mark === "<|ref|>" ? span.text : "";
  }
  return pairs;
}

/** Rounds as Python does: a half to the even neighbour. */
function rounded(value: number): number {
  const low = Math.floor(value);
  return value - low === 0.5 ? low + (low % 2) : Math.round(value);
}

/** Reads what stands in square brackets as a box; null for what is none. */
function corners(inner: string): Box["corners"] | null {
  const numbers = inner.split(",").slice(0, 4).map((part) => NUMBER.exec(part)?.[1]);
  if (numbers.length < 4 || numbers.some((number) => number === undefined)) return null;
  const [a = 0, b = 0, c = 0, d = 0] = numbers.map(Number);
  const [x1, x2] = [Math.min(a, c), Math.max(a, c)];
  const [y1, y2] = [Math.min(b, d), Math.max(b, d)];
  if (x2 < 0 || y2 < 0 || x1 > TOP || y1 > TOP) return null;
  const cut = (value: number) => rounded(Math.min(Math.max(value, 0), TOP));
  return [cut(x1), cut(y1), cut(x2), cut(y2)];
}

/** The boxes of a text that begins at `offset` in the answer, as `parse_boxes` finds them. */
function read(text: string, offset = 0): Box[] {
  return labelled(spansOf(text)).flatMap(([label, list]) => {
    const there = (at: number) => {
      const [from = 0, begin = 0] = list.pieces.findLast(([piece]) => piece <= at) ?? [];
      return begin + at - from + offset;
    };
    return [...list.text.matchAll(INNERMOST)].flatMap(({ 0: whole, 1: inner = "", index }): Box[] => {
      const found = corners(inner);
      const numbers: [number, number] = [there(index), there(index + whole.length - 1) + 1];
      return found ? [{ label, picture: 0, corners: found, span: null, numbers }] : [];
    });
  });
}

/**
 * The finished boxes of an answer, which may still be growing; docs/grounding.md has the table of what is made of
 * every malformed one. Boxes that are found in another order than they stand have no place in the text.
 */
export function parse(text: string, picture: number): Box[] {
  const every = read(text);
  const placed = [...text.matchAll(TAGGED)].flatMap(({ 0: tagged, index }) =>
    read(tagged, index).map((box): Box => ({ ...box, span: [index, index + tagged.length] })),
  );
  const agree = placed.length === every.length && every.every((box, index) => same(box, placed[index]));
  return (agree ? placed : every).map((box) => ({ ...box, picture }));
}

const same = (a: Box, b: Box | undefined) => a.label === b?.label && a.corners.join() === b.corners.join();

/** The server's boxes, with the places of their numbers. Its offsets count characters, ours UTF-16 units. */
export function fromServer(list: ServerBox[], text: string): Box[] {
  const own = parse(text, 0);
  const offsets: number[] = [];
  let at = 0;
  for (const letter of text) {
    offsets.push(at);
    at += letter.length;
  }
  offsets.push(at);
  return list.map((box, index) => {
    const start = box.start === undefined ? undefined : offsets[box.start];
    const end = box.end === undefined ? undefined : offsets[box.end];
    const span: Box["span"] = start === undefined || end === undefined ? null : [start, end];
    const given: Box = { label: box.label, picture: box.image, corners: box.box, span };
    return { ...given, numbers: same(given, own[index]) ? own[index]?.numbers : null };
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
  for (const span of text.matchAll(TAGGED)) {
    const [start, end] = [span.index, span.index + span[0].length];
    plain(start);
    const own = boxes.flatMap((box, index) => (box.span && box.span[0] === start ? [index] : []));
    found.push({ text: unmarked(span[1] ?? ""), start, end, boxes: own });
    at = end;
  }
  plain(text.length - (growing ? (UNFINISHED.exec(text)?.[0].length ?? 0) : 0));
  return found.filter((stretch) => stretch.text !== "" || stretch.boxes !== null);
}

const unmarked = (text: string) => text.replace(MARK, "");

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

/** How near an edge must be to where it is drawn to count as the same, in steps of 0..999: 3 % of the picture. */
const NEAR = 30;
const DIGIT = /^\s*[0-9]$/;

/**
 * How sure it was of a box: the probability that an edge lies within 3 % of the picture of where it is drawn, as the
 * geometric mean of the four. The last digit of 914 is a matter of chance and says nothing; the first one says all.
 */
export function boxConfidence(tokens: Token[], box: Box): number | null {
  const place = box.numbers ?? box.span;
  if (!place) return null;
  const [start, end] = place;
  const numbers: Token[][] = [];
  let beside = false;
  for (const token of tokens) {
    if (token.start < start || token.end > end || token.end === token.start) continue;
    if (!DIGIT.test(token.text)) beside = false;
    else if (beside) numbers.at(-1)?.push(token);
    else beside = numbers.push([token]) > 0;
  }
  if (numbers.length !== 4) return confidence(tokens, start, end); // another tokenizer, or numbers of another kind
  return Math.exp(numbers.reduce((sum, digits) => sum + Math.log(near(digits)), 0) / 4);
}

/** The probability that a number lies near the one that was written, digit by digit. */
function near(digits: Token[]): number {
  const value = Number(digits.map(({ text }) => text.trim()).join(""));
  /** The share of `width` numbers from `least` on that are near. */
  const share = (least: number, width: number) =>
    Math.max(0, Math.min(value + NEAR, least + width - 1) - Math.max(value - NEAR, least) + 1) / width;
  let [sum, reached, before] = [0, 1, 0];
  for (const [place, { text, logprob, top }] of digits.entries()) {
    const width = 10 ** (digits.length - place - 1);
    const told = new Map(top.map((other) => [other.text.trim(), Math.exp(other.logprob)])).set(text.trim(), Math.exp(logprob));
    const known = [...told.keys()].filter((other) => DIGIT.test(other)).length;
    const untold = Math.max(0, 1 - [...told.values()].reduce((a, b) => a + b, 0)) / Math.max(1, 10 - known); // spread evenly
    for (let digit = 0; digit < 10; digit += 1) {
      if (digit === Number(text)) continue;
      sum += reached * (told.get(`${digit}`) ?? untold) * share((before + digit) * width, width);
    }
    reached *= Math.exp(logprob);
    before = (before + Number(text)) * 10;
  }
  return Math.min(1, sum + reached);
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
