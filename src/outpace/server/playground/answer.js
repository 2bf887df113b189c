// One answer on the page: its text in the colours of who drafted it, a strip with a bar per step, legend and figures.

import { look, make } from "./palette.js";

const SVG = "http://www.w3.org/2000/svg";

export class Answer {
  // `onChoose(answer, step)` is called when a person chooses a step.
  constructor(name, onChoose) {
    this.onChoose = onChoose;
    this.words = make("div", "words");
    this.legend = make("ul", "legend");
    this.legend.setAttribute("aria-label", "Who drafted the tokens");
    this.figures = make("dl", "figures");
    this.notes = make("p", "notes");
    this.bars = document.createElementNS(SVG, "svg");
    this.bars.setAttribute("preserveAspectRatio", "none");
    this.bars.setAttribute("aria-hidden", "true");
    this.slider = make("input");
    Object.assign(this.slider, { type: "range", min: 0, step: 1 });
    this.slider.setAttribute("aria-label", `Steps of ${name}`);
    this.strip = make("div", "strip", this.bars, this.slider);
    this.strip.title = "A bar per step: up, the tokens it gave; down, the drafted ones that were rejected.";
    this.element = make("div", "answer", this.words, this.strip, this.legend, this.figures, this.notes);
    this.words.addEventListener("click", (event) => this._clicked(event));
    this.slider.addEventListener("input", () => this.choose(Number(this.slider.value)));
    this.slider.addEventListener("focus", () => this.choose(Number(this.slider.value)));
    this.clear();
  }

  clear() {
    this.steps = [];
    this.chosen = null;
    this.spans = new Map(); // token -> its element
    this._up = 4; // most tokens of a step so far, and most rejected ones: the height of the bars
    this._down = 2;
    this._before = "";
    this.words.replaceChildren();
    this.bars.replaceChildren();
    this.legend.replaceChildren();
    this.figures.replaceChildren();
    this.notes.textContent = "";
    this.strip.hidden = true;
    this.element.removeAttribute("aria-busy");
  }

  add({ step, changed }) {
    for (const token of changed) this.spans.get(token).textContent = token.shown;
    if (!step) return;
    const group = make("span", "step");
    group.dataset.step = this.steps.length;
    for (const token of step.tokens) {
      const inCode = (this._before.match(/^```/gm) ?? []).length % 2;
      const span = make("span", look(token.source) + (inCode ? " code" : ""), token.shown);
      if (token.source) span.title = token.source === "target" ? "the model's own" : `drafted by ${token.source}`;
      this.spans.set(token, span);
      this._before += token.shown;
      group.append(span);
    }
    this.words.append(group);
    this.steps.push(step);
    this._bar(step);
  }

  // A bar: up, the tokens that the step gave; down, the drafted ones that were rejected.
  _bar(step) {
    const x = this.steps.length - 1;
    const kept = new Set(step.draft?.accepted);
    const lost = (step.draft?.sources ?? []).filter((_, node) => !kept.has(node));
    step.tokens.forEach((token, i) => this.bars.append(rectangle(x, -i - 1, token.source)));
    lost.forEach((source, i) => this.bars.append(rectangle(x, i + 0.3, source, "lost")));
    this._up = Math.max(this._up, step.tokens.length);
    this._down = Math.max(this._down, lost.length);
    const n = this.steps.length;
    this.bars.setAttribute("viewBox", `0 ${-this._up} ${n} ${this._up + this._down + 0.5}`);
    this.strip.style.setProperty("--steps", n);
    this.strip.hidden = false;
    this.slider.max = n - 1;
    if (this.chosen === null) this.slider.value = n - 1;
  }

  // Legend and figures as they stand.
  tell(trace) {
    const counts = trace.traced ? [...trace.bySource()] : [];
    this.legend.replaceChildren(
      ...counts.map(([source, n]) => make("li", "", make("span", look(source), source), ` ${n}`)),
    );
    const { tokens, rate, perStep, acceptance } = trace.figures();
    const shown = [
      ["tokens", tokens === null ? "–" : String(tokens)],
      ["tokens/s", rate === null ? "–" : rate.toFixed(1)],
      ["tokens/step", perStep === null ? "–" : perStep.toFixed(2)],
      ["accepted", acceptance === null ? "–" : `${Math.round(100 * acceptance)} %`],
    ];
    this.figures.replaceChildren(...shown.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value))));
  }

  // What the server says of the whole, once it is over.
  conclude(trace) {
    this.tell(trace);
    const { method, exactness, notes = [] } = trace.summary ?? {};
    const parts = [];
    if (!trace.traced) parts.push("This server does not say who drafted what.");
    const worth = method !== "plain" && exactness ? `, ${MEANING[exactness] ?? exactness}` : "";
    if (method) parts.push(`Method ${method}${worth}.`);
    for (const note of notes) parts.push(/[.!?]$/.test(note) ? note : `${note}.`);
    if (trace.finish === "length") parts.push("Cut at the most tokens allowed under Settings.");
    this.notes.textContent = parts.join(" ");
  }

  _clicked(event) {
    const group = event.target.closest(".step");
    if (!group || !document.getSelection().isCollapsed) return; // whoever marks text wants to copy it
    this.choose(Number(group.dataset.step));
  }

  choose(index) {
    const step = this.steps[index];
    if (!step) return;
    this.unchoose();
    this.chosen = index;
    this.slider.value = index;
    this.slider.setAttribute("aria-valuetext", brief(step, this.steps.length));
    this.strip.classList.add("chosen");
    this.words.children[index].classList.add("chosen");
    this.onChoose(this, step);
  }

  unchoose() {
    if (this.chosen !== null) this.words.children[this.chosen]?.classList.remove("chosen");
    this.strip.classList.remove("chosen");
    this.chosen = null;
  }

  // Point at the token where two answers part.
  mark(index) {
    [...this.spans.values()][index]?.classList.add("parts");
  }
}

const MEANING = {
  identical: "the same tokens as plain decoding",
  distribution: "tokens drawn from the same distribution as plain decoding's",
  approximate: "an approximation of plain decoding",
};

function rectangle(x, y, source, more = "") {
  const rect = document.createElementNS(SVG, "rect");
  const box = { x: x + 0.08, y: y + 0.06, width: 0.84, height: 0.88 };
  for (const [name, value] of Object.entries(box)) rect.setAttribute(name, value);
  rect.setAttribute("class", `${look(source)} ${more}`);
  return rect;
}

export function brief(step, of) {
  const place = `Step ${step.index + 1} of ${of}`;
  if (!step.draft) return `${place}: the first token, from reading the prompt`;
  const drafted = step.draft.tokens.length;
  return drafted ? `${place}: ${step.draft.accepted.length} of ${drafted} drafted tokens accepted` : `${place}: nothing drafted`;
}
