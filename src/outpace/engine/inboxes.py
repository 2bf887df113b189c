"""Events by request. Several streams may be open at once: a step of one of them fills the inboxes of all."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import ParameterError
from ..types import Result
from .engine import Engine
from .request import StepEvent


class Inboxes:
    """Steps an engine and sorts its events: into the inbox of a request that has one, else they are returned by
    `step`. One thread at a time.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._inboxes: dict[int, list[StepEvent]] = {}
        self._others: list[StepEvent] = []  # for the next `step`

    @property
    def engine(self) -> Engine:
        """Raises ParameterError when closed."""
        if self._engine is None:
            raise ParameterError("this LLM is closed: make another one")
        return self._engine

    def open(self, id: int) -> None:
        """An inbox for a request, before its first step."""
        self._inboxes[id] = []

    def step(self) -> list[StepEvent]:
        """One step of all requests; returns the events of those without an inbox, since the last call."""
        for event in self.engine.step():
            self._inboxes.get(event.id, self._others).append(event)
        events, self._others = self._others, []
        return events

    def pump(self) -> None:
        """One step of all requests, by the reader of an inbox."""
        self._others = self.step()

    def take(self, id: int) -> list[StepEvent]:
        """The events of an inbox, which is empty afterwards."""
        events, self._inboxes[id] = self._inboxes[id], []
        return events

    def cancel(self, id: int) -> Result | None:
        """End a request. Returns what it has, or None if it was over or this is closed."""
        return None if self._engine is None else self._engine.cancel(id)

    def leave(self, id: int) -> None:
        """No events of this request are wanted any more. Safe to call twice."""
        self._inboxes.pop(id, None)

    def close(self) -> None:
        """Cancel the requests with an inbox, and let the engine go. Safe to call twice."""
        for id in self._inboxes:
            self.cancel(id)
        self._engine = None


class Stream:
    """Iterates over the steps of one request; `result` is set when it is over, however it ends.

    Leaving the loop early cancels the request. `cancel` may be called from a signal handler: the loop ends after
    the current step.
    """

    def __init__(self, inboxes: Inboxes, id: int) -> None:
        self._inboxes, self._id = inboxes, id
        self.result: Result | None = None
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __iter__(self) -> Iterator[StepEvent]:
        shown = 0
        try:
            while self.result is None:
                for event in self._inboxes.take(self._id):
                    if event.error is not None:
                        self.result = event.result
                        raise event.error
                    shown += len(event.text)
                    self.result = event.result
                    yield event
                if self.result is not None:
                    return
                if self.cancelled:
                    self.result = self._inboxes.cancel(self._id)
                    if self.result is not None and len(self.result.text) > shown:
                        yield StepEvent(self._id, [], [], self.result.text[shown:], None, self.result)
                    return
                self._inboxes.pump()
        finally:
            if self.result is None:
                self.result = self._inboxes.cancel(self._id)
            self._inboxes.leave(self._id)
