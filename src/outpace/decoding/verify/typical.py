"""Typical acceptance: a draft token passes if the target would not be surprised by it."""

from __future__ import annotations

import numpy as np

from ...errors import ParameterError
from ...registry import register
from ...types import Accepted, Draft
from ..contracts import Sequence
from ..outputs import TargetOutputs
from .coupled import CoupledVerifier
from .rejection import Distribution
from .threshold import ThresholdVerifier


@register(
    kind="verifier",
    family="SPEC",
    title="Typical acceptance",
    paper="https://arxiv.org/abs/2401.10774",
    exactness="approximate",
    claim="2.2x to 3.6x with trained heads (Medusa)",
)
class TypicalVerifier(ThresholdVerifier):
    """A draft token passes with p(x) >= min(epsilon, delta exp(-H)), H the entropy of p: the flatter the target's
    distribution, the less likely a token may be. Greedy requests are decided as by the coupled verifier, which the
    rule comes to when all probability is on one token.

    Exactness: approximate, see ThresholdVerifier; greedy output is that of plain decoding all the same. Cai et al.,
    "Medusa", section 2.3.1, whose epsilon is 0.09 and delta its square root; their first token, always accepted, is
    here the one that the step before committed.

    Parameters: `epsilon` the hard threshold, `delta` the weight of the entropy's, both above 0 and at most 1.
    """

    name = "typical"

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        for name, value in (("epsilon", epsilon), ("delta", delta)):
            if not 0 < value <= 1:
                raise ParameterError(f"typical:{name}={value!r} is out of range: it must be above 0 and at most 1")
        self.epsilon, self.delta = epsilon, delta
        self._coupled = CoupledVerifier()

    def verify(self, sequence: Sequence, draft: Draft, outputs: TargetOutputs) -> Accepted:
        if sequence.params.greedy:
            return self._coupled.verify(sequence, draft, outputs)
        return super().verify(sequence, draft, outputs)

    def least(self, p: Distribution) -> float:
        some = p[p > 0]
        return min(self.epsilon, self.delta * float(np.exp((some * np.log(some)).sum())))
