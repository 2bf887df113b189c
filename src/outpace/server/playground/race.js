// The race: one prompt and seed, accelerated and plain, one after the other; then a verdict, and a replay of both.

import { Answer } from "./answer.js";
import { make } from "./palette.js";
import { compare, Trace } from "./trace.js";

const seconds = (value) => `${value.toFixed(2)} s`;

class Lane {
  constructor(element, onChoose) {
    this.name = element.querySelector("h2 span");
    this.timer = element.querySelector(".timer");
    this.answer = new Answer(`the ${this.name.textContent} lane`, onChoose);
    element.append(this.answer.element);
    this.element = element;
    this.clear();
  }

  clear() {
    this.trace = null;
    this.answer.clear();
    this.time(0);
  }

  time(value) {
    this.timer.textContent = seconds(value);
  }
}

export class Race {
  // `ask(body, trace, onEvent, signal)` streams one answer; `say(text)` tells what is going on.
  constructor({ ask, say, onChoose }) {
    this.ask = ask;
    this.say = say;
    this.plain = new Lane(document.getElementById("lane-plain"), onChoose);
    this.fast = new Lane(document.getElementById("lane-fast"), onChoose);
    this.prompt = document.getElementById("race-prompt");
    this.verdict = document.getElementById("verdict");
    this.replayButton = document.getElementById("replay");
    this.both = document.querySelector(".lanes");
  }

  get lanes() {
    return [this.fast, this.plain];
  }

  // `body`: the request as the settings make it; `plain`: the `outpace` options that turn drafting off.
  async run(body, plain, prompt, signal) {
    for (const lane of this.lanes) lane.clear();
    this.verdict.replaceChildren();
    this.replayButton.hidden = true;
    this.both.classList.remove("beside");
    this.prompt.textContent = prompt;
    this.fast.name.textContent = body.outpace.method ?? "accelerated";
    const undrafted = { ...body, outpace: { ...plain, trace: true } };
    this.say("Reading the prompt once, so that both lanes find it cached.");
    await this.ask({ ...undrafted, max_tokens: 1 }, new Trace(), () => {}, signal);
    this.say(`First ${this.fast.name.textContent}, alone on the machine.`);
    await this._lane(this.fast, body, signal);
    this.say("Now plain, alone on the machine.");
    await this._lane(this.plain, undrafted, signal);
    const verdict = judge(this.plain, this.fast);
    this.verdict.replaceChildren(make("h2", "", verdict.title), ...verdict.lines.map((line) => make("p", "", line)));
    for (const lane of verdict.unit === "token" ? this.lanes : []) lane.answer.mark(verdict.at);
    this.replayButton.hidden = false;
    this.replayButton.scrollIntoView({ block: "nearest" });
    this.say(`${verdict.title}.`);
  }

  async _lane(lane, body, signal) {
    const trace = new Trace();
    const start = performance.now();
    const end = everyFrame(() => lane.time((performance.now() - start) / 1000));
    lane.answer.element.setAttribute("aria-busy", "true");
    lane.element.scrollIntoView({ block: "nearest" });
    try {
      await this.ask(body, trace, (event) => {
        lane.answer.add(event);
        lane.answer.tell(trace);
      }, signal);
      lane.trace = trace;
      lane.time(trace.seconds);
    } finally {
      end();
      lane.answer.element.removeAttribute("aria-busy");
      lane.answer.conclude(trace);
    }
    lane.time(trace.seconds);
  }

  // Both lanes at once, every step at the moment when it came.
  async replay(signal) {
    const runs = this.lanes.map((lane) => ({ lane, trace: lane.trace, next: 0 }));
    for (const { lane } of runs) lane.answer.clear();
    this.both.classList.add("beside");
    this.both.scrollIntoView({ block: "nearest" });
    this.say("Replay of both lanes at their recorded speed.");
    const start = performance.now();
    let stopped = false;
    await new Promise((done) => {
      const end = everyFrame(() => {
        const now = signal.aborted ? Infinity : (performance.now() - start) / 1000;
        for (const run of runs) advance(run, now);
        if (runs.some((run) => run.next < run.trace.steps.length)) return;
        stopped = signal.aborted;
        end();
        done();
      });
    });
    for (const { lane, trace } of runs) lane.answer.conclude(trace);
    const parted = compare(this.plain.trace, this.fast.trace);
    for (const lane of parted.unit === "token" && !parted.same ? this.lanes : []) lane.answer.mark(parted.at);
    this.say(stopped ? "Replay stopped; both answers are shown whole." : "Replay over.");
  }
}

function advance(run, now) {
  const { steps } = run.trace;
  while (run.next < steps.length && steps[run.next].t <= now) run.lane.answer.add({ step: steps[run.next++], changed: [] });
  run.lane.time(Math.min(now, run.trace.seconds));
}

// Call until told to stop; returns what stops it.
function everyFrame(call) {
  let handle = 0;
  let running = true;
  const tick = () => {
    call();
    if (running) handle = requestAnimationFrame(tick);
  };
  handle = requestAnimationFrame(tick);
  return () => {
    running = false;
    cancelAnimationFrame(handle);
  };
}

// What the race showed, in words: {title, lines, at, unit}.
export function judge(plain, fast) {
  const found = compare(plain.trace, fast.trace);
  const name = fast.name.textContent;
  const [slow, quick] = [plain.trace, fast.trace];
  const rates = [quick, slow].map((trace) => trace.figures().rate);
  const speeds = rates.every((rate) => rate) ? ` (${rates.map((rate) => rate.toFixed(1)).join(" against ")} tokens/s)` : "";
  if (found.same) {
    const n = slow.tokens.length;
    const what = found.unit === "token" ? `${n} tokens, the same ids and the same text` : `${[...slow.text].length} characters, the same text`;
    const times = `${seconds(quick.seconds)} against ${seconds(slow.seconds)}${speeds}`;
    const factor = slow.seconds / quick.seconds;
    const gain = Number.isFinite(factor) ? `, ${factor.toFixed(2)} × as fast as plain` : "";
    return { title: `Identical${gain}`, lines: [`${what}.`, `${times}.`], unit: "none", at: -1 };
  }
  const title = `They part at ${found.unit} ${found.at + 1}`;
  const lines = [`${before(slow, found)} Plain goes on with ${after(slow, found)}, ${name} with ${after(quick, found)}.`];
  const { exactness, notes = [] } = quick.summary ?? {};
  if (exactness === "identical") lines.push("The server declared the result identical, so this is a fault: please report it.");
  else if (exactness) lines.push(`The server declared the result as ${exactness}. ${notes.join(" ")}`.trim());
  if (speeds) lines.push(`Speed${speeds}.`);
  return { title, lines, unit: found.unit, at: found.at };
}

const LONG = 40; // characters of each answer that the verdict quotes

function cut(trace, { at, unit }) {
  const index = unit === "token" ? trace.tokens.slice(0, at).reduce((n, token) => n + token.shown.length, 0) : at;
  return [trace.text.slice(0, index), trace.text.slice(index)];
}

function before(trace, found) {
  const text = cut(trace, found)[0];
  return text ? `Both begin “${text.length > LONG ? "…" : ""}${text.slice(-LONG)}”.` : "They differ from the beginning.";
}

function after(trace, found) {
  const text = cut(trace, found)[1];
  return text ? `“${text.slice(0, LONG)}${text.length > LONG ? "…" : ""}”` : "nothing (it ends there)";
}
