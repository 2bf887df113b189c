// The page: settings, conversation, race, and who may use the server when.

import { ApiError, models, stream } from "./api.js";
import { Answer } from "./answer.js";
import { make } from "./palette.js";
import { Race } from "./race.js";
import { StepPanel } from "./steps.js";
import { Trace } from "./trace.js";

const at = (id) => document.getElementById(id);
const KEPT = ["temperature", "seed", "max-tokens", "method", "system"]; // settings that outlive a visit; never the key
const SAMPLES = [
  "Write a Python class for a stack with push, pop, peek and len, with docstrings.",
  "List the months of the year, each with its number of days, as JSON.",
  "Say the alphabet twice, letters separated by commas.",
];

const panel = new StepPanel(at("step"));
const chosen = (answer, step) => panel.show(answer, step);
const race = new Race({ ask, say, onChoose: chosen });
const conversation = []; // {role, content} of finished turns
let known = []; // models of the server
let running = null; // AbortController of what goes on

// -- settings ------------------------------------------------------------------------------------------------------

function stored(storage, name, value) {
  try {
    if (value === undefined) return storage().getItem(`outpace.${name}`);
    storage().setItem(`outpace.${name}`, value);
  } catch {
    // storage is blocked: settings last as long as the page
  }
  return null;
}
const local = () => localStorage;
const session = () => sessionStorage;

function request(messages) {
  const system = at("system").value.trim();
  const outpace = { trace: true };
  if (at("method").value) outpace.method = at("method").value;
  return {
    model: at("model").value || undefined,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: at("temperature").valueAsNumber,
    seed: at("seed").valueAsNumber,
    max_tokens: at("max-tokens").valueAsNumber,
    outpace,
  };
}

const current = () => known.find((model) => model.id === at("model").value) ?? known[0];

function offerMethods() {
  const wanted = at("method").value || stored(local, "method") || "";
  const { methods = [], method } = current() ?? {};
  const first = make("option", "", method ? `as the server was started (${method})` : "as the server was started");
  first.value = "";
  const options = methods.map(({ name, title }) => {
    const option = make("option", "", title ? `${name}: ${title}` : name);
    option.value = name;
    return option;
  });
  at("method").replaceChildren(first, ...options);
  at("method").value = methods.some(({ name }) => name === wanted) ? wanted : "";
}

async function findModels() {
  try {
    known = await models(at("api-key").value);
  } catch (error) {
    fail(error);
    return;
  }
  at("model").replaceChildren(
    ...known.map(({ id }) => {
      const option = make("option", "", id);
      option.value = id;
      return option;
    }),
  );
  at("model-field").hidden = known.length < 2;
  offerMethods();
  at("error").hidden = true;
  say(known.length ? `Ready: ${current().id}` : "");
}

function restoreSettings() {
  for (const id of KEPT) {
    const value = stored(local, id);
    if (value !== null && id !== "method") at(id).value = value;
    at(id).addEventListener("change", () => stored(local, id, at(id).value));
  }
  at("api-key").value = stored(session, "api-key") ?? "";
  at("api-key").addEventListener("change", () => {
    stored(session, "api-key", at("api-key").value);
    findModels();
  });
  at("model").addEventListener("change", offerMethods);
  at("fields").addEventListener("submit", (event) => event.preventDefault());
}

// -- one thing at a time -------------------------------------------------------------------------------------------

function say(text) {
  at("status").textContent = text;
}

function fail(error) {
  say("");
  if (!(error instanceof ApiError)) console.error(error);
  at("error").textContent = error instanceof ApiError ? error.message : `The page failed: ${error.message}. Reload it.`;
  at("error").hidden = false;
  if (error.message.includes("API key")) at("settings").open = true;
}

function busy(now) {
  const focused = document.activeElement;
  at("send").hidden = now;
  at("stop").hidden = !now;
  at("replay").disabled = at("clear").disabled = now;
  if (now && focused === at("send")) at("stop").focus();
  if (!now && (focused === at("stop") || focused === document.body)) at("prompt").focus();
}

// Run a task that can be stopped. Returns whether it came to its end.
async function attempt(task) {
  if (running) return false;
  running = new AbortController();
  at("error").hidden = true;
  busy(true);
  try {
    await task(running.signal);
    return true;
  } catch (error) {
    if (error.name === "AbortError") say("Stopped. What came is kept.");
    else fail(error);
    return false;
  } finally {
    running = null;
    busy(false);
  }
}

