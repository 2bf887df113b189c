"""Events of a stream of /v1/messages, made from the chunks of the chat completion that answers it."""

from __future__ import annotations

from typing import Any

from ...engine.request import StepEvent
from ...types import Result
from ..refusals import Refusal
from ..service import ServingEngine
from ..stream import ChatChunks, Chunks
from ..submissions import Call, dumped
from .messages import ended, message_head, tool_use, usage


def named(value: dict[str, Any]) -> bytes:
    """An event that has its type in its name, too."""
    return b"event: " + value["type"].encode() + b"\ndata: " + dumped(value) + b"\n\n"


class MessageEvents(Chunks):
    """One block of content is open at a time: text, or a call whose input comes as pieces of JSON."""

    keep_alive = named({"type": "ping"})

    def __init__(self, call: Call, engine: ServingEngine, arrived: float) -> None:
        self.call, self._engine = call, engine
        self._chat = ChatChunks(call, engine, arrived)
        self._open: str | None = None  # the type of the open block
        self._index = -1

    def event(self, index: int, event: StepEvent) -> bytes:
        choice, found = self._chat.choices[index], list[dict[str, Any]]()
        for part in self._chat.parts(choice, event):
            found += self._delta(part["delta"])
        if event.result is not None:
            last = self._chat.last(choice, event.result)
            found += self._delta(last["delta"]) + self._close() + self._end(last["finish_reason"], event.result)
        return b"".join(map(named, found))

    async def end(self, results: list[Result]) -> bytes:
        return named({"type": "message_stop"})

    def failed(self, refusal: Refusal, request_id: str) -> bytes:
        return named(refusal.anthropic_body(request_id))

    def begin(self) -> bytes:
        counted = {
            "input_tokens": self.call.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        message = {**message_head(self._engine.name, self._chat.head["id"]), "usage": counted}
        return named({"type": "message_start", "message": message}) + named({"type": "ping"})

    def _delta(self, delta: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if delta.get("content"):
            if self._open != "text":
                found += self._close() + self._start("text", {"type": "text", "text": ""})
            found.append(self._piece({"type": "text_delta", "text": delta["content"]}))
        for made in delta.get("tool_calls") or []:
            if "id" in made:
                block = tool_use(made["id"], made["function"]["name"], {})
                found += self._close() + self._start("tool_use", block)
            if made["function"].get("arguments"):
                found.append(self._piece({"type": "input_json_delta", "partial_json": made["function"]["arguments"]}))
        return found

    def _start(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        self._open = kind
        self._index += 1
        return [{"type": "content_block_start", "index": self._index, "content_block": block}]

    def _piece(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._index}]

    def _end(self, finish: str, result: Result) -> list[dict[str, Any]]:
        own = self._chat.figures(0, result)
        return [
            {
                "type": "message_delta",
                "delta": ended(finish, result),
                "usage": usage(self.call, result),
                "outpace": own,
            }
        ]
