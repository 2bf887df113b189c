"""What the scheduler and the engine that executes its plans exchange. Plain data: no tensors, no decoder.

tokens of a job     prompt_tokens | generated              (the last one is not in the cache while it decodes)
places in the cache `read` while the prompt is read, then prompt_tokens + generated - 1
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Literal, NamedTuple, Protocol

from ..errors import CapacityError
from ..fields import Flag, Number, Whole, check, same, value
from .options import FIXED_ROWS, STEP_ROWS, EngineOptions

Preemption = Literal["swap", "recompute"]


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What may run and wait. Rows are what a target step computes. Raises ParameterError for a value out of range.

    num_pages     pages of the KV cache, of `page_size` tokens each
    max_position  tokens of the model's context
    max_batch     jobs that run at once, reading or decoding
    max_rows      rows of one decoding sequence in a step: its last token and its draft
    max_step_rows rows of all decoding sequences in a step; a sequence always has one
    prefill_rows  prompt rows of a step
    max_queue     jobs that wait; one more is refused with QueueFull. None: no limit
    max_step_s    seconds that a step may take while somebody decodes. None: the rows alone count
    least_chunk   prompt rows that a step has in any case, so that reading goes on whatever `max_step_s` is
    draft_share   of the rows beside the decoding sequences' own, what drafts get while prompts are read
    ageing_s      seconds without a start that raise the priority of an owner's waiting jobs by one, up to the best
                  that anybody has. None: never
    headroom      tokens that every running job must have pages for beside the one that starts
    swap_tokens   most tokens on the host at once, in whole pages. 0: what is preempted is read again
    swap_least    pages below which a preempted job is read again all the same
    logit_rows    prompt rows of a step that give logits, of all jobs that want those of their whole prompts
    shortest_first among an owner's jobs of one priority those of the shortest predicted output start first
    """

    num_pages: int = value(MISSING, Whole(1))
    page_size: int = value(MISSING, Whole(1))
    max_position: int = value(MISSING, Whole(1))
    max_batch: int = same(EngineOptions, "max_batch")
    max_rows: int = same(EngineOptions, "max_rows", FIXED_ROWS)
    max_step_rows: int = same(EngineOptions, "max_step_rows", STEP_ROWS)
    prefill_rows: int = same(EngineOptions, "prefill_rows")
    max_queue: int | None = same(EngineOptions, "max_queue")
    max_step_s: float | None = same(EngineOptions, "max_step_s")
    least_chunk: int = value(16, Whole(1))
    draft_share: float = value(0.25, Number(0, 1))
    ageing_s: float | None = value(10.0, Number(0, above=True), none=True)
    headroom: int = value(32, Whole(0))
    swap_tokens: int = same(EngineOptions, "swap_tokens")
    swap_least: int = value(8, Whole(0))
    logit_rows: int = value(128, Whole(1))
    shortest_first: bool = value(False, Flag())

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def of(options: EngineOptions, num_pages: int, page_size: int, max_position: int) -> SchedulerLimits:
        return SchedulerLimits(
            num_pages,
            page_size,
            max_position,
            max_batch=options.max_batch,
            max_rows=options.rows,
            max_step_rows=options.step_rows,
            prefill_rows=options.prefill_rows,
            max_queue=options.max_queue,
            max_step_s=options.max_step_s,
            swap_tokens=options.swap_tokens,
        )

    @property
    def swap_pages(self) -> int:
        return self.swap_tokens // self.page_size

    def pages(self, tokens: int) -> int:
        """Pages that so many places take."""
        return -(-tokens // self.page_size)

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raises CapacityError when such a job could never run."""
        total = prompt_tokens + max_tokens
        if total > self.max_position:
            left = self.max_position - prompt_tokens
            advice = f"use max_tokens of at most {left}" if left > 0 else "shorten the prompt"
            raise CapacityError(
                f"{prompt_tokens} prompt tokens and max_tokens={max_tokens} make {total}, but the model's context "
                f"is {self.max_position} tokens: {advice}"
            )
        if self.pages(total) > self.num_pages:
            raise CapacityError(
                f"{prompt_tokens} prompt tokens and max_tokens={max_tokens} make {total}, but the KV cache holds "
                f"{self.num_pages * self.page_size} tokens: lower max_tokens, shorten the prompt or raise kv_tokens"
            )


@dataclass(slots=True, eq=False)
class Job:
    """A request as the scheduler sees it. What follows `arrived` is the scheduler's own."""

    id: int
    prompt_tokens: int
    max_tokens: int
    owner: str = ""
    priority: int = 0  # lower ones first
    group: str | None = None
    max_draft: int | None = None  # most draft rows of a step; None: as the limits say
    arrived: float | None = None  # None: when it is added, by the scheduler's clock
    whole: bool = False  # every row of its prompt must be run: nothing comes from the prefix cache
    logits: bool = False  # and gives logits
    rows: int = 1  # of a step, beside drafts
    pause: int = 0  # tokens after which a chunk ends, since something is done with what was read up to there
    ahead: int = 0  # tokens at the end of its text that it does not read before it decodes: its first step does

    order: int = field(default=-1, init=False)  # of arrival
    level: int = field(default=0, init=False)  # the priority, raised by waiting; what it started with is kept
    target: int = field(default=0, init=False)  # tokens to read before it decodes (again)
    read: int = field(default=0, init=False)  # of these
    generated: int = field(default=0, init=False)
    predicted: int | None = field(default=None, init=False)  # tokens of output in all
    running: bool = field(default=False, init=False)
    began: float | None = field(default=None, init=False)  # its first start
    preempted: int = field(default=0, init=False)  # so often
    since: float = field(default=0.0, init=False)  # when it last joined the queue
    waited: float = field(default=0.0, init=False)  # after preemptions, in seconds
    swapped: bool = field(default=False, init=False)  # its pages are on the host
    fresh: bool = field(default=False, init=False)  # must start without cached pages

    @property
    def uncached(self) -> bool:
        """It starts without pages of the prefix cache."""
        return self.fresh or self.whole

    @property
    def decoding(self) -> bool:
        return self.running and self.read == self.target

    @property
    def own(self) -> int:
        """Rows of its next step, beside drafts."""
        return min(self.rows, self.remaining + 1)

    @property
    def unread(self) -> int:
        """Tokens to read before it decodes."""
        return self.target - self.read

    @property
    def ahead_of_pause(self) -> int:
        """Of the tokens to read those before the next pause."""
        return min(self.pause - self.read, self.unread) if self.read < self.pause else self.unread

    @property
    def remaining(self) -> int:
        return self.max_tokens - self.generated

    @property
    def context(self) -> int:
        """Places in the cache, or on the host."""
        return self.prompt_tokens + self.generated - 1 if self.read == self.target else self.read

    @property
    def rank(self) -> tuple[int, int]:
        """The order in which jobs keep running: the smallest first."""
        return self.level, self.order


class Memory(Protocol):
    """The engine's KV cache, or a simulator's counters."""

    @property
    def available_pages(self) -> int:
        """Pages that are free, or that the prefix cache alone holds and would give up."""

    def shared_pages(self, id: int) -> int:
        """Of a waiting job's prompt: pages in the prefix cache that running jobs hold as well. Starting the job takes
        none of the available pages for them; 0 is a safe answer."""

    def pages_needed(self, id: int, rows: int) -> int:
        """Available pages that `rows` more rows of a running job take, a copy of a shared last page included."""

    def pages_held(self, id: int) -> int:
        """Available pages that preempting a running job makes; where it is not sure, the fewest."""


class Start(NamedTuple):
    """A job that starts now. `swapped`: its pages come back from the host; else it is read from its first token that
    is not cached. `cached`: whether it may use the prefix cache."""

    id: int
    swapped: bool
    cached: bool


class Preempt(NamedTuple):
    """A running job that gives its pages back before the step runs."""

    id: int
    how: Preemption


@dataclass(slots=True)
class StepPlan:
    """One step. Every id runs; pages for all rows that it allows are there once `preempt` was carried out."""

    preempt: list[Preempt] = field(default_factory=list)
    decoding: list[int] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)  # (id, prompt rows)
    draft_rows: int = 0  # of all sequences together
    caps: dict[int, int] = field(default_factory=dict)  # most draft rows of each decoding sequence

    @property
    def empty(self) -> bool:
        """No rows. With `preempt` it is still to be carried out, and the next plan has rows."""
        return not self.decoding and not self.chunks


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start; seconds by the scheduler's clock."""

    waiting: int = 0  # now
    running: int = 0  # now
    started: int = 0  # first starts
    finished: int = 0  # cancelled ones included
    refused: int = 0  # because the queue was full
    swapped: int = 0  # preempted, by way
    recomputed: int = 0
    mispredicted: int = 0  # outputs longer than predicted
    read_tokens: int = 0
    reread_tokens: int = 0  # of these, by jobs that had been preempted
    generated_tokens: int = 0
    queue_s: float = 0.0  # from arrival to first start, summed over `started`
    longest_queue_s: float = 0.0
