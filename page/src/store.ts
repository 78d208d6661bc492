/** Everything the page knows, and what can be done. Components read it with `useStore`. */

import { useSyncExternalStore } from "react";
import * as api from "./api";
import {
  added, messagesFor, newChat, newId, newReply, path, picturesOf, replied, shownIn, switched,
  type AssistantTurn, type Chat, type Mode, type Problem, type Reply, type Seen, type Sent, type Turn, type Usage,
  type UserTurn,
} from "./chat";
import { wire } from "./code";
import * as db from "./db";
import { fromServer, parse, readable, TokenReader, type ServerBox, type ServerToken } from "./grounding";
import { browserLang, sayer, type Lang, type Say } from "./i18n";
import { dataUrl, fromDataUrl, shown, type Picture } from "./pictures";
import { prompt, unsaid } from "./prompts";

export interface Params {
  temperature: number;
  topP: number;
  topK: number | null;
  penalty: number;
  most: number | null;
  seed: number | null;
  tiles: number | null;
  system: string;
  logprobs: boolean;
}

export const DEFAULTS: Params = {
  temperature: 0.1,
  topP: 1,
  topK: null,
  penalty: 1,
  most: null,
  seed: null,
  tiles: null,
  system: "",
  logprobs: true,
};

export interface Draft {
  text: string;
  mode: Mode;
  pictures: string[];
  pageByPage: boolean;
}
export const EMPTY: Draft = { text: "", mode: "ask", pictures: [], pageByPage: false };

/** What lies over the page. */
export type Panel =
  | { kind: "params" | "shortcuts" | "key" }
  | { kind: "viewer"; picture: string; turn: string | null; reply: number };

export interface State {
  lang: Lang;
  theme: "light" | "dark";
  phase: string;
  models: api.Model[];
  model: string;
  params: Params;
  chats: Chat[];
  current: string;
  pictures: Record<string, Picture>;
  draft: Draft;
  panel: Panel | null;
  sidebar: boolean;
  /** Turns that are being answered. */
  running: Record<string, AbortController>;
  /** A line for all to read, such as a file that is no picture. */
  notice: string | null;
  /** What is being opened. */
  progress: string | null;
}

const kept = {
  get: (name: string) => localStorage.getItem(`seekvl-${name}`),
  set: (name: string, value: string) => localStorage.setItem(`seekvl-${name}`, value),
};

function keptParams(): Params {
  try {
    return { ...DEFAULTS, ...(JSON.parse(kept.get("params") ?? "{}") as Partial<Params>) };
  } catch {
    return DEFAULTS;
  }
}

const first = newChat();
let state: State = {
  lang: (kept.get("lang") as Lang | null) ?? browserLang(),
  theme:
    (kept.get("theme") as State["theme"] | null) ??
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"),
  phase: "starting",
  models: [],
  model: "",
  params: keptParams(),
  chats: [first],
  current: first.id,
  pictures: {},
  draft: EMPTY,
  panel: null,
  sidebar: matchMedia("(min-width: 900px)").matches,
  running: {},
  notice: null,
  progress: null,
};

const listeners = new Set<() => void>();
const subscribe = (listener: () => void) => {
  listeners.add(listener);
  return () => listeners.delete(listener);
};

export const get = () => state;

export function set(change: Partial<State>): void {
  state = { ...state, ...change };
  listeners.forEach((listener) => listener());
}

export function useStore<T>(select: (state: State) => T): T {
  return useSyncExternalStore(subscribe, () => select(state));
}

export const useSay = (): Say => says[useStore((now) => now.lang)];
const says = { en: sayer("en"), zh: sayer("zh") };
export const say: Say = (word, values) => says[state.lang](word, values);

// What is chosen once and kept

export function setLang(lang: Lang): void {
  kept.set("lang", lang);
  document.documentElement.lang = lang === "zh" ? "zh-CN" : "en";
  set({ lang });
}

export function setTheme(theme: State["theme"]): void {
  kept.set("theme", theme);
  document.documentElement.dataset.theme = theme;
  set({ theme });
}

export function setParams(params: Params): void {
  kept.set("params", JSON.stringify(params));
  set({ params });
}

export function setModel(model: string): void {
  kept.set("model", model);
  set({ model });
}

// The server

