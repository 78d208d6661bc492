/** A request as someone would write it: curl, Python with openai, with replicate, with seekvl. */

import { shownIn, type Sent, type SentMessage } from "./chat";
import type { Word } from "./i18n";
import type { Picture } from "./pictures";

export type Language = "curl" | "openai" | "replicate" | "seekvl";

type Known = Record<string, Picture>;

/** Names for files that differ, in the order of the request. */
function fileNames(sent: Sent, pictures: Known): Map<string, string> {
  const names = new Map<string, string>();
  for (const message of sent.messages) {
    if (typeof message.content === "string") continue;
    for (const part of message.content) {
      if (part.type !== "picture" || names.has(part.id)) continue;
      const plain = (pictures[part.id]?.name ?? "picture.png").replace(/[^\w.\-]/g, "_");
      const taken = new Set(names.values());
      names.set(part.id, taken.has(plain) ? `${names.size + 1}-${plain}` : plain);
    }
  }
  return names;
}

const media = (id: string, pictures: Known) => pictures[id]?.blob.type || "image/png";
const py = (value: unknown): string => {
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(py).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, inner]) => `${JSON.stringify(name)}: ${py(inner)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
};

export function code(language: Language, sent: Sent, pictures: Known): string {
  return { curl, openai, replicate, seekvl }[language](sent, pictures);
}

/** Why a request cannot be written in a language; null where it can. */
export function unsayable(language: Language, sent: Sent): Word | null {
  if (language !== "replicate") return null;
  const pictures = shownIn(sent.messages).length;
  const fits = sent.messages.length === 1 && sent.top_k === undefined && pictures >= 1 && pictures <= MOST_IMAGES;
  return fits ? null : "notReplicate";
}

/** Pictures that the published inputs `image1` to `image3` take. */
const MOST_IMAGES = 3;
/** What the published input `max_new_tokens` takes at most; its default is less than the context may leave. */
const MOST_NEW = 4096;

/** The body with pictures as the shell reads them from files. */
function curl(sent: Sent, pictures: Known): string {
  const names = fileNames(sent, pictures);
  const body = wire(sent, (id) => `data:${media(id, pictures)};base64,@@${names.get(id)}@@`);
  const text = JSON.stringify(body, null, 2)
    .replaceAll("\\", "\\\\")
    .replaceAll("$", "\\$")
    .replaceAll("`", "\\`")
    .replace(/@@(.*?)@@/g, (_, name: string) => `$(base64 -w0 '${name}')`);
  return [
    `curl -N ${location.origin}/v1/chat/completions \\`,
    `  -H "Authorization: Bearer $SEEKVL_API_KEY" \\`,
    `  -H "Content-Type: application/json" \\`,
    `  --data-binary @- <<JSON`,
    text,
    "JSON",
  ].join("\n");
}

const OURS = new Set(["repetition_penalty", "top_k", "max_tiles", "grounding", "ignore_eos"]);

function openai(sent: Sent, pictures: Known): string {
  const names = fileNames(sent, pictures);
  const { model, messages, stream: _, stream_options: __, ...rest } = sent;
  const extra = Object.fromEntries(Object.entries(rest).filter(([name]) => OURS.has(name)));
  const own = Object.entries(rest).filter(([name]) => !OURS.has(name));
  const lines = messages.map((message) => `        ${pyMessage(message, names, "shown")},`);
  return [
    "import base64",
    "import os",
    "from pathlib import Path",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ.get("SEEKVL_API_KEY", "any"))`,
    "",
    "",
    'def shown(path, kind="image/png"):',
    `    url = f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"`,
    '    return {"type": "image_url", "image_url": {"url": url}}',
    "",
    "",
    "answer = client.chat.completions.create(",
    `    model=${py(model)},`,
    "    messages=[",
    ...lines,
    "    ],",
    ...own.map(([name, value]) => `    ${name}=${py(value)},`),
    ...(Object.keys(extra).length > 0 ? [`    extra_body=${py(extra)},`] : []),
    ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}

