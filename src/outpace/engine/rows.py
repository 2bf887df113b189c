"""How the rows of a step are shared between prompts and drafts, beside those that every decoding job has of its own.

After Sarathi-Serve (Agrawal et al., 2024, https://arxiv.org/abs/2403.02310, algorithm 3): decodes in every step, and
prompts in chunks that fill it, as far as rows or the measured seconds of a step allow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..errors import ParameterError
from .jobs import Job, SchedulerLimits

StepSeconds = Callable[[int, float], float]  # of so many rows behind so many cached tokens; more rows never take less


_TINY_S, _MOST_SLOWER = 1e-9, 1000.0
_FIRST_ROWS = 128


def largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest of 1 to `most` for which `holds`, which does for all below one for which it does; 0 if for none."""
    if most > 0 and holds(most):  # nearly always
        return most
    low, high = 0, max(most - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


class Rows:
    """Shares the rows of one step after the other. Keeps how much longer steps with a chunk of a prompt take than the
    table says, which was measured with fewer rows, behind fewer tokens, and perhaps beside other programs."""

    def __init__(self, limits: SchedulerLimits, step_seconds: StepSeconds | None) -> None:
        if limits.max_step_s is not None and step_seconds is None:
            raise ParameterError("max_step_s needs measured step times: give `step_seconds`, or leave max_step_s out")
        self._limits, self._step_seconds = limits, step_seconds
        self._slower = 1.0  # measured seconds for each of the table's
        self._proven = _FIRST_ROWS  # rows of the largest step that was not too long; twice as many may be tried

    def took(self, running: Collection[Job], rows: int, seconds: float) -> None:
        """A step of so many rows, chunks among them, has been measured."""
        if self._step_seconds is None:
            return
        expected = max(self._step_seconds(rows, _context(running)), _TINY_S)
        ratio = min(max(seconds / expected, 1 / _MOST_SLOWER), _MOST_SLOWER)
        self._slower += (ratio - self._slower) / 2
        if self._limits.max_step_s is not None and seconds > self._limits.max_step_s:
            self._proven = max(int(rows * self._limits.max_step_s / seconds), 1)
        else:
            self._proven = max(self._proven, rows)

    def cap(self, job: Job) -> int:
        """Most draft rows of a decoding job: no more than could still be emitted."""
        if job.max_draft == 0:
            return 0
        most = self._limits.max_rows - 1
        return max(min(job.remaining - 1, most if job.max_draft is None else min(job.max_draft, most)), 0)

    def share(self, running: Collection[Job], own: int, caps: Collection[int]) -> tuple[int, int]:
        """Rows for prompts and for drafts; `own` are the decoding jobs' own, `caps` most draft rows of each. Drafts get
        what prompts leave, and at least their share."""
        limits = self._limits
        drafts = min(max(limits.max_step_rows - own, 0), sum(caps))
        unread = min(sum(job.unread for job in running), limits.prefill_rows)
        if not own:
            return unread, 0
        spare = min(drafts + unread, max(drafts, limits.prefill_rows))
        if limits.max_step_s is not None:
            seconds = limits.max_step_s / self._slower
            spare = max(self._within(seconds, min(own + spare, 2 * self._proven), _context(running)) - own, 0)
        drafts = min(drafts, max(int(limits.draft_share * spare), spare - unread))
        return min(unread, max(spare - drafts, limits.least_chunk)), drafts

    def _within(self, seconds: float, most: int, context: float) -> int:
        """The largest number of rows, at most `most`, of a step that takes no longer; 0 if one row does."""
        step_seconds = self._step_seconds
        assert step_seconds is not None
        return largest(most, lambda rows: step_seconds(rows, context) <= seconds)


def _context(running: Collection[Job]) -> float:
    return sum(job.context for job in running) / max(len(running), 1)
