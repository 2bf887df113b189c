"""Different sequences of one batch draft with different methods."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from functools import reduce
from operator import or_
from time import perf_counter

from ...errors import MethodError
from ...models.decoder import Taps
from ...types import Draft
from ..contracts import Drafter, Market, Observation, Proposal, Sequence


class Routed(Drafter):
    """Sends each sequence to the drafter that its `method` names, "" to `own`. All draft for the same packed step, so a
    batch of many methods costs the target no more than one of a single method.

    Raises MethodError in `begin` for a method that is not there.
    """

    name = "routed"
    paper = ""

    def __init__(self, own: Drafter, others: Mapping[str, Drafter]) -> None:
        self._drafters: dict[str, Drafter] = {"": own, **others}

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
    def taps(self) -> Taps:
        return reduce(or_, [drafter.taps for drafter in self._drafters.values()])

    def begin(self, sequence: Sequence) -> None:
        self.of(sequence.method).begin(sequence)

    def propose(self, sequences: Seq[Sequence], budgets: Seq[int], market: Market) -> Proposal:
        methods = {sequence.method for sequence in sequences}
        if len(methods) == 1:
            return _timed(self.of(*methods), sequences, budgets, market)
        drafts, seconds = [Draft.empty()] * len(sequences), dict[str, float]()
        for method, drafter in self._drafters.items():
            mine = [i for i, sequence in enumerate(sequences) if sequence.method == method]
            if not mine:
                continue
            proposal = _timed(drafter, [sequences[i] for i in mine], [budgets[i] for i in mine], market)
            for name, spent in proposal.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + spent
            for i, draft in zip(mine, proposal.drafts, strict=True):
                drafts[i] = draft
        return Proposal(drafts, seconds)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        self._drafters[sequence.method].observe(sequence, seen)

    def explain(self) -> list[str]:
        lines = self._drafters[""].explain()
        for name in self.methods:
            lines += [f"{name}: {line}" for line in self._drafters[name].explain()]
        return lines

    def end(self, sequence: Sequence) -> None:
        drafter = self._drafters.get(sequence.method)
        if drafter is not None:
            drafter.end(sequence)


def _timed(drafter: Drafter, sequences: Seq[Sequence], budgets: Seq[int], market: Market) -> Proposal:
    """Its proposal, with the seconds that it took by itself."""
    began = perf_counter()
    proposal = drafter.propose(sequences, budgets, market)
    return Proposal(proposal.drafts, proposal.seconds or {drafter.name: perf_counter() - began})
