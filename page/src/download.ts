/** Boxes of an answer as files: drawn as PNG and SVG, as data in our JSON and in COCO's. */

import { colours, pixels, type Box } from "./grounding";
import { canvasOf, dataUrl, decoded, stem, type Picture } from "./pictures";

export type Format = "png" | "svg" | "json" | "coco";

export async function download(format: Format, picture: Picture, boxes: Box[], confidences: (number | null)[]) {
  const name = `${stem(picture.name)}-boxes`;
  if (format === "png") return save(await png(picture, boxes), `${name}.png`);
  if (format === "svg") return save(text(await svg(picture, boxes), "image/svg+xml"), `${name}.svg`);
  const data = format === "json" ? plain(picture, boxes, confidences) : coco(picture, boxes, confidences);
  return save(text(JSON.stringify(data, null, 2), "application/json"), `${name}.${format === "coco" ? "coco." : ""}json`);
}

export function save(blob: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export const text = (content: string, type: string) => new Blob([content], { type });

const escaped = (words: string) =>
  words.replace(/[\u0000-\u001f\u007f-\u009f\ufffe\uffff]/g, " ").replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

async function svg(picture: Picture, boxes: Box[]): Promise<string> {
  const { width, height } = picture;
  const thick = Math.max(2, Math.floor(Math.min(width, height) / 150));
  const size = Math.max(11, Math.round(Math.min(width, height) / 24));
  const ink = colours(boxes);
  const drawn = boxes.map((box, index) => {
    const [x1, y1, x2, y2] = pixels(box, width, height);
    const label = escaped(box.label);
    const plate = Math.round(measure(box.label, size)) + 8;
    const top = y1 >= size + 6 ? y1 - size - 6 : y1;
    return (
      `<rect x="${x1}" y="${y1}" width="${x2 - x1}" height="${y2 - y1}" fill="none" stroke="${ink[index]}" ` +
      `stroke-width="${thick}"><title>${label} ${box.corners.join(" ")}</title></rect>` +
      (label && `<rect x="${x1}" y="${top}" width="${plate}" height="${size + 6}" fill="${ink[index]}"/>` +
        `<text x="${x1 + 4}" y="${top + size}" font-family="sans-serif" font-size="${size}" fill="#fff">${label}</text>`)
    );
  });
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">` +
    `<image width="${width}" height="${height}" href="${await dataUrl(picture.blob)}"/>${drawn.join("")}</svg>\n`
  );
}

/** The width of words in px. */
export function measure(words: string, size: number): number {
  measuring ??= canvasOf(1, 1).getContext("2d");
  if (!measuring) return words.length * size * 0.6;
  measuring.font = `${size}px sans-serif`;
  return measuring.measureText(words).width;
}
let measuring: CanvasRenderingContext2D | null = null;

async function png(picture: Picture, boxes: Box[]): Promise<Blob> {
  const canvas = canvasOf(picture.width, picture.height);
  const context = canvas.getContext("2d");
  if (!context) throw new Error("no canvas");
  context.drawImage(await decoded(text(await svg(picture, boxes), "image/svg+xml")), 0, 0);
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no PNG"))), "image/png"),
  );
}

const rounded = (values: number[]) => values.map((value) => Math.round(value * 100) / 100);

function plain({ name, width, height }: Picture, boxes: Box[], confidences: (number | null)[]) {
  return {
    picture: { name, width, height },
    boxes: boxes.map((box, index) => ({
      label: box.label,
      box: box.corners,
      box_px: rounded(pixels(box, width, height)),
      confidence: confidences[index] ?? null,
    })),
  };
}

function coco({ name, width, height }: Picture, boxes: Box[], confidences: (number | null)[]) {
  const labels = [...new Set(boxes.map((box) => box.label))];
  return {
    images: [{ id: 1, file_name: name, width, height }],
    categories: labels.map((label, index) => ({ id: index + 1, name: label })),
    annotations: boxes.map((box, index) => {
      const [x1, y1, x2, y2] = pixels(box, width, height);
      return {
        id: index + 1,
        image_id: 1,
        category_id: labels.indexOf(box.label) + 1,
        bbox: rounded([x1, y1, x2 - x1, y2 - y1]),
        area: Math.round((x2 - x1) * (y2 - y1)),
        iscrowd: 0,
        ...(confidences[index] == null ? {} : { score: confidences[index] }),
      };
    }),
  };
}
