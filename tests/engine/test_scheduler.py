"""Who runs when: each rule by itself, and everything together in thousands of simulated steps."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import Simulator, limits

from outpace.engine.jobs import Job

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
            step_s=step_s,
            ageing_s=ageing_s,
            swap_pages=swap_pages,
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
