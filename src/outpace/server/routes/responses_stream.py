"""Events of a stream of /v1/responses, made from the chunks of the chat completion that answers it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from ...engine.request import StepEvent
from ...types import Result
from ..bodies import usage
from ..refusals import Refusal
from ..service import ServingEngine
from ..stream import ChatChunks, Chunks
from ..submissions import Call
from .messages_stream import named
from .responses import Turn, call_item, finished, message_item, response_head

Keep = Callable[[dict[str, Any]], Awaitable[None]]


class ResponseEvents(Chunks):
    """One item of output is open at a time. `keep`: stores the whole response before its last event is sent."""

    def __init__(self, call: Call, engine: ServingEngine, arrived: float, turn: Turn, keep: Keep) -> None:
        self.call = call
        self._chat, self._keep = ChatChunks(call, engine, arrived), keep
        self._head = response_head(turn, int(time.time()), engine.name, call)
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []  # of the open item
        self._number = 0
        self._finish, self._figures = "stop", dict[str, Any]()

    def begin(self) -> bytes:
        return b"".join(self._event(f"response.{kind}", response=self._head) for kind in ("created", "in_progress"))

    def event(self, index: int, event: StepEvent) -> bytes:
        choice, found = self._chat.choices[index], list[bytes]()
        for part in self._chat.parts(choice, event):
            found += self._delta(part["delta"])
        if event.result is not None:
            last = self._chat.last(choice, event.result)
            found += self._delta(last["delta"])
            self._finish, self._figures = last["finish_reason"], self._chat.figures(index, event.result)
            if self._open is None and not self._output:
                found += self._start(message_item("", "in_progress"))
            found += self._close("incomplete" if self._finish == "length" else "completed")
        return b"".join(found)

    async def end(self, results: list[Result]) -> bytes:
        figures = {"finish_reason": self._finish, "usage": usage(self.call, results), "outpace": self._figures}
        whole = finished(self._head, self._output, figures, int(time.time()))
        await self._keep(whole)
        return self._event(f"response.{whole['status']}", response=whole)

    def failed(self, refusal: Refusal, request_id: str) -> bytes:
        code = "rate_limit_exceeded" if refusal.status == 429 else "server_error"
        error = {"code": code, "message": refusal.message}
        broken = {**self._head, "status": "failed", "error": error, "output": self._output}
        return self._event("response.failed", response=broken)

    def _event(self, kind: str, **values: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named({"type": kind, "sequence_number": number, **values})

    def _delta(self, delta: dict[str, Any]) -> list[bytes]:
        found: list[bytes] = []
        if delta.get("content"):
            if self._open is None or self._open["type"] != "message":
                found += self._close() + self._start(message_item("", "in_progress"))
            found.append(self._piece("output_text", delta["content"], content_index=0, logprobs=[]))
        for made in delta.get("tool_calls") or []:
            function = made["function"]
            if "id" in made:
                found += self._close() + self._start(call_item(made["id"], function["name"], "", "in_progress"))
            if function.get("arguments"):
                found.append(self._piece("function_call_arguments", function["arguments"]))
        return found

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._output)}

    def _start(self, item: dict[str, Any]) -> list[bytes]:
        self._open, self._pieces = item, []
        shown = {**item, "content": []} if item["type"] == "message" else item
        found = [self._event("response.output_item.added", output_index=len(self._output), item=shown)]
        if item["type"] == "message":
            part = item["content"][0]
            found.append(self._event("response.content_part.added", **self._place(), content_index=0, part=part))
        return found

    def _piece(self, kind: str, text: str, **more: Any) -> bytes:
        self._pieces.append(text)
        return self._event(f"response.{kind}.delta", **self._place(), delta=text, **more)

    def _close(self, status: str = "completed") -> list[bytes]:
        if self._open is None:
            return []
        item, text, place = self._open, "".join(self._pieces), self._place()
        if item["type"] == "message":
            done = message_item(text, status, item["id"])
            part = done["content"][0]
            found = [
                self._event("response.output_text.done", **place, content_index=0, text=text, logprobs=[]),
                self._event("response.content_part.done", **place, content_index=0, part=part),
            ]
        else:
            done = call_item(item["call_id"], item["name"], text, status, item["id"])
            found = [self._event("response.function_call_arguments.done", **place, arguments=text, name=item["name"])]
        found.append(self._event("response.output_item.done", output_index=len(self._output), item=done))
        self._output.append(done)
        self._open = None
        return found
