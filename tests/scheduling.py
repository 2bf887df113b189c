"""A simulator: pages as counters, a clock that steps advance, random acceptance. The scheduler needs nothing else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from outpace.engine.jobs import Job, SchedulerLimits, StepPlan
from outpace.engine.scheduler import Scheduler


def limits(**given: Any) -> SchedulerLimits:
    return SchedulerLimits(**{"num_pages": 100, "page_size": 4, "max_position": 10_000, "headroom": 8} | given)


class Pages:
    """A paged cache with a prefix cache for groups, as reference counts alone. The prefix cache keeps what jobs of a
    group have read of their common beginning, a partly used last page included; whoever writes there copies it."""

    def __init__(self, of: SchedulerLimits) -> None:
        self.num_pages, self.page_size = of.num_pages, of.page_size
        self.length: dict[int, int] = {}
        self.pages: dict[int, list[int]] = {}
        self.tree: dict[tuple[str, str], tuple[list[int], int]] = {}  # pages, tokens in them
        self.waiting: dict[int, tuple[Job, int]] = {}  # and the length of its common beginning
        self.next_page = 0

    def references(self) -> Counter[int]:
        return Counter(page for pages in self.pages.values() for page in pages)

    def kept(self) -> Counter[int]:
        return Counter(page for pages, _ in self.tree.values() for page in pages)

    @property
    def available_pages(self) -> int:
        return self.num_pages - len(self.references())

    def match(self, job: Job, common: int) -> tuple[list[int], int]:
        if job.group is None or (job.owner, job.group) not in self.tree:
            return [], 0
        pages, tokens = self.tree[job.owner, job.group]
        tokens = min(tokens, common, job.target - 1)
        return pages[: -(-tokens // self.page_size)], tokens

    def shared_pages(self, id: int) -> int:
        pages, tokens = self.match(*self.waiting[id])
        held = self.references()
        return sum(page in held for page in pages[: tokens // self.page_size])

    def pages_needed(self, id: int, rows: int) -> int:
        length, pages = self.length[id], self.pages[id]
        copy = rows > 0 and length % self.page_size > 0 and self.references()[pages[-1]] + self.kept()[pages[-1]] > 1
        return max(-(-(length + rows) // self.page_size) - len(pages), 0) + copy

    def pages_held(self, id: int) -> int:
        references = self.references()
        return sum(references[page] == 1 for page in self.pages[id])

    def _new_page(self) -> int:
        assert self.available_pages > 0, "pages are over-committed"
        if len(self.references().keys() | self.kept().keys()) == self.num_pages:  # evict, all of a group at once
            held = self.references()
            name = next(n for n, (pages, _) in self.tree.items() if any(page not in held for page in pages))
            del self.tree[name]
        self.next_page += 1
        return self.next_page

    def begin(self, job: Job, cached: bool) -> int:
        pages, tokens = self.match(*self.waiting[job.id]) if cached else ([], 0)
        self.pages[job.id], self.length[job.id] = list(pages), tokens
        return tokens

    def write(self, id: int, rows: int) -> None:
        pages = self.pages[id]
        if rows and self.length[id] % self.page_size and self.references()[pages[-1]] + self.kept()[pages[-1]] > 1:
            pages[-1] = self._new_page()
        self.length[id] += rows
        while len(pages) < -(-self.length[id] // self.page_size):
            pages.append(self._new_page())

    def cut(self, id: int, length: int) -> None:
        self.length[id] = length
        del self.pages[id][-(-length // self.page_size) :]

    def keep(self, job: Job, common: int) -> None:
        if job.group is not None:
            tokens = min(common, self.length[job.id])
            self.tree[job.owner, job.group] = self.pages[job.id][: -(-tokens // self.page_size)], tokens

    def end(self, id: int) -> None:
        del self.pages[id], self.length[id]


@dataclass
class Simulator:
    """Runs jobs to their end; every step is checked against the limits."""

    limits: SchedulerLimits
    step_seconds: Callable[[int, float], float] | None = None
    predict: Callable[[Job], int] | None = None
    seed: int = 0
    now: float = 0.0
    done: list[int] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = Pages(self.limits)
        self.scheduler = Scheduler(self.limits, self.memory, lambda: self.now, self.step_seconds, self.predict)
        self.random = random.Random(self.seed)
        self.ends: dict[int, int] = {}
        self.host: dict[int, int] = {}

    def add(self, job: Job, output: int | None = None, common: int = 0) -> None:
        """`output`: tokens until it stops by itself. `common`: the beginning that its group shares."""
        self.scheduler.add(job)
        self.memory.waiting[job.id] = job, common
        self.ends[job.id] = min(output or job.max_tokens, job.max_tokens)

    def cancel(self, id: int) -> None:
        if id in self.memory.pages:
            self.memory.end(id)
        self.host.pop(id, None)
        self.scheduler.finished(id)

    def step(self) -> StepPlan:
        for start in self.scheduler.admit():
            job = self.scheduler.job(start.id)
            if start.swapped:
                self.memory.pages[job.id], self.memory.length[job.id] = [], 0
                self.memory.write(job.id, self.host.pop(job.id))
                self.scheduler.started(job.id, job.context)
            else:
                self.begun.append(job.id)
                self.scheduler.started(job.id, self.memory.begin(job, start.cached))
        before = {id: self.memory.length[id] for id in self.memory.pages}
        first = min(map(self.scheduler.job, before), key=lambda job: job.rank, default=None)
        better = [j for j in self.scheduler.waiting() if first is not None and j.priority < first.priority]
        plan = self.scheduler.plan()
        self.scheduler.check_integrity()
        if first is not None and not first.running:
            assert better or len(before) == 1, "the first gives way to nobody but a higher priority"
        for id, how in plan.preempt:
            if how == "swap":
                self.host[id] = before[id]
            self.memory.end(id)
        self._run(plan)
        self.plans.append(plan)
        self.scheduler.check_integrity()
        return plan

    def _run(self, plan: StepPlan) -> None:
        job, of = self.scheduler.job, self.limits
        drafts, left = {}, plan.draft_rows
        for id in self.random.sample(plan.decoding, len(plan.decoding)):
            drafts[id] = min(plan.caps[id], left, self.random.choice([0, plan.caps[id]]))
            left -= drafts[id]
        rows = sum(n for _, n in plan.chunks)
        self._check(plan, rows)
        for id in plan.decoding:
            self.memory.write(id, 1 + drafts[id])
        for id, n in plan.chunks:
            self.memory.write(id, n)
        total = len(plan.decoding) + sum(drafts.values()) + rows
        self.now += 0.01 if self.step_seconds is None else self.step_seconds(max(total, 1), 0)
        for id, n in plan.chunks:
            self.scheduler.prefilled(id, n)
            if job(id).decoding:
                self.memory.keep(*self.memory.waiting[id])
                self._advance(id, 1)
        for id in plan.decoding:
            n = min(self.random.randint(0, drafts[id]) + 1, self.ends[id] - job(id).generated)
            self.memory.cut(id, job(id).context + n)
            self._advance(id, n)
        assert of.max_batch >= len(self.memory.pages)

    def _advance(self, id: int, tokens: int) -> None:
        self.scheduler.advanced(id, tokens)
        if self.scheduler.job(id).generated == self.ends[id]:
            self.done.append(id)
            self.cancel(id)
        else:
            assert self.memory.length[id] == self.scheduler.job(id).context

    def _check(self, plan: StepPlan, rows: int) -> None:
        of, job = self.limits, self.scheduler.job
        running = [id for id in self.memory.pages if job(id).decoding]
        assert sorted(plan.decoding) == sorted(running), "whoever decodes and was not preempted is in every step"
        assert len({id for id, _ in plan.chunks}) == len(plan.chunks) and rows <= of.prefill_rows
        assert plan.draft_rows <= max(of.max_step_rows - len(plan.decoding), 0)
        for id, cap in plan.caps.items():
            assert 0 <= cap < min(of.max_rows, job(id).remaining + 1) and cap <= job(id).remaining - 1
        if plan.decoding and of.max_step_s is not None and self.step_seconds is not None:
            all_rows = len(plan.decoding) + plan.draft_rows + rows
            free = self.step_seconds(all_rows, 0) <= of.max_step_s
            assert free or (plan.draft_rows <= of.least_chunk and rows <= of.least_chunk)

    def run(self, most: int = 100_000) -> None:
        idle = 0
        for _ in range(most):
            if self.scheduler.idle:
                return
            plan = self.step()
            idle = idle + 1 if plan.empty else 0
            assert idle <= self.limits.max_batch + 1, "steps without rows"
        raise AssertionError("it does not finish")
