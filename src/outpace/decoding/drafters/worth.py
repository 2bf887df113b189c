"""Whether asking a drafter repays its time: measured cost against measured gain."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import inf

from ...types import Draft
from ..contracts import Sequence, node_depths

_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of what the drafters before it promise: bins of the table
_TRIALS, _HOPE = 3, 0.5  # before a bin is believed; tokens it starts with, so that cheap ones are not given up
_FADE = 1 - 1 / 60  # of the table, for each step in which the drafter was asked
_FADE_OWN, _PRIOR_OWN = 1 - 1 / 12, 2.0  # the same for one sequence, and what it starts from, in tokens
_FADE_TIMES = 0.9
_HOPELESS = 0.8  # a forward gives one token at most, so one that costs this much is not even tried
_SHORT, _LONG = 8, 256  # steps until a drafter that does not pay is tried again, at least and at most
_EXPLORING = 0.015  # of the tokens is what trials may cost
_TRIAL_FORWARDS = 4  # of a draft model, about: it stops by itself where it is not sure
_READING = 0.05  # of the tokens still to come is what reading a text may cost
_DEAR = 0.05  # tokens: a forward that costs less is not worth a look at the target's certainty
_LOOKS = 4  # at a text that is not read yet; then one look in eight steps


@dataclass(slots=True)
class _Bin:
    gained: float = _HOPE  # tokens
    seconds: float = 0.0
    trials: int = 0

    @property
    def per_second(self) -> float:
        return max(self.gained, 0.0) / self.seconds if self.seconds > 0 else 0.0


@dataclass(slots=True)
class _Customer:
    """One sequence: how its gains compare with what the table foretold, and when the drafter is tried next."""

    gained: float = _PRIOR_OWN
    foretold: float = _PRIOR_OWN
    skipped: int = _LONG  # every new text is worth a trial at once
    nap: float = _SHORT
    known: bool = False  # the drafter has read its text
    sure: float = 0.0  # sum of the target's certainties that were looked at
    looks: int = 0
    waited: int = 0  # steps without having read it


class Worth:
    """Bookkeeping for one drafter.

    The gain of a step is the number of accepted tokens that no drafter before it proposed, less what the rows of its
    nodes cost: in a large batch, where no row is free, a draft that is often right may still not pay. Gain per second
    of drafting is kept in a table by what those before it promised (beside a long certain lookup a draft model adds
    little), and is expected to be that times how the sequence compares with the others. Where it is less than the price
    of a second the drafter rests, and is tried again: once for each new text, then after 8 steps or, if it is dear,
    after so many that trials cost at most 1.5 % of the tokens, and each time after twice as many. A trial is a whole
    draft: a draft model ends it where its own confidence does not repay a forward, so it is short where it has to be.
    A text that a dear drafter has not read yet is left unread while the target is less sure of its tokens than a
    forward costs: a forward gives about one token, accepted no more often than the likeliest one is drawn.
    """

    def __init__(self) -> None:
        self._bins = [_Bin() for _ in range(len(_EDGES) + 1)]
        self._customers: dict[int, _Customer] = {}
        self.forward_s = 0.0  # of one level of a draft
        self._call_s = 0.0
        self._read_s = 0.0  # for each token of a text seen for the first time
        self._unreported = 0.0
        self.asked = self.skipped = 0
        self.seconds = self.gained = 0.0

    def paying(self, sequences: Seq[Sequence], promised: Seq[float], price: float) -> list[int]:
        """Places of the sequences for which to ask, because it pays or as a trial. Mostly there are none in a large
        batch, where this is most of what drafting costs: what is the same for all is worked out once.

        `price`: tokens that a second is worth; `promised`: tokens that the drafters before it are expected to bring.
        """
        if price * self.forward_s > _HOPELESS:
            self.skipped += len(sequences)
            return []
        trial = price * min(self._call_s, _TRIAL_FORWARDS * self.forward_s) / _EXPLORING
        needed: dict[int, float] = {}  # by bin: how many times what the table foretells is worth the price
        customers, chosen = self._customers, []
        for place, (sequence, tokens) in enumerate(zip(sequences, promised, strict=True)):
            customer = customers.get(sequence.id)
            if customer is None:
                customer = customers[sequence.id] = _Customer()
            if not customer.known and not self._readable(sequence, customer, price):
                continue
            cell = bisect_right(_EDGES, tokens)
            if cell not in needed:
                needed[cell] = self._needed(cell, price)
            if customer.gained >= needed[cell] * customer.foretold:
                customer.skipped, customer.nap = 0, _SHORT
            else:
                customer.skipped += 1
                nap = max(customer.nap, trial / (1 + tokens))
                if customer.skipped <= nap and customer.skipped <= _LONG:
                    continue
                customer.skipped, customer.nap = 0, min(2 * customer.nap, _LONG)
            chosen.append(place)
        self.skipped += len(sequences) - len(chosen)
        return chosen

    def waits(self, id: int, price: float) -> bool:
        """Whether the drafter, a dear one, has not read this text: then `saw` is told how sure the target is."""
        if price * self.forward_s < _DEAR:
            return False
        customer = self._customers.get(id)
        if customer is None:
            return True
        return not customer.known and (customer.looks < _LOOKS or customer.waited % 8 == 0)

    def saw(self, id: int, sure: float) -> None:
        """The probability of the likeliest next token was `sure`."""
        customer = self._customers.setdefault(id, _Customer())
        customer.sure += sure
        customer.looks += 1

    def _readable(self, sequence: Sequence, customer: _Customer, price: float) -> bool:
        """Whether reading the text, which a draft model must do first, is a small part of what is still to come, and
        the target sure enough of its tokens for drafts to be accepted at all."""
        customer.waited += 1
        if customer.sure < price * self.forward_s * customer.looks:
            return False
        remaining = sequence.params.max_tokens - (len(sequence.tokens) - sequence.prompt_length)
        return price * self._read_s * len(sequence.tokens) <= _READING * remaining

    def _needed(self, cell: int, price: float) -> float:
        """How many times the gain that the table foretells is worth the price: from the nearest bin that was tried,
        0 (any) if none was."""
        for distance in range(len(self._bins)):
            for other in (cell - distance, cell + distance):
                if 0 <= other < len(self._bins) and self._bins[other].trials >= _TRIALS:
                    per_second = self._bins[other].per_second
                    return price / per_second if per_second > 0 else inf
        return 0.0

    def took(self, seconds: float, sequences: Seq[Sequence], drafts: Seq[Draft]) -> float:
        """A call of `propose`. Returns seconds of drafting for each sequence, the first reading of its text apart."""
        levels = max((int(node_depths(d.parents).max()) + 1 for d in drafts if len(d) > 1), default=1)
        self._unreported += seconds
        self.asked += len(drafts)
        fresh = [s for s in sequences if not self._customers.setdefault(s.id, _Customer()).known]
        for sequence in fresh:
            self._customers[sequence.id].known = True
        if fresh:
            drafting = min(seconds, levels * self.forward_s)
            if self.forward_s > 0:  # else nobody knows which part was reading
                self._read_s = _mix(self._read_s, (seconds - drafting) / sum(len(s.tokens) for s in fresh))
            return drafting / len(sequences)
        self._call_s = _mix(self._call_s, seconds)
        self.forward_s = _mix(self.forward_s, seconds / levels)
        return seconds / len(sequences)

    def learned(self, id: int, promised: float, gain: float, seconds: float) -> None:
        """A step was committed in which the drafter was asked for sequence `id`, which took `seconds` of drafting and
        observing. `gain`: tokens accepted that no drafter before it had proposed, less those that its rows cost."""
        cell = self._bins[bisect_right(_EDGES, promised)]
        customer = self._customers.setdefault(id, _Customer())
        cell.gained = _FADE * cell.gained + gain
        cell.seconds = _FADE * cell.seconds + seconds
        cell.trials += 1
        foretold = max(seconds * cell.per_second, 1e-3)
        weight = min(1.0, _PRIOR_OWN / foretold)  # one long draft is no more than one piece of evidence
        customer.gained = max(_FADE_OWN * customer.gained + weight * gain, 0.0)
        customer.foretold = _FADE_OWN * customer.foretold + weight * foretold
        self.gained += gain
        self.seconds += seconds

    def forget(self, id: int) -> None:
        self._customers.pop(id, None)

    def explain(self) -> str:
        chances = self.asked + self.skipped
        if not self.asked:
            return "never asked" if chances else "no step yet"
        return (
            f"asked in {self.asked} of {chances} steps, {1e3 * self.seconds / self.asked:.2f} ms and "
            f"{self.gained / self.asked:.2f} tokens gained each time, its rows paid"
        )

    def spent(self) -> float:
        """Seconds of drafting since the last call."""
        seconds, self._unreported = self._unreported, 0.0
        return seconds


def _mix(average: float, new: float) -> float:
    return new if average == 0 else _FADE_TIMES * average + (1 - _FADE_TIMES) * new