/** Looks whether the server is ready, again and again until it is; then asks for its models. */
export async function connect(): Promise<void> {
  for (;;) {
    const phase = await api.phase();
    set({ phase });
    if (phase === "ready") break;
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
  try {
    const models = await api.models();
    const old = kept.get("model");
    const model = models.find((each) => each.id === old)?.id ?? models[0]?.id ?? "";
    set({ models, model });
  } catch (error) {
    if (error instanceof api.Failure && error.problem.status === 401) set({ panel: { kind: "key" } });
    else set({ notice: String(error) });
  }
}

export function setKey(value: string): void {
  api.key.set(value.trim());
  set({ panel: null });
  void connect();
}

// Chats

export const chatOf = (now: State): Chat => now.chats.find((chat) => chat.id === now.current) ?? first;

function change(id: string, how: (chat: Chat) => Chat, keep = true): void {
  set({ chats: state.chats.map((chat) => (chat.id === id ? how(chat) : chat)) });
  const chat = state.chats.find((each) => each.id === id);
  if (keep && chat) void saved(db.chats.put(chat));
}

/** Says so where the browser keeps nothing, once; the page goes on. */
async function saved(writing: Promise<unknown>): Promise<void> {
  try {
    await writing;
  } catch (error) {
    set({ notice: say("historyFull", { why: String(error) }) });
  }
}

export async function loadHistory(): Promise<void> {
  let found: Chat[];
  try {
    found = await db.chats.all();
  } catch (error) {
    set({ notice: say("historyFull", { why: String(error) }) });
    return;
  }
  const chats = found.map(settled).sort((a, b) => b.updated - a.updated);
  set({ chats: [...state.chats.filter((chat) => !chats.some((other) => other.id === chat.id)), ...chats] });
  void sweep();
}

/** A chat as this page keeps it: answers that were under way when it was closed have stopped, none lacks a field. */
function settled(chat: Chat): Chat {
  const turns = Object.entries(chat.turns).map(([id, turn]): [string, Turn] => {
    if (turn.role === "user") return [id, turn];
    const replies = turn.replies.map(
      (reply): Reply => {
        const whole = { ...newReply(), ...reply };
        return whole.state === "waiting" || whole.state === "streaming" ? { ...whole, state: "stopped" } : whole;
      },
    );
    return [id, { ...turn, replies }];
  });
  return { ...chat, turns: Object.fromEntries(turns) };
}

/** Forgets pictures that no chat shows. */
async function sweep(): Promise<void> {
  const used = new Set([...state.chats.flatMap(picturesOf), ...state.draft.pictures]);
  for (const id of await db.pictures.keys()) {
    if (!used.has(String(id)) && !state.pictures[String(id)]) await db.pictures.delete(String(id));
  }
}

export function startChat(): void {
  const empty = state.chats.find((chat) => Object.keys(chat.turns).length === 0);
  const chat = empty ?? newChat();
  const chats = empty ? state.chats : [chat, ...state.chats];
  set({ chats, current: chat.id, draft: EMPTY, panel: null });
  focusQuestion();
}

export function focusQuestion(): void {
  setTimeout(() => document.getElementById("question")?.focus(), 0);
}

export async function openChat(id: string): Promise<void> {
  set({ current: id, draft: EMPTY, panel: null });
  if (!matchMedia("(min-width: 900px)").matches) set({ sidebar: false });
  await loadPictures(picturesOf(chatOf(state)));
}

async function loadPictures(ids: string[]): Promise<void> {
  for (const id of ids) {
    if (state.pictures[id]) continue;
    const stored = await db.pictures.get(id);
    if (stored) set({ pictures: { ...state.pictures, [id]: shown(stored) } });
  }
}

export async function deleteChats(ids: string[]): Promise<void> {
  for (const id of ids) {
    await saved(db.chats.delete(id));
    const gone = state.chats.find((chat) => chat.id === id);
    Object.keys(gone?.turns ?? {}).forEach((turn) => state.running[turn]?.abort());
  }
  const left = state.chats.filter((chat) => !ids.includes(chat.id));
  const chats = left.length > 0 ? left : [newChat()];
  const current = chats.some((chat) => chat.id === state.current) ? state.current : (chats[0]?.id ?? "");
  set({ chats, current });
  void sweep();
}

const FORMAT = "seekvl-chats-1";

/** Chats with their pictures, as one file. */
export async function exported(ids: string[]): Promise<Blob> {
  const chats = state.chats.filter((chat) => ids.includes(chat.id) && Object.keys(chat.turns).length > 0);
  const names = [...new Set(chats.flatMap(picturesOf))];
  await loadPictures(names);
  const pictures = await Promise.all(
    names.flatMap((id) => {
      const picture = state.pictures[id];
      return picture ? [described(picture)] : [];
    }),
  );
  return new Blob([JSON.stringify({ format: FORMAT, chats, pictures })], { type: "application/json" });
}

/** Whether something of a file may be taken as a chat: what the history shows before any is opened. */
function sound(chat: Partial<Chat>): boolean {
  const { id, title, updated, turns, chosen } = chat;
  const named = typeof id === "string" && typeof title === "string" && Number.isFinite(updated);
  const turned = Object.values(turns ?? {}).every(
    (turn) => Array.isArray(turn.role === "user" ? turn.pictures : turn.replies) && typeof turn.id === "string",
  );
  return named && turned && typeof turns === "object" && typeof chosen === "object";
}

async function described({ id, name, width, height, blob }: Picture) {
  return { id, name, width, height, data: await dataUrl(blob) };
}

/** Adds the chats of such a file; returns how many. Throws for another file. */
export async function imported(file: Blob): Promise<number> {
  const read = JSON.parse(await file.text()) as {
    format?: string;
    chats?: Chat[];
    pictures?: { id: string; name: string; width: number; height: number; data: string }[];
  };
  if (read.format !== FORMAT || !Array.isArray(read.pictures) || !read.chats?.every(sound)) {
    throw new Error(FORMAT);
  }
  for (const { data, ...picture } of read.pictures) {
    await saved(db.pictures.put({ ...picture, blob: fromDataUrl(data) }));
  }
  const chats = read.chats.map(settled);
  for (const chat of chats) await saved(db.chats.put(chat));
  const ids = new Set(chats.map((chat) => chat.id));
  set({ chats: [...chats, ...state.chats.filter((chat) => !ids.has(chat.id))] });
  if (chats[0]) await openChat(chats[0].id);
  return chats.length;
}

export async function keepPicture(picture: Picture): Promise<void> {
  set({ pictures: { ...state.pictures, [picture.id]: picture } });
  const { url: _, ...stored } = picture;
  await saved(db.pictures.put(stored));
}

// Asking

/** Adds a user's turn below `parent` and answers it. */
export async function submit(draft: Draft, parent: string | null): Promise<void> {
  const chat = chatOf(state);
  const turn: UserTurn = {
    role: "user",
    id: newId(),
    parent,
    mode: draft.mode,
    text: draft.text.trim() || unsaid(draft.mode, state.model, state.lang),
    prompt: prompt(draft.mode, draft.text, state.model, state.lang),
    pictures: draft.pictures,
    pageByPage: draft.pageByPage && draft.pictures.length > 1,
  };
  change(chat.id, (old) => ({ ...added(old, turn), title: old.title || readable(turn.text).slice(0, 60) }));
  await answer(chat.id, turn);
}

/** Answers a user's turn, or answers it again; what was answered before stays as a version. */
export async function answer(chatId: string, asked: UserTurn): Promise<void> {
  const pages = asked.pageByPage ? asked.pictures : [null];
  const turn: AssistantTurn = {
    role: "assistant",
    id: newId(),
    parent: asked.id,
    model: state.model,
    replies: pages.map((picture, index) => ({
      ...newReply(),
      page: picture === null ? null : { number: index + 1, of: pages.length, picture },
    })),
  };
  change(chatId, (chat) => added(chat, turn));
  await withStop(turn.id, async (signal) => {
    for (const [index, picture] of pages.entries()) {
      await reply(chatId, turn.id, index, { asked: asked.id, picture, signal });
    }
  });
}

/** Answers one page, or the whole turn, once more in its place: for what failed. */
export async function retry(chatId: string, id: string, index: number): Promise<void> {
  const turn = state.chats.find((chat) => chat.id === chatId)?.turns[id];
  if (turn?.role !== "assistant") return;
  const page = turn.replies[index]?.page ?? null;
  change(chatId, (chat) => replied(chat, turn.id, index, { ...newReply(), page }));
  await withStop(turn.id, (signal) =>
    reply(chatId, turn.id, index, { asked: turn.parent, picture: page?.picture ?? null, signal }),
  );
}

async function withStop(id: string, work: (signal: AbortSignal) => Promise<void>): Promise<void> {
  const controller = new AbortController();
  set({ running: { ...state.running, [id]: controller } });
  try {
    await work(controller.signal);
  } finally {
    const { [id]: _, ...left } = state.running;
    set({ running: left });
  }
}

export function stop(): void {
  Object.values(state.running).forEach((controller) => controller.abort());
}

interface Asked {
  asked: string;
  picture: string | null;
  signal: AbortSignal;
}

/** Sends one request and writes down its answer as it grows. */
async function reply(chatId: string, id: string, index: number, { asked, picture, signal }: Asked): Promise<void> {
  const put = (values: Partial<Reply>, keep = false) =>
    change(chatId, (chat) => replied(chat, id, index, values), keep);
  if (signal.aborted) return put({ state: "stopped" }, true);
  const chat = state.chats.find((each) => each.id === chatId);
  if (!chat) return;
  const sent = request(messagesFor(chat, asked, state.params.system, picture));
  const ids = shownIn(sent.messages);
  put({ sent, shown: ids });
  const growing = new Growing(ids.length, put);
  try {
    await loadPictures(ids);
    const body = await wired(sent);
    growing.begin();
    for await (const piece of api.complete(body, signal)) growing.push(piece);
    growing.end({ state: "done" });
  } catch (error) {
    if (signal.aborted) growing.end({ state: "stopped" });
    else growing.end({ state: "failed", problem: problemOf(error) });
  }
}

function problemOf(error: unknown): Problem {
  if (error instanceof api.Failure) {
    if (error.problem.status === 401) set({ panel: { kind: "key" } });
    return error.problem;
  }
  return { status: -1, code: null, message: String(error), retryAfter: null, requestId: null };
}

function request(messages: Sent["messages"]): Sent {
  const { params, model } = state;
  const given: Record<string, unknown> = {
    temperature: params.temperature,
    top_p: params.topP === 1 ? undefined : params.topP,
    top_k: params.topK ?? undefined,
    repetition_penalty: params.penalty === 1 ? undefined : params.penalty,
    max_completion_tokens: params.most ?? undefined,
    seed: params.seed ?? undefined,
    max_tiles: (modelOf(state)?.max_tiles && params.tiles) || undefined,
    logprobs: params.logprobs || undefined,
    top_logprobs: params.logprobs ? 5 : undefined,
  };
  const set = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined));
  return { model, messages, ...set, stream: true, stream_options: { include_usage: true } };
}

