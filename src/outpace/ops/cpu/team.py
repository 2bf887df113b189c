"""A team of threads that run one compiled job together: a decoder step, the search for the largest logits, or the draw
of tokens. Shared by every decoder of the process.

Between steps the workers spin for about a millisecond (a decode step follows the last one at once), then park.

In a team as large as the set of usable cores each thread has a core of its own: schedulers that pack threads to save
power put two spinning threads on one core, and a step then takes a hundred times as long. Workers are tied to theirs.
The caller, which is the first thread, is only moved to the one that is left, when it is found elsewhere. It stays there
while all others are taken, and threads that it starts are free to go anywhere.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .address import address
from .barrier import J_ARRIVED, J_BARRIER
from .compiled import address_of, compiled
from .sample import sample_rows
from .search import top_rows
from .simd import atomic_load, atomic_store, call_at, load_i64, pause, yield_core
from .step import decoder_step

_PATIENCE = 20_000  # spins of about 40 ns
STEP, SAMPLE, TOP = decoder_step, sample_rows, top_rows  # jobs: functions of (control block, thread)
_JOB, _CONTROL, _STOP, _FUNCTION = range(4)  # entries of the mailbox


def _find_core() -> Callable[[], int]:
    """What tells the core that this thread runs on; -1 where the system does not say."""
    try:
        return ctypes.PyDLL(None).sched_getcpu  # type: ignore[no-any-return]  # keeps the GIL: it takes no time
    except (AttributeError, OSError, TypeError):
        return lambda: -1


_this_core = _find_core()


@compiled
def work(job, control, me):
    """Thread `me`'s part of a job: the function at address `job`."""
    call_at(job, control, me)


@compiled
def serve(mailbox, me, seen, patience):
    """A worker's life between parkings: wait for the next job number, run it, wait again.

    Returns the last job number seen when nothing came for `patience` spins, or -1 when told to stop.
    """
    spins = 0
    while spins < patience:
        job = atomic_load(mailbox)
        if load_i64(mailbox + 8 * _STOP) != 0:
            return -1
        if job != seen:
            work(load_i64(mailbox + 8 * _FUNCTION), load_i64(mailbox + 8 * _CONTROL), me)
            seen, spins = job, 0
        pause()
        spins += 1
        if spins % 1024 == 0:
            yield_core()
    return seen


@compiled
def post(mailbox, job, control, function):
    atomic_store(mailbox + 8 * _FUNCTION, function)
    atomic_store(mailbox + 8 * _CONTROL, control)
    atomic_store(mailbox, job)


Job = Callable[[int, int], None]


class Team:
    """`threads - 1` daemon workers and the caller. One job at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._mailbox = np.zeros(8, dtype=np.int64)
        # arrivals at barriers, ever; not the decoder's: a slow worker may still look at it when the decoder is gone
        self._arrivals = np.zeros(8, dtype=np.int64)
        self._addresses = self._mailbox.ctypes.data, self._arrivals.ctypes.data
        self._jobs = 0
        self._lock = threading.Lock()
        self._wake = threading.Condition()
        self._parked = 0
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._pinned = 1 < threads == len(self._cores)
        for me in range(1, threads):
            threading.Thread(target=self._work, args=(me,), name=f"outpace-{me}", daemon=True).start()

    def _work(self, me: int) -> None:
        seen, mailbox = 0, self._addresses[0]
        if self._pinned:
            os.sched_setaffinity(0, {self._cores[me]})
        while True:
            seen = serve(mailbox, me, seen, _PATIENCE)
            if seen < 0:
                return
            with self._wake:
                self._parked += 1
                while self._mailbox[_JOB] == seen and not self._mailbox[_STOP]:
                    self._wake.wait()
                self._parked -= 1

    def run(self, control: NDArray[np.int64], job: Job = STEP) -> None:
        """Run the job that a control block describes; returns when all threads are done with it."""
        with self._lock:
            if self._pinned:
                self._take_place()
            self._jobs += 1
            function, at = address_of(job), address(control)
            mailbox, arrivals = self._addresses
            control[J_BARRIER], control[J_ARRIVED] = arrivals, self._arrivals[0]
            if self.threads > 1:
                post(mailbox, self._jobs, at, function)
                if self._parked:
                    with self._wake:
                        self._wake.notify_all()
            work(function, at, 0)

    def _take_place(self) -> None:
        """Move the caller to the core that no worker has, unless it has chosen its own cores."""
        if _this_core() != self._cores[0] and os.sched_getaffinity(0) == set(self._cores):
            os.sched_setaffinity(0, self._cores[:1])
            os.sched_setaffinity(0, self._cores)


@cache
def team(threads: int) -> Team:
    """The process's team of that many threads."""
    return Team(threads)
