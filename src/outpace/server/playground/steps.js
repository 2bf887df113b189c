// The tree of one step: what was drafted after the text so far, by whom, and what the model kept.

import { brief } from "./answer.js";
import { look, make } from "./palette.js";
import { tree } from "./trace.js";

export class StepPanel {
  constructor(element) {
    this.element = element;
    this.title = element.querySelector("h2");
    this.body = element.querySelector("#step-body");
    this.answer = null;
    element.querySelector("button").addEventListener("click", () => this.close());
  }

  get open() {
    return !this.element.hidden;
  }

  show(answer, step) {
    if (this.answer !== answer) this.answer?.unchoose();
    this.answer = answer;
    this.title.textContent = brief(step, answer.steps.length).split(":")[0];
    this.body.replaceChildren(make("p", "", account(step)), ...(step.draft?.tokens.length ? [whole(answer, step)] : []));
    this.element.hidden = false;
    answer.words.children[step.index]?.scrollIntoView({ block: "nearest" }); // the panel may have covered it
  }

  close() {
    const inside = this.element.contains(document.activeElement);
    this.element.hidden = true;
    if (inside) this.answer?.slider.focus({ preventScroll: true });
    this.answer?.unchoose();
    this.element.hidden = true; // focus on the slider would have opened it again
    this.answer = null;
  }
}

const count = (n, one) => (n === 1 ? `one ${one}` : `${n} ${one}s`);

function account(step) {
  if (!step.draft) return "The first token comes from reading the prompt. Nothing was drafted for it.";
  const drafted = step.draft.tokens.length;
  const accepted = step.draft.accepted.length;
  const own = step.tokens.length - accepted;
  if (!drafted) return "Nothing was drafted: a plain step, one token of the model's own.";
  const parts = [`${count(drafted, "token")} drafted, ${accepted || "none"} accepted`];
  parts.push(own > 0 ? "and then one of the model's own" : "and there the answer ends");
  const text = parts.join(", ");
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}

const CONTEXT = 32; // characters of the text so far that stand at the root

function whole(answer, step) {
  const text = answer.steps.slice(0, step.index).flatMap(({ tokens }) => tokens.map((token) => token.shown)).join("");
  const root = make("span", "after", `${text.length > CONTEXT ? "…" : ""}${visible(text.slice(-CONTEXT))}`);
  return make("ul", "tree", make("li", "", root, branches(tree(step))));
}

// Nested lists: a list item is a stretch of tokens without a fork, cut where the drafter or the verdict changes; the
// branches that follow it are a list inside.
function branches(items) {
  const list = make("ul", "tree");
  for (const item of items) {
    const entry = make("li");
    let next = [item];
    while (next.length === 1) next = stretch(entry, next[0]);
    if (next.length) entry.append(branches(next));
    list.append(entry);
  }
  return list;
}

function stretch(entry, first) {
  const fate = first.node === null ? "own" : first.accepted ? "accepted" : "rejected";
  const run = make("span", `run ${fate}`);
  let item = first;
  for (;;) {
    const node = make("span", `node ${look(item.source)}`, visible(item.text));
    node.dataset.source = item.source;
    run.append(node);
    const [child, ...others] = item.children;
    const same = child && child.source === first.source && child.accepted === first.accepted;
    if (others.length || !same || child.node === null) break;
    item = child;
  }
  const by = fate === "own" ? "the model's own" : `${first.source}, ${fate}`;
  run.append(make("span", "by", by));
  entry.append(run);
  return item.children;
}

// White space as signs that can be seen.
function visible(text) {
  return text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(no text)";
}
