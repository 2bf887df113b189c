"""Rejection sampling: the target's distribution from a drafter's samples."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...registry import register
from ...types import NO_PARENT, Accepted, Draft, Exactness
from ..contracts import Sequence, Verifier
from ..outputs import TargetOutputs
from ..sampling import Stream, distribution_of, draw, uniform
from ..tree import children
from .coupled import CoupledVerifier
from .walk import Recorder, target_row

Distribution = NDArray[np.float64]


@register(
    kind="verifier",
    family="SPEC",
    title="Speculative (rejection) sampling, recursive for siblings",
    paper="https://arxiv.org/abs/2211.17192",
    exactness="distribution",
    claim="2x to 3x (T5-XXL)",
)
class RejectionVerifier(Verifier):
    """Accepts a child x of a node with probability min(1, p(x) / q(x)), p the target's distribution there and
    q the one that x was sampled from. After a rejection p becomes the normalised positive part of p - q and
    the next sibling is tried; after the last one the token is sampled from what is left of p.

    q of a sibling is its row of `draft.q` where siblings were drawn independently; where they were drawn without
    replacement (`draft.replacement` False) it is that row without the earlier siblings, normalised again. A node
    that was proposed outright (draft.q is None) has all of q on itself.

    Exactness: distribution, if every node of a draft with q was sampled as the draft says. Greedy is decided as by
    the coupled verifier. Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding",
    section 2.3 and appendix A.1; Chen et al. (arXiv 2302.01318), algorithm 2; independent siblings: Miao et al.,
    "SpecInfer" (arXiv 2305.09781), section 4.3; without replacement: Jeon et al., "Recursive Speculative Decoding"
    (arXiv 2402.14160), section 3.1. Uniforms are keyed by (seed, position, number of the sibling); the residual's
    by (seed, position), as in plain decoding, so a step without a draft samples what plain decoding samples.
    """

    name = "rejection"
    exactness: ClassVar[Exactness] = "distribution"
    uses_q: ClassVar[bool] = True

    def __init__(self) -> None:
        self._coupled = CoupledVerifier()

    def verify(self, sequence: Sequence, draft: Draft, outputs: TargetOutputs) -> Accepted:
        if sequence.params.greedy:
            return self._coupled.verify(sequence, draft, outputs)
        below = children(draft.parents)
        with Recorder(sequence) as record:
            node: int | None = NO_PARENT
            while node is not None:
                processed = record.process(target_row(outputs, node))
                p = distribution_of(processed, sequence.params)
                token, node = self._decide(p, below.get(node, []), draft, sequence.params.seed, record.position)
                record.emit(processed, token, node)
            return record.result()

    def _decide(
        self, p: Distribution, siblings: list[int], draft: Draft, seed: int, position: int
    ) -> tuple[int, int | None]:
        """The token after a node and the sibling that carried it, None if all were rejected."""
        tried: list[int] = []
        for i, child in enumerate(siblings):
            token = int(draft.tokens[child])
            q = drawn_from(draft, child, () if draft.replacement else tried)
            likelihood = 1.0 if q is None else float(q[token])
            assert likelihood > 0, f"draft node {child} carries token {token}, to which its q gives no weight"
            if uniform(seed, position, Stream.ACCEPT, i) < float(p[token]) / likelihood:
                return token, child
            p = normalised(left_over(p, q, token), p)
            tried.append(token)
        return draw(p, uniform(seed, position)), None


def drawn_from(draft: Draft, node: int, excluded: list[int] | tuple[int, ...] = ()) -> Distribution | None:
    """The distribution f64[V] that a node was sampled from, tokens `excluded`; None if it was proposed outright."""
    if draft.q is None:
        return None
    q = draft.q[node].astype(np.float64)
    q[list(excluded)] = 0
    q /= q.sum()
    return q


def left_over(p: Distribution, q: Distribution | None, token: int) -> Distribution:
    """The positive part of p - q; `q` None has all its weight on `token`."""
    if q is None:
        left = p.copy()
        left[token] = max(0.0, left[token] - 1)
        return left
    return np.maximum(p - q, 0)


def normalised(weights: Distribution, otherwise: Distribution) -> Distribution:
    """`weights` with sum 1; `otherwise` where nothing is left, which rounding alone can bring about."""
    total = weights.sum()
    return weights / total if total > 0 else otherwise
