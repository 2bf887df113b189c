"""Runs a batch file through an engine: groups what begins alike, keeps the queue filled, writes answers."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ..cache.storage import PAGE_SIZE
from ..decoding.methods import make_verifier
from ..engine.grouping import NONE, group
from ..engine.request import StepEvent
from ..errors import OutpaceError, ParameterError, QueueFull
from ..types import Result
from .batchfile import BadLine, BatchInput, BatchLine, Journal
from .bodies import chat_body, completion_body
from .protocol import ChatRequest, CompletionRequest
from .refusals import Refusal, refusal_of, refusal_of_body
from .service import ServingEngine
from .submissions import Call, Limits, chat_call, completion_call

if TYPE_CHECKING:
    from ..engine.llm import LLM

Order = Literal["grouped", "as-given"]
BLOCK_LINES, BLOCK_TOKENS = 8192, 4 << 20  # of requests that are looked at together; bounds the memory
RULES = 1  # how prompts are built and seeds are drawn; raise it when a change of either changes answers
HOPELESS = 3  # requests in a row that fail a step by themselves: then it is not they
log = logging.getLogger("outpace.batch")


def settings(llm: LLM, limits: Limits, any_model: bool) -> dict[str, object]:
    """Everything that an answer depends on beside its request, by the name that the command line has for it.

    Where the same tokens are promised whatever is drafted, how it is drafted is left out, and so are the number of
    threads and the size of the cache: a batch may go on with others.
    """
    draft = llm.draft_loaded
    lossless = make_verifier(llm.verifier).exactness == "identical" and llm.decoder.row_invariant
    sizes = llm.options.max_rows, llm.options.max_batch
    drafting = (llm.method, llm.planner, *sizes, draft and (draft.key or draft.name, draft.decoder.precision))
    return {
        "--model": llm.loaded.key or llm.name,
        "--precision": llm.precision,
        "--device": llm.decoder.device.type,
        "--verifier": llm.verifier,
        "--method, --draft-model, --planner, --max-rows or --max-batch": None if lossless else drafting,
        "--methods": tuple(sorted(llm.options.methods)),
        "--answer-tokens": limits.answer_tokens,
        "--any-model": any_model,
        "version of Outpace": (RULES, replace(limits, answer_tokens=0)),
    }


@dataclass(slots=True)
class Progress:
    """Of one run; `found` requests were done before it."""

    total: int
    found: int
    done: int = 0
    failed: int = 0  # in all, those of earlier runs included
    tokens: int = 0  # written in this run
    prompt_tokens: int = 0  # of the requests that this run answered
    cached_tokens: int = 0  # of these, found in the prefix cache
    grouped: int = 0  # requests that share a beginning with others


@dataclass(slots=True)
class _Open:
    """A line whose submissions are in the engine."""

    line: BatchLine
    place: int
    call: Call
    ids: list[int]
    results: list[Result | None]


class _Refused(Exception):
    """A line that is understood and cannot be answered."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(slots=True, eq=False)