// One answer: chunks go into `trace`, what they change to `onEvent`.
async function ask(body, trace, onEvent, signal) {
  const sent = performance.now();
  for await (const chunk of stream(body, { key: at("api-key").value, signal })) {
    onEvent(trace.add(chunk, (performance.now() - sent) / 1000));
  }
}

// -- chat ----------------------------------------------------------------------------------------------------------

async function chat(prompt) {
  const answer = new Answer(`answer ${conversation.length / 2 + 1}`, chosen);
  const turn = make("article", "turn", make("p", "asked", prompt), answer.element);
  turn.setAttribute("aria-label", `Turn ${conversation.length / 2 + 1}`);
  at("intro").hidden = true;
  at("clear").hidden = false;
  at("log").append(turn);
  at("main").scrollTop = at("main").scrollHeight;
  at("prompt").value = "";
  answer.element.setAttribute("aria-busy", "true");
  say("Answering. Escape stops it.");
  const trace = new Trace();
  const question = { role: "user", content: prompt };
  const whole = await attempt((signal) =>
    ask(request([...conversation, question]), trace, (event) => following(() => {
      answer.add(event);
      answer.tell(trace);
    }), signal),
  );
  answer.element.removeAttribute("aria-busy");
  if (trace.tokens.length) {
    following(() => answer.conclude(trace));
    conversation.push(question, { role: "assistant", content: trace.text });
  } else {
    turn.remove();
    at("intro").hidden = at("log").childElementCount > 0;
    at("clear").hidden = !at("log").childElementCount;
    at("prompt").value ||= prompt; // nothing came: it is there to be sent again
  }
  if (whole) say(`Answered in ${trace.seconds.toFixed(1)} s.`);
}

// Change the page and stay at its end, if that is where the reader is.
function following(change) {
  const main = at("main");
  const end = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
  change();
  if (end) main.scrollTop = main.scrollHeight;
}

function clearConversation() {
  panel.close();
  conversation.length = 0;
  at("log").replaceChildren();
  at("intro").hidden = false;
  at("clear").hidden = true;
  say("A new conversation.");
  at("prompt").focus();
}

// -- race ----------------------------------------------------------------------------------------------------------

async function runRace(prompt) {
  const body = request([{ role: "user", content: prompt }]);
  if (body.outpace.method === "plain") {
    fail(new ApiError("Both lanes would be plain. Choose another method under Settings, then race again."));
    return;
  }
  const methods = current()?.methods ?? [];
  const plain = methods.some(({ name }) => name === "plain") ? { method: "plain" } : { max_draft: 0 };
  panel.close();
  body.user = `race-${Date.now()}-${Math.random().toString(36).slice(2)}`; // nobody's drafts or prefixes but its own
  await attempt((signal) => race.run(body, plain, prompt, signal));
}

// -- the page ------------------------------------------------------------------------------------------------------

const racing = () => location.hash === "#race";

function showView() {
  at("chat-view").hidden = racing();
  at("race-view").hidden = !racing();
  at("send").textContent = racing() ? "Race" : "Send";
  for (const [id, here] of [["to-chat", !racing()], ["to-race", racing()]]) {
    if (here) at(id).setAttribute("aria-current", "page");
    else at(id).removeAttribute("aria-current");
  }
  panel.close();
}

function submit(event) {
  event?.preventDefault();
  const prompt = at("prompt").value.trim();
  if (!prompt || running) return;
  if (!at("fields").checkValidity()) {
    at("settings").open = true;
    at("fields").reportValidity();
    return;
  }
  if (racing()) runRace(prompt);
  else chat(prompt);
}

function themes() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => (at("theme").textContent = dark() ? "Light theme" : "Dark theme");
  at("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    stored(local, "theme", root.dataset.theme);
    label();
  });
  system.addEventListener("change", label);
  label();
}

function samples() {
  for (const text of SAMPLES) {
    const button = make("button", "link", text);
    button.type = "button";
    button.addEventListener("click", () => {
      at("prompt").value = text;
      at("prompt").focus();
    });
    at("samples").append(make("li", "", button));
  }
}

at("composer").addEventListener("submit", submit);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", clearConversation);
at("replay").addEventListener("click", () => {
  panel.close();
  attempt((signal) => race.replay(signal));
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if (panel.open) panel.close();
});
window.addEventListener("hashchange", showView);

themes();
samples();
restoreSettings();
showView();
findModels();
at("prompt").focus();
