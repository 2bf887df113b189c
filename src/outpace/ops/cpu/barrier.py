"""What the jobs of a team share: the head of their control blocks, and the barrier at which its threads meet.

A job's control block is int64 (addresses, sizes, flags); its first entries are these, whatever the job.
"""

from __future__ import annotations

from numba import njit

from .simd import atomic_add, atomic_load, load_i64, pause, store_i64, yield_core

# address of the team's count of arrivals, the count when the job began, threads of the team
J_BARRIER, J_ARRIVED, J_THREADS = range(3)
SPINS_BEFORE_YIELD = 256


@njit(inline="always")
def get(c, index):
    return load_i64(c + 8 * index)


@njit(inline="always")
def put(c, index, value):
    store_i64(c + 8 * index, value)


@njit
def meet(c, threads, arrived):
    """Barrier. `arrived`: the count of arrivals at which this meeting is complete; returns the next one's.

    The count only ever rises: a thread may still be looking at it when the next job begins.
    """
    counter = get(c, J_BARRIER)
    atomic_add(counter, 1)
    spins = 0
    while atomic_load(counter) < arrived:
        pause()
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            yield_core()
    return arrived + threads
