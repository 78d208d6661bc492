import { Component, StrictMode, type ReactNode } from "react";
import { createRoot } from "react-dom/client";
import { App } from "./App";
import { connect, get, loadHistory, say } from "./store";
import "./style.css";

document.documentElement.lang = get().lang === "zh" ? "zh-CN" : "en";
document.documentElement.dataset.theme = get().theme;
void loadHistory();
void connect();

/** Says what broke, where else there would be an empty page; the history is kept. */
class Whole extends Component<{ children: ReactNode }, { broken: string | null }> {
  state = { broken: null };
  static getDerivedStateFromError(error: unknown) {
    return { broken: String(error) };
  }
  render() {
    if (this.state.broken === null) return this.props.children;
    return (
      <main className="broken" role="alert">
        <p>{say("broken")}</p>
        <pre>{this.state.broken}</pre>
        <button type="button" className="solid" onClick={() => location.reload()}>
          {say("retry")}
        </button>
      </main>
    );
  }
}

const root = document.getElementById("root");
if (root) {
  createRoot(root).render(
    <StrictMode>
      <Whole>
        <App />
      </Whole>
    </StrictMode>,
  );
}
