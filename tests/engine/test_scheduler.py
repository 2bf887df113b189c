"""Who runs when: each rule by itself, and everything together in thousands of simulated steps."""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from scheduling import Simulator, limits

from outpace.engine.jobs import Job, Preempt, Start, StepPlan
from outpace.errors import CapacityError, ParameterError, QueueFull

WORK = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt
        st.integers(1, 40),  # max_tokens
        st.integers(1, 40),  # output
        st.sampled_from("ab"),
        st.integers(-2, 2),  # priority
        st.sampled_from([None, None, "g", "h"]),
        st.integers(0, 30),  # common beginning
        st.integers(0, 12),  # steps before the next arrives
        st.booleans(),  # whether some job is cancelled then
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(
    WORK,
    st.integers(20, 60),
    st.integers(1, 6),
    st.integers(1, 40),
    st.sampled_from([None, 0.02, 0.1]),
    st.sampled_from([None, 0.05, 1.0]),
    st.sampled_from([0, 12, 1000]),
    st.sampled_from(["no", "yes", "shortest"]),
    st.randoms(use_true_random=False),
)
def test_everything_finishes(
    work, num_pages, max_batch, prefill_rows, step_s, ageing_s, swap_pages, predict, rng
) -> None:
    simulator = Simulator(
        limits(
            num_pages=num_pages,
            max_batch=max_batch,
            prefill_rows=prefill_rows,
            max_step_s=step_s,
            ageing_s=ageing_s,
            swap_tokens=4 * swap_pages,
            swap_least=2,
            max_rows=5,
            max_step_rows=12,
            headroom=4,
            least_chunk=3,
            shortest_first=predict == "shortest",
        ),
        step_seconds=None if step_s is None else lambda rows, context: 0.001 * rows + 0.01,
        predict=None if predict == "no" else lambda job: rng.randint(1, 60),
        seed=rng.randint(0, 1000),
    )
    cancelled = set()
    for id, (prompt, most, output, owner, priority, group, common, pause, cancel) in enumerate(work):
        simulator.add(Job(id, prompt, most, owner, priority, group), output, min(common, prompt))
        for _ in range(pause):
            if not simulator.scheduler.idle:
                simulator.step()
        if cancel:
            gone = rng.randint(0, id)
            if gone not in simulator.done:
                cancelled.add(gone)
            simulator.cancel(gone)
    simulator.run()
    assert sorted(simulator.done) == sorted(set(range(len(work))) - cancelled)
    assert simulator.memory.available_pages == num_pages and not simulator.host


@settings(max_examples=60, deadline=None)
@given(WORK, st.integers(20, 400), st.integers(1, 8), st.integers(1, 40), st.integers(0, 1000))
def test_plans_do_not_depend_on_whether_pages_were_asked_for(work, num_pages, max_batch, prefill_rows, seed) -> None:
    """Where there are pages for all that a step can take, the scheduler asks nobody."""
    found, ample = [], []
    for always in (False, True):
        simulator = Simulator(
            limits(num_pages=num_pages, max_batch=max_batch, prefill_rows=prefill_rows, max_rows=5, max_step_rows=12),
            seed=seed,
        )
        if always:
            simulator.scheduler._most_pages = lambda: num_pages + 1  # type: ignore[method-assign]
        for id, (prompt, most, output, owner, priority, group, common, pause, _) in enumerate(work):
            simulator.add(Job(id, prompt, most, owner, priority, group), output, min(common, prompt))
            for _ in range(pause):
                if not simulator.scheduler.idle:
                    simulator.step()
                    ample.append(simulator.scheduler._ample)
        simulator.run()
        found.append((simulator.plans, simulator.done))
        assert not always or not simulator.scheduler._ample
    assert found[0] == found[1]
    event(f"ample: {any(ample)}")


def plans_of(simulator: Simulator, steps: int) -> list[StepPlan]:
    return [simulator.step() for _ in range(steps)]


def chunk_rows(plan: StepPlan) -> int:
    return sum(rows for _, rows in plan.chunks)


