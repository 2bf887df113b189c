"""Requests, drafts, results and statistics as plain data. No torch at import time.

Shapes: `n` nodes of a draft, `V` vocabulary, `R` rows of logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import ParameterError
from .fields import Choice, Each, Flag, Number, Pairs, Text, Whole, check, value
from .json_text import JsonSchema

if TYPE_CHECKING:
    import torch

Exactness = Literal["identical", "distribution", "approximate"]
RANKS: tuple[Exactness, ...] = ("identical", "distribution", "approximate")  # the best first
FinishReason = Literal["stop", "length", "cancelled", "error"]
#: of weights; "file": each matrix in the format that its file has it in
Precision = Literal["file", "float32", "bfloat16", "int8", "int4"]
Pooling = Literal["mean", "last"]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
#: as a decoder makes them: arrays on the CPU, which need no torch, tensors elsewhere
Logits: TypeAlias = "torch.Tensor | FloatArray"

_CONSTRAINTS = ("json_schema", "regex", "grammar")

NO_PARENT = -1  # the parent of a draft's first nodes: the last committed token


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request chooses its tokens.

    `temperature=0` is greedy. `seed` keys the randomness together with the position, never with draw order:
    two runs of one seed give the same text whatever was batched or drafted beside it.
    Raises ParameterError for a value out of range.
    """

    max_tokens: int = value(256, Whole(1, words="a whole number, 1 or more"), "Longest answer, in tokens.")
    min_tokens: int = value(
        0, Whole(0), "What ends an output cannot come before so many tokens; stop strings are not looked for there."
    )
    temperature: float = value(
        0.0,
        Number(0, 100, words="a number from 0 (greedy) to 100"),
        "0 takes the likeliest token, higher is more varied.",
    )
    top_k: int = value(
        0, Whole(0, words="a whole number, 0 (no limit) or more"), "Sample among the k likeliest tokens; 0: all."
    )
    top_p: float = value(
        1.0, Number(0, 1, above=True), "Sample among the likeliest tokens that make up this probability."
    )
    min_p: float = value(
        0.0, Number(0, 1, below=True), "Leave out tokens less likely than this share of the likeliest."
    )
    repetition_penalty: float = value(
        1.0, Number(0, 100, above=True), "Above 1: tokens of the prompt and the answer become less likely."
    )
    presence_penalty: float = value(0.0, Number(-2, 2), "Subtracted from the logits of tokens that the answer has.")
    frequency_penalty: float = value(0.0, Number(-2, 2), "The same for each time that it has them.")
    logit_bias: Mapping[int, float] = value(
        {}, Pairs(Whole(0), Number(-100, 100), "token ids, each with a bias from -100 to 100"), "Added to logits."
    )
    seed: int = value(
        0, Whole(0, 2**63 - 1, words="a whole number from 0 to 2**63 - 1"), "The same seed gives the same text."
    )
    stop: tuple[str, ...] = value((), Each(Text(), "non-empty strings", single=True), "End before any of these texts.")
    stop_token_ids: tuple[int, ...] = value((), Each(Whole(0), "token ids"), "End at any of these.")
    ignore_eos: bool = value(False, Flag(), "Go on behind the model's own end.")
    logprobs: int | None = value(
        None, Whole(0, 20), "Of the chosen token and of this many likeliest ones. None: no log-probabilities."
    )
    raw_logprobs: bool = value(
        False, Flag(), "Log-probabilities are those of the model alone, before penalties, bias and grammar."
    )
    prompt_logprobs: int | None = value(
        None, Whole(0, 20), "The same of the prompt's tokens, by the model's own distribution."
    )

    json_schema: str | Mapping[str, Any] | None = value(
        None, JsonSchema(), "The output is JSON that the schema (text or object) describes."
    )
    regex: str | None = value(None, Text(empty=True, words="a regular expression"), "The whole output matches it.")
    grammar: str | None = value(
        None,
        Text(empty=True, words="the text of a grammar"),
        "The output is a sentence of it: Lark's or llama.cpp's (GBNF) notation.",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.min_tokens > self.max_tokens:
            raise ParameterError(f"min_tokens={self.min_tokens} is out of range: max_tokens is {self.max_tokens}")
        if self.raw_logprobs and self.logprobs is None:
            raise ParameterError("raw_logprobs says which log-probabilities are given: set logprobs too")
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ParameterError(f"{' and '.join(given)} cannot go together: give one of {', '.join(_CONSTRAINTS)}")
        if given and self.ignore_eos:
            raise ParameterError(
                f"{given[0]} ends the output where it is complete, ignore_eos goes on: drop one of them"
            )

    @property
    def constraint(self) -> tuple[str, str] | None:
        """What the output must keep to: `json_schema`, `regex` or `grammar`, and its text."""
        return next(((name, getattr(self, name)) for name in _CONSTRAINTS if getattr(self, name) is not None), None)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def edits_logits(self) -> bool:
        """Whether anything but the temperature changes the target's logits."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.constraint is not None
            or self.min_tokens > 0
        )


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How one request is served; nothing here changes which tokens it gets, unless `method` is not lossless.

    owner      requests of two owners share no cached prefix, and no drafter state, and are queued fairly
    priority   lower ones start, and are kept running, before higher ones
    method     drafts with this method instead of the engine's own; the engine must have been opened with it
    max_draft  most draft nodes of a step; 0 is plain decoding
    exactness  the weakest guarantee that is acceptable: a request that could only get less is refused
    group      requests of one group have a long common beginning: the first reads it, the others wait for that
    pooling    give a vector of the prompt too: the mean of the model's final hidden states, or the last of them

    Raises ParameterError for a value out of range.
    """

    owner: str = value("", Text(empty=True))
    priority: int = value(0, Whole(-100, 100))
    method: str | None = value(None, Text())
    max_draft: int | None = value(None, Whole(0, 4096))
    exactness: Exactness | None = value(None, Choice(get_args(Exactness)))
    group: str | None = value(None, Text(empty=True))
    pooling: Pooling | None = value(None, Choice(get_args(Pooling)))

    def __post_init__(self) -> None:
        check(self)


@dataclass(slots=True, eq=False)
class Draft:
    """A token tree that a drafter proposes. A chain is a tree; an empty draft is plain decoding.

    Nodes are in topological order: `parents[i] < i`, and `NO_PARENT` for children of the last committed token.
    """

    tokens: IntArray  # [n]
    parents: IntArray  # [n]
    sources: list[str]  # [n] name of the drafter that proposed the node first
    scores: FloatArray | None = None  # [n] drafter's estimate of P(node is accepted | its parent is)
    q: FloatArray | None = None  # [n, V] distribution each node was *sampled* from; None: proposed outright
    # With q: whether siblings, all drawn from one distribution, were drawn independently. Without replacement the
    # later ones of a node exclude the earlier; their rows of q are then the distribution before any exclusion.
    replacement: bool = True

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def empty() -> Draft:
        z = np.empty(0, dtype=np.int64)
        return Draft(z, z, [])

    @staticmethod
    def chain(
        tokens: IntArray | list[int],
        source: str,
        scores: FloatArray | None = None,
        q: FloatArray | None = None,
    ) -> Draft:
        t = np.asarray(tokens, dtype=np.int64)
        return Draft(t, np.arange(-1, len(t) - 1, dtype=np.int64), [source] * len(t), scores, q)


@dataclass(slots=True, eq=False)
class Accepted:
    """What a verifier decided for one sequence and one step; in lists, since they are short."""

    path: list[int]  # [a] accepted draft nodes, from the root down
    tokens: list[int]  # [a + 1] their tokens, then the target's own next token
    # [a + 1] of `tokens` under the target's processed distribution, or its raw one (SamplingParams.raw_logprobs)
    logprobs: FloatArray | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None  # [a + 1][k] (token, log-probability)


@dataclass(slots=True)
class SourceStats:
    """What one drafter did for one request. `tested[d]` nodes at depth d whose ancestors were all accepted, `right[d]`
    of them accepted too: their quotient is the acceptance at that depth."""

    proposed: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    tested: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)

    def record(self, depth: int, right: bool) -> None:
        while len(self.tested) <= depth:
            self.tested.append(0)
            self.right.append(0)
        self.tested[depth] += 1
        self.right[depth] += right


