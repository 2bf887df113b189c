"""Who runs when, and how rows are shared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outpace.decoding.planners.planner import share_rows
from outpace.engine.admission import Admission


@given(st.integers(-5, 60), st.lists(st.integers(-1, 40), max_size=12))
def test_rows_are_shared_fairly(available: int, caps: list[int]) -> None:
    shares = share_rows(available, caps)
    assert all(0 <= s <= max(0, c) for s, c in zip(shares, caps, strict=True))
    assert sum(shares) == min(max(0, available), sum(max(0, c) for c in caps))
    below_cap = [s for s, c in zip(shares, caps, strict=True) if s < c]
    if below_cap:  # who could use more has, but for one row, at least what anyone has
        assert max(shares) - min(below_cap) <= 1


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=20), st.integers(1, 5), st.randoms())
def test_first_come_first_served_within_limits(requests: list[tuple[int, int]], max_batch: int, rng) -> None:
    queue = Admission(max_batch=max_batch, num_pages=10, page_size=8, max_position=1000)
    running: list[int] = []
    started: list[int] = []
    for id, (prompt, new) in enumerate(requests):
        queue.add(id, prompt, new)
        queue.check_integrity()
    while len(started) < len(requests):
        now = queue.admit()
        queue.check_integrity()
        running += now
        started += now
        assert running, "somebody must run"
        assert sum(-(-sum(requests[i]) // 8) for i in running) <= 10 and len(running) <= max_batch
        gone = running.pop(rng.randrange(len(running)))
        queue.release(gone)
        queue.release(gone)  # twice is safe
    assert started == list(range(len(requests)))
    for id in running:
        queue.release(id)
    queue.check_integrity()


def test_a_waiting_request_can_leave() -> None:
    queue = Admission(max_batch=1, num_pages=10, page_size=8, max_position=100)
    for id in range(3):
        queue.add(id, 4, 4)
    assert queue.admit() == [0]
    queue.release(1)
    queue.release(0)
    assert queue.admit() == [2]