class BatchRun:
    """`run` answers every request of `source` that `journal` has no answer to. Not thread-safe; the engine is its own
    until then.

    window   requests in the engine at a time, enough that its queue is never empty
    limits   of single requests, as the server's
    model    the name that bodies must give, if they give one; None: any
    """

    engine: ServingEngine
    source: BatchInput
    journal: Journal
    window: int = 32
    order: Order = "grouped"
    limits: Limits = field(default_factory=Limits)
    model: str | None = None
    progress: Progress = field(init=False)
    _open: dict[int, _Open] = field(default_factory=dict, init=False)  # by place
    _asked: dict[int, tuple[int, int]] = field(default_factory=dict, init=False)  # id -> (place, choice)
    _next: deque[tuple[int, str | None]] = field(default_factory=deque, init=False)  # (place, group)
    _suspects: deque[int] = field(default_factory=deque, init=False)  # places whose step failed: each runs alone
    _failed_alone: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        found = self.journal.found
        self.progress = Progress(len(self.source), found, found, self.journal.failed)

    def run(self, told: Callable[[Progress], None], stop: Callable[[], bool] = lambda: False) -> bool:
        """Until all is answered (True), or `stop` says so between two steps (False); what was under way is then
        cancelled and begins anew another time. `told` hears of progress after each step.

        Raises BatchFileError if the output cannot be written, and what the engine raised if it fails again and again.
        """
        blocks = self._blocks()
        try:
            while not stop():
                self._fill(blocks)
                if not self._open:
                    assert self.engine.idle and self.journal.done.all()
                    return True
                try:
                    events = self.engine.step()
                except Exception as error:
                    self._single_out(error)
                    continue
                for event in events:
                    self._take(event)
                told(self._count())
            return False
        finally:
            for place in list(self._open):
                self._withdraw(place)

    # -- what comes next ---------------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[list[tuple[int, str | None]]]:
        """Requests in the order in which they should run, block by block. Lines that are refused are answered here."""
        places: list[int] = []
        prompts: list[NDArray[np.int32]] = []
        outputs: list[int] = []
        held = 0
        for place in range(len(self.source)):
            if self.journal.done[place]:
                continue
            if (found := self._understood(place)) is None:
                continue
            call = found[1]
            places.append(place)
            if self.order == "grouped":
                prompts.append(np.array(call.submissions[0].tokens, dtype=np.int32))
                outputs.append(sum(submission.params.max_tokens for submission in call.submissions))
                held += len(prompts[-1])
            if len(places) == BLOCK_LINES or held > BLOCK_TOKENS:
                yield self._arranged(places, prompts, outputs)
                places, prompts, outputs, held = [], [], [], 0
        yield self._arranged(places, prompts, outputs)

    def _arranged(
        self, places: list[int], prompts: list[NDArray[np.int32]], outputs: list[int]
    ) -> list[tuple[int, str | None]]:
        if self.order != "grouped":
            return [(place, None) for place in places]
        found = group(prompts, outputs, PAGE_SIZE)
        self.progress.grouped += sum(g != NONE for g in found.groups)
        named = [None if g == NONE else f"batch-{places[0]}-{g}" for g in found.groups]
        return [(places[i], named[i]) for i in found.order]

    def _understood(self, place: int) -> tuple[BatchLine, Call] | None:
        """A request that can be asked; one that cannot is answered with the reason, and None."""
        try:
            line = self.source.read(place)
        except BadLine as bad:
            self.journal.refuse(place, bad)
            return None
        try:
            return line, self._call(line)
        except _Refused as refused:
            self._refuse(line, place, refused.refusal)
        except OutpaceError as error:
            self._refuse(line, place, refusal_of(error))
        return None

    def _call(self, line: BatchLine) -> Call:
        """The body as the server would read it. A seed that is not given follows from the file and the line, so that a
        run that was killed and resumed says what one that was not would have said."""
        kind = ChatRequest if line.url == "/v1/chat/completions" else CompletionRequest
        try:
            body = kind.model_validate(line.body)
        except ValidationError as error:
            errors = [{**e, "loc": ("body", *e["loc"])} for e in error.errors(include_url=False)]
            refusal = refusal_of_body(errors, list(kind.model_fields), "application/json")
            raise _Refused(refusal) from None
        except RecursionError:
            raise ParameterError("the body is nested too deeply") from None
        if self.model is not None and body.model not in (None, self.model):
            message = f"no model {body.model[:200]!r} here; this batch runs {self.model!r}: leave model out of the body"
            raise _Refused(Refusal(404, message, "model", "model_not_found"))
        if body.stream:
            raise ParameterError("stream: a batch has whole answers only; leave it out")
        if body.seed is None:
            key = hashlib.blake2b(f"{self.source.digest}/{line.number}".encode(), digest_size=6).digest()
            body = body.model_copy(update={"seed": int.from_bytes(key)})
        understood: Any = chat_call if kind is ChatRequest else completion_call
        call: Call = understood(body, self.engine, "", self.limits)
        return call

    def _refuse(self, line: BatchLine, place: int, refusal: Refusal) -> None:
        self.journal.answer(place, line.custom_id, refusal.status, refusal.body())

    # -- in the engine -----------------------------------------------------------------------------------------

    def _fill(self, blocks: Iterator[list[tuple[int, str | None]]]) -> None:
        """Submit until the window is full. Requests whose step failed wait until nothing else runs, and run alone."""
        if self._suspects:
            while self._suspects and not self._open:
                self._submit(self._suspects.popleft(), None)
            return
        while len(self._asked) < self.window:
            if not self._next:
                more = next(blocks, None)
                if more is None:
                    return
                self._next.extend(more)
                continue
            place, name = self._next.popleft()
            if not self._submit(place, name):
                self._next.appendleft((place, name))
                return

    def _submit(self, place: int, name: str | None) -> bool:
        """Hand a request over; False if the engine's queue is full for now."""
        found = self._understood(place)
        if found is None:
            return True
        line, call = found
        open = self._open[place] = _Open(line, place, call, [], [None] * len(call.submissions))
        try:
            for choice, submission in enumerate(call.submissions):
                options = submission.options if name is None else replace(submission.options, group=name)
                id = self.engine.submit(submission.tokens, submission.params, submission.prediction, options)
                open.ids.append(id)
                self._asked[id] = place, choice
        except QueueFull as error:
            self._withdraw(place)
            if self._open:
                return False
            self._refuse(line, place, refusal_of(error))
        except OutpaceError as error:
            self._withdraw(place)
            self._refuse(line, place, refusal_of(error))
        return True

    def _take(self, event: StepEvent) -> None:
        if event.id not in self._asked or (event.result is None and event.error is None):
            return
        place, choice = self._asked[event.id]
        open = self._open[place]
        if event.error is not None:
            self._withdraw(place)
            self._fail(open, event.error)
            return
        del self._asked[event.id]
        open.results[choice] = event.result
        results = [r for r in open.results if r is not None]
        if len(results) < len(open.results):
            return
        del self._open[place]
        make = chat_body if open.line.url == "/v1/chat/completions" else completion_body
        body = make(open.call, results, self.engine)
        self.journal.answer(place, open.line.custom_id, 200, body)
        self._failed_alone = 0
        progress = self.progress
        progress.tokens += sum(len(r.token_ids) for r in results)
        progress.prompt_tokens += sum(r.stats.prompt_tokens for r in results)
        progress.cached_tokens += sum(r.stats.cached_tokens for r in results)

    def _fail(self, open: _Open, error: Exception) -> None:
        if not isinstance(error, OutpaceError):
            log.error("line %d failed", open.line.number, exc_info=error)
        refusal = refusal_of(error)
        if refusal.status >= 500:  # here the one who asked is the one who looks for the reason
            refusal = Refusal(
                500, f"the engine failed on this request: {type(error).__name__}: {error}", None, "failed"
            )
        self._refuse(open.line, open.place, refusal)

    def _single_out(self, error: Exception) -> None:
        """A step failed. If one request alone was in it, that one is to blame; else each is tried again by itself."""
        step = [self._asked[id][0] for id in self.engine.in_step if id in self._asked]
        blamed = list(dict.fromkeys(step)) or list(self._open)
        opened = [self._open[place] for place in blamed]
        for place in blamed:
            self._withdraw(place)
        if len(opened) > 1:
            self._suspects.extend(blamed)
            return
        self._failed_alone += 1
        if not opened or self._failed_alone >= HOPELESS:
            raise error
        self._fail(opened[0], error)

    def _withdraw(self, place: int) -> None:
        for id in self._open.pop(place).ids:
            if self._asked.pop(id, None) is not None:
                self.engine.cancel(id)

    def _count(self) -> Progress:
        self.progress.done, self.progress.failed = self.journal.found, self.journal.failed
        return self.progress