def cost(rows: int, context: float) -> float:
    return 0.010 + 0.001 * rows


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch": 0},
        {"num_pages": 0},
        {"prefill_rows": 0},
        {"max_queue": 0},
        {"max_step_s": 0.0},
        {"max_step_s": math.nan},
        {"draft_share": 1.5},
        {"ageing_s": -1.0},
        {"headroom": -1},
        {"swap_tokens": -1},
        {"least_chunk": 0},
    ],
)
def test_limits_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        limits(**wrong)


def test_limits_that_need_more() -> None:
    with pytest.raises(ParameterError, match="step_seconds"):
        Simulator(limits(max_step_s=0.1))
    with pytest.raises(ParameterError, match="predict"):
        Simulator(limits(shortest_first=True))


def test_what_could_never_run_is_refused() -> None:
    simulator = Simulator(limits(num_pages=10, max_position=60))
    with pytest.raises(CapacityError, match="use max_tokens of at most 10"):
        simulator.add(Job(0, 50, 11))
    with pytest.raises(CapacityError, match=r"shorten the prompt$"):
        simulator.add(Job(0, 60, 1))
    with pytest.raises(CapacityError, match="KV cache holds 40 tokens"):
        simulator.add(Job(0, 40, 1))
    assert simulator.scheduler.idle
    simulator.add(Job(0, 39, 1))
    simulator.run()


def test_a_full_queue_says_when_to_come_back() -> None:
    simulator = Simulator(limits(max_queue=2, max_batch=1), step_seconds=lambda rows, context: 3.0)
    simulator.add(Job(0, 4, 2))
    simulator.add(Job(1, 4, 2))
    with pytest.raises(QueueFull) as full:
        simulator.add(Job(2, 4, 2))
    assert full.value.retry_after_s == 1.0  # nothing ran yet
    simulator.step()  # job 0 starts: one place
    for id in range(3, 8):
        simulator.add(Job(id, 4, 2))
        with pytest.raises(QueueFull) as full:
            simulator.add(Job(100, 4, 2))
        simulator.step()
        simulator.step()
    assert full.value.retry_after_s == pytest.approx(6.0, rel=0.5)  # two steps a job
    assert simulator.scheduler.stats.refused == 6
    simulator.run()
    assert simulator.done == [0, 1, 3, 4, 5, 6, 7]


def test_decodes_are_in_every_step_and_chunks_keep_to_the_time() -> None:
    simulator = Simulator(limits(max_step_s=0.0601, prefill_rows=200, least_chunk=8), step_seconds=cost)
    simulator.add(Job(0, 4, 100, max_draft=0))
    simulator.step()
    simulator.add(Job(1, 200, 4))
    plan = simulator.step()
    assert plan.decoding == [0] and plan.chunks == [(1, 49)]  # 50 rows take 0.060 s
    simulator.cancel(0)
    assert chunk_rows(simulator.step()) == 151, "nobody waits for a token"


def test_prompts_are_read_on_however_short_the_time() -> None:
    simulator = Simulator(limits(max_step_s=0.001, least_chunk=8), step_seconds=cost)
    simulator.add(Job(0, 4, 100))
    simulator.step()
    simulator.add(Job(1, 20, 4))
    assert [chunk_rows(p) for p in plans_of(simulator, 3)] == [8, 8, 4]
    assert all(p.decoding[0] == 0 and p.draft_rows == 0 for p in simulator.plans[1:])


def test_drafts_get_what_chunks_leave_and_at_least_their_share() -> None:
    simulator = Simulator(limits(max_step_s=0.0511, draft_share=0.25, max_rows=33, max_step_rows=33), step_seconds=cost)
    simulator.add(Job(0, 4, 200))
    simulator.step()
    assert simulator.step().draft_rows == 32, "nobody reads: the limit is that of the rows"
    simulator.add(Job(1, 55, 4, max_draft=0))
    plan = simulator.step()
    assert (plan.draft_rows, chunk_rows(plan)) == (10, 30)  # of 41 rows in 0.051 s one is the sequence's own
    plan = simulator.step()
    assert (plan.draft_rows, chunk_rows(plan)) == (15, 25)


