// One look per drafter, given out as they appear: a colour and an underline of its own (style.css, .s0 to .s7).

const LOOKS = 8;
const slots = new Map([["suffix", 0], ["recycling", 1]]); // the default method's look the same on every visit

// CSS classes of a token by its source. The target's own tokens, and those of a server that does not tell, are plain.
export function look(source) {
  if (source === "target" || source === null || source === undefined) return "tok";
  if (!slots.has(source)) slots.set(source, slots.size % LOOKS);
  return `tok s${slots.get(source)}`;
}

// An element with text and children. Text goes in as text, never as markup.
export function make(tag, classes = "", ...content) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  element.append(...content);
  return element;
}
