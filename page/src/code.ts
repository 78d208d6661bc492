/** A request as someone would write it: curl, Python with openai, Python with seekvl. */

import type { Sent, SentMessage } from "./chat";
import type { Picture } from "./pictures";

export type Language = "curl" | "openai" | "seekvl";

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
  if (language === "curl") return curl(sent, pictures);
  return language === "openai" ? openai(sent, pictures) : seekvl(sent, pictures);
}

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
