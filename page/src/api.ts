/** Talking to the server: its OpenAI dialect, and the two routes of the page. */

import type { Problem } from "./chat";

const KEY = "seekvl-key";

/** The key is kept for this tab only. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value: string) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Thrown for every answer that is an error, and for a server that cannot be reached (status 0). */
export class Failure extends Error {
  constructor(readonly problem: Problem) {
    super(problem.message);
  }
}

export interface Model {
  id: string;
  /** Most tokens of prompt and answer together. */
  context_length: number | null;
  /** Most tiles a picture is cut into; null where the model sees every picture whole. */
  max_tiles: number | null;
}

function headers(): Record<string, string> {
  const given = key.get();
  return { "Content-Type": "application/json", ...(given ? { Authorization: `Bearer ${given}` } : {}) };
}

async function ask(path: string, options: RequestInit): Promise<Response> {
  let answer: Response;
  try {
    answer = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Failure(problem(0, null, String(error instanceof Error ? error.message : error)));
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  throw new Failure({
    ...fromBody(answer.status, text),
    retryAfter: Number(answer.headers.get("Retry-After")) || null,
    requestId: answer.headers.get("x-request-id"),
  });
}

function problem(status: number, code: string | null, message: string): Problem {
  return { status, code, message, retryAfter: null, requestId: null };
}

function fromBody(status: number, text: string): Problem {
  try {
    const body: unknown = JSON.parse(text);
    const { error } = body as { error?: { message?: string; code?: string | null } };
    return problem(status, error?.code ?? null, error?.message ?? text);
  } catch {
    return problem(status, null, text || `HTTP ${status}`);
  }
}

/** Whether the server would answer: "ready", or what it is busy with. `/ready` would be an error in the console. */
export async function phase(): Promise<string> {
  try {
    const body: unknown = await (await fetch("/health-check")).json();
    const { status } = body as { status: string };
    return status === "BUSY" ? "ready" : status.toLowerCase();
  } catch {
    return "away";
  }
}

export async function models(): Promise<Model[]> {
  const body: unknown = await (await ask("/v1/models", { method: "GET" })).json();
  return (body as { data: Model[] }).data.filter((model) => !model.id.endsWith("-simple"));
}

/** The picture at a web address, which the server fetches: the page asks no third party. */
export async function fetchPicture(url: string): Promise<Blob> {
  const answer = await ask("/v1/page/picture", { method: "POST", body: JSON.stringify({ url }) });
  return answer.blob();
}

export interface PdfPage {
  page: number;
  pages: number;
  picture: string;
}

/** The pages of a PDF, as they are drawn. */
export async function* pdfPages(pdf: string): AsyncGenerator<PdfPage> {
  const answer = await ask("/v1/page/pdf", { method: "POST", body: JSON.stringify({ pdf }) });
  for await (const data of events(answer)) yield checked<PdfPage>(data);
}

export interface Streamed {
  raw: string;
  requestId: string | null;
  chunk: Record<string, unknown>;
}

/** The chunks of an answer, as they come; aborting the signal ends the work on the server, too. */
export async function* complete(body: unknown, signal: AbortSignal): AsyncGenerator<Streamed> {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const answer = await ask("/v1/chat/completions", options);
  const requestId = answer.headers.get("x-request-id");
  let ended = false;
  for await (const raw of events(answer)) {
    if (raw === "[DONE]") {
      ended = true;
      continue;
    }
    yield { raw, requestId, chunk: checked<Record<string, unknown>>(raw) };
  }
  if (!ended) throw new Failure(problem(0, "broken_stream", "the stream ended before the answer did"));
}

function checked<T>(data: string): T {
  const value: unknown = JSON.parse(data);
  const { error } = value as { error?: { message: string; code: string | null } };
  if (error) throw new Failure(problem(500, error.code, error.message));
  return value as T;
}

/** The data of each event; comments are passed over. */
async function* events(answer: Response): AsyncGenerator<string> {
  if (!answer.body) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split("\n\n");
      buffer = parts.pop() ?? "";
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data: "));
        if (lines.length > 0) yield lines.map((line) => line.slice(6)).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined); // leaving early hangs up, which cancels the answer
  }
}
