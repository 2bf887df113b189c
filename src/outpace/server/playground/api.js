// The server's API: what can be chosen, and one streamed answer. Errors come out as sentences for a person.

const url = (path) => new URL(`../v1/${path}`, document.baseURI);

export class ApiError extends Error {}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function answerTo(request) {
  let response;
  try {
    response = await request();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. See whether outpace serve still runs, then try again.");
  }
  if (!response.ok) throw new ApiError(await inWords(response));
  return response;
}

// [{id, methods: [{name, title}], method}] of /v1/models.
export async function models(key) {
  const response = await answerTo(() => fetch(url("models"), { headers: headers(key) }));
  const { data = [] } = await response.json();
  return data.map(({ id, outpace = {} }) => ({
    id,
    method: outpace.method ?? null,
    methods: (outpace.methods ?? []).map((m) => (typeof m === "string" ? { name: m } : m)),
  }));
}

// Chunks of a streamed chat completion, one after another. Raises ApiError, or AbortError after `signal`.
export async function* stream(body, { key, signal }) {
  const response = await answerTo(() =>
    fetch(url("chat/completions"), {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers(key) },
      body: JSON.stringify({ ...body, stream: true }),
      signal,
    }),
  );
  let whole = false;
  try {
    for await (const data of events(response.body)) {
      whole ||= data === "[DONE]";
      if (whole) continue; // read to the end, or the server takes it for a reader who left
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(`The server broke off: ${sentence(chunk.error.message ?? "no reason given")} Try again.`);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection broke off in the middle of the answer. What came is kept; try again.");
  }
  if (!whole) throw new ApiError("The answer ended before the server said that it was complete. What came is kept; try again.");
}

// The data of each server-sent event. Lines may end in CR LF, an event may have several data lines.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer = (buffer + value).replaceAll("\r\n", "\n");
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection may be gone already
  }
}

const sentence = (text) => (/[.!?]$/.test(text.trim()) ? text.trim() : `${text.trim()}.`);

async function inWords(response) {
  const body = await response.json().catch(() => ({}));
  const detail = body.error?.message ?? (typeof body.detail === "string" ? body.detail : "");
  const said = detail ? ` The server says: ${sentence(detail)}` : "";
  const wait = response.headers.get("Retry-After");
  switch (response.status) {
    case 401:
    case 403:
      return `The server asks for an API key, and the one given does not fit.${said} Enter it under Settings.`;
    case 404:
      return `The server does not know what was asked for.${said} Reload the page to see which models and methods it has.`;
    case 413:
      return `The prompt is larger than the server takes.${said} Shorten it, or begin a new conversation.`;
    case 429:
      return `The server is full.${said} Try again ${wait ? `in ${wait} seconds` : "in a moment"}.`;
    case 503:
      return `The server is not ready or is stopping.${said} Try again ${wait ? `in ${wait} seconds` : "in a moment"}.`;
    default:
      if (response.status >= 500) return `The server failed (status ${response.status}).${said} Its log has the reason; try again.`;
      return `The server refused the request (status ${response.status}).${said} Change the settings or the prompt.`;
  }
}
