"""A team of threads that run one compiled step together, shared by every decoder of the process.

Between steps the workers spin for about a millisecond (a decode step follows the last one at once), then park.

A team as large as the set of usable cores keeps each thread on a core of its own while it works: schedulers that pack
threads to save power put two spinning threads on one core, and a step then takes a hundred times as long.
"""

from __future__ import annotations

import os
import threading
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .compiled import compiled
from .simd import atomic_store
from .step import C_ARRIVED, C_BARRIER, decoder_step, serve

_PATIENCE = 20_000  # spins of about 40 ns


@compiled
def post(mailbox, job, control):
    atomic_store(mailbox + 8, control)
    atomic_store(mailbox, job)


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
                while self._mailbox[0] == seen and not self._mailbox[2]:
                    self._wake.wait()
                self._parked -= 1

    def run(self, control: NDArray[np.int64]) -> None:
        """Run the step that a control block describes; returns when all threads are done with it."""
        with self._lock:
            self._jobs += 1
            control[C_BARRIER], control[C_ARRIVED] = self._arrivals.ctypes.data, self._arrivals[0]
            address = control.ctypes.data
            if self.threads > 1:
                post(self._mailbox.ctypes.data, self._jobs, address)
                if self._parked:
                    with self._wake:
                        self._wake.notify_all()
            if not self._pinned or os.sched_getaffinity(0) != set(self._cores):  # the caller has chosen its own cores
                decoder_step(address, 0)
                return
            os.sched_setaffinity(0, self._cores[:1])
            try:
                decoder_step(address, 0)
            finally:  # threads that the caller starts later must be free to go anywhere
                os.sched_setaffinity(0, self._cores)


@cache
def team(threads: int) -> Team:
    """The process's team of that many threads."""
    return Team(threads)
