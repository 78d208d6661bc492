/** Pictures in the browser: opened, made small enough for the server, marked, cut into pages. */

import { pdfPages } from "./api";
import { newId } from "./chat";
import type { StoredPicture } from "./db";

export interface Picture extends StoredPicture {
  /** An object URL of the blob. */
  url: string;
}

/** What the server decodes; anything else that the browser can show is turned into PNG. */
const TAKEN = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"]);
const MOST_BYTES = 20 * 2 ** 20;
const MOST_PIXELS = 64_000_000;
/** A picture this much taller than wide is a long scan, and may be cut into pages. */
const LONG = 2.2;
/** Height over width of a page that a long scan is cut into, and what neighbours share of it. */
const PAGE = 1.414;
const SHARED = 0.06;

export class PictureError extends Error {}

export const isPdf = (file: Blob & { name?: string }) =>
  file.type === "application/pdf" || /\.pdf$/i.test(file.name ?? "");

export const isLong = (picture: Picture) => picture.height > LONG * picture.width && picture.height > 600;

export function shown(stored: StoredPicture): Picture {
  return { ...stored, url: URL.createObjectURL(stored.blob) };
}

/** Opens a file as a picture. Throws PictureError for what the browser cannot show. */
export async function open(file: Blob, name: string): Promise<Picture> {
  const element = await decoded(file);
  const { naturalWidth: width, naturalHeight: height } = element;
  if (TAKEN.has(file.type) && file.size <= MOST_BYTES && width * height <= MOST_PIXELS) {
    return shown({ id: newId(), name, width, height, blob: file });
  }
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / 2 / (width * height)));
  const canvas = canvasOf(Math.round(width * scale) || 512, Math.round(height * scale) || 512);
  canvas.getContext("2d")?.drawImage(element, 0, 0, canvas.width, canvas.height);
  return fromCanvas(canvas, name, file.size > MOST_BYTES ? "image/jpeg" : "image/png");
}

/** A file as an <img> that is ready to be drawn; cameras' orientation is applied. */
export async function decoded(file: Blob): Promise<HTMLImageElement> {
  const url = URL.createObjectURL(file);
  const element = new Image();
  element.src = url;
  try {
    await element.decode();
  } catch {
    throw new PictureError(file.type || "?");
  } finally {
    URL.revokeObjectURL(url);
  }
  return element;
}

export function canvasOf(width: number, height: number): HTMLCanvasElement {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

export async function fromCanvas(
  canvas: HTMLCanvasElement,
  name: string,
  type: "image/png" | "image/jpeg" = "image/png",
): Promise<Picture> {
  const blob = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, type, 0.92));
  if (!blob) throw new PictureError(type);
  return shown({ id: newId(), name, width: canvas.width, height: canvas.height, blob });
}

/** A copy with a red rectangle around x1, y1, x2, y2 in px, as `seekvl.grounding.mark_object` draws it. */
export async function marked(picture: Picture, region: [number, number, number, number]): Promise<Picture> {
  const canvas = canvasOf(picture.width, picture.height);
  const context = canvas.getContext("2d");
  if (!context) throw new PictureError("canvas");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(await decoded(picture.blob), 0, 0, canvas.width, canvas.height);
  const thick = Math.max(2, Math.floor(Math.min(picture.width, picture.height) / 150)) + 1;
  const [x1, y1, x2, y2] = region.map(Math.round) as typeof region;
  context.strokeStyle = "rgb(255 0 0)";
  context.lineWidth = thick;
  context.strokeRect(x1 + thick / 2, y1 + thick / 2, x2 - x1 - thick, y2 - y1 - thick); // the line lies inside
  return fromCanvas(canvas, `${stem(picture.name)}-marked.png`);
}

/** Cuts a long scan into pages, top to bottom; each begins with the last lines of the one before. */
export async function cut(picture: Picture): Promise<Picture[]> {
  const element = await decoded(picture.blob);
  const height = Math.min(picture.height, Math.round(picture.width * PAGE));
  const step = Math.max(1, Math.round(height * (1 - SHARED)));
  const pages: Picture[] = [];
  for (let top = 0; ; top += step) {
    const rows = Math.min(height, picture.height - top);
    const canvas = canvasOf(picture.width, rows);
    canvas.getContext("2d")?.drawImage(element, 0, -top);
    pages.push(await fromCanvas(canvas, `${stem(picture.name)}-${pages.length + 1}.png`));
    if (top + rows >= picture.height) return pages;
  }
}

/** The pages of a PDF as pictures; the server draws them. */
export async function* pagesOf(
  file: Blob,
  name: string,
): AsyncGenerator<{ picture: Picture; page: number; pages: number }> {
  for await (const { page, pages, picture } of pdfPages(await dataUrl(file, "application/pdf"))) {
    yield { picture: await open(fromDataUrl(picture), `${stem(name)}-${page}.png`), page, pages };
  }
}

export function dataUrl(blob: Blob, type = blob.type): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(reader.error ?? new PictureError(type));
    reader.readAsDataURL(blob.type === type ? blob : new Blob([blob], { type }));
  });
}

/** A data: URL as a file; `fetch` of one is what the page's policy forbids. */
export function fromDataUrl(url: string): Blob {
  const [head = "", body = ""] = url.split(",", 2);
  const type = /^data:([^;]*)/.exec(head)?.[1] ?? "";
  return new Blob([Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0))], { type });
}

export const stem = (name: string) => name.replace(/\.[^.]*$/, "") || "picture";
