"""The order of waiting jobs: by priority (raised by waiting), then the owner who was served least, then arrival. Of a
group only one reads the common prefix.

Virtual token counters after Sheng et al., Fairness in Serving Large Language Models, OSDI 2024
(https://arxiv.org/abs/2401.00588). Within an owner's jobs of one priority nobody overtakes, so only the first of
each such class is ever looked at. A class ages from its last start: an owner with a thousand old jobs that are
served regularly gains nothing over one whose first job is new, while a class that is not served is raised until it is.
What was preempted ages by its own waiting since. Ageing ends at the best priority that anybody has: from there on
order is fair, and among equals nothing ages at all.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping

from .jobs import Job

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # cost of a token, as in the paper


class Served:
    """Tokens served to each owner, weighted. Owners count while they have jobs."""

    def __init__(self) -> None:
        self.tokens: dict[str, float] = {}
        self._jobs: Counter[str] = Counter()
        self._floor = 0.0  # of the owner who left last

    def enter(self, owner: str) -> None:
        """One more job. An owner who had none is lifted to the least served one: idle time earns no credit."""
        if not self._jobs[owner]:
            least = min((self.tokens[o] for o in self._jobs if self._jobs[o]), default=self._floor)
            self.tokens[owner] = max(self.tokens.get(owner, 0.0), least)
        self._jobs[owner] += 1

    def leave(self, owner: str) -> None:
        self._jobs[owner] -= 1
        if not self._jobs[owner]:
            del self._jobs[owner]
            self._floor = self.tokens[owner]
            if not self._jobs:  # everybody starts equal to who left last, so no counter need be kept
                self.tokens.clear()

    def charge(self, owner: str, prompt: int = 0, output: int = 0) -> None:
        self.tokens[owner] += PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output

    def check_integrity(self, owners: Counter[str]) -> None:
        assert self._jobs == owners, "jobs of owners are counted wrongly"
        assert owners.keys() <= self.tokens.keys()


class WaitingQueue:
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

    def add(self, job: Job, now: float) -> None:
        job.since = now
        insort(self._classes.setdefault((job.owner, job.priority), []), job, key=self._within)

    def _within(self, job: Job) -> tuple[int, int]:
        length = job.predicted if self._shortest_first and job.predicted is not None else 0
        return length, job.order

    def first(self, now: float, best: int, held: set[tuple[str, str]]) -> tuple[Job, int] | None:
        """The next job to start, and its priority as raised by now. `best`: the best priority among those that run.
        `held`: groups that wait for their first member."""
        best = min([best, *(priority for _, priority in self._classes)])
        candidates = []
        for name, jobs in self._classes.items():
            job = next((j for j in jobs if j.group is None or (j.owner, j.group) not in held), None)
            if job is not None:
                candidates.append((self._level(name, job, now, best), self._served.tokens[job.owner], job.order, job))
        if not candidates:
            return None
        level, _, _, job = min(candidates, key=lambda candidate: candidate[:3])
        return job, level

    def _level(self, name: tuple[str, int], job: Job, now: float, best: int) -> int:
        if self._ageing_s is None:
            return job.level
        if job.preempted:
            waited = job.waited + now - job.since
        else:
            waited = now - max(job.since, self._last_start.get(name, job.since))
        return min(job.level, max(job.priority - max(int(waited / self._ageing_s), 0), best))

    def start(self, job: Job, now: float) -> None:
        self._last_start[job.owner, job.priority] = now
        job.waited += max(now - job.since, 0.0) if job.preempted else 0.0
        self.remove(job)

    def remove(self, job: Job) -> None:
        name = job.owner, job.priority
        self._classes[name].remove(job)
        if not self._classes[name]:
            del self._classes[name]
            if len(self._last_start) > 4096:  # of owners long gone
                self._last_start = {n: at for n, at in self._last_start.items() if n in self._classes}


class Groups:
    """Jobs of one owner with a common beginning: the first reads it, the others wait until it is in the prefix cache
    rather than read it as well (after BatchLLM, Zheng et al., 2024, https://arxiv.org/abs/2412.03594)."""

    def __init__(self) -> None:
        self._leaders: dict[tuple[str, str], int] = {}  # who reads
        self._readable: set[tuple[str, str]] = set()
        self._members: Counter[tuple[str, str]] = Counter()

    @property
    def held(self) -> set[tuple[str, str]]:
        """Groups whose beginning is being read."""
        return set(self._leaders)

    def enter(self, job: Job) -> None:
        if job.group is not None:
            self._members[job.owner, job.group] += 1

    def start(self, job: Job) -> None:
        if job.group is not None and (job.owner, job.group) not in self._readable:
            self._leaders[job.owner, job.group] = job.id

    def read(self, job: Job) -> None:
        """The job has read its prompt."""
        if job.group is not None:
            self._readable.add((job.owner, job.group))
            self.stop(job)

    def stop(self, job: Job) -> None:
        """The job reads no longer; if its group is not readable the next one may start."""
        if job.group is not None and self._leaders.get((job.owner, job.group)) == job.id:
            del self._leaders[job.owner, job.group]

    def leave(self, job: Job) -> None:
        self.stop(job)
        if job.group is None:
            return
        name = job.owner, job.group
        self._members[name] -= 1
        if not self._members[name]:
            del self._members[name]
            self._readable.discard(name)

    def check_integrity(self, jobs: Mapping[int, Job]) -> None:
        members = Counter((job.owner, job.group) for job in jobs.values() if job.group is not None)
        assert members == self._members and self._readable <= members.keys()
        for name, id in self._leaders.items():
            job = jobs[id]
            assert (job.owner, job.group) == name and job.running and not job.decoding
            assert name not in self._readable
