"""How the rows of a step are shared, against what the limits promise."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outpace.engine.jobs import Job, SchedulerLimits
from outpace.engine.rows import Rows, largest


@given(st.integers(0, 40), st.integers(-1, 45))
def test_largest_is_what_counting_finds(most: int, last: int) -> None:
    calls: list[int] = []

    def holds(n: int) -> bool:
        calls.append(n)
        return n <= last

    assert largest(most, holds) == max((n for n in range(1, most + 1) if n <= last), default=0)
    assert all(1 <= n <= most for n in calls) and len(calls) <= 8


def decoding(id: int, remaining: int, max_draft: int | None) -> Job:
    job = Job(id, 10, remaining, max_draft=max_draft)
    job.target = job.read = 10
    job.running = True
    return job


def reading(id: int, unread: int) -> Job:
    job = Job(id, unread, 5)
    job.target, job.running = unread, True
    return job


def test_what_steps_really_take_corrects_the_table() -> None:
    """The table says that rows cost nothing; 20 ms each is what they take."""
    limits = SchedulerLimits(1000, 16, 10_000, max_batch=16, max_step_s=0.25, prefill_rows=512, least_chunk=1)
    rows = Rows(limits, lambda rows, context: 0.001 + 0.0001 * rows)
    writer, reader = decoding(0, 100, 0), reading(1, 5000)
    chunks = []
    for _ in range(12):
        chunk, _ = rows.share([writer, reader], 1, [rows.cap(writer)])
        chunks.append(chunk)
        rows.took([writer, reader], 1 + chunk, 0.02 * (1 + chunk))
    assert chunks[0] == 255, "no more than twice what has been tried"
    assert all(0.12 <= 0.02 * (1 + chunk) <= 0.3 for chunk in chunks[4:]), chunks
    for _ in range(12):  # and back, when they take less
        chunk, _ = rows.share([writer, reader], 1, [rows.cap(writer)])
        rows.took([writer, reader], 1 + chunk, 0.0002 * (1 + chunk))
    assert chunk > 400


@given(
    st.lists(st.tuples(st.integers(1, 30), st.none() | st.integers(0, 20)), max_size=12),
    st.lists(st.integers(1, 900), max_size=4),
    st.none() | st.integers(1, 600),
)
def test_shares_keep_every_limit(outputs: list[tuple[int, int | None]], prompts: list[int], within: int | None) -> None:
    """`within`: rows that fit in the seconds of a step."""
    limits = SchedulerLimits(1000, 16, 10_000, max_batch=16, max_step_s=None if within is None else float(within))
    rows = Rows(limits, lambda rows, context: float(rows))
    writers = [decoding(i, *output) for i, output in enumerate(outputs)]
    readers = [reading(100 + i, n) for i, n in enumerate(prompts)]
    chunk, drafts = rows.share([*writers, *readers], len(writers), list(map(rows.cap, writers)))
    unread = min(sum(prompts), limits.prefill_rows)
    wanted = min(sum(map(rows.cap, writers)), max(limits.max_step_rows - len(writers), 0))
    assert 0 <= chunk <= unread and 0 <= drafts <= wanted
    assert all(rows.cap(job) < job.remaining and rows.cap(job) < limits.max_rows for job in writers)
    if not writers:
        assert (chunk, drafts) == (unread, 0)  # nobody waits for a token
        return
    assert chunk >= min(unread, limits.least_chunk)  # reading goes on
    if within is not None:
        assert len(writers) + drafts + chunk <= max(within, len(writers) + limits.least_chunk + drafts)
        assert len(writers) + drafts <= max(within, len(writers))
    if not prompts and within is None:
        assert drafts == wanted
    if within is None and drafts < wanted:  # drafts yielded to prompts, down to their share
        assert drafts >= int(limits.draft_share * min(wanted + unread, max(wanted, limits.prefill_rows)))
