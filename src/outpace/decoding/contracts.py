"""The contract of drafters and verifiers: reserve -> propose -> forward -> verify -> commit.

Every drafter that was called for a step observes its commit, whichever proposed the accepted nodes. A verifier is a
pure function. Neither keeps anything in the target's cache.

Shapes: `n` draft nodes, `V` vocabulary; `outputs` of a step has n + 1 rows: row 0 is the target's answer after the
last committed token, row i + 1 its answer after draft node i.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from ..cache.pages import PagedKVCache
from ..models.decoder import NO_TAPS, Decoder, Taps
from ..models.heads import Head
from ..models.tokenizer import Tokenizer
from ..types import Accepted, DecodingStats, Draft, Exactness, IntArray, Precision, SamplingParams
from .grammar import Matcher
from .outputs import TargetOutputs
from .sampling import History

NOT_CACHED = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence being decoded, as drafters and verifiers see it. The engine alone appends to `tokens`."""

    id: int
    tokens: list[int]  # prompt and output so far; the last one is not in the KV cache yet
    prompt_length: int
    params: SamplingParams
    prediction: list[int] = field(default_factory=list)  # what the caller expects the output to be, or much of it
    kv: int = NOT_CACHED  # its handle in the target's KV cache, which holds all of `tokens` but the last
    method: str = ""  # that drafts for it, if the engine was opened with several; "": the engine's own
    owner: str = ""  # what drafters learn from one owner's text never reaches another owner's
    matcher: Matcher | None = None  # of its grammar, if `params` have one; `history` moves it
    stop_ids: frozenset[int] = frozenset()  # what ends it
    stats: DecodingStats = field(default_factory=DecodingStats)
    edits_logits: bool = field(init=False)  # as its `params` say
    _history: History | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.edits_logits = self.params.edits_logits

    @property
    def history(self) -> History:
        """Counts of `tokens` for the penalties, and the grammar, caught up in time proportional to what was appended.

        A verifier may append the path that it walks, and truncates it again before it returns.
        """
        if self._history is None:
            self._history = History((), self.prompt_length, self.matcher, self.stop_ids)
        for token in self.tokens[len(self._history) :]:
            self._history.append(token)
        return self._history

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    def fork(self, id: int, params: SamplingParams, matcher: Matcher | None) -> Sequence:
        """Another one that goes on from the same tokens, not in the KV cache yet. `matcher`: a new one."""
        return replace(
            self,
            id=id,
            tokens=list(self.tokens),
            params=params,
            kv=NOT_CACHED,
            matcher=matcher,
            stats=deepcopy(self.stats),
        )


@dataclass(slots=True, eq=False)
class Observation:
    """What a step revealed of one sequence.

    accepted  what was committed; its tokens are in sequence.tokens already
    outputs   valid during `observe` only; what is tapped is there for every row of a chunk
    kind      "step": of its last token and a draft; "prefill": of a chunk of its text. The last one gives a token, the
              others none, and no logits
    """

    accepted: Accepted
    draft: Draft
    outputs: TargetOutputs
    kind: Literal["prefill", "step"] = "step"

    @property
    def new_tokens(self) -> list[int]:
        return self.accepted.tokens


@dataclass(frozen=True, slots=True)
class DrafterContext:
    """What drafters may be built from."""

    vocab_size: int  # of the target
    draft: Decoder | None = None  # the draft model, of the target's vocabulary
    draft_pages: int = 0  # of its KV cache
    sampled: bool = False  # the verifier uses q (rejection sampling): drafters that can should sample
    merged: bool = False  # the draft will be merged with others, which loses q: propose outright
    owner_of: Callable[[Sequence], Hashable] | None = None  # sequences of two owners share no drafter state
    target: Decoder | None = None  # for drafters that draft with the target itself,
    cache: PagedKVCache | None = None  # in its own KV cache: a provisional region of sequence.kv, rolled back after
    target_in: Callable[[Precision], Decoder] | None = None  # the target's weights in another precision
    tokenizer: Tokenizer | None = None  # of the target
    draft_tokenizer: Tokenizer | None = None  # of the draft model, which may be another
    head: Head | None = None  # trained for the target


