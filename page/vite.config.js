import { readdirSync, readFileSync } from "node:fs";
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

export default defineConfig({
  base: "/page/",
  plugins: [react(), examples(), licences()],
  build: {
    outDir: "../seekvl/serve/page",
    emptyOutDir: true,
    modulePreload: false, // its helper would be the only script that is not ours
    assetsInlineLimit: 0,
    rollupOptions: {
      // names without hashes, so that a new build is a small change; the server tells copies apart by ETag
      output: { entryFileNames: "page.js", chunkFileNames: "[name].js", assetFileNames: "[name][extname]" },
    },
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000", "/health-check": "http://127.0.0.1:8000" } },
});
