import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { App } from "./App";
import { connect, get, loadHistory } from "./store";
import "./style.css";

document.documentElement.lang = get().lang === "zh" ? "zh-CN" : "en";
document.documentElement.dataset.theme = get().theme;
void loadHistory();
void connect();

const root = document.getElementById("root");
if (root) {
  createRoot(root).render(
    <StrictMode>
      <App />
    </StrictMode>,
  );
}