/** One question with its pictures: `unsayable` tells what else there is. */
function replicate(sent: Sent, pictures: Known): string {
  const names = fileNames(sent, pictures);
  const content = sent.messages.at(-1)?.content ?? "";
  const parts = typeof content === "string" ? [] : content;
  const shown = parts.flatMap((part) => (part.type === "picture" ? [names.get(part.id)] : []));
  const text = parts.flatMap((part) => (part.type === "text" ? [part.text] : [])).join("\n");
  const inputs: [string, string][] = [
    ["text", py(text)],
    ...shown.map((name, index): [string, string] => [`image${index + 1}`, `open(${py(name)}, "rb")`]),
    ["max_new_tokens", py(sent.max_completion_tokens ?? MOST_NEW)],
    ["temperature", py(sent.temperature)],
    ["top_p", py(sent.top_p ?? 1)],
    ["repetition_penalty", py(sent.repetition_penalty ?? 1)],
    ...["seed", "max_tiles"].filter((name) => sent[name] !== undefined).map((name): [string, string] => [name, py(sent[name])]),
  ];
  return [
    "import os",
    "",
    "import replicate  # 1.x",
    "",
    `client = replicate.Client(base_url="${location.origin}", api_token=os.environ.get("SEEKVL_API_KEY", "any"))`,
    "output = client.run(",
    `    ${py(sent.model)},`,
    "    input={",
    ...inputs.map(([name, value]) => `        ${py(name)}: ${value},`),
    "    },",
    ")",
    'print(output["text_out"])',
  ].join("\n");
}

const HERE = ["temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop"];

function seekvl(sent: Sent, pictures: Known): string {
  const names = fileNames(sent, pictures);
  const model = sent.model.startsWith("seekvl/") ? sent.model.slice(7) : sent.model;
  const options = HERE.filter((name) => sent[name] !== undefined).map((name) => `${name}=${py(sent[name])}`);
  if (sent.max_completion_tokens !== undefined) options.unshift(`max_new_tokens=${py(sent.max_completion_tokens)}`);
  const load = sent.max_tiles === undefined ? py(model) : `${py(model)}, max_tiles=${py(sent.max_tiles)}`;
  return [
    "import seekvl",
    "",
    `vlm = seekvl.load(${load})`,
    "messages = [",
    ...sent.messages.map((message) => `    ${pyMessage(message, names, null)},`),
    "]",
    `answer = vlm.chat(messages${options.map((option) => `, ${option}`).join("")})`,
    "print(answer.text, answer.boxes, answer.usage)",
  ].join("\n");
}

function pyMessage(message: SentMessage, names: Map<string, string>, helper: string | null): string {
  if (typeof message.content === "string") return py(message);
  const parts = message.content.map((part) => {
    if (part.type === "text") return py(part);
    const name = py(names.get(part.id));
    return helper ? `${helper}(${name})` : `{"type": "image", "image": ${name}}`;
  });
  return `{"role": ${py(message.role)}, "content": [${parts.join(", ")}]}`;
}

/** The request as it goes over the wire; `url` says what stands for a picture. */
export function wire(sent: Sent, url: (id: string) => string): Record<string, unknown> {
  const messages = sent.messages.map((message) => ({
    role: message.role,
    content:
      typeof message.content === "string"
        ? message.content
        : message.content.map((part) =>
            part.type === "text" ? part : { type: "image_url", image_url: { url: url(part.id) } },
          ),
  }));
  return { ...sent, messages };
}

/** The request to look at: pictures shortened. */
export function raw(sent: Sent, pictures: Known): string {
  const names = fileNames(sent, pictures);
  return JSON.stringify(
    wire(sent, (id) => `data:${media(id, pictures)};base64,… (${names.get(id)}, ${pictures[id]?.blob.size ?? "?"} bytes)`),
    null,
    2,
  );
}