def test_drafts_stay_within_what_can_be_emitted_and_what_was_asked() -> None:
    simulator = Simulator(limits(max_rows=8))
    simulator.add(Job(0, 4, 3))
    simulator.add(Job(1, 4, 30, max_draft=2))
    simulator.add(Job(2, 4, 30))
    simulator.step()
    plan = simulator.step()
    assert plan.caps == {0: 1, 1: 2, 2: 7} and plan.draft_rows == 10


def test_drafts_go_before_anybody_is_preempted() -> None:
    simulator = Simulator(limits(num_pages=8, headroom=0, max_rows=9))
    simulator.add(Job(0, 11, 20))
    simulator.add(Job(1, 11, 20))
    simulator.step()
    plan = simulator.step()  # 3 pages each are full but for one place, 2 are free
    assert not plan.preempt and plan.decoding == [0, 1]
    assert sum(plan.caps.values()) <= 8 and plan.caps[0] > plan.caps[1]


def fill(swap_pages: int = 0) -> tuple[Simulator, StepPlan]:
    """Two jobs outgrow the memory: the plan in which one gives way."""
    simulator = Simulator(limits(num_pages=8, headroom=2, swap_tokens=4 * swap_pages, swap_least=2))
    for id in range(2):
        simulator.add(Job(id, 12, 18, max_draft=0))
    while not (plan := simulator.step()).preempt:
        pass
    return simulator, plan


def test_the_last_come_gives_way_and_reads_again_what_it_had() -> None:
    simulator, plan = fill()
    assert plan.preempt == [Preempt(1, "recompute")] and plan.decoding == [0]
    job = simulator.scheduler.job(1)
    had = job.generated
    assert had > 0 and job.target == 12 + had and job.read == 0
    simulator.run()
    stats = simulator.scheduler.stats
    assert simulator.done == [0, 1] and stats.generated_tokens == 36 and stats.recomputed == 1
    assert stats.finished == 2 and stats.started == 2
    assert stats.reread_tokens == 12 + had


def test_swapped_jobs_read_nothing_again() -> None:
    simulator, plan = fill(swap_pages=100)
    assert plan.preempt == [Preempt(1, "swap")]
    simulator.run()
    assert simulator.scheduler.stats.read_tokens == 24 and simulator.scheduler.stats.swapped == 1


def test_the_host_has_an_end() -> None:
    simulator, plan = fill(swap_pages=2)
    assert plan.preempt == [Preempt(1, "recompute")]
    pages = simulator.limits.pages(simulator.scheduler.job(1).target - 1)  # that it held when it gave way
    assert fill(swap_pages=pages)[1].preempt == [Preempt(1, "swap")], "they fit to the last one"
    assert fill(swap_pages=pages - 1)[1].preempt == [Preempt(1, "recompute")]


def test_a_job_that_fails_to_come_back_leaves_nothing() -> None:
    simulator, _ = fill(swap_pages=100)
    simulator.cancel(0)
    assert simulator.scheduler.admit() == [Start(1, True, True)]
    simulator.scheduler.finished(1)
    simulator.scheduler.check_integrity()
    assert simulator.scheduler.idle and simulator.scheduler.plan().empty


def test_admission_leaves_room_to_grow() -> None:
    simulator = Simulator(limits(num_pages=10, headroom=8))
    simulator.add(Job(0, 12, 20))
    simulator.add(Job(1, 12, 20))  # 3 pages of prompt would fit, with 2 more for each to grow they do: 10
    simulator.add(Job(2, 1, 1))
    simulator.step()
    assert simulator.begun == [0, 1]
    roomy = Simulator(limits(num_pages=10, headroom=9))
    roomy.add(Job(0, 12, 20))
    roomy.add(Job(1, 12, 28))
    roomy.step()
    assert roomy.begun == [0, 1]
    tight = Simulator(limits(num_pages=10, headroom=10))
    tight.add(Job(0, 12, 28))
    tight.add(Job(1, 12, 28))
    tight.step()
    assert tight.begun == [0]


