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
    title="Speculative (rejection) sampling",
    paper="https://arxiv.org/abs/2211.17192",
    exactness="distribution",
)
class RejectionVerifier(Verifier):
    """Accepts a child x of a node with probability min(1, p(x) / q(x)), p the target's distribution there and
    q the one that x was sampled from. After a rejection p becomes the normalised positive part of p - q and
    the next sibling is tried; after the last one the token is sampled from what is left of p. A node that was
    proposed outright (draft.q is None) has all of q on itself.

    Exactness: distribution, if every node of a draft with q was sampled from its row of q, siblings
    independently of each other. Greedy is decided as by the coupled verifier. Leviathan, Kalman and Matias,
    "Fast Inference from Transformers via Speculative Decoding", section 2.3 and appendix A.1; Chen et al.
    (arXiv 2302.01318), algorithm 2; siblings: Miao et al., "SpecInfer" (arXiv 2305.09781), section 4.3.
    Uniforms are keyed by (seed, position, number of the sibling); the residual's by (seed, position), as in
    plain decoding, so a step without a draft samples what plain decoding samples.
    """

    name = "rejection"
    exactness: ClassVar[Exactness] = "distribution"

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
        for i, child in enumerate(siblings):
            token = int(draft.tokens[child])
            q = None
            if draft.q is not None:
                q = draft.q[child].astype(np.float64)
                q /= q.sum()
            likelihood = 1.0 if q is None else float(q[token])
            assert likelihood > 0, f"draft node {child} carries token {token}, to which its q gives no weight"
            if uniform(seed, position, Stream.ACCEPT, i) < float(p[token]) / likelihood:
                return token, child
            p = _residual(p, q, token)
        return draw(p, uniform(seed, position)), None


def _residual(p: Distribution, q: Distribution | None, token: int) -> Distribution:
    """What is left of p after `token`, drawn from q (None: all on `token`), was rejected."""
    if q is None:
        left = p.copy()
        left[token] = 0
    else:
        left = np.maximum(p - q, 0)
    total = left.sum()
    # p = q up to rounding: a rejection has probability zero up to rounding, and p itself is the answer.
    return left / total if total > 0 else p
