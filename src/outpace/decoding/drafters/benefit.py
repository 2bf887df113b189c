"""Whether calling a drafter pays: measured cost against measured gain."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import inf

from ...types import Draft
from ..contracts import Sequence, node_depths

_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0)  # bin edges of the table: tokens expected of the drafters before this one
_MIN_TRIALS = 3  # before a bin is believed
_INITIAL_GAIN = 0.5  # tokens that a bin starts with, so that cheap drafters are not given up at once
_DECAY = 1 - 1 / 60  # of the table, for each step in which the drafter was called
_SEQUENCE_DECAY, _SEQUENCE_PRIOR = 1 - 1 / 12, 2.0  # the same for one sequence, and its initial value in tokens
_TIME_DECAY = 0.9
_TOO_COSTLY = 0.8  # tokens: a forward adds one token at most, so one that costs this much is never tried
_MIN_INTERVAL, _MAX_INTERVAL = 8, 256  # steps until a drafter that does not pay is tried again
_TRIAL_COST = 0.015  # share of the tokens that trials may cost
_TRIAL_FORWARDS = 4  # of a draft model, about: it stops by itself where its confidence is low
_PREFILL_COST = 0.05  # share of the tokens still to come that the draft model's prefill of a text may cost
_COSTLY_FORWARD = 0.05  # tokens: below this cost of a forward the target's certainty is not sampled
_SAMPLES = 4  # of the certainty of a text without prefill; afterwards one in eight steps


@dataclass(slots=True)
class _Bin:
    gained: float = _INITIAL_GAIN  # tokens
    seconds: float = 0.0
    trials: int = 0

    @property
    def per_second(self) -> float:
        return max(self.gained, 0.0) / self.seconds if self.seconds > 0 else 0.0


@dataclass(slots=True)
class _Record:
    """One sequence: its gain beside the gain that the table predicts, and when the drafter is tried next."""

    gained: float = _SEQUENCE_PRIOR
    predicted: float = _SEQUENCE_PRIOR
    skipped: int = _MAX_INTERVAL  # steps; every new text gets a trial at once
    interval: float = _MIN_INTERVAL
    prefilled: bool = False  # the drafter has read its text
    certainty: float = 0.0  # sum of the target's sampled certainties
    samples: int = 0
    waited: int = 0  # times it might have been asked and had no prefill
    sampled: int = -1  # `waited` at the last sample


class Benefit:
    """Cost and gain of one drafter among several.

    The gain of a step is the number of accepted tokens that no drafter before this one proposed, less the cost of the
    rows of its nodes: in a large batch, where every row costs time, a draft that is often right may still not pay. Gain
    per second of drafting is kept in a table by the tokens expected of the drafters before it (beside a long, certain
    lookup a draft model adds little); the gain expected for a sequence is the table's value times the ratio of the
    sequence's own gain to the table's. Where the expected gain per second is below `rate`, the tokens per second of the
    engine, the drafter is skipped and tried again later: once for each new text, then after 8 steps or, if it is
    costly, after so many that trials cost at most 1.5 % of the tokens, and each time after twice as many. A trial is a
    whole draft: a draft model ends it where its own confidence does not repay a forward, so it is short by itself.

    A costly drafter must read a text before its first draft (prefill). It does not while the target's certainty is
    below the cost of a forward: a forward adds about one token, which is accepted no more often than the likeliest one
    is drawn.
    """

    def __init__(self) -> None:
        self._bins = [_Bin() for _ in range(len(_EDGES) + 1)]
        self._records: dict[int, _Record] = {}
        self.forward_s = 0.0  # of one level of a draft
        self._call_s = 0.0
        self._prefill_s = 0.0  # for each token of a text seen for the first time
        self.called = self.skipped = 0
        self.seconds = self.gained = 0.0

    def select(self, sequences: Seq[Sequence], expected: Seq[float], rate: float) -> list[int]:
        """Indices of the sequences for which to call the drafter, because it pays or as a trial. In a large batch there
        are mostly none, and this is most of what drafting costs: what is the same for all is computed once.

        `rate`: tokens per second of the engine; `expected`: tokens that the drafters before it are expected to add.
        """
        if rate * self.forward_s > _TOO_COSTLY:
            self.skipped += len(sequences)
            return []
        trial = rate * min(self._call_s, _TRIAL_FORWARDS * self.forward_s) / _TRIAL_COST
        needed: dict[int, float] = {}  # by bin, see _needed
        records, chosen = self._records, []
        for i, (sequence, tokens) in enumerate(zip(sequences, expected, strict=True)):
            record = records.get(sequence.id)
            if record is None:
                record = records[sequence.id] = _Record()
            if not record.prefilled and not self._may_prefill(sequence, record, rate):
                continue
            cell = bisect_right(_EDGES, tokens)
            if cell not in needed:
                needed[cell] = self._needed(cell, rate)
            if record.gained >= needed[cell] * record.predicted:
                record.skipped, record.interval = 0, _MIN_INTERVAL
            else:
                record.skipped += 1
                interval = max(record.interval, trial / (1 + tokens))
                if record.skipped <= interval and record.skipped <= _MAX_INTERVAL:
                    continue
                record.skipped, record.interval = 0, min(2 * record.interval, _MAX_INTERVAL)
            chosen.append(i)
        self.skipped += len(sequences) - len(chosen)
        return chosen

    def needs_certainty(self, id: int, rate: float) -> bool:
        """Whether the drafter is costly, may be tried at all, and has not read this text: then `record_certainty` is to
        be called."""
        if not _COSTLY_FORWARD <= rate * self.forward_s <= _TOO_COSTLY:
            return False
        record = self._records.get(id)
        if record is None:
            return True
        if record.prefilled or record.sampled == record.waited:  # nobody was asked since the last sample
            return False
        return record.samples < _SAMPLES or record.waited % 8 == 0

    def record_certainty(self, id: int, certainty: float) -> None:
        """`certainty`: the probability of the likeliest next token."""
        record = self._records.setdefault(id, _Record())
        record.certainty += certainty
        record.samples += 1
        record.sampled = record.waited

    def _may_prefill(self, sequence: Sequence, record: _Record, rate: float) -> bool:
        """Whether the prefill, which a draft model must do first, costs a small share of what is still to come, and
        the target is certain enough for drafts to be accepted at all."""
        record.waited += 1
        if record.certainty < rate * self.forward_s * record.samples:
            return False
        remaining = sequence.params.max_tokens - (len(sequence.tokens) - sequence.prompt_length)
        return rate * self._prefill_s * len(sequence.tokens) <= _PREFILL_COST * remaining

    def _needed(self, cell: int, rate: float) -> float:
        """The multiple of the table's gain at which a call breaks even: by the nearest bin that was tried, 0 (any gain
        will do) if none was."""
        for distance in range(len(self._bins)):
            for other in (cell - distance, cell + distance):
                if 0 <= other < len(self._bins) and self._bins[other].trials >= _MIN_TRIALS:
                    per_second = self._bins[other].per_second
                    return rate / per_second if per_second > 0 else inf
        return 0.0

    def record_call(self, seconds: float, sequences: Seq[Sequence], drafts: Seq[Draft]) -> float:
        """A call of `propose`. Returns seconds of drafting for each sequence, without the prefill of its text."""
        levels = max((int(node_depths(d.parents).max()) + 1 for d in drafts if len(d) > 1), default=1)
        self.called += len(drafts)
        fresh = [s for s in sequences if not self._records.setdefault(s.id, _Record()).prefilled]
        for sequence in fresh:
            self._records[sequence.id].prefilled = True
        if fresh:
            drafting = min(seconds, levels * self.forward_s)
            if self.forward_s > 0:  # else it is not known which part was prefill
                self._prefill_s = _mix(self._prefill_s, (seconds - drafting) / sum(len(s.tokens) for s in fresh))
            return drafting / len(sequences)
        self._call_s = _mix(self._call_s, seconds)
        self.forward_s = _mix(self.forward_s, seconds / levels)
        return seconds / len(sequences)

    def record_step(self, id: int, expected: float, gain: float, seconds: float) -> None:
        """A step was committed for which the drafter was called for sequence `id`; drafting and observing took
        `seconds`. `gain`: accepted tokens that no drafter before it had proposed, less the cost of its rows."""
        cell = self._bins[bisect_right(_EDGES, expected)]
        record = self._records.setdefault(id, _Record())
        cell.gained = _DECAY * cell.gained + gain
        cell.seconds = _DECAY * cell.seconds + seconds
        cell.trials += 1
        predicted = max(seconds * cell.per_second, 1e-3)
        weight = min(1.0, _SEQUENCE_PRIOR / predicted)  # one long draft is no more than one piece of evidence
        record.gained = max(_SEQUENCE_DECAY * record.gained + weight * gain, 0.0)
        record.predicted = _SEQUENCE_DECAY * record.predicted + weight * predicted
        self.gained += gain
        self.seconds += seconds

    def forget(self, id: int) -> None:
        self._records.pop(id, None)

    def explain(self) -> str:
        chances = self.called + self.skipped
        if not self.called:
            return "never used" if chances else "no step yet"
        return (
            f"used in {self.called} of {chances} steps; each use took {1e3 * self.seconds / self.called:.2f} ms and "
            f"gained {self.gained / self.called:.2f} tokens, less the cost of checking them"
        )


def _mix(average: float, new: float) -> float:
    return new if average == 0 else _TIME_DECAY * average + (1 - _TIME_DECAY) * new