def test_higher_priority_starts_first_and_displaces_lower() -> None:
    simulator = Simulator(limits(max_batch=1, ageing_s=None))
    simulator.add(Job(0, 4, 50, priority=3))
    simulator.step()
    simulator.add(Job(1, 4, 5, priority=1))
    simulator.add(Job(2, 4, 5, priority=0))
    plan = simulator.step()
    assert plan.preempt == [Preempt(0, "recompute")]
    simulator.run()
    assert simulator.done == [2, 1, 0]


def test_equals_are_never_displaced() -> None:
    simulator = Simulator(limits(max_batch=1, ageing_s=0.01), step_seconds=lambda rows, context: 1.0)
    simulator.add(Job(0, 4, 50, max_draft=0))
    simulator.step()
    simulator.add(Job(1, 4, 5))
    simulator.run()
    assert simulator.done == [0, 1] and not any(p.preempt for p in simulator.plans)


def test_who_aged_does_not_displace_its_equals() -> None:
    simulator = Simulator(limits(max_batch=2, ageing_s=0.01), step_seconds=lambda rows, context: 1.0)
    simulator.add(Job(0, 4, 30, priority=3, max_draft=0))
    simulator.add(Job(1, 4, 30, priority=0, max_draft=0))
    simulator.add(Job(2, 4, 5, priority=3))
    simulator.run()
    assert sorted(simulator.done[:2]) == [0, 1] and not any(p.preempt for p in simulator.plans)


def test_waiting_raises_the_priority() -> None:
    """A stream of high-priority jobs that never ends; one of low priority that is not displaced once its time came."""

    def steps(ageing_s: float | None) -> int:
        simulator = Simulator(limits(max_batch=1, ageing_s=ageing_s), step_seconds=lambda rows, context: 1.0)
        simulator.add(Job(0, 4, 10, priority=2, max_draft=0))
        id = 0
        while 0 not in simulator.done and len(simulator.plans) < 300:
            if simulator.scheduler.stats.waiting < 2:
                id += 1
                simulator.add(Job(id, 4, 2, "other"))
            simulator.step()
        return len(simulator.plans)

    assert steps(None) == 300
    assert steps(5.0) < 60


def test_turns_are_fair_between_owners() -> None:
    """Backlogged owners differ by no more than one admission can bring, as VTC shows."""
    simulator = Simulator(limits(max_batch=3, num_pages=1000))
    for id in range(60):
        simulator.add(Job(id, 40, 40, "talkative", max_draft=0))
    for id in range(60, 200):
        simulator.add(Job(id, 5, 8, "brief", max_draft=0))
    for _ in range(400):
        simulator.step()
        served = [simulator.scheduler.served(owner) for owner in ("talkative", "brief")]
        assert abs(served[0] - served[1]) <= 2 * max(40, 2 * 3 * 80)
    assert {simulator.scheduler.job(id).owner for id in range(200) if id not in simulator.done} == {
        "talkative",
        "brief",
    }
    assert min(served) > 1000
    for name, ids in (("talkative", range(60)), ("brief", range(60, 200))):
        begun = [id for id in simulator.begun if id in ids]
        assert begun == sorted(begun), f"nobody overtakes within {name}"


def test_idleness_is_no_credit() -> None:
    simulator = Simulator(limits(max_batch=1))
    for id in range(20):
        simulator.add(Job(id, 10, 10, "early"))
    while len(simulator.done) < 10:
        simulator.step()
    for id in range(20, 40):
        simulator.add(Job(id, 10, 10, "late"))
    assert simulator.scheduler.served("late") == simulator.scheduler.served("early") > 0
    while len(simulator.done) < 20:
        simulator.step()
    assert 4 <= sum(id >= 20 for id in simulator.done) <= 6


