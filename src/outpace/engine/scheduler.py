"""Which jobs run, with how many rows, and which are preempted. Pure Python, no tensors: a simulator runs it with its
own clock.

One step, as the engine drives it:

    for start in scheduler.admit():          # jobs that start or come back
        scheduler.started(start.id, places)  # after the prefix cache was searched, or the pages came back
    plan = scheduler.plan()                  # carry out plan.preempt first, then run the rows
    scheduler.prefilled(id, rows)            # each chunk; the last one of a prompt brings a token as well
    scheduler.advanced(id, tokens)           # each sequence that got tokens
    scheduler.finished(id)                   # over or cancelled, at any time between plans

Continuous batching after Orca (Yu et al., OSDI 2022); decodes in every step and prompts in chunks that fill it after
Sarathi-Serve (Agrawal et al., 2024, https://arxiv.org/abs/2403.02310, algorithm 3); pages on demand and preemption
after PagedAttention (Kwon et al., 2023, https://arxiv.org/abs/2309.06180, section 4.5); predicted lengths after S3
(Jin et al., 2023, https://arxiv.org/abs/2306.06000).

No job starves. Running jobs are ranked by (level, arrival); only worse ranked ones are preempted, so the first always
gets its rows. A level sinks by waiting, never rises again and has a floor, so the order settles and the first finishes.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from time import monotonic

from ..errors import CapacityError, ParameterError, QueueFull
from .fairness import Groups, Served, WaitingQueue
from .jobs import Job, Memory, Preempt, SchedulerLimits, SchedulerStats, Start, StepPlan
from .rows import Rows, StepSeconds, largest

WORST = 2**31  # below every priority
_FINISHES = 32  # the last ones, from which the rate of finishing is taken

_rank = attrgetter("rank")

Predict = Callable[[Job], int]  # tokens of output; what is out of range is brought into it


class Scheduler:
    """Decides; its owner executes. Not thread-safe. Ids are never used twice."""

    def __init__(
        self,
        limits: SchedulerLimits,
        memory: Memory,
        clock: Callable[[], float] = monotonic,
        step_seconds: StepSeconds | None = None,
        predict: Predict | None = None,
    ) -> None:
        if limits.shortest_first and predict is None:
            raise ParameterError("shortest_first needs predicted lengths: give `predict`, or leave shortest_first out")
        self.limits, self.memory = limits, memory
        self._clock, self._predict = clock, predict
        self._rows = Rows(limits, step_seconds)
        self._served = Served()
        self._queue = WaitingQueue(self._served, limits.ageing_s, limits.shortest_first)
        self._jobs: dict[int, Job] = {}
        self._running: dict[int, Job] = {}
        self._ranked: list[Job] = []  # those that run, in the order in which they keep running
        self._starting: set[int] = set()  # admitted, not yet reported as started
        self._groups = Groups()
        self._host_pages = 0  # that swapped jobs take
        self._freed = 0  # pages that this plan's victims give back; together they may be more
        self._ample = False  # this plan need not ask for pages: there are enough for all that it can give
        self._next_order = 0
        self._finishes: deque[float] = deque(maxlen=_FINISHES)
        self._counts = SchedulerStats()

    # -- jobs come and go --------------------------------------------------------------------------------------

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raises CapacityError when such a job could never run."""
        self.limits.check(prompt_tokens, max_tokens)

    def add(self, job: Job) -> None:
        """Queue a job. Raises CapacityError when it could never run, QueueFull when too many wait already."""
        self.check(job.prompt_tokens, job.max_tokens)
        assert job.id not in self._jobs and job.prompt_tokens >= 1 and job.max_tokens >= 1
        assert 1 <= job.rows <= self.limits.max_rows
        waiting, most = len(self._queue), self.limits.max_queue
        if most is not None and waiting >= most:
            self._counts.refused += 1
            seconds = self.retry_after_s()
            raise QueueFull(
                f"{waiting} requests wait already and at most {most} may: try again in {seconds:.0f} s", seconds
            )
        job.arrived = self._clock() if job.arrived is None else job.arrived
        job.order, self._next_order = self._next_order, self._next_order + 1
        job.level, job.target = job.priority, job.prompt_tokens - job.ahead
        if self._predict is not None:
            job.predicted = min(max(int(self._predict(job)), 1), job.max_tokens)
        self._jobs[job.id] = job
        self._served.enter(job.owner)
        self._groups.enter(job)
        self._queue.add(job, job.arrived)

    def fork(self, id: int, job: Job) -> None:
        """`job` goes on from where the decoding job `id` is; it runs from here on, with the same places. Raises
        CapacityError when as many run as may."""
        parent, most = self._running[id], self.limits.max_batch
        assert parent.decoding and job.id not in self._jobs and job.group is None
        if len(self._running) >= most:
            raise CapacityError(f"{most} requests run, as many as may: raise max_batch, or fork when others are over")
        job.arrived = job.began = self._clock()
        job.order, self._next_order = self._next_order, self._next_order + 1
        job.level, job.predicted, job.running = parent.level, parent.predicted, True
        job.target, job.read, job.generated = parent.target, parent.read, parent.generated
        self._jobs[job.id] = self._running[job.id] = job
        insort(self._ranked, job, key=_rank)
        self._served.enter(job.owner)
        self._groups.enter(job)
        self._counts.started += 1

    def retry_after_s(self) -> float:
        """Seconds until a place in the queue should be free, by the rate at which jobs finish; at least 1."""
        now, gaps = self._clock(), max(len(self._finishes) - 1, 1)
        if len(self._finishes) > 1:
            began = self._finishes[0]  # to now: a rate that has fallen is seen before the next one finishes
        else:
            began = min((j.began for j in self._running.values() if j.began is not None), default=now)
        return max(1.0, (now - began) / gaps)

    def finished(self, id: int) -> None:
        """The job is over or cancelled, running or waiting. An unknown id is one that was over already."""
        job = self._jobs.pop(id, None)
        if job is None:
            return
        if job.running:
            self._leave(job)
            self._starting.discard(id)
            self._finishes.append(self._clock())
        else:
            self._queue.remove(job)
        self._host_pages -= self.limits.pages(job.context) if job.swapped else 0
        job.running = False
        self._groups.leave(job)
        self._served.leave(job.owner)
        self._counts.finished += 1

    # -- starts ------------------------------------------------------------------------------------------------

    def admit(self) -> list[Start]:
        """Jobs that start or come back now, in queue order; they run from here on. Each is then reported by `started`.
        Nobody overtakes the first in the queue: a large job would starve."""
        starts: list[Start] = []
        available = self.memory.available_pages
        while len(self._running) < self.limits.max_batch:
            first = self._next()
            if first is None:
                break
            job, level = first
            need = self._start_pages(job)
            if need + self._future_pages() > available:
                assert self._running, "nothing runs and a job that fits does not start: pages are lost"
                break
            available -= need
            starts.append(Start(job.id, job.swapped, not job.uncached))
            self._begin(job, level)
        return starts

    def _next(self) -> tuple[Job, int] | None:
        """The job that starts next, and its level."""
        if not len(self._queue):
            return None
        best = min((job.priority for job in self._running.values()), default=WORST)
        return self._queue.first(self._clock(), best, self._groups.held)

    def _start_pages(self, job: Job) -> int:
        """Available pages for a waiting job: for what it reads or brings back, and for what it is to write next."""
        known = max(job.target, job.context + 1)
        shared = 0 if job.swapped or job.uncached else self.memory.shared_pages(job.id)
        return max(self.limits.pages(known + self._headroom(job) + job.own - 1) - shared, 0)

    def _headroom(self, job: Job) -> int:
        """Tokens that a job should have pages for: as many as it is predicted to, or a few, which is enough for it not
        to be preempted at once."""
        ahead = self.limits.headroom if job.predicted is None else job.predicted - job.generated
        return min(max(ahead, 1), job.remaining) - 1  # the last token is never written

    def _ahead(self, job: Job) -> int:
        """Rows that a running job has before it and should have pages for."""
        return job.unread + self._headroom(job) + (job.own if job.decoding else 0)

    def _future_pages(self) -> int:
        """Pages that running jobs are still to get before anybody else starts. Those that start now are counted
        already."""
        return sum(
            self.memory.pages_needed(job.id, self._ahead(job))
            for job in self._running.values()
            if job.id not in self._starting
        )

    def _begin(self, job: Job, level: int) -> None:
        now = self._clock()
        self._queue.start(job, now)
        job.level, job.running = level, True
        self._running[job.id] = job
        insort(self._ranked, job, key=_rank)
        self._starting.add(job.id)
        self._groups.start(job)
        if job.began is None:
            assert job.arrived is not None
            job.began = now
            waited = max(now - job.arrived, 0.0)
            self._counts.started += 1
            self._counts.queue_s += waited
            self._counts.longest_queue_s = max(self._counts.longest_queue_s, waited)
            self._served.charge(job.owner, prompt=job.prompt_tokens)  # now: several starts of a step see each other

    def started(self, id: int, places: int) -> None:
        """The job has `places` in the cache: those found in the prefix cache, or those that came back."""
        job = self._running[id]
        self._starting.remove(id)
        if job.swapped:
            assert places == job.context, f"job {id} came back with {places} places instead of {job.context}"
            self._host_pages -= self.limits.pages(job.context)
            job.swapped = False
            return
        assert 0 <= places < job.target + job.ahead, "the last token must be run for its logits"
        assert not (job.uncached and places)
        job.read = places
        if job.decoding:
            self._groups.read(job)
        if not job.preempted:
            self._served.charge(job.owner, prompt=-places)  # what was cached costs nothing

    # -- a step ------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step. Jobs in `preempt` wait again from here on."""
        assert not self._starting, "every job from admit() must be reported by started()"
        plan = StepPlan()
        self._freed = 0
        self._preempt_lower(plan)
        self._check_predictions(plan)
        self._ample = self.memory.available_pages >= self._most_pages()
        spare = self._decodes(plan)
        jobs = [self._jobs[id] for id in plan.decoding]
        caps = {job.id: self._rows.cap(job) for job in jobs}
        rows, drafts = self._rows.share(self._running.values(), sum([job.own for job in jobs]), caps.values())
        spare = self._chunks(plan, rows, spare)
        self._drafts(plan, caps, drafts, spare)
        return plan

    def _most_pages(self) -> int:
        """More than a step can take: each job at most two beside those that its rows fill."""
        limits = self.limits
        return len(self._running) * (limits.pages(limits.max_rows) + 2) + limits.pages(limits.prefill_rows)

    def _leave(self, job: Job) -> None:
        del self._running[job.id]
        self._ranked.remove(job)

    def _preempt_lower(self, plan: StepPlan) -> None:
        """Preempt running jobs of lower priority if a waiting one of higher priority can then start. Ageing alone
        preempts nobody, and a job that has aged as far is not preempted: that would only read prompts again."""
        first = self._next()
        if first is None or not self._running:
            return
        job, level = first
        victims = [v for v in reversed(self._ranked) if v.level > level and v.priority > job.priority]
        available, need = self.memory.available_pages, self._start_pages(job)
        future, running = self._future_pages(), len(self._running)
        for n in range(len(victims) + 1):
            if running < self.limits.max_batch and need + future <= available:
                for v in victims[:n]:
                    self._preempt(v, plan)
                return
            if n < len(victims):
                v = victims[n]
                available += self.memory.pages_held(v.id)
                future -= self.memory.pages_needed(v.id, self._ahead(v))
                running -= 1

    def _check_predictions(self, plan: StepPlan) -> None:
        """A prediction that has run out is doubled; if the pages for it are lacking, the job is preempted."""
        if self._predict is None:
            return
        for job in self._ranked[::-1]:
            if job.predicted is None or job.generated < job.predicted or not job.decoding:
                continue
            self._counts.mispredicted += 1
            job.predicted = min(max(2 * job.predicted, job.generated + 1), job.max_tokens)
            first = job is self._ranked[0]
            if not first and self._future_pages() > self._available:
                self._preempt(job, plan)

    def _decodes(self, plan: StepPlan) -> int:
        """Every decoding job gets its row; while pages are lacking, the worst ranked job is preempted. Returns the
        pages left."""
        while True:
            decoding = [job for job in self._ranked if job.decoding]
            need = 0 if self._ample else sum(self.memory.pages_needed(job.id, job.own) for job in decoding)
            spare = self._available - need
            if spare >= 0:
                plan.decoding = [job.id for job in decoding]
                return spare
            if len(self._ranked) > 1:
                self._preempt(self._ranked[-1], plan)
            elif plan.preempt:  # what those hold together is known once they are gone
                return 0
            else:
                self._start_over(self._ranked[0], plan)

    @property
    def _available(self) -> int:
        return self.memory.available_pages + self._freed

    def _chunks(self, plan: StepPlan, rows: int, spare: int) -> int:
        """Give prompt rows by rank, as far as pages allow. If nothing runs otherwise, the worst ranked are preempted
        for the first. Returns the pages left."""
        logits = self.limits.logit_rows
        for job in self._ranked:
            if rows <= 0:
                break
            n = self._rows_in(job, min(job.ahead_of_pause, rows, logits if job.logits else rows), spare)
            if n:
                plan.chunks.append((job.id, n))
                rows -= n
                logits -= n if job.logits else 0
                spare -= 0 if self._ample else self.memory.pages_needed(job.id, n)
        first = self._ranked[0] if self._ranked else None
        if first is not None and not first.decoding and not any(id == first.id for id, _ in plan.chunks):
            self._free_pages_for(first, plan)
        return spare

    def _free_pages_for(self, first: Job, plan: StepPlan) -> None:
        """The first ranked job reads and has no page: the worst ranked is preempted, from the next step on."""
        if len(self._running) > 1:
            last = self._ranked[-1]
            plan.decoding = [id for id in plan.decoding if id != last.id]
            plan.chunks = [(id, n) for id, n in plan.chunks if id != last.id]
            self._preempt(last, plan)
        elif not plan.preempt:
            self._start_over(first, plan)

    def _rows_in(self, job: Job, most: int, pages: int) -> int:
        """The largest number of rows, at most `most`, of a running job that so many pages hold."""
        if self._ample or not most:
            return most
        return largest(most, lambda rows: self.memory.pages_needed(job.id, rows) <= pages)

    def _drafts(self, plan: StepPlan, caps: Mapping[int, int], rows: int, spare: int) -> None:
        """Caps by rank, at most those given, as far as pages allow: those for the drafts of all are available."""
        plan.caps = dict.fromkeys(plan.decoding, 0)
        if rows <= 0:
            plan.draft_rows = 0
            return
        for id in plan.decoding:
            job, most = self._jobs[id], min(caps[id], rows)
            if self._ample or not most:
                plan.caps[id] = most
                continue
            own = self.memory.pages_needed(id, job.own)  # taken off already
            plan.caps[id] = self._rows_in(job, job.own + most, spare + own) - job.own
            spare -= self.memory.pages_needed(id, job.own + plan.caps[id]) - own
        plan.draft_rows = min(rows, sum(plan.caps.values()))

    # -- preemption --------------------------------------------------------------------------------------------

    def _preempt(self, job: Job, plan: StepPlan, fresh: bool = False) -> None:
        """Back to the queue. Swapped if that is configured, the host has space, and it pays."""
        limits, pages = self.limits, self.limits.pages(job.context)
        swap = limits.swap_least <= pages <= limits.swap_pages - self._host_pages and job.context > 0 and not fresh
        self._freed += self.memory.pages_held(job.id)
        plan.preempt.append(Preempt(job.id, "swap" if swap else "recompute"))
        if swap:
            self._counts.swapped += 1
            self._host_pages += pages
        else:
            self._counts.recomputed += 1
            job.target, job.read = job.prompt_tokens + job.generated - job.ahead, 0
        job.swapped, job.fresh, job.running = swap, fresh, False
        job.preempted += 1
        self._leave(job)
        self._groups.stop(job)
        self._queue.add(job, self._clock())

    def _start_over(self, job: Job, plan: StepPlan) -> None:
        """Alone and without a page: it holds a shared cached page, which it would have to copy."""
        assert not job.fresh, f"job {job.id} runs alone and has no page for a row: pages are lost"
        self._preempt(job, plan, fresh=True)

    # -- reports -----------------------------------------------------------------------------------------------

    def took(self, rows: int, seconds: float) -> None:
        """The step that was planned last had so many rows, a chunk of a prompt among them, and took so long."""
        self._rows.took(self._running.values(), rows, seconds)

    def prefilled(self, id: int, rows: int) -> None:
        """`rows` prompt rows of the job were computed."""
        job = self._running[id]
        job.read += rows
        assert rows >= 1 and job.read <= job.target
        self._counts.read_tokens += rows
        self._counts.reread_tokens += rows if job.preempted else 0
        if job.decoding:
            self._groups.read(job)

    def advanced(self, id: int, tokens: int) -> None:
        """The job's output grew by `tokens`."""
        job = self._running[id]
        job.generated += tokens
        assert tokens >= 1 and job.read == job.target and job.generated <= job.max_tokens
        self._counts.generated_tokens += tokens
        self._served.charge(job.owner, output=tokens)

    @property
    def idle(self) -> bool:
        return not self._jobs

    @property
    def stats(self) -> SchedulerStats:
        """A copy."""
        return replace(self._counts, waiting=len(self._queue), running=len(self._running))

    def served(self, owner: str) -> float:
        """Weighted tokens that the owner was served, what idleness was lifted over included."""
        return self._served.tokens.get(owner, 0.0)

    def job(self, id: int) -> Job:
        """To look at. KeyError when it is over."""
        return self._jobs[id]

    def waiting(self) -> list[Job]:
        """To look at, in no order."""
        return list(self._queue)

    def check_integrity(self) -> None:
        """AssertionError if the counters contradict each other."""
        waiting = {job.id: job for job in self._queue}
        assert not waiting.keys() & self._running.keys() and waiting.keys() | self._running.keys() == self._jobs.keys()
        assert len(waiting) == len(self._queue) and len(self._running) <= self.limits.max_batch
        assert self._starting <= self._running.keys()
        for id, job in self._jobs.items():
            assert job.running == (id in self._running)
            assert 0 <= job.read <= job.target <= job.prompt_tokens + job.generated and job.remaining >= 0
            assert job.running or job.swapped or job.read == 0
            assert job.level <= job.priority
        host = sum(self.limits.pages(job.context) for job in self._jobs.values() if job.swapped)
        assert host == self._host_pages <= self.limits.swap_pages
        self._served.check_integrity(Counter(job.owner for job in self._jobs.values()))
        self._groups.check_integrity(self._jobs)
