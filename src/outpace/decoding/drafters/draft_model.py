"""Drafting by a smaller model of the same vocabulary: a chain of constant length."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...errors import ParameterError
from ...registry import register
from ...types import Draft, FloatArray
from ..contracts import DrafterContext
from ..sampling import Stream, distribution_of, draw, host_row, uniform
from .grown import NO_ROW, Cell, Choice, Draws, Grown, Growth, cell_of, coupled_draw, dense, edit_rows, likeliest
from .sources import ModelSource, Rows, Source


@dataclass(slots=True, eq=False)
class _Chain:
    growth: Growth
    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    cells: list[Cell | None] = field(default_factory=list)
    q: list[FloatArray] = field(default_factory=list)
    reach: float = 1.0

    def add(self, token: int, score: float, cell: Cell, q: FloatArray | None) -> None:
        self.tokens.append(token)
        self.scores.append(score)
        self.cells.append(cell)
        self.reach *= score
        if q is not None:
            self.q.append(q)

    def finish(self, source: str, floor: float) -> None:
        """The draft: all nodes that are reached and accepted with probability `floor` at least."""
        one, scores = self.growth, np.array(self.scores, dtype=np.float32)
        n = int((np.cumprod(scores) >= floor).sum())
        one.draft = Draft.chain(self.tokens[:n], source, scores[:n], np.stack(self.q[:n]) if self.q[:n] else None)
        one.rows, one.cells = [*range(len(self.tokens) - 1), NO_ROW][:n], self.cells[:n]


@register(
    family="SPEC",
    title="Draft model, chain",
    paper="https://arxiv.org/abs/2211.17192",
    exactness="identical",
    needs=("draft model",),
)
class DraftChain(Grown):
    """The draft model continues the text by itself, one forward per token.

    Under coupled verification it proposes its likeliest token, or where the target samples its own coupled draw. Under
    rejection sampling it samples with the request's own parameters and passes its distribution on as q; whether such a
    draft goes on depends on the distributions it was drawn from, and on tokens only above the node in question.
    A node's score is the measured acceptance of nodes of its confidence: the probability that the draft model gives
    the token it proposes, or the largest of q.

    Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", algorithm 1.

    Parameters: `max_tokens` longest draft; `min_reach` the draft ends when the probability that its last token is
    reached and accepted falls below it (0: constant length, as in the paper). Raises ParameterError out of range.
    """

    name = "draft"
    paper = "https://arxiv.org/abs/2211.17192"

    def __init__(
        self, source: Source, draws: Draws = Draws.COUPLED, max_tokens: int = 6, min_reach: float = 0.0
    ) -> None:
        super().__init__(source, draws)
        if max_tokens < 1:
            raise ParameterError(f"{self.name}:max_tokens={max_tokens} is out of range: it must be at least 1")
        if not 0 <= min_reach <= 1:
            raise ParameterError(f"{self.name}:min_reach={min_reach} is out of range: it must be from 0 to 1")
        self.max_tokens, self.min_reach = max_tokens, min_reach

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> DraftChain:
        return cls(ModelSource.of(context, cls.name), Draws.of(context), **options)

    def _rows(self, budget: int) -> int:
        return min(budget, self.max_tokens) - 1

    def _grow(self, growing: list[Growth], logits: torch.Tensor) -> None:
        chains = [_Chain(one) for one in growing]
        stop, active = max(self.min_reach, self.forward_floor, self.floor), chains
        while True:
            self._lengthen(active, logits)
            active = [
                chain
                for chain in active
                if len(chain.tokens) < min(chain.growth.budget, self.max_tokens) and chain.reach >= stop
            ]
            if not active:
                break
            logits = self.source.extend(
                [Rows(c.growth.sequence, c.tokens[-1:], list(range(-1, len(c.tokens) - 1))) for c in active]
            )
        for chain in chains:
            chain.finish(self.name, self.floor)

    def _lengthen(self, chains: list[_Chain], logits: torch.Tensor) -> None:
        """Add the next token of each, chosen from its row of `logits`."""
        edited = edit_rows(logits, [(chain.growth.sequence, chain.tokens) for chain in chains])
        ids, p = likeliest(edited, 1)
        for row, chain in enumerate(chains):
            params = chain.growth.sequence.params
            position = len(chain.growth.sequence.tokens) + len(chain.tokens)
            token, own, q = ids[row][0], p[row][0], None
            if params.greedy:
                kind = Choice.GREEDY
            elif self.draws is Draws.COUPLED:
                kind = Choice.COUPLED
                token, own = coupled_draw(edited[row], params, position)
            elif self.draws is Draws.SAMPLED:
                kind = Choice.SAMPLED
                q = dense(distribution_of(host_row(edited[row]), params), self.source.vocab_size)
                key = (len(chain.growth.sequence.tokens), Stream.DRAFT, len(chain.tokens))
                token, own = draw(q, uniform(params.seed, *key)), float(q.max())
            else:
                kind = Choice.OUTRIGHT
            cell = cell_of(kind, own)
            chain.add(token, self._rate(cell), cell, q)