def test_a_group_is_read_once() -> None:
    simulator = Simulator(limits(prefill_rows=16, num_pages=200))
    for id in range(4):
        simulator.add(Job(id, 40, 20, group="g"), common=32)
    simulator.add(Job(9, 5, 5))
    simulator.step()
    assert simulator.begun == [0, 9], "others go past a group that waits"
    simulator.run()
    assert simulator.begun == [0, 9, 1, 2, 3]
    assert simulator.scheduler.stats.read_tokens == 5 + 40 + 3 * 8
    assert simulator.scheduler.served("") == 0, "nobody is left, nothing is remembered"


def test_a_group_whose_first_is_cancelled_goes_on() -> None:
    simulator = Simulator(limits(prefill_rows=8))
    for id in range(3):
        simulator.add(Job(id, 40, 4, group="g"), common=32)
    simulator.step()
    simulator.cancel(0)
    simulator.step()
    assert simulator.begun == [0, 1]
    simulator.run()
    assert simulator.done == [1, 2]


def test_pages_that_running_jobs_share_cost_nothing_more() -> None:
    simulator = Simulator(limits(num_pages=18, headroom=4))
    for id in range(5):
        simulator.add(Job(id, 40, 8, group="g"), common=36)
    plans_of(simulator, 2)
    assert simulator.begun == [0, 1, 2, 3], "9 pages in common and 2 more for each"


def test_whoever_cannot_copy_a_cached_page_starts_without_it() -> None:
    """The whole memory is one job's, whose last cached page is shared with the prefix cache: nothing to copy it to."""
    simulator = Simulator(limits(num_pages=10))
    simulator.add(Job(0, 39, 1, group="g"), common=38)
    simulator.add(Job(1, 39, 1, group="g"), common=38)
    simulator.run(20)
    assert simulator.done == [0, 1]
    assert [p.preempt for p in simulator.plans if p.preempt] == [[Preempt(1, "recompute")]]


def test_predicted_lengths_admit_more_and_double_when_they_fail() -> None:
    simulator = Simulator(limits(num_pages=20, headroom=1000), predict=lambda job: 4)
    for id in range(4):
        simulator.add(Job(id, 12, 60, max_draft=0), output=20 if id else 50)
    simulator.step()
    assert simulator.begun == [0, 1, 2, 3], "by the worst case only one fits"
    simulator.run()
    stats = simulator.scheduler.stats
    assert sorted(simulator.done) == [0, 1, 2, 3] and stats.mispredicted >= 8 and stats.recomputed > 0
    cautious = Simulator(limits(num_pages=20, headroom=1000))
    for id in range(4):
        cautious.add(Job(id, 12, 60), output=20)
    cautious.step()
    assert cautious.begun == [0]


def test_shortest_first() -> None:
    simulator = Simulator(limits(max_batch=1, shortest_first=True), predict=lambda job: job.max_tokens)
    for id, length in enumerate((30, 20, 10, 20)):
        simulator.add(Job(id, 4, length))
    simulator.run()
    assert simulator.done == [2, 1, 3, 0]


def test_what_was_cached_is_not_charged() -> None:
    simulator = Simulator(limits(num_pages=200))
    simulator.add(Job(0, 40, 50, group="g", max_draft=0), common=32)
    simulator.step()
    before = simulator.scheduler.served("")
    simulator.add(Job(1, 40, 50, group="g", max_draft=0), common=32)
    simulator.step()
    assert simulator.scheduler.served("") - before == 8 + 2 + 2


def test_a_step_is_planned_quickly() -> None:
    """Planning is nothing beside a step, with many waiting."""
    simulator = Simulator(limits(num_pages=10_000, max_batch=32))
    for id in range(3000):
        simulator.add(Job(id, 20, 20, f"owner {id % 20}"))
    scheduler = simulator.scheduler
    began = perf_counter()
    for start in scheduler.admit():
        simulator.memory.pages[start.id], simulator.memory.length[start.id] = [], 0
        scheduler.started(start.id, 0)
    scheduler.plan()
    assert perf_counter() - began < 0.5
