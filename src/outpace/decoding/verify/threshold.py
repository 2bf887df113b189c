"""What the approximate verifiers share: a draft token passes if the target finds it likely enough."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from ...types import NO_PARENT, Accepted, Draft, Exactness, FloatArray, SamplingParams
from ..contracts import Sequence, Verifier
from ..outputs import TargetOutputs
from ..sampling import distribution_of, logprobs
from ..tree import path_to
from .rejection import Distribution
from .walk import Recorder, target_row

_AS_IT_IS = SamplingParams(temperature=1.0)


class ThresholdVerifier(Verifier):
    """Accepts the longest path of draft tokens that each have at least the probability `least`; of equally long ones
    the likeliest. The token behind it is the target's own, as in plain decoding.

    Probabilities are those that the request samples from, penalties, temperature and filters included; what these
    exclude is never accepted. Greedy requests are verified at temperature 1 without filters.

    Exactness: approximate. An accepted token is one that the target finds probable, not one that it drew, so the output
    depends on the drafter. The draft's q is not used.
    """

    exactness: ClassVar[Exactness] = "approximate"

    @abstractmethod
    def least(self, p: Distribution) -> float:
        """The smallest probability that passes where the target's distribution is `p` f64[V]."""

    def verify(self, sequence: Sequence, draft: Draft, outputs: TargetOutputs) -> Accepted:
        params = _AS_IT_IS if sequence.params.greedy else sequence.params
        tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
        with Recorder(sequence) as record:
            rows: dict[int, FloatArray] = {}  # processed logits after a node whose path passes
            tests: dict[int, tuple[Distribution, float]] = {}
            merit = {NO_PARENT: (0, 0.0)}  # of a node whose path passes: its length, its log-probability
            for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
                if parent not in merit:
                    continue
                if parent not in tests:
                    rows[parent] = self._row(record, draft, outputs, parent)
                    p = distribution_of(rows[parent], params)
                    tests[parent] = p, self.least(p)
                p, least = tests[parent]
                if 0 < p[token] >= least:
                    length, likely = merit[parent]
                    merit[node] = length + 1, likely + logprobs(rows[parent], token, 0)[0]
            last = max(merit, key=merit.__getitem__)
            if last not in rows:
                rows[last] = self._row(record, draft, outputs, last)
            record.move_to([])
            path = path_to(draft.parents, last)
            for parent, node in zip([NO_PARENT, *path], path, strict=False):
                record.emit(rows[parent], tokens[node], node)
            record.emit(rows[last], record.choose(rows[last]), None)
            return record.result()

    def _row(self, record: Recorder, draft: Draft, outputs: TargetOutputs, node: int) -> FloatArray:
        record.move_to(draft.tokens[path_to(draft.parents, node)].tolist())
        return record.process(target_row(outputs, node))
