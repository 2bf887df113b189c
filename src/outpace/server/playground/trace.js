// What a stream said about one answer: its tokens, who drafted each, and the draft of every step. No page here.

// One token of an answer. `text` is the token alone; `shown` is its part of the answer's text, which may come later
// (half a character) or never (the token that ends the answer).
// A step: {index, tokens: [{id, text, source, shown}], draft: null | {tokens, ids, parents, sources, accepted}, t}

export class Trace {
  constructor() {
    this.steps = [];
    this.tokens = [];
    this.text = "";
    this.summary = null; // the `outpace` object of the last chunk: method, exactness, notes, stats
    this.finish = null;
    this.traced = false; // whether the server says who drafted what
    this.drafted = 0;
    this.accepted = 0;
    this._drafters = new Set();
    this._unplaced = []; // tokens whose text has not come
  }

  // Take in one chunk of the stream; `now`: seconds since the request was sent, used where the server gives no time.
  // Returns {step, changed}: the new step or null, and tokens of earlier steps whose `shown` grew.
  add(chunk, now) {
    const choice = chunk.choices?.[0];
    const content = choice?.delta?.content ?? "";
    const told = chunk.outpace ?? {};
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    if (told.stats) this.summary = told;
    this.traced ||= Boolean(told.tokens);
    const untold = content && !this.traced ? [{ id: null, text: content, source: null }] : [];
    const tokens = told.tokens ?? untold; // a step may take several chunks: the first tells of it
    const step = tokens.length ? this._step(tokens, told.draft ?? null, told.t ?? now) : null;
    this.text += content;
    const changed = this._place(content).filter((token) => !step || !step.tokens.includes(token));
    return { step, changed };
  }

  _step(tokens, draft, t) {
    const step = { index: this.steps.length, draft, t, tokens: tokens.map((token) => ({ ...token, shown: "" })) };
    this.steps.push(step);
    this.tokens.push(...step.tokens);
    this._unplaced.push(...step.tokens);
    if (draft) {
      this.drafted += draft.tokens.length;
      this.accepted += draft.accepted.length;
      for (const source of draft.sources) this._drafters.add(source);
    }
    return step;
  }

  // Share out text among the tokens that wait for theirs. The stream's text is what counts: all of it is shown, and
  // where a token's own text differs (a leading space, part of a character) it goes to the nearest one.
  _place(content) {
    const changed = new Set();
    let rest = content;
    let last = null;
    while (rest && this._unplaced.length) {
      const token = this._unplaced[0];
      const at = token.text ? rest.indexOf(token.text) : 0;
      if (at < 0 || at > 4) {
        const later = this._unplaced.findIndex((other, i) => i && other.text && within(rest, other.text, 8));
        if (later < 0) break;
        this._unplaced.splice(0, later); // theirs is part of a character that the later one completes
        continue;
      }
      token.shown = rest.slice(0, at + token.text.length);
      rest = rest.slice(token.shown.length);
      changed.add((last = this._unplaced.shift()));
    }
    if (rest) {
      last = this._unplaced.shift() ?? last ?? this.tokens.at(-1);
      if (last) {
        last.shown += rest;
        changed.add(last);
      }
    }
    return [...changed];
  }

  // Seconds, by the server's clock where it tells.
  get seconds() {
    return this.steps.at(-1)?.t ?? 0;
  }

  // The first token comes from reading the prompt, not from a step that decodes.
  figures() {
    const stats = this.summary?.stats;
    if (!this.traced && !stats) return { tokens: null, rate: null, perStep: null, acceptance: null };
    const decoding = this.steps.filter((step) => step.draft).length;
    const n = this.tokens.length;
    const spent = this.steps.length > 1 ? this.seconds - this.steps[0].t : 0;
    return {
      tokens: stats?.tokens ?? n,
      rate: stats?.tokens_per_s ?? (spent > 0 ? (n - this.steps[0].tokens.length) / spent : null),
      perStep: stats?.mean_accepted ?? (decoding ? (n - 1) / decoding : null),
      acceptance: stats ? (this.drafted ? stats.acceptance_rate : null) : this.drafted ? this.accepted / this.drafted : null,
    };
  }

  // source -> tokens of the answer, in order of appearance, the model's own first. Who drafted in vain has none.
  bySource() {
    const counts = new Map([["target", 0]]);
    for (const { source } of this.tokens) {
      if (source !== null) counts.set(source, (counts.get(source) ?? 0) + 1);
    }
    for (const source of this._drafters) counts.set(source, counts.get(source) ?? 0);
    return counts;
  }
}

function within(text, part, reach) {
  const at = text.indexOf(part);
  return at >= 0 && at <= reach;
}

// The tree of a step: [{node, text, source, accepted, children}] below the last committed token. The target's own token,
// which no drafter proposed here, is a child of the last accepted node and has node null.
export function tree(step) {
  const { tokens, parents, sources, accepted } = step.draft;
  const kept = new Set(accepted);
  const root = { children: [] };
  const nodes = tokens.map((text, node) => ({ node, text, source: sources[node], accepted: kept.has(node), children: [] }));
  nodes.forEach((item, node) => (nodes[parents[node]] ?? root).children.push(item));
  const own = step.tokens[accepted.length];
  if (own) {
    const end = accepted.length ? nodes[accepted.at(-1)] : root;
    end.children.unshift({ node: null, text: own.text, source: "target", accepted: true, children: [] });
  }
  const order = (item) => {
    item.children.sort((a, b) => b.accepted - a.accepted || (a.node ?? -1) - (b.node ?? -1));
    item.children.forEach(order);
  };
  order(root);
  return root.children;
}

// Where two answers part: {same: true}, or {same: false, at} with the first token that differs. Token ids decide where
// both streams have them, and the texts have to agree as well.
export function compare(one, other) {
  const ids = [one, other].map((trace) => trace.tokens.map((token) => token.id));
  const counted = ids.flat().every((id) => id !== null && id !== undefined);
  const [a, b] = counted ? ids : [[...one.text], [...other.text]];
  const at = a.findIndex((item, i) => item !== b[i]);
  const first = at >= 0 ? at : a.length < b.length ? a.length : -1;
  if (first >= 0) return { same: false, at: first, unit: counted ? "token" : "character" };
  return one.text === other.text ? { same: true, unit: counted ? "token" : "character" } : { same: false, at: a.length, unit: "token" };
}
