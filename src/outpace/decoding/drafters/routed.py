"""Different sequences of one batch draft with different methods."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from ...errors import MethodError
from ...types import Draft
from ..contracts import Drafter, Observation, Sequence


class Routed(Drafter):
    """Sends each sequence to the drafter that its `method` names, "" to `own`. All draft for the same packed step, so a
    batch of many methods costs the target no more than one of a single method.

    Raises MethodError in `begin` for a method that is not there.
    """

    name = "routed"
    paper = ""

    def __init__(self, own: Drafter, others: Mapping[str, Drafter]) -> None:
        self._drafters: dict[str, Drafter] = {"": own, **others}
        self._seconds: dict[str, float] = {}

    @property
    def methods(self) -> list[str]:
        """What a sequence may name."""
        return [name for name in self._drafters if name]

    def of(self, method: str) -> Drafter:
        try:
            return self._drafters[method]
        except KeyError:
            raise MethodError(
                f"method {method!r} is not offered here; there are: {', '.join(self.methods) or 'none but the default'}"
            ) from None

    @property
    def expects_topk(self) -> int:
        return max(drafter.expects_topk for drafter in self._drafters.values())

    def begin(self, sequence: Sequence) -> None:
        self.of(sequence.method).begin(sequence)

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int]) -> list[Draft]:
        methods = {sequence.method for sequence in sequences}
        if len(methods) == 1:
            drafts, self._seconds = self._ask(self.of(*methods), sequences, budgets)
            return drafts
        drafts = [Draft.empty()] * len(sequences)
        self._seconds = {}
        for method, drafter in self._drafters.items():
            mine = [i for i, sequence in enumerate(sequences) if sequence.method == method]
            if not mine:
                continue
            proposed, seconds = self._ask(drafter, [sequences[i] for i in mine], [budgets[i] for i in mine])
            for name, spent in seconds.items():
                self._seconds[name] = self._seconds.get(name, 0.0) + spent
            for i, draft in zip(mine, proposed, strict=True):
                drafts[i] = draft
        return drafts

    def _ask(
        self, drafter: Drafter, sequences: Seq[Sequence], budgets: Seq[int]
    ) -> tuple[list[Draft], dict[str, float]]:
        drafter.floor, drafter.forward_floor, drafter.rate = self.floor, self.forward_floor, self.rate
        return drafter.timed(sequences, budgets)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        self._drafters[sequence.method].observe(sequence, seen)

    def seconds_by_source(self, total: float) -> dict[str, float]:
        return self._seconds

    def explain(self) -> list[str]:
        lines = self._drafters[""].explain()
        for name in self.methods:
            lines += [f"{name}: {line}" for line in self._drafters[name].explain()]
        return lines

    def end(self, sequence: Sequence) -> None:
        drafter = self._drafters.get(sequence.method)
        if drafter is not None:
            drafter.end(sequence)