@dataclass(frozen=True, slots=True)
class Market:
    """What drafting has to repay in a step, as its planner says. All 0: nothing."""

    #: A node that is less likely to be reached and accepted than this does not repay its row. Drafters that order nodes
    #: by such an estimate stop there, others may ignore it.
    floor: float = 0.0
    #: The same for what costs a forward of the draft model.
    forward_floor: float = 0.0
    #: Tokens per second of the engine at the moment, 0 if it is not measured. Where several drafters are merged, each
    #: must be expected to gain as many per second of its own time.
    rate: float = 0.0


@dataclass(slots=True)
class Proposal:
    """One draft for each sequence. `seconds`: what each source spent on them, of a drafter that asks several; empty:
    all of the time was its own."""

    drafts: list[Draft]
    seconds: dict[str, float] = field(default_factory=dict)


class Drafter(ABC):
    """Proposes drafts. State is kept per sequence id, made in `begin` and dropped in `end`."""

    name: ClassVar[str]
    paper: ClassVar[str]
    #: Whether it observes every step and every chunk of a text, also those in which it was not called to propose
    follows: ClassVar[bool] = False

    @property
    def taps(self) -> Taps:
        """What `observe` reads from the outputs, every time, beside logits."""
        return NO_TAPS

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Drafter:
        """Build one; `options` are parameters of the constructor that a user may set, checked by the caller.

        Raises MethodError when `context` lacks what it needs, ParameterError for an option out of range.
        """
        return cls(**options)

    def begin(self, sequence: Sequence) -> None:  # noqa: B027
        """A sequence starts; its prompt is in `sequence.tokens`."""

    @abstractmethod
    def propose(self, sequences: Seq[Sequence], budgets: Seq[int], market: Market) -> Proposal:
        """One draft per sequence, of at most `budgets[i]` nodes (0: return an empty one).

        With q, what is proposed and its scores depend on the tokens sampled above a node, never on its own, and the
        draws are new in every step: key them by its first position (see `sampling.Stream.DRAFT`).
        """

    def observe(self, sequence: Sequence, seen: Observation) -> None:  # noqa: B027
        """A step was committed, or a chunk of the text read. Unless it `follows`, not called for steps in which
        `propose` was not called: what it missed is in `sequence.tokens`."""

    def explain(self) -> list[str]:
        """What it did and why, in lines for a person."""
        return []

    def end(self, sequence: Sequence) -> None:  # noqa: B027
        """The sequence is finished or cancelled; forget everything of it. Safe to call twice."""


class Verifier(ABC):
    """Decides which draft nodes the target accepts. Pure: frees nothing, edits nothing in place."""

    name: ClassVar[str]
    exactness: ClassVar[Exactness]
    #: Whether it looks at `draft.q`, so that drafters that can should sample. It then takes siblings drawn with and
    #: without replacement, as `draft.replacement` says.
    uses_q: ClassVar[bool] = False

    def prepare(self, step: Seq[tuple[Sequence, TargetOutputs]], threads: int) -> None:  # noqa: B027
        """Called once for a step before its sequences are verified: what can be computed for all of them together, on
        that many threads. It changes no result."""

    @abstractmethod
    def verify(self, sequence: Sequence, draft: Draft, outputs: TargetOutputs) -> Accepted:
        """`outputs` rows as in the module's legend; returns at least one token."""


def node_depths(parents: IntArray) -> IntArray:
    """Depth of each node, 0 for children of the last committed token. [n] -> [n]"""
    depths: list[int] = []
    for parent in parents.tolist():  # small lists: element by element numpy would take several times as long
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return np.array(depths, dtype=np.int64)
