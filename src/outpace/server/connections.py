"""Connections that wait: for a header, for a body, for the next request, for a client that does not read. Each has its
time, and all of them together their number.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .refusals import Refusal

Phase = Literal["header", "body", "answer"]
REASONS = ("header_timeout", "body_timeout", "write_timeout", "evicted", "refused")  # for closing one
LEAST_RATE = 10_000  # bytes a second: a body gets a second more for each so many that came


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds, and a number.

    header_s   from the opening of a connection, or the first byte of a further request, to the end of its header
    body_s     for a body, and a second more for each 10 kB that came
    idle_s     between two requests
    write_s    for a client that does not read what it is sent
    most       connections at once. One more closes the one that has been idle longest; if none is, it gets 503
    """

    header_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 30.0
    write_s: float = 60.0
    most: int = 1000


@dataclass(slots=True)
class Connections:
    """What became of them, for whoever counts. `closed`: by the reason why the server closed them."""

    open: int = 0
    closed: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))


_LATE = Refusal(408, "the request did not arrive in time; send it again", code="request_timeout")
_FULL = Refusal(503, "too many connections are open; come again later", code="too_many_connections")


class PatientProtocol(H11Protocol):
    """uvicorn's protocol with an end to all waiting."""

    def __init__(self, patience: Patience, counts: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._patience, self._counts = patience, counts
        self._phase: Phase = "header"
        self._since = self.loop.time()
        self._heard = False  # anything of the request that is awaited
        self._received = 0
        self._timer: Any = None
        self._stalled: Any = None

    @property
    def idle_since(self) -> float | None:
        """When it last began to wait for a request; None while there is one."""
        return self._since if self._phase == "header" else None

    # -- from the transport --------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._counts.open += 1
        self._enter("header")
        if len(self.connections) > self._patience.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._counts.open -= 1
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received += len(data)
        if self._phase == "header" and not self._heard:
            self._heard = True
            if self.cycle is not None:  # the time of a new connection runs since it was opened
                self._arm(self._patience.header_s)
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self._patience.write_s, self._not_read)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _make_room(self) -> None:
        """There is one too many: close one that is idle, else this one."""
        others = [c for c in self.connections if isinstance(c, PatientProtocol) and not c.transport.is_closing()]
        if len(others) <= self._patience.most:
            return
        idle = [c for c in others if c is not self and c.idle_since is not None]
        if idle:
            min(idle, key=lambda c: c.idle_since or 0)._close("evicted")
        else:
            self._close("refused", _FULL)

    # -- what it waits for ---------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Enter the phase that the state of the conversation shows."""
        answered = self.cycle is None or self.cycle.response_complete
        if self.conn.their_state is h11.SEND_BODY:
            phase: Phase = "body"
        elif self.conn.their_state is h11.IDLE and answered:
            phase = "header"
        else:
            phase = "answer"
        if phase != self._phase:
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        self._phase, self._since, self._received = phase, self.loop.time(), 0
        self._heard = phase == "header" and bool(self.conn.trailing_data[0])
        first = self.cycle is None  # between two requests uvicorn's own timer runs
        if phase == "body":
            self._arm(self._patience.body_s)
        elif phase == "header" and (first or self._heard):
            self._arm(self._patience.header_s)
        else:
            self._arm(None)

    def _arm(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self._timer = None
        if self._phase == "body":
            allowed = self._patience.body_s + self._received / LEAST_RATE
            left = self._since + allowed - self.loop.time()
            if left > 0 or self.flow.read_paused:  # it still comes, or it is not the client who waits
                self._arm(max(left, 1.0))
                return
            self._close("body_timeout", _LATE)
        else:
            self._close("header_timeout", _LATE if self._heard else None)

    def _not_read(self) -> None:
        self._counts.closed["write_timeout"] += 1
        self.transport.abort()

    def _close(self, reason: str, refusal: Refusal | None = None) -> None:
        """End the connection, with an answer if none has begun."""
        if self.transport.is_closing():
            return
        self._counts.closed[reason] += 1
        self._unset_keepalive_if_required()
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if refusal is not None and not begun:
            self.transport.write(_written(refusal))
        self.transport.close()


def _written(refusal: Refusal) -> bytes:
    body = json.dumps(refusal.body()).encode()
    retry = "retry-after: 5\r\n" if refusal.status == 503 else ""
    reason = {408: "Request Timeout", 503: "Service Unavailable"}[refusal.status]
    return (
        f"HTTP/1.1 {refusal.status} {reason}\r\ncontent-type: application/json\r\n{retry}"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode() + body
