"""Server-sent events: chunks in OpenAI's form, and the response that sends them until the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.request import StepEvent
from ..engine.text import TextStream
from ..types import Result
from .bodies import FINISH, decoding, finish_of, head, ignored, tool_call, usage
from .calls import Begun, Ended, Item, Piece, new_id
from .calls import Call as MadeCall
from .logprobs import ScoredToken, Shown
from .refusals import Refusal
from .service import ServingEngine, Ticket
from .submissions import Call, dumped

KEEP_ALIVE_S = 10.0  # a comment, when there was nothing to say for so long
KEEP_ALIVE = b": still here\n\n"
DONE = b"data: [DONE]\n\n"


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    if isinstance(body, dict) and len(body.get("choices") or []) > 1:
        return Response(_in_pieces(body), status, headers, "application/json")
    return Response(dumped(body), status, headers, "application/json")


def _in_pieces(body: dict[str, Any]) -> bytes:
    """JSON of a body, choice by choice: the library lets no other thread run while it writes one value."""
    choices = b"[" + b",".join([dumped(choice) for choice in body["choices"]]) + b"]"
    parts = [dumped(name) + b":" + (choices if name == "choices" else dumped(value)) for name, value in body.items()]
    return b"{" + b",".join(parts) + b"}"


def sse(value: Any) -> bytes:
    return b"data: " + dumped(value) + b"\n\n"


class Choice:
    """One choice of a stream: what was said of it, and what is held back."""

    def __init__(self, call: Call, index: int, engine: ServingEngine) -> None:
        self.call, self.index = call, index
        params = call.submissions[index].params
        self.begun = False
        self.shown = Shown(engine.tokenizer, params)
        self.reader = call.reader()
        self.forced = call.tools is not None and call.tools.forced
        self.calls = 0  # begun
        self.called = False  # the last of them is complete
        self.tracer = TextStream(engine.tokenizer.detokenizer(), params.stop, params.min_tokens) if call.trace else None

    def scored(self, event: StepEvent) -> list[ScoredToken] | None:
        if event.logprobs is None:
            return None
        found = list(zip(event.token_ids, event.logprobs, event.top_logprobs or [], strict=True))
        return self.shown.certain(found, event.text, event.result)

    def traced(self, event: StepEvent) -> list[dict[str, Any]]:
        """Each token with the text that became certain with it; all of them joined are the text of the output."""
        assert self.tracer is not None
        found: list[dict[str, Any]] = []
        for id, source in zip(event.token_ids, event.sources, strict=True):
            over = self.tracer.stopped or self.shown.ends(id)
            text = "" if over else self.tracer.push([id])[0]
            found.append({"id": id, "text": text, "source": source})
        if event.result is not None and found:
            found[-1]["text"] += self.tracer.flush()
        return found

    def draft(self, event: StepEvent) -> dict[str, Any] | None:
        if event.draft is None:
            return None
        ids = [int(t) for t in event.draft.tokens]
        return {
            "tokens": [self.shown.token(id)[0] for id in ids],
            "ids": ids,
            "parents": [int(p) for p in event.draft.parents],
            "sources": list(event.draft.sources),
            "accepted": [int(a) for a in event.draft.accepted],
        }


class Chunks:
    """Makes the chunks of one response. `arrived`: when the request came, by perf_counter."""

    kind, prefix = "", ""
    keep_alive = KEEP_ALIVE

    def __init__(self, call: Call, engine: ServingEngine, arrived: float) -> None:
        self.call, self.arrived = call, arrived
        self.head: dict[str, Any] = head(self.kind, self.prefix, engine)
        if call.usage_chunk:
            self.head["usage"] = None
        self.choices = [Choice(call, i, engine) for i in range(len(call.submissions))]

    def event(self, index: int, event: StepEvent) -> bytes:
        """All chunks that one step's event makes; none if nothing has become certain."""
        choice = self.choices[index]
        parts = self.parts(choice, event)
        last = None if event.result is None else self.last(choice, event.result)
        if choice.tracer is None:
            found = [self._chunk(part) for part in parts]
        else:  # one chunk carries the step's trace, also if it has no text yet
            own = {"tokens": choice.traced(event), "draft": choice.draft(event), "t": self._since()}
            first, *rest = parts or [self.nothing(choice)]
            found = [self._chunk(first, own), *(self._chunk(part) for part in rest)]
        if last is not None:
            assert event.result is not None
            found.append(self._chunk(last, self.figures(index, event.result)))
        return b"".join(found)

    def begin(self) -> bytes:
        """What is sent before anything is written."""
        return b""

    async def end(self, results: list[Result]) -> bytes:
        """What follows the last event of the last choice."""
        if not self.call.usage_chunk:
            return DONE
        counted = usage(self.call, [self.call.answered(result) for result in results])
        return sse({**self.head, "choices": [], "usage": counted}) + DONE

    def failed(self, refusal: Refusal, request_id: str) -> bytes:
        """What ends a stream that cannot go on."""
        return sse(refusal.body())

    def figures(self, index: int, result: Result) -> dict[str, Any]:
        """How a choice was decoded."""
        return decoding(self.call, index, result) | ignored(self.call)

    def _since(self) -> float:
        return round(perf_counter() - self.arrived, 5)

    def _chunk(self, choice: dict[str, Any], own: dict[str, Any] | None = None) -> bytes:
        body = {**self.head, "choices": [choice]}
        if own is not None:
            body["outpace"] = own
        return sse(body)

    def parts(self, choice: Choice, event: StepEvent) -> list[dict[str, Any]]:
        raise NotImplementedError

    def nothing(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def last(self, choice: Choice, result: Result) -> dict[str, Any]:
        raise NotImplementedError


class ChatChunks(Chunks):
    """Of /v1/chat/completions."""

    kind, prefix = "chat.completion.chunk", "chatcmpl"

    def parts(self, choice: Choice, event: StepEvent) -> list[dict[str, Any]]:
        scored = choice.scored(event)
        logprobs = None if scored is None else {"content": choice.shown.chat(scored), "refusal": None}
        deltas = [delta for item in self._items(choice, event) for delta in self._deltas(choice, item)]
        if logprobs is not None and logprobs["content"] and not deltas:
            deltas = [{"content": ""}]
        if not choice.begun and deltas:
            choice.begun = True
            deltas[0] = {"role": "assistant", **deltas[0]}
        found = [self._part(choice, delta) for delta in deltas]
        if found:
            found[-1]["logprobs"] = logprobs
        return found

    def nothing(self, choice: Choice) -> dict[str, Any]:
        return self._part(choice, {})

    def last(self, choice: Choice, result: Result) -> dict[str, Any]:
        delta = {} if choice.begun else {"role": "assistant", "content": None if choice.forced else ""}
        return self._part(choice, delta, finish_of(result, choice.called))

    def _items(self, choice: Choice, event: StepEvent) -> list[Item]:
        """Text and calls that have become certain."""
        if choice.reader is None:
            return [event.text] if event.text else []
        found = choice.reader.push(event.text)
        if event.result is not None:
            found += choice.reader.flush(event.result.finish_reason == "length")
        return found

    def _deltas(self, choice: Choice, item: Item) -> list[dict[str, Any]]:
        match item:
            case str():
                return [{"content": item}]
            case Ended():
                choice.called = True
                return []
            case Piece(arguments):
                return [{"tool_calls": [{"index": choice.calls - 1, "function": {"arguments": arguments}}]}]
            case Begun(name):
                made = tool_call(new_id(), name, "")
            case MadeCall(name, arguments):
                made = tool_call(new_id(), name, arguments)
        choice.calls += 1
        choice.called = isinstance(item, MadeCall) and item.complete
        return [{"tool_calls": [{"index": choice.calls - 1, **made}]}]

    def _part(self, choice: Choice, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": reason}


class CompletionChunks(Chunks):
    """Of /v1/completions."""

    kind, prefix = "text_completion", "cmpl"

    def parts(self, choice: Choice, event: StepEvent) -> list[dict[str, Any]]:
        found = [] if choice.begun or self.call.echo is None else [self._prompt(choice, event, self.call.echo)]
        choice.begun = True
        if self.call.silent:
            return found
        scored = choice.scored(event)
        logprobs = None if scored is None else choice.shown.legacy(scored)
        if event.text or (logprobs and logprobs["tokens"]):
            found.append({"index": choice.index, "text": event.text, "logprobs": logprobs, "finish_reason": None})
        return found

    def _prompt(self, choice: Choice, event: StepEvent, texts: list[str]) -> dict[str, Any]:
        text, logprobs = texts[choice.index // self.call.n], None
        if event.prompt is not None:
            logprobs = choice.shown.prompt(self.call.submissions[choice.index].tokens, event.prompt, len(text))
        return {**self.nothing(choice), "text": text, "logprobs": logprobs}

    def nothing(self, choice: Choice) -> dict[str, Any]:
        return {"index": choice.index, "text": "", "logprobs": None, "finish_reason": None}

    def last(self, choice: Choice, result: Result) -> dict[str, Any]:
        return {**self.nothing(choice), "finish_reason": FINISH[self.call.answered(result).finish_reason]}


async def chunks_of(
    ticket: Ticket, chunks: Chunks, seen: Callable[[list[tuple[int, StepEvent]]], None]
) -> AsyncIterator[bytes]:
    """The whole stream. `seen` is told of every batch of events."""
    if beginning := chunks.begin():
        yield beginning
    while not ticket.finished:
        batch = await ticket.take(KEEP_ALIVE_S)
        if not batch:
            yield chunks.keep_alive
            continue
        seen(batch)
        yield b"".join([chunks.event(index, event) for index, event in batch])
    yield await chunks.end([result for result in ticket.results if result is not None])


class EventStream(Response):
    """Sends what an iterator yields. `left` is called when the client goes, `over` in any case, at the end."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncIterator[bytes], left: Callable[[], None], over: Callable[[], None]) -> None:
        self.status_code, self.background = 200, None
        self._source, self._left, self._over = source, left, over
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(watch(receive, self._left))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in self._source:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except OSError:  # the connection broke while something was written
            self._left()
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
            self._over()


async def watch(receive: Receive, left: Callable[[], None]) -> None:
    """Call `left` when the client goes. The body of the request has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
    left()
