"""Block verification: the target's distribution, with the draft verified as a whole."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ...registry import register
from ...types import NO_PARENT, Accepted, Draft, Exactness
from ..contracts import Sequence, Verifier
from ..outputs import TargetOutputs
from ..sampling import Stream, distribution_of, draw, uniform
from .coupled import CoupledVerifier
from .rejection import RejectionVerifier, drawn_from, left_over, normalised
from .walk import Recorder, target_row


@register(
    kind="verifier",
    family="SPEC",
    title="Block verification",
    paper="https://arxiv.org/abs/2403.10444",
    exactness="distribution",
    claim="5 % to 8 % over token-wise verification",
)
class BlockVerifier(Verifier):
    """Judges how long a prefix of a chain stays, instead of token after token. With w_0 = 1 and
    w_i = min(1, w_(i-1) p(x_i) / q(x_i)), the first i tokens pass their test with probability

        h_i = s / (s + 1 - w_i),  s = sum of the positive part of w_i p - q, both after x_i;   h_n = w_n

    and the longest prefix that passes is accepted. The next token comes from the normalised positive part of
    w_i p - q there, after the whole chain from p. More tokens are accepted in expectation than one by one, because a
    token that the target likes better than the drafter did makes up for an earlier one that it likes less; with
    tokens proposed outright (no q) there is nothing to make up for, and both accept alike.

    Exactness: distribution. Chains only: a tree, where some node has several children, is decided node by node as by
    the rejection verifier, and greedy as by the coupled one. Sun et al., "Block Verification Accelerates Speculative
    Decoding", algorithm 2. The tests' uniforms are keyed by (seed, first position of the step, i): a step looks at all
    of them, so that the next one needs new ones.
    """

    name = "block"
    exactness: ClassVar[Exactness] = "distribution"
    uses_q: ClassVar[bool] = True

    def __init__(self) -> None:
        self._coupled = CoupledVerifier()
        self._rejection = RejectionVerifier()

    def verify(self, sequence: Sequence, draft: Draft, outputs: TargetOutputs) -> Accepted:
        if sequence.params.greedy:
            return self._coupled.verify(sequence, draft, outputs)
        if (draft.parents != np.arange(NO_PARENT, len(draft) - 1)).any():
            return self._rejection.verify(sequence, draft, outputs)
        return self._chain(sequence, draft, outputs)

    def _chain(self, sequence: Sequence, draft: Draft, outputs: TargetOutputs) -> Accepted:
        params, start, n = sequence.params, len(sequence.tokens), len(draft)
        with Recorder(sequence) as record:
            weight, kept = 1.0, 0
            for i in range(n + 1):
                processed = record.process(target_row(outputs, i - 1))
                p = distribution_of(processed, params)
                if i == n:
                    left, passes = p, weight
                else:
                    token, q = int(draft.tokens[i]), drawn_from(draft, i)
                    left = left_over(weight * p, q, token)
                    mass = float(left.sum())
                    passes = mass / (mass + 1 - weight) if weight < 1 else 1.0
                if i == 0 or uniform(params.seed, start, Stream.ACCEPT, i) < passes:
                    kept, row, remaining = i, processed, normalised(left, p)
                if i == n:
                    break
                likelihood = 1.0 if q is None else float(q[token])
                assert likelihood > 0, f"draft node {i} carries token {token}, to which its q gives no weight"
                weight = min(1.0, weight * float(p[token]) / likelihood)
                if weight == 0:  # the target never says this, nor anything behind it
                    break
                record.emit(processed, token, i)
            record.cut(kept)
            record.emit(row, draw(remaining, uniform(params.seed, record.position)), None)
            return record.result()
