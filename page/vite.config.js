import { readFileSync } from "node:fs";
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

export default defineConfig({
  base: "/page/",
  plugins: [react(), examples()],
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
