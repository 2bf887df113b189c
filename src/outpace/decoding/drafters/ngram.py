"""Prompt lookup: what followed the same few tokens the last time."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from ...errors import ParameterError
from ...registry import register
from ...types import NO_PARENT
from ..contracts import Sequence
from .nodes import NodeDrafter, Nodes, NodeState, chain_length, check_range
from .rates import Rates


class NgramIndex:
    """Where each n-gram of one sequence was last followed by something. An append costs one entry per length."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.tokens: list[int] = []
        self._lengths = range(shortest, longest + 1)
        self._last: list[dict[tuple[int, ...], int]] = [{} for _ in self._lengths]

    def extend(self, tokens: Seq[int]) -> None:
        seen = self.tokens
        for token in tokens:
            # The n-grams that end here only now have a continuation: the place of the new token.
            end = len(seen)
            for last, n in zip(self._last, self._lengths, strict=True):
                if n <= end:
                    last[tuple(seen[end - n :])] = end
            seen.append(int(token))

    def find(self) -> tuple[int, int]:
        """(n, place of the continuation) of the longest suffix seen before; n is 0 if there is none."""
        end = len(self.tokens)
        for last, n in zip(reversed(self._last), reversed(self._lengths), strict=True):
            if n <= end:
                place = last.get(tuple(self.tokens[end - n :]))
                if place is not None:
                    return n, place
        return 0, end

    def continuation(self, place: int, length: int) -> list[int]:
        """`length` tokens from `place`; past the end the copy reads itself, so a loop goes on as a loop."""
        copied = self.tokens[place : place + length]
        period = len(self.tokens) - place
        while len(copied) < length:
            copied.append(copied[len(copied) - period])
        return copied


@dataclass(slots=True)
class _State(NodeState):
    index: NgramIndex


@register(
    family="SPEC",
    title="Prompt lookup (n-gram)",
    paper="https://github.com/apoorvumang/prompt-lookup-decoding",
    exactness="identical",
    claim="2x to 4x where the output repeats the input (authors' page)",
)
@dataclass(slots=True, eq=False)
class Ngram(NodeDrafter[_State]):
    """Proposes the tokens that followed the last occurrence of the longest suffix of at most `max_ngram`
    tokens, in prompt and output. A chain; a hash index per n-gram length is kept up token by token.

    Saxena, "Prompt Lookup Decoding" (2023); the reference-copying idea is that of Yang et al., "Inference
    with Reference" (arXiv 2304.04487, section 3).

    Parameters: `min_ngram`, `max_ngram` lengths of the suffix to match; `max_tokens` longest draft.
    A node's score is the measured acceptance of matches of that length.
    """

    name = "ngram"
    paper = "https://github.com/apoorvumang/prompt-lookup-decoding"

    min_ngram: int = 1
    max_ngram: int = 5
    max_tokens: int = 32
    _states: dict[int, _State] = field(default_factory=dict, init=False, repr=False)
    _rates: Rates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ParameterError(f"ngram needs 1 <= min_ngram <= max_ngram, not {self.min_ngram} and {self.max_ngram}")
        check_range(self.name, "max_tokens", self.max_tokens, 1)
        self._rates = Rates([min(0.9, 0.3 + 0.15 * n) for n in range(self.max_ngram + 1)])

    def begin(self, sequence: Sequence) -> None:
        self._states[sequence.id] = _State(NgramIndex(self.min_ngram, self.max_ngram))

    def _grow(self, sequence: Sequence, state: _State, nodes: Nodes, budget: int, floor: float) -> None:
        index = state.index
        index.extend(sequence.tokens[len(index.tokens) :])
        matched, place = index.find()
        if matched:
            score = float(self._rates.value[matched])
            length = chain_length(score, floor, min(budget, self.max_tokens))
            node = NO_PARENT
            for token in index.continuation(place, length):
                node = nodes.add(node, token, score, (matched,))
