"""A server of canned answers: the playground's files under /playground, and the API's streams without a model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import outpace

FOLDER = Path(outpace.__file__).parent / "server" / "playground"
POLICY = "default-src 'self'"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Step:
    """One step of an answer: its tokens with who drafted each, and the draft as (text, parent, source) per node."""

    tokens: list[tuple[str, str]]
    draft: list[tuple[str, int, str]] | None = None
    accepted: list[int] = field(default_factory=list)
    content: str | None = None  # the text that comes with it, if not the tokens' own
    pause: float = 0.02  # seconds before it


def chain(*tokens: str, source: str, own: str, rejected: tuple[str, ...] = ()) -> Step:
    """A drafted chain, all of `tokens` accepted and `rejected` not, and then the target's own token."""
    nodes = [(text, i - 1, source) for i, text in enumerate((*tokens, *rejected))]
    kept = list(range(len(tokens)))
    return Step([*((text, source) for text in tokens), (own, "target")], nodes, kept)


FOX = [
    Step([("The", "target")]),
    Step(
        [(" quick", "suffix"), (" brown", "suffix"), (" fox", "target")],
        [(" slow", -1, "recycling"), (" quick", -1, "suffix"), (" brown", 1, "suffix"), (" cat", 2, "suffix")],
        [1, 2],
    ),
    Step([(" jumps", "target")], []),
    chain(" over", " the", source="recycling", own=" lazy", rejected=(" moon", " and")),
    chain(" dog", ".", source="ngram", own="<end>"),
]
# content that stops before the end token's own text, as a server's does
FOX[-1] = Step(FOX[-1].tokens, FOX[-1].draft, FOX[-1].accepted, content=" dog.")
FOX_TEXT = "The quick brown fox jumps over the lazy dog."

SLOW = [Step([("word ", "target")], [] if i else None, pause=0.05) for i in range(200)]


def plainly(steps: list[Step], pause: float = 0.02) -> list[Step]:
    """The same tokens, one a step, none drafted."""
    tokens = [text for step in steps for text, _ in step.tokens]
    content = {"<end>": ""}
    return [Step([(t, "target")], [] if i else None, content=content.get(t), pause=pause) for i, t in enumerate(tokens)]


@dataclass
class Refusal:
    """An answer that is an error: of the request, or in the middle of a stream."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)


BREAK = Refusal(0, "")  # in the middle of an answer: the connection is closed

Reply = Callable[[dict[str, Any]], "list[Any] | Refusal"]  # steps, and among them refusals


def is_plain(body: dict[str, Any]) -> bool:
    return body["outpace"].get("method") == "plain" or body["outpace"].get("max_draft") == 0


def fox(body: dict[str, Any]) -> list[Step]:
    return (plainly(FOX) if is_plain(body) else FOX)[: 1 if body["max_tokens"] == 1 else None]


@dataclass
class FakeServer:
    """`reply` says what a request gets; `bodies` are the requests, `gone` those whose reader left before the end."""

    url: str
    reply: Reply = fox
    key: str = ""
    traced: bool = True  # tells who drafted what, as the contract asks
    bodies: list[dict[str, Any]] = field(default_factory=list)
    gone: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def models(self) -> dict[str, Any]:
        own = {"methods": ["plain", "suffix", "ngram"], "method": "suffix+recycling+ngram", "precision": "int8"}
        return {"object": "list", "data": [{"id": "toy", "object": "model", "outpace": own}]}


def token_id(text: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 50_000


def drafted(step: Step) -> dict[str, Any] | None:
    if step.draft is None:
        return None
    return {
        "tokens": [text for text, _, _ in step.draft],
        "ids": [token_id(text) for text, _, _ in step.draft],
        "parents": [parent for _, parent, _ in step.draft],
        "sources": [source for _, _, source in step.draft],
        "accepted": step.accepted,
    }


def chunks(steps: list[Any], body: dict[str, Any], traced: bool) -> Iterator[dict[str, Any]]:
    """The stream of the server's contract, as objects."""
    began = time.perf_counter()

    def chunk(delta: dict[str, str], told: dict[str, Any] | None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        own = {} if told is None else {"outpace": told}
        return {"id": "c", "object": "chat.completion.chunk", "model": "toy", "choices": [choice], **own}

    for index, step in enumerate(steps):
        if isinstance(step, Refusal):
            yield {"error": {"message": step.message}}
            return
        time.sleep(step.pause)
        tokens = [{"id": token_id(text), "text": text, "source": source} for text, source in step.tokens]
        content = "".join(text for text, _ in step.tokens) if step.content is None else step.content
        told = {"tokens": tokens, "draft": drafted(step), "t": time.perf_counter() - began} if traced else None
        if index:
            yield chunk({"content": content}, told)
        else:  # the first chunk has the role and tells of the step, its text comes apart
            yield chunk({"role": "assistant", "content": ""}, told)
            yield chunk({"content": content}, None)
    yield chunk({}, summary(steps, body) if traced else None, "stop")


def summary(steps: list[Step], body: dict[str, Any]) -> dict[str, Any]:
    tokens = sum(len(step.tokens) for step in steps)
    decoding = [step for step in steps if step.draft is not None]
    drafted, accepted = sum(len(s.draft or ()) for s in decoding), sum(len(s.accepted) for s in decoding)
    stats = {
        "tokens": tokens,
        "steps": len(decoding),
        "mean_accepted": (tokens - 1) / len(decoding) if decoding else 1.0,
        "acceptance_rate": accepted / drafted if drafted else 0.0,
        "tokens_per_s": tokens / max(sum(step.pause for step in steps), 1e-9),
    }
    method = body["outpace"].get("method", "suffix+recycling+ngram")
    return {"method": method, "exactness": "identical", "notes": [], "stats": stats}


class Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, status: int, body: dict[str, Any], **headers: str) -> None:
        self.answer(status, json.dumps(body).encode(), "application/json", **headers)

    def refused(self) -> bool:
        if not self.fake.key or self.headers.get("Authorization") == f"Bearer {self.fake.key}":
            return False
        self.json(401, {"error": {"message": "no such API key"}})
        return True

    def do_GET(self) -> None:
        self.fake.paths.append(self.path)
        if self.path == "/v1/models":
            if not self.refused():
                self.json(200, self.fake.models())
            return
        name = self.path.removeprefix("/playground/") or "index.html"
        path = FOLDER / name
        if not self.path.startswith("/playground/") or not path.is_file():
            self.json(404, {"error": {"message": "not found"}})
            return
        self.answer(200, path.read_bytes(), TYPES[path.suffix])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        self.fake.bodies.append(body)
        reply = self.fake.reply(body)
        if isinstance(reply, Refusal):
            self.json(reply.status, {"error": {"message": reply.message}}, **reply.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            whole = reply[: reply.index(BREAK)] if BREAK in reply else reply
            for chunk in chunks(whole, body, self.fake.traced):
                self.wfile.write(f"data: {json.dumps(chunk)}\r\n\r\n".encode())
                self.wfile.flush()
            if whole is reply:
                self.wfile.write(b": the end\n\ndata: [DONE]\n\n")
        except OSError:
            self.fake.gone.append(body)


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A server on a port of its own, until the block ends."""
    handler = type("FakeHandler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.fake = FakeServer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler.fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
