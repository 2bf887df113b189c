"""Drafting by a smaller model of the same vocabulary: a chain of constant length."""

from __future__ import annotations

from ...errors import ParameterError
from ...registry import register
from ...types import Logits
from ..contracts import Market
from ..sampling import Stream, distribution_of, draw, host_row, uniform
from .grown import Choice, Draws, Grown, Growth, cell_of, coupled_draw, dense, edit_rows, likeliest
from .sources import Source


@register(
    family="SPEC",
    title="Draft model, chain",
    paper="https://arxiv.org/abs/2211.17192",
    exactness="identical",
    needs=("draft model",),
    claim="2x to 3x (T5-XXL)",
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

    def _rows(self, budget: int) -> int:
        return min(budget, self.max_tokens) - 1

    def _grow(self, growing: list[Growth], logits: Logits, market: Market) -> None:
        stop, active = max(self.min_reach, market.forward_floor, market.floor), growing
        while active:
            self._lengthen(active, logits)
            active = [
                one for one in active if len(one.tokens) < min(one.budget, self.max_tokens) and one.reach[-1] >= stop
            ]
            if active:
                logits = self.source.extend([one.run([len(one.tokens) - 1]) for one in active])
        for one in growing:
            one.finish(self.name, market.floor)

    def _lengthen(self, chains: list[Growth], logits: Logits) -> None:
        """Add the next token of each, chosen from its row of `logits`."""
        edited = edit_rows(logits, [(one.sequence, one.tokens) for one in chains])
        ids, p = likeliest(edited, 1)
        for row, one in enumerate(chains):
            params, last = one.sequence.params, len(one.tokens) - 1
            token, own, q = ids[row][0], p[row][0], None
            if params.greedy:
                kind = Choice.GREEDY
            elif self.draws is Draws.COUPLED:
                kind = Choice.COUPLED
                token, own = coupled_draw(edited[row], params, one.root + last + 1)
            elif self.draws is Draws.SAMPLED:
                kind = Choice.SAMPLED
                q = dense(distribution_of(host_row(edited[row]), params), self.source.vocab_size)
                token, own = draw(q, uniform(params.seed, one.root, Stream.DRAFT, last + 1)), float(q.max())
            else:
                kind = Choice.OUTRIGHT
            cell = cell_of(kind, own)
            one.add(last, token, self._rate(cell), cell, q)
