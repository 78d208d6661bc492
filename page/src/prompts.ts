/** What the mode buttons make of what was typed. */

import type { Mode } from "./chat";

/** The bundled models know the wordings they were trained with, in English. */
export const isNano = (model: string) => /seekvl-nano/.test(model);

const DEFAULTS: Record<Mode, { nano: string; en: string; zh: string }> = {
  ask: { nano: "", en: "", zh: "" },
  describe: { nano: "Describe the picture.", en: "Describe this image in detail.", zh: "请详细描述这张图片。" },
  read: { nano: "What does the sign say?", en: "Read all the text in the image.", zh: "请读出图片中的所有文字。" },
  locate: { nano: "", en: "", zh: "" },
  grounded: { nano: "Describe the picture.", en: "Describe this image in detail.", zh: "请详细描述这张图片。" },
  compare: {
    nano: "What is in the second picture?",
    en: "What is different between the two images?",
    zh: "这两张图片有什么不同？",
  },
};

/** What is asked where nothing is typed; empty where something must be. */
export function unsaid(mode: Mode, model: string, lang: "en" | "zh"): string {
  return DEFAULTS[mode][isNano(model) ? "nano" : lang];
}

/** What the model is told. */
export function prompt(mode: Mode, typed: string, model: string, lang: "en" | "zh"): string {
  const text = typed.trim() || unsaid(mode, model, lang);
  if (mode === "locate") {
    const phrase = text.replace(/<\|\/?ref\|>/g, "").replace(/\s+/g, " ");
    // nano was trained without marks in questions
    return isNano(model) ? `Where is ${phrase}?` : `Locate <|ref|>${phrase}<|/ref|> in the given image.`;
  }
  return mode === "grounded" && !text.includes("<|grounding|>") ? `<|grounding|>${text}` : text;
}

/** The question of in-context grounding (2412.10302), for two pictures, the first with a red rectangle. */
export const IN_CONTEXT =
  "In the first image, an object within the red rectangle is marked. " +
  "Locate the object of the same category in the second image.";

/** A question about a region, for one picture with a red rectangle. */
export const aboutRegion = (model: string, lang: "en" | "zh") =>
  lang === "zh" && !isNano(model) ? "红色方框里是什么？" : "What is the object within the red rectangle?";
