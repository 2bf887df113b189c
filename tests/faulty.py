"""Methods with one fault each, registered for a test: what an audit must find."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from outpace import registry
from outpace.decoding.contracts import Drafter, DrafterContext, Market, Observation, Proposal, Verifier
from outpace.decoding.contracts import Sequence as TokenSequence
from outpace.decoding.drafters.ngram import NgramIndex
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import Stream, distribution_of, draw, uniform
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.decoding.verify.rejection import RejectionVerifier, drawn_from, left_over, normalised
from outpace.decoding.verify.walk import Recorder, target_row
from outpace.types import Accepted, Draft, Exactness


class OneIn500(Verifier):
    """Claims to be coupled, and lets one wrong first token in 500 pass."""

    name = "one-in-500"
    exactness: ClassVar[Exactness] = "identical"
    rate: ClassVar[float] = 1 / 500

    def verify(self, sequence: TokenSequence, draft: Draft, outputs: TargetOutputs) -> Accepted:
        seen = CoupledVerifier().verify(sequence, draft, outputs)
        fault = uniform(sequence.params.seed, len(sequence.tokens), Stream.ACCEPT, 99) < self.rate
        if fault and len(draft) and not len(seen.path):
            with Recorder(sequence) as record:
                record.emit(record.process(target_row(outputs, -1)), int(draft.tokens[0]), 0)
                behind = record.process(target_row(outputs, 0))
                record.emit(behind, record.choose(behind), None)
                return record.result()
        return seen


class OnlyDistribution(OneIn500):
    """Claims no more than the distribution, and lets a wrong greedy token pass, more often."""

    name = "only-distribution"
    exactness: ClassVar[Exactness] = "distribution"
    rate: ClassVar[float] = 1 / 40


class CountedFault(OneIn500):
    """The same by a counter, out of sight of the random numbers."""

    name = "counted-fault"

    def __init__(self) -> None:
        self.rejected = 0

    def verify(self, sequence: TokenSequence, draft: Draft, outputs: TargetOutputs) -> Accepted:
        seen = CoupledVerifier().verify(sequence, draft, outputs)
        if len(draft) and not len(seen.path):
            self.rejected += 1
            if self.rejected % 500 == 0:
                return Accepted([0], [int(draft.tokens[0]), int(outputs.argmax()[1])])
        return seen


class WrongResidual(RejectionVerifier):
    """The residual is taken from the target's answer one row further on."""

    name = "wrong-residual"

    def verify(self, sequence: TokenSequence, draft: Draft, outputs: TargetOutputs) -> Accepted:
        self._outputs = outputs
        return super().verify(sequence, draft, outputs)

    def _decide(self, p: Any, siblings: list[int], draft: Draft, seed: int, position: int) -> tuple[int, int | None]:
        from outpace.types import SamplingParams

        for i, child in enumerate(siblings):
            token, q = int(draft.tokens[child]), drawn_from(draft, child)
            likelihood = 1.0 if q is None else float(q[token])
            if uniform(seed, position, Stream.ACCEPT, i) < float(p[token]) / likelihood:
                return token, child
            wrong = distribution_of(target_row(self._outputs, child), SamplingParams(temperature=1.0))
            p = normalised(left_over(wrong, q, token), p)
        return draw(p, uniform(seed, position)), None


class Leaky(Drafter):
    """Prompt lookup in everybody's text: one index for all owners."""

    name = "leaky"
    paper = ""

    def __init__(self) -> None:
        self.index = NgramIndex(2, 4)
        self.read: dict[int, int] = {}

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Leaky:
        return cls()

    def begin(self, sequence: TokenSequence) -> None:
        self.read[sequence.id] = 0

    def propose(self, sequences: Sequence[TokenSequence], budgets: Sequence[int], market: Market) -> Proposal:
        drafts = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            self.catch_up(sequence)
            found, place = self.index.find()
            drafted = self.index.continuation(place, min(budget, 6)) if found else []
            drafts.append(Draft.chain(drafted, self.name) if drafted else Draft.empty())
        return Proposal(drafts)

    def observe(self, sequence: TokenSequence, seen: Observation) -> None:
        self.catch_up(sequence)

    def catch_up(self, sequence: TokenSequence) -> None:
        start = self.read[sequence.id]
        self.index.extend(sequence.tokens[start:])
        self.read[sequence.id] = len(sequence.tokens)


class LeaksWhileShared(Leaky):
    """The same as long as somebody else is being answered, and not a step longer."""

    name = "leaks-while-shared"

    def end(self, sequence: TokenSequence) -> None:
        del self.read[sequence.id]
        if not self.read:
            self.index = NgramIndex(2, 4)


class KeepsToOwners(Drafter):
    """No fault: after a token it proposes what followed it in any text of the same owner."""

    name = "keeps-to-owners"
    paper = ""

    def __init__(self) -> None:
        self.after: dict[str, dict[int, int]] = {}

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> KeepsToOwners:
        return cls()

    def begin(self, sequence: TokenSequence) -> None:
        self.learn(sequence)

    def propose(self, sequences: Sequence[TokenSequence], budgets: Sequence[int], market: Market) -> Proposal:
        drafts = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            after, text = self.after[sequence.owner], sequence.tokens[-1:]
            while len(text) <= min(budget, 6) and text[-1] in after:
                text.append(after[text[-1]])
            drafts.append(Draft.chain(text[1:], self.name) if len(text) > 1 else Draft.empty())
        return Proposal(drafts)

    def observe(self, sequence: TokenSequence, seen: Observation) -> None:
        self.learn(sequence)

    def learn(self, sequence: TokenSequence) -> None:
        self.after.setdefault(sequence.owner, {}).update(itertools.pairwise(sequence.tokens))


class ForgetsNothing(Drafter):
    """Proposes after the last two tokens what followed them in the output of whoever came before."""

    name = "forgets-nothing"
    paper = ""

    def __init__(self) -> None:
        self.after: dict[tuple[int, int], int] = {}

    def propose(self, sequences: Sequence[TokenSequence], budgets: Sequence[int], market: Market) -> Proposal:
        drafts = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            text: list[int] = sequence.tokens[-2:]
            while len(text) - 2 < budget and (text[-2], text[-1]) in self.after:
                text.append(self.after[text[-2], text[-1]])
            drafts.append(Draft.chain(text[2:], self.name) if len(text) > 2 else Draft.empty())
        return Proposal(drafts)

    def end(self, sequence: TokenSequence) -> None:
        out = sequence.output
        self.after.update({(a, b): c for a, b, c in zip(out, out[1:], out[2:], strict=False)})


@contextmanager
def registered(cls: type, exactness: Exactness = "identical") -> Iterator[str]:
    """While it lasts, the method can be named."""
    registry.methods()  # all that there are, before one is added
    kind: registry.Kind = "verifier" if issubclass(cls, Verifier) else "drafter"
    registry.register(kind=kind, family="SPEC", title="", paper="", exactness=exactness)(cls)
    name: str = cls.name  # type: ignore[attr-defined]
    try:
        yield name
    finally:
        del registry._methods[name]
