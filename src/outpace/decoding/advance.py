"""Ways to advance: what a sequence does with its rows of a step.

    spans     the rows of each sequence, and what they see
    forward   the engine reserves, packs and runs them, beside those of all others
    judge     what the answers mean: tokens, and which of the rows stay in the cache
    observe   what was kept, once stop tokens, stop strings and `max_tokens` have cut it

Between two steps everything of a sequence but its last token is in the cache. So its rows begin with that token, and as
many rows stay as there are new tokens. A step may also give none: then its rows stay open, with what they wrote, and
the next step has them again. That is how a block of positions is refined.

Drafting is one of these ways (`draft_verify.py`), several drafts in one row another (`modes/superposed.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from ..models.batch import Span
from ..models.decoder import NO_TAPS, Taps
from ..types import Accepted, Draft, Exactness, FloatArray, SamplingParams
from .contracts import Sequence
from .outputs import TargetOutputs
from .planners.planner import StepBudget


@dataclass(slots=True, eq=False)
class Work(Span):
    """The rows of one sequence in a step.

    draft       what the rows behind the first stand for, if they were drafted
    embeddings  f32[n, D] in place of those of its tokens; see `Decoder.embedding`
    """

    draft: Draft | None = None
    embeddings: FloatArray | None = None


@dataclass(slots=True, eq=False)
class Outcome:
    """What a step gave a sequence. `accepted.tokens` follow its last one, and of the rows behind the first those of
    `accepted.path` stay: one fewer than there are tokens. Without tokens all rows stay open. `finished`: nothing
    follows."""

    accepted: Accepted
    finished: bool = False


class Advance(ABC):
    """One way, for any number of sequences. State is kept per sequence id, made in `begin` and dropped in `end`.

    Implementations touch neither cache nor `Sequence.tokens`; what goes wrong in `judge` ends that sequence alone.
    """

    name: ClassVar[str]
    #: Rows of a sequence in a step, at most, beside those that the step's budget allows it for drafts.
    rows: int = 1
    #: Whether the last row of a text that was read is judged, since its answer follows the text. Else a sequence's last
    #: token is left to its first step.
    reads_last: bool = True
    #: Whether its output's keys and values are what reading the tokens would have written, so that other requests may
    #: begin with them. Those of the prompt are.
    shares_output: bool = True

    @property
    @abstractmethod
    def exactness(self) -> Exactness:
        """Of what it writes."""

    @property
    def taps(self) -> Taps:
        """What it reads from the outputs, every time, beside logits."""
        return NO_TAPS

    def check(self, params: SamplingParams) -> None:  # noqa: B027
        """Raises ParameterError for what it cannot follow."""

    def begin(self, sequence: Sequence) -> None:  # noqa: B027
        """A sequence starts, or comes back after `pause`."""

    def pause(self, sequence: Sequence) -> None:  # noqa: B027
        """The sequence lost its places in the cache to others. All its text will be read again, by `read`; an open
        region is gone."""

    def end(self, sequence: Sequence) -> None:  # noqa: B027
        """It is finished or cancelled; forget everything of it. Safe to call twice."""

    def read(self, sequence: Sequence, start: int, n: int) -> Work:
        """Rows that write the keys and values of its tokens `start` to `start + n`, of which a chunk of its text is
        made. `logits` of it are the reader's to choose."""
        return Work(sequence.tokens[start : start + n], start)

    @abstractmethod
    def spans(self, sequences: Seq[Sequence], budget: StepBudget) -> list[Work]:
        """The rows of each sequence."""

    def prepare(self, step: Seq[tuple[Sequence, TargetOutputs]], threads: int) -> None:  # noqa: B027
        """Called once before the sequences of a step are judged: what can be computed for all together, on that many
        threads. It changes no result, and what fails here fails again where it is known whose fault it is."""

    @abstractmethod
    def judge(self, sequence: Sequence, work: Work, outputs: TargetOutputs) -> Outcome:
        """What the answers to `work` mean, or to the last row of its text. Nothing is decided yet: see `observe`."""

    def observe(self, sequence: Sequence, work: Work, kept: Accepted, outputs: TargetOutputs) -> None:  # noqa: B027
        """`kept` was committed and is in `sequence.tokens`: what `judge` gave, or the beginning of it; nothing after a
        chunk of its text that goes on. Not called for sequences that failed."""

    def account(self, step: Seq[tuple[Sequence, Work, Outcome]], others: int, seconds: float) -> None:  # noqa: B027
        """The step of its last `spans` took so long after them; it had `others` rows of other sequences in it."""
