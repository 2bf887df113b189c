"""What a step of the target costs: seconds by rows and context, as measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...types import FloatArray

_UNIT = 64  # tokens of context: steps are timed no finer


@dataclass(frozen=True, slots=True, eq=False)
class StepCosts:
    """`seconds[i, j]` of a step of `rows[i]` rows behind `contexts[j]` cached tokens; both ascend. Between them the
    time is linear, and beyond the last ones it goes on as between the last two."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: FloatArray
    _curves: dict[int, FloatArray] = field(default_factory=dict, init=False, repr=False)  # by context, in _UNITs

    def __post_init__(self) -> None:
        assert self.seconds.shape == (len(self.rows), len(self.contexts)), "one time for each pair"
        assert list(self.rows) == sorted(set(self.rows)) and list(self.contexts) == sorted(set(self.contexts))
        assert len(self.rows) > 1 and (self.seconds > 0).all()

    def curve(self, most_rows: int, context: float) -> FloatArray:
        """Seconds of steps of 1 to `most_rows` rows, ascending. A view."""
        unit = int(context) // _UNIT
        known = self._curves.get(unit)
        if known is None or len(known) < most_rows:
            known = self._curves[unit] = self._curve(max(most_rows, self.rows[-1]), (unit + 0.5) * _UNIT)
        return known[:most_rows]

    def _curve(self, most_rows: int, context: float) -> FloatArray:
        wanted = np.arange(1, most_rows + 1)
        at = self._at(context)
        times = np.interp(wanted, self.rows, at)
        slope = (at[-1] - at[-2]) / (self.rows[-1] - self.rows[-2])
        times += np.maximum(wanted - self.rows[-1], 0) * max(slope, 0.0)
        # Fewer rows never cost more than what many were seen to take: disturbances only ever add.
        return np.minimum.accumulate(times[::-1])[::-1].astype(np.float32)

    def step(self, rows: int, context: float) -> float:
        return float(self.curve(max(rows, 1), context)[-1])

    def _at(self, context: float) -> FloatArray:
        """Times by rows at one context. [rows]"""
        if len(self.contexts) == 1:
            return self.seconds[:, 0]
        j = int(np.clip(np.searchsorted(self.contexts, context) - 1, 0, len(self.contexts) - 2))
        low, high = self.contexts[j], self.contexts[j + 1]
        share = (max(context, 0.0) - low) / (high - low)
        mixed: FloatArray = self.seconds[:, j] + share * (self.seconds[:, j + 1] - self.seconds[:, j])
        return np.maximum(mixed, 0.25 * self.seconds[:, 0])
