"""A team of threads that run one compiled step together, shared by every decoder of the process.

Between steps the workers spin for about a millisecond (a decode step follows the last one at once), then park.
"""

from __future__ import annotations

import threading
from functools import cache

import numpy as np

from .simd import atomic_store, njit
from .step import decoder_step, serve

_PATIENCE = 20_000  # spins of about 40 ns


@njit(nogil=True, cache=True)
def _post(mailbox, job, control):
    atomic_store(mailbox + 8, control)
    atomic_store(mailbox, job)


class Team:
    """`threads - 1` daemon workers and the caller. One job at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._mailbox = np.zeros(8, dtype=np.int64)
        self._jobs = 0
        self._lock = threading.Lock()
        self._wake = threading.Condition()
        self._parked = 0
        for me in range(1, threads):
            threading.Thread(target=self._work, args=(me,), name=f"outpace-{me}", daemon=True).start()

    def _work(self, me: int) -> None:
        seen, address = 0, self._mailbox.ctypes.data
        while True:
            seen = serve(address, me, seen, _PATIENCE)
            if seen < 0:
                return
            with self._wake:
                self._parked += 1
                while self._mailbox[0] == seen and not self._mailbox[2]:
                    self._wake.wait()
                self._parked -= 1

    def run(self, control: int) -> None:
        """Run the step described by the control block at this address; returns when all threads are done."""
        with self._lock:
            self._jobs += 1
            if self.threads > 1:
                _post(self._mailbox.ctypes.data, self._jobs, control)
                if self._parked:
                    with self._wake:
                        self._wake.notify_all()
            decoder_step(control, 0)


@cache
def team(threads: int) -> Team:
    """The process's team of that many threads."""
    return Team(threads)
