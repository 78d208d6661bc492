import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

/** Copies the example pictures of the repository into the built page. */
const examples = () => ({
  name: "examples",
  generateBundle() {
    for (const name of ["chart.png", "shapes.png", "sign.png"]) {
      const source = readFileSync(new URL(`../examples/${name}`, import.meta.url));
      this.emitFile({ type: "asset", fileName: `examples/${name}`, source });
    }
  },
});

/** Writes down the licences of all packages that the built script holds. */
const licences = () => ({
  name: "licences",
  generateBundle(_, bundle) {
    const packages = new Set();
    for (const chunk of Object.values(bundle)) {
      for (const id of Object.keys(chunk.modules ?? {})) {
        const found = /^\0?(.*\/node_modules\/(?:@[^/]+\/)?[^/]+)\//.exec(id);
        if (found) packages.add(found[1]);
      }
    }
    const texts = [...packages].sort().map((folder) => {
      const { name, version, license } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
      const file = readdirSync(folder).find((each) => /^licen[cs]e/i.test(each));
      const text = file ? readFileSync(`${folder}/${file}`, "utf8").trim() : license;
      return `${name} ${version}, ${license}\n\n${text}\n`;
    });
    this.emitFile({ type: "asset", fileName: "licences.txt", source: texts.join(`\n${"-".repeat(80)}\n\n`) });
  },
});

/** Paths of all files below a folder, but for packages and what an editor hides. */
const below = (folder) =>
  readdirSync(folder, { withFileTypes: true })
    .filter(({ name }) => name !== "node_modules" && !name.startsWith("."))
    .flatMap((entry) => {
      if (entry.isDirectory()) return below(`${folder}/${entry.name}`).map((path) => `${entry.name}/${path}`);
      return [entry.name];
    })
    .sort();

/** Writes down what was built from what: a test holds sources and built files to it. */
const sums = () => {
  let [sources, built] = ["", ""];
  const lines = (folder) =>
    below(folder)
      .filter((path) => path !== "sums.txt")
      .map((path) => `${createHash("sha256").update(readFileSync(`${folder}/${path}`)).digest("hex")}  ${path}\n`);
  return {
    name: "sums",
    apply: "build",
    configResolved({ root, build }) {
      [sources, built] = [root, resolve(root, build.outDir)];
    },
    closeBundle() {
      writeFileSync(`${built}/sums.txt`, ["sources\n", ...lines(sources), "built\n", ...lines(built)].join(""));
    },
  };
};

export default defineConfig({
  base: "/page/",
  plugins: [react(), examples(), licences(), sums()],
  build: {
    outDir: "../seekvl/serve/page",
    emptyOutDir: true,
    modulePreload: false, // its helper would be the only script that is not ours
    assetsInlineLimit: 0,
    rollupOptions: {
      // what reads answers is a file of its own, which tests ask in a browser
      input: { page: "index.html", grounding: "src/grounding.ts" },
      preserveEntrySignatures: "exports-only",
      // names without hashes, so that a new build is a small change; the server tells copies apart by ETag
      output: { entryFileNames: "[name].js", chunkFileNames: "[name].js", assetFileNames: "[name][extname]" },
    },
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000", "/health-check": "http://127.0.0.1:8000" } },
});