async function wired(sent: Sent): Promise<Record<string, unknown>> {
  const urls = new Map<string, string>();
  for (const id of new Set(shownIn(sent.messages))) {
    const picture = state.pictures[id];
    if (picture) urls.set(id, await dataUrl(picture.blob));
  }
  return wire(sent, (id) => urls.get(id) ?? "");
}

/** An answer that grows: gathers chunks, and shows them once a frame. */
class Growing {
  private text = "";
  private raw: string[] = [];
  private tokens = new TokenReader();
  private more: Partial<Reply> = {};
  private boxes: ServerBox[] | null = null;
  private began = 0;
  private frame = 0;

  constructor(private readonly pictures: number, private readonly put: (values: Partial<Reply>, keep?: boolean) => void) {}

  begin(): void {
    this.began = performance.now();
  }

  push({ raw, requestId, chunk }: api.Streamed): void {
    this.raw.push(raw);
    this.more.requestId = requestId;
    const [choice] = chunk.choices as {
      delta: { content?: string; grounding?: ServerBox[] };
      logprobs: { content: ServerToken[] } | null;
      finish_reason: string | null;
    }[];
    if (choice?.delta.content) {
      this.more.first ??= performance.now() - this.began;
      this.text += choice.delta.content;
    }
    choice?.logprobs?.content.forEach((token) => this.tokens.push(token));
    if (choice?.finish_reason) {
      this.boxes = choice.delta.grounding ?? [];
      this.more.finish = choice.finish_reason;
      this.more.notices = (chunk.notices as string[] | undefined) ?? [];
      this.more.seen = (chunk.pictures as Seen[] | undefined) ?? [];
      this.more.timings = (chunk.timings as Record<string, number> | undefined) ?? null;
    }
    if (chunk.usage) this.more.usage = chunk.usage as Usage;
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.put({ ...this.now(), state: this.text ? "streaming" : "waiting" });
    });
  }

  end(last: Partial<Reply>): void {
    cancelAnimationFrame(this.frame);
    const total = this.began ? performance.now() - this.began : null;
    this.put({ ...this.now(), total, raw: this.raw, ...last }, true);
  }

  private now(): Partial<Reply> {
    const boxes = this.boxes ? fromServer(this.boxes, this.text) : parse(this.text, Math.max(0, this.pictures - 1));
    return { ...this.more, text: this.text, boxes, tokens: this.tokens.placed(this.text) };
  }
}

// Looking back

export function chooseVersion(turn: Turn, to: string): void {
  change(state.current, (chat) => switched(chat, turn, to));
}

export function answerAgain(): void {
  const last = path(chatOf(state)).at(-1);
  if (last?.role !== "assistant" || state.running[last.id]) return;
  const asked = chatOf(state).turns[last.parent];
  if (asked?.role === "user") void answer(state.current, asked);
}

/** The model that is asked, once it is known. */
export const modelOf = (now: State): api.Model | undefined => now.models.find((each) => each.id === now.model);

/** Tokens the last answer left used, of the context. */
export function used(chat: Chat): number {
  const last = path(chat).at(-1);
  return last?.role === "assistant" ? (last.replies.at(-1)?.usage?.total_tokens ?? 0) : 0;
}

