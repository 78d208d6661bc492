/** One of several: chips and tabs that the arrow keys move through, with a single stop of the Tab key. */

import { useRef } from "react";

interface Props<Value extends string> {
  /** What is chosen, for those who hear it. */
  label: string;
  options: readonly (readonly [Value, string])[];
  value: Value;
  /** Told whether it was pointed at; keys stay where they are. */
  onChange: (value: Value, pointed: boolean) => void;
  kind?: "radio" | "tab";
  className?: string;
  /** The panel that tabs change. */
  controls?: string;
}

const STEPS: Record<string, number> = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

export function Choice<Value extends string>(props: Props<Value>) {
  const { label, options, value, onChange, kind = "radio", className, controls } = props;
  const group = useRef<HTMLDivElement>(null);
  const onKey = (event: React.KeyboardEvent) => {
    const step = STEPS[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const at = (options.findIndex(([each]) => each === value) + step + options.length) % options.length;
    const next = options[at];
    if (!next) return;
    onChange(next[0], false);
    group.current?.querySelectorAll<HTMLElement>(`[role="${kind}"]`)[at]?.focus();
  };
  return (
    <div ref={group} className={className} role={kind === "radio" ? "radiogroup" : "tablist"} aria-label={label} onKeyDown={onKey}>
      {options.map(([each, words]) => (
        <button
          key={each}
          type="button"
          role={kind}
          {...(kind === "radio" ? { "aria-checked": each === value } : { "aria-selected": each === value, "aria-controls": controls })}
          tabIndex={each === value ? 0 : -1}
          className={kind === "radio" ? "chip" : "tab"}
          onClick={(event) => onChange(each, event.detail > 0)}
        >
          {words}
        </button>
      ))}
    </div>
  );
}
