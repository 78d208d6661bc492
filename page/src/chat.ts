/** A conversation as a tree: each turn hangs below the one it follows; siblings are versions of each other. */

import type { Box, Token } from "./grounding";

export type Mode = "ask" | "describe" | "read" | "locate" | "grounded" | "compare";

/** What the server says it saw of a picture. */
export interface Seen {
  size: [number, number];
  scaled: [number, number];
  columns: number;
  rows: number;
  tokens: number;
  tile: number;
  tile_tokens: number;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details?: { cached_tokens: number; image_tokens: number };
}

/** Why a request failed. */
export interface Problem {
  status: number;
  code: string | null;
  message: string;
  retryAfter: number | null;
  requestId: string | null;
}

/** A request as it was sent, its pictures named by id in the place of their data. */
export interface Sent {
  model: string;
  messages: SentMessage[];
  [parameter: string]: unknown;
}
export interface SentMessage {
  role: "system" | "user" | "assistant";
  content: string | SentPart[];
}
export type SentPart = { type: "text"; text: string } | { type: "picture"; id: string };

/** One answer of the server. A turn has one, or one for each page of a document. */
export interface Reply {
  state: "waiting" | "streaming" | "done" | "stopped" | "failed";
  /** Ids of all pictures of the request, in order; boxes name them by index. */
  shown: string[];
  /** Which page this answers about, where pages are answered one by one. */
  page: { number: number; of: number; picture: string } | null;
  text: string;
  tokens: Token[];
  boxes: Box[];
  seen: Seen[];
  notices: string[];
  usage: Usage | null;
  timings: Record<string, number> | null;
  /** Milliseconds from sending to the first letter, and to the end. */
  first: number | null;
  total: number | null;
  finish: string | null;
  problem: Problem | null;
  sent: Sent | null;
  /** The events of the stream, as they came. */
  raw: string[];
  requestId: string | null;
}

export interface UserTurn {
  role: "user";
  id: string;
  parent: string | null;
  mode: Mode;
  /** What was typed. */
  text: string;
  /** What the model is told. */
  prompt: string;
  pictures: string[];
  pageByPage: boolean;
}
export interface AssistantTurn {
  role: "assistant";
  id: string;
  parent: string;
  model: string;
  replies: Reply[];
}
export type Turn = UserTurn | AssistantTurn;

export interface Chat {
  id: string;
  title: string;
  created: number;
  updated: number;
  turns: Record<string, Turn>;
  /** Which child is shown, by parent; the first turn's parent is "". */
  chosen: Record<string, string>;
}

export function newId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(12)); // randomUUID is missing on plain http
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newChat(): Chat {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, turns: {}, chosen: {} };
}

export function newReply(): Reply {
  return {
    state: "waiting",
    shown: [],
    page: null,
    text: "",
    tokens: [],
    boxes: [],
    seen: [],
    notices: [],
    usage: null,
    timings: null,
    first: null,
    total: null,
    finish: null,
    problem: null,
    sent: null,
    raw: [],
    requestId: null,
  };
}

/** The turns that are shown, first to last. */
export function path(chat: Chat): Turn[] {
  const found: Turn[] = [];
  for (let at = chat.chosen[""]; at !== undefined; at = chat.chosen[at]) {
    const turn = chat.turns[at];
    if (!turn) break;
    found.push(turn);
  }
  return found;
}

/** A turn and all before it, first to last. */
export function upTo(chat: Chat, id: string): Turn[] {
  const found: Turn[] = [];
  for (let at: string | null = id; at !== null; ) {
    const turn: Turn | undefined = chat.turns[at];
    if (!turn) break;
    found.unshift(turn);
    at = turn.parent;
  }
  return found;
}

/** The versions of a turn, oldest first. */
export function versions(chat: Chat, turn: Turn): string[] {
  return Object.values(chat.turns)
    .filter((other) => other.parent === turn.parent)
    .map((other) => other.id);
}

/** The chat with one more turn, which is shown. */
export function added(chat: Chat, turn: Turn): Chat {
  return {
    ...chat,
    updated: Date.now(),
    turns: { ...chat.turns, [turn.id]: turn },
    chosen: { ...chat.chosen, [turn.parent ?? ""]: turn.id },
  };
}

/** The chat with another version of a turn shown. */
export function switched(chat: Chat, turn: Turn, to: string): Chat {
  return { ...chat, chosen: { ...chat.chosen, [turn.parent ?? ""]: to } };
}

/** The chat with one reply changed. */
export function replied(chat: Chat, id: string, index: number, change: Partial<Reply>): Chat {
  const turn = chat.turns[id];
  if (turn?.role !== "assistant") return chat;
  const replies = turn.replies.map((reply, at) => (at === index ? { ...reply, ...change } : reply));
  return { ...chat, turns: { ...chat.turns, [id]: { ...turn, replies } } };
}

/** What a turn of the model said, all pages together. */
export function said(turn: AssistantTurn): string {
  return turn.replies.map((reply) => reply.text).filter(Boolean).join("\n\n");
}

/** The ids of all pictures of a chat. */
export function picturesOf(chat: Chat): string[] {
  return Object.values(chat.turns).flatMap((turn) => (turn.role === "user" ? turn.pictures : []));
}

/** The messages of a request that answers a user's turn; `only` shows just one of its pictures. */
export function messagesFor(chat: Chat, id: string, system: string, only: string | null): SentMessage[] {
  const messages: SentMessage[] = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  for (const turn of upTo(chat, id)) {
    if (turn.role === "assistant") {
      messages.push({ role: "assistant", content: said(turn) });
      continue;
    }
    const pictures = turn.id === id && only !== null ? [only] : turn.pictures;
    const parts: SentPart[] = pictures.map((picture) => ({ type: "picture", id: picture }));
    messages.push({ role: "user", content: [...parts, { type: "text", text: turn.prompt }] });
  }
  return messages;
}

/** The ids of the pictures of a request, in order. */
export function shownIn(messages: SentMessage[]): string[] {
  return messages.flatMap((message) =>
    typeof message.content === "string"
      ? []
      : message.content.flatMap((part) => (part.type === "picture" ? [part.id] : [])),
  );
}
