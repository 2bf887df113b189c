"""A team of threads that run one compiled job together: a decoder step, or the choice of tokens. Shared by every
decoder of the process.

Between steps the workers spin for about a millisecond (a decode step follows the last one at once), then park.

A team as large as the set of usable cores keeps each thread on a core of its own while it works: schedulers that pack
threads to save power put two spinning threads on one core, and a step then takes a hundred times as long.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .barrier import J_ARRIVED, J_BARRIER
from .compiled import address_of, compiled
from .sample import sample_rows
from .simd import atomic_load, atomic_store, call_at, load_i64, pause, yield_core
from .step import decoder_step

_PATIENCE = 20_000  # spins of about 40 ns
STEP, SAMPLE = decoder_step, sample_rows  # jobs: functions of (control block, thread)
_JOB, _CONTROL, _STOP, _FUNCTION = range(4)  # entries of the mailbox


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
        self._jobs = 0
        self._lock = threading.Lock()
        self._wake = threading.Condition()
        self._parked = 0
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._pinned = 1 < threads == len(self._cores)
        for me in range(1, threads):
            threading.Thread(target=self._work, args=(me,), name=f"outpace-{me}", daemon=True).start()

    def _work(self, me: int) -> None:
        seen, address = 0, self._mailbox.ctypes.data
        if self._pinned:
            os.sched_setaffinity(0, {self._cores[me]})
        while True:
            seen = serve(address, me, seen, _PATIENCE)
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
            self._jobs += 1
            function = address_of(job)
            control[J_BARRIER], control[J_ARRIVED] = self._arrivals.ctypes.data, self._arrivals[0]
            address = control.ctypes.data
            if self.threads > 1:
                post(self._mailbox.ctypes.data, self._jobs, address, function)
                if self._parked:
                    with self._wake:
                        self._wake.notify_all()
            if not self._pinned or os.sched_getaffinity(0) != set(self._cores):  # the caller has chosen its own cores
                work(function, address, 0)
                return
            os.sched_setaffinity(0, self._cores[:1])
            try:
                work(function, address, 0)
            finally:  # threads that the caller starts later must be free to go anywhere
                os.sched_setaffinity(0, self._cores)


@cache
def team(threads: int) -> Team:
    """The process's team of that many threads."""
    return Team(threads)
