"""One thread owns the engine and steps it; asyncio hands requests in and takes events out.

What a step yields crosses to the event loop in one wake-up, whatever the number of streams: the engine's thread holds
the interpreter only between kernels, and must not lose time there.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from ..engine.request import StepEvent
from ..models.tokenizer import Tokenizer
from ..types import FinishReason, RequestOptions, Result, SamplingParams

T = TypeVar("T")
log = logging.getLogger("outpace.server")
_COMPILERS = 16  # threads for grammars; one compiles, the others look whether theirs is there
IDLE_CHECK_S = 1.0  # the books are compared when the engine has been idle for so long


class ServingEngine(Protocol):
    """What is served: an `LLM`, or whatever keeps to this. Used by one thread at a time, but for `tokenizer`, `name`,
    `method`, `precision` and `max_new_tokens`, which only read what never changes, and `prepare`."""

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def width(self) -> int: ...  # of an embedding
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def idle(self) -> bool: ...
    @property
    def in_step(self) -> Sequence[int]: ...
    @property
    def methods(self) -> Sequence[str]: ...
    def max_new_tokens(self, prompt: Sequence[int]) -> int: ...
    def prepare(self, params: SamplingParams) -> None: ...
    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        prediction: str | Sequence[int] = "",
        options: RequestOptions | None = None,
    ) -> int: ...
    def step(self) -> list[StepEvent]: ...
    def cancel(self, id: int) -> Result | None: ...
    def metrics(self) -> Mapping[str, Any]: ...
    def check_integrity(self) -> None: ...
    def close(self) -> None: ...


class ServiceError(Exception):
    """Not the user's doing. `status`: the HTTP status that says so. `retry_after_s`: when to come again, if at all."""

    def __init__(self, message: str, status: int, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s


class Gone(Exception):
    """The client has left; nobody waits for the answer."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One request to the engine."""

    tokens: Sequence[int]
    params: SamplingParams
    prediction: Sequence[int] = ()  # tokens that the output is expected to repeat
    options: RequestOptions = field(default_factory=RequestOptions)


class Ticket:
    """The requests of one call, all or none of them, and what comes of them. Belongs to the event loop."""

    def __init__(self, service: EngineService, submissions: Sequence[Submission]) -> None:
        self._service = service
        self.submissions = list(submissions)
        self.results: list[Result | None] = [None] * len(submissions)
        self.closed = False
        self._events: deque[tuple[int, StepEvent]] = deque()
        self._error: Exception | None = None
        self._open = len(submissions)
        self._waiter: asyncio.Future[None] | None = None

    @property
    def finished(self) -> bool:
        """Every result is there, and every event has been taken."""
        return not self._open and not self._events and self._error is None

    async def take(self, patience: float | None = None) -> list[tuple[int, StepEvent]]:
        """(index of the submission, event) of all that has happened since; waits until something has. Empty after
        `patience` seconds without any. Raises what ended the requests: ServiceError, Gone, or an OutpaceError of the
        engine."""
        if not self._events and self._open and self._error is None and not self.closed:
            self._waiter = asyncio.get_running_loop().create_future()
            timer = None if patience is None else self._waiter.get_loop().call_later(patience, self._wake)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        if self.closed:
            raise Gone
        events = list(self._events)
        self._events.clear()
        if not events and self._error is not None:
            raise self._error
        return events

    async def wait(self) -> list[Result]:
        """All results, in the order of the submissions."""
        while not self.finished:
            await self.take()
        return [result for result in self.results if result is not None]

    def close(self) -> None:
        """Nobody wants the rest: what is unfinished is cancelled, its pages are free after the current step."""
        if not self.closed:
            self.closed = True
            if self._open:
                self._service._cancel(self)
            self._wake()

    # -- from the service, on the event loop --------------------------------------------------------------------

    def _happened(self, index: int, event: StepEvent) -> None:
        if event.error is not None:  # of this request alone
            if event.result is not None:
                self._service._lost(self.submissions[index], event.result)
            self._failed(event.error)
            self._service._cancel(self)
            return
        self._events.append((index, event))
        if event.result is not None:
            self.results[index] = event.result
            self._open -= 1
        self._wake()

    def _failed(self, error: Exception) -> None:
        if self._open and self._error is None:
            self._error, self._open = error, 0
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineService:
    """Runs an engine for an event loop. `start`, then `submit`; `drain` and `stop` at the end.

    An exception in a step fails the requests that were in it with ServiceError 500; the engine goes on. Only if it
    cannot even be rid of them, or its books do not agree, is the service `broken`, and refuses everything with 503.
    """

    def __init__(self, engine: ServingEngine) -> None:
        self.engine = engine
        self.draining = False
        self.broken: str | None = None
        self.steps_failed = 0
        self.on_lost: Callable[[Result], None] = lambda result: None  # of a choice that did not come to its end
        self._compilers = ThreadPoolExecutor(_COMPILERS, "outpace-grammar")
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._live: dict[int, tuple[Ticket, int]] = {}  # engine's id -> ticket and index; the engine's thread alone
        self._tickets: set[Ticket] = set()  # unfinished; the event loop alone
        self._quiet: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="outpace-engine", daemon=True)

    # -- the event loop's side ----------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._thread.start()

    @property
    def open_calls(self) -> int:
        return len(self._tickets)

    def check_open(self) -> None:
        """Raises ServiceError 503 when nothing new is taken."""
        if self.broken is not None:
            raise ServiceError(f"the engine is out of order: {self.broken}; restart the server", 503, "engine_broken")
        if self.draining:
            raise ServiceError("the server is stopping and takes nothing new: use another one", 503, "draining")

    async def submit(self, submissions: Sequence[Submission]) -> Ticket:
        """Queue all, or none. Raises what the engine refuses them with, QueueFull among it, and ServiceError."""
        self.check_open()
        for params in {
            submission.params.constraint: submission.params
            for submission in submissions
            if submission.params.constraint
        }.values():
            # others go on while a heavy grammar is compiled, those among them too whose grammar is there
            await asyncio.get_running_loop().run_in_executor(self._compilers, self.engine.prepare, params)
        self.check_open()
        ticket = Ticket(self, submissions)
        self._tickets.add(ticket)
        assert self._quiet is not None
        self._quiet.clear()
        try:
            await self.call(lambda: self._submit(ticket))
        except BaseException:
            ticket.closed = True
            self._cancel(ticket)  # the command may still be in the queue
            raise
        if ticket.closed:
            raise Gone
        return ticket

    async def metrics(self) -> dict[str, Any]:
        return await self.call(lambda: dict(self.engine.metrics()))

    async def call(self, function: Callable[[], T]) -> T:
        """The function's result, from the engine's thread, between two steps."""
        loop = self._loop
        assert loop is not None, "the service has not been started"
        answer: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not answer.done():
                if error is None:
                    answer.set_result(result)  # type: ignore[arg-type]
                else:
                    answer.set_exception(error)

        def command() -> None:
            try:
                result = function()
            except Exception as error:
                self._tell(settle, None, error)
            else:
                self._tell(settle, result, None)

        self._commands.put(command)
        return await answer

    def drain(self) -> None:
        """Take nothing new; what runs goes on."""
        self.draining = True

    async def drained(self, grace: float) -> bool:
        """Wait until all calls are over, at most `grace` seconds. Whether they are."""
        assert self._quiet is not None
        try:
            await asyncio.wait_for(self._quiet.wait(), grace)
        except TimeoutError:
            return False
        return True

    def abort(self, message: str) -> None:
        """End every running call with an error that clients see."""
        for ticket in list(self._tickets):
            ticket._failed(ServiceError(message, 503, "aborted"))
            self._cancel(ticket)

    async def stop(self) -> None:
        """End what still runs, end the thread, close the engine."""
        self.drain()
        self.abort("the server has stopped")
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self.engine.close()

    def _cancel(self, ticket: Ticket) -> None:
        self._forget(ticket)
        self._commands.put(lambda: self._drop(ticket))

    def _forget(self, ticket: Ticket) -> None:
        self._tickets.discard(ticket)
        if not self._tickets and self._quiet is not None:
            self._quiet.set()

    def _deliver(self, happened: Iterable[tuple[Ticket, int, StepEvent]]) -> None:
        for ticket, index, event in happened:
            ticket._happened(index, event)
            if not ticket._open:
                self._forget(ticket)

    def _lost(self, submission: Submission, result: Result) -> None:
        if submission.options.pooling is None:  # an embedding has no choices
            self.on_lost(result)

    def _fail(self, tickets: Iterable[Ticket], error: Exception) -> None:
        for ticket in tickets:
            ticket._failed(error)
            self._forget(ticket)

    # -- the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        checked = True
        while True:
            idle = self.broken is not None or self.engine.idle
            try:
                command = self._commands.get(idle, None if checked else IDLE_CHECK_S)
            except Empty:
                if not idle:
                    self._step()
                    checked = False
                else:
                    self._check()
                    checked = True
                continue
            if command is None:
                return
            command()
            checked = False

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:
            self._step_failed(error)
            return
        happened = []
        for event in events:
            known = self._live.get(event.id)
            if known is not None:
                happened.append((*known, event))
                if event.result is not None:
                    del self._live[event.id]
        if happened:
            self._tell(self._deliver, happened)

    def _step_failed(self, error: Exception) -> None:
        """The requests of the step are lost; all of them if the engine does not know which those were."""
        self.steps_failed += 1
        log.error("a step failed: %s: %s", type(error).__name__, error, exc_info=error)
        in_step = [id for id in self.engine.in_step if id in self._live]
        tickets = {self._live[id][0] for id in in_step or list(self._live)}
        if not tickets:  # nobody is left whose end could mend it
            self._break(f"a step without requests failed ({type(error).__name__}: {error})", error)
        for ticket in tickets:
            self._drop(ticket, "error")
        shown = ServiceError("the step that held this request failed; it may be sent again", 500, "step_failed")
        self._tell(self._fail, tickets, shown)

    def _submit(self, ticket: Ticket) -> None:
        try:
            for index, submission in enumerate(ticket.submissions):
                id = self.engine.submit(submission.tokens, submission.params, submission.prediction, submission.options)
                self._live[id] = ticket, index
        except BaseException:
            self._drop(ticket)
            raise

    def _drop(self, ticket: Ticket, reason: FinishReason = "cancelled") -> None:
        """Cancel what the engine still has of a call."""
        for id, index in [(id, index) for id, (owner, index) in self._live.items() if owner is ticket]:
            del self._live[id]
            try:
                result = self.engine.cancel(id)
                if result is not None:
                    result.finish_reason = reason
                    self._tell(self._lost, ticket.submissions[index], result)
            except Exception as error:
                self._break(f"cancelling a request failed ({type(error).__name__}: {error})", error)

    def _check(self) -> None:
        try:
            self.engine.check_integrity()
        except Exception as error:
            self._break(f"its books do not agree ({error})", error)

    def _break(self, reason: str, error: Exception) -> None:
        log.critical("the engine is out of order: %s", reason, exc_info=error)
        self.broken = reason
        lost = {ticket for ticket, _ in self._live.values()}
        self._live.clear()
        self._tell(self._fail, lost, ServiceError("the engine is out of order; restart the server", 500, "broken"))

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        loop = self._loop
        assert loop is not None
        try:
            loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("the event loop is gone")