@dataclass(slots=True)
class DecodingStats:
    """Of one request. Times in seconds; `steps` are target forwards that decoded (prefill apart)."""

    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    sources: dict[str, SourceStats] = field(default_factory=dict)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0  # this request's share of the target's forwards and of verifying drafts
    plain_s: float = 0.0  # what plain decoding of the same tokens takes by the measured step times; 0: not measured
    expected_tokens: float = 0.0  # by the drafts' scores, the target's own tokens included
    time_to_first_token_s: float = 0.0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    queue_s: float = 0.0  # waiting before the prompt was begun
    preemptions: int = 0  # how often it was stopped to free pages for others
    kv_freed: int = 0  # bytes of keys and values that its policy gave back
    prediction_accepted: int = 0  # tokens of the caller's prediction that the output has, in order
    prediction_rejected: int = 0  # and those that it has not

    def source(self, name: str) -> SourceStats:
        found = self.sources.get(name)
        if found is None:
            found = self.sources[name] = SourceStats()
        return found

    @property
    def accepted_by_source(self) -> dict[str, int]:
        return {name: s.accepted for name, s in self.sources.items() if s.accepted}

    @property
    def drafted_by_source(self) -> dict[str, int]:
        return {name: s.proposed for name, s in self.sources.items() if s.proposed}

    @property
    def realised_speedup(self) -> float | None:
        """Over plain decoding by the measured step times; None if they were not measured."""
        return self.plain_s / self.decode_s if self.plain_s > 0 and self.decode_s > 0 else None

    @property
    def predicted_speedup(self) -> float | None:
        """The same, had as many tokens been accepted as the drafts' scores predicted."""
        realised = self.realised_speedup
        return None if realised is None else realised * self.expected_tokens / max(self.tokens - 1, 1)

    @property
    def mean_accepted(self) -> float:
        """tau: tokens committed per target step, the bonus token included. The first token comes from prefill."""
        return (self.tokens - 1) / self.steps if self.steps else 1.0

    @property
    def acceptance_rate(self) -> float:
        """alpha: accepted draft tokens per drafted token."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed: tokens after the first over the time after prefill."""
        return (self.tokens - 1) / self.decode_s if self.decode_s > 0 and self.tokens > 1 else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s > 0 else 0.0


@dataclass(slots=True, eq=False)
class PromptReading:
    """What reading a prompt of T tokens told, as far as it was asked for.

    Log-probabilities are those of the model's own distribution: temperature, penalties and filters do not change them.
    The first token has none: nothing stands before it.
    """

    logprobs: list[float] | None  # [T - 1] of the tokens from the second on
    top_logprobs: list[list[tuple[int, float]]] | None  # [T - 1][k] (token, log-probability), the likeliest first
    embedding: FloatArray | None  # [D] of unit length


@dataclass(slots=True)
class Result:
    """A finished request."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    method: str
    exactness: Exactness
    stats: DecodingStats
    sources: list[str]  # per token: the drafter that proposed it, or "target"
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    notes: list[str] = field(default_factory=list)  # why `exactness` is less than the method could give
    stopped_by: str | None = None  # the stop string that ended the text
    prompt: PromptReading | None = None  # with SamplingParams.prompt_logprobs or RequestOptions.pooling
