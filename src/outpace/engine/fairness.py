"""Whose turn it is: priority raised by waiting, then the owner who was served least, then who came first.

Virtual token counters after Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, algorithm 2
(https://arxiv.org/abs/2401.00588). Within an owner's jobs of one priority nobody overtakes, so only the first of
each such class is ever looked at. A class ages from its last start: an owner with a thousand old jobs that are
served in turn gains nothing over one whose first job is new, while a class that gets no turn at all is raised until
it does.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator

from .jobs import Job

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # of a token: what it costs, as in the paper (section 4.1)
TOP = -101  # ageing goes no further: above every priority, and finite, so that the order settles


class Served:
    """Tokens served to each owner, weighted. Owners count while they have jobs."""

    def __init__(self) -> None:
        self.tokens: dict[str, float] = {}
        self._jobs: Counter[str] = Counter()
        self._floor = 0.0  # of the owner who left last

    def enter(self, owner: str) -> None:
        """A job more. An owner who had none is lifted to the least served one: idleness is no credit."""
        if not self._jobs[owner]:
            least = min((self.tokens[o] for o in self._jobs if self._jobs[o]), default=self._floor)
            self.tokens[owner] = max(self.tokens.get(owner, 0.0), least)
        self._jobs[owner] += 1

    def leave(self, owner: str) -> None:
        self._jobs[owner] -= 1
        if not self._jobs[owner]:
            del self._jobs[owner]
            self._floor = self.tokens[owner]
            if not self._jobs:  # everybody starts level with who left last, so nobody need be remembered
                self.tokens.clear()

    def charge(self, owner: str, prompt: int = 0, output: int = 0) -> None:
        self.tokens[owner] += PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output

    def check_integrity(self, owners: Counter[str]) -> None:
        assert self._jobs == owners, "jobs of owners are counted wrongly"
        assert owners.keys() <= self.tokens.keys()


class Line:
    """The jobs that wait."""

    def __init__(self, served: Served, ageing_s: float | None, shortest_first: bool) -> None:
        self._served, self._ageing_s, self._shortest_first = served, ageing_s, shortest_first
        self._classes: dict[tuple[str, int], list[Job]] = {}
        self._last_start: dict[tuple[str, int], float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._classes.values()))

    def __iter__(self) -> Iterator[Job]:
        for jobs in self._classes.values():
            yield from jobs

    def add(self, job: Job) -> None:
        insort(self._classes.setdefault((job.owner, job.priority), []), job, key=self._within)

    def _within(self, job: Job) -> tuple[int, int]:
        length = job.predicted if self._shortest_first and job.predicted is not None else 0
        return length, job.order

    def first(self, now: float, held: set[tuple[str, str]]) -> tuple[Job, int] | None:
        """Whose turn it is, and its priority as raised by now. `held`: groups that wait for their first."""
        best: tuple[int, float, int] | None = None
        chosen = None
        for name, jobs in self._classes.items():
            job = next((j for j in jobs if j.group is None or (j.owner, j.group) not in held), None)
            if job is None:
                continue
            key = (self._level(name, job, now), self._served.tokens[job.owner], job.order)
            if best is None or key < best:
                best, chosen = key, job
        return None if best is None or chosen is None else (chosen, best[0])

    def _level(self, name: tuple[str, int], job: Job, now: float) -> int:
        assert job.arrived is not None
        if self._ageing_s is None:
            return min(job.level, job.priority)
        waited = now - max(job.arrived, self._last_start.get(name, job.arrived))
        return min(job.level, max(job.priority - max(int(waited / self._ageing_s), 0), TOP))

    def start(self, job: Job, now: float) -> None:
        self._last_start[job.owner, job.priority] = now
        self.remove(job)

    def remove(self, job: Job) -> None:
        name = job.owner, job.priority
        self._classes[name].remove(job)
        if not self._classes[name]:
            del self._classes[name]
            if len(self._last_start) > 4096:  # of owners long gone
                self._last_start = {n: at for n, at in self._last_start.items() if n in self._classes}
