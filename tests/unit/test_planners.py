"""Planners: which nodes are verified, against exhaustive search; drafters that must repay their time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from drafting import propose
from hypothesis import given
from hypothesis import strategies as st

from outpace.decoding.contracts import Market, Observation, Sequence
from outpace.decoding.drafters.benefit import Benefit
from outpace.decoding.drafters.merged import Merged
from outpace.decoding.drafters.ngram import Ngram
from outpace.decoding.methods import make_planner
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.planners.costs import StepCosts
from outpace.decoding.planners.fixed import Fixed
from outpace.decoding.planners.goodput import Goodput
from outpace.decoding.planners.planner import StepBudget, share_rows
from outpace.decoding.planners.tetris import Tetris
from outpace.decoding.sampling import certainty, distribution
from outpace.decoding.tree import expected_accepted, keep_best, reaches
from outpace.errors import MethodError
from outpace.registry import methods
from outpace.types import NO_PARENT, Accepted, Draft, SamplingParams


def table(seconds: list[float]) -> StepCosts:
    """Times of steps of 1, 2, ... rows, the same for every context."""
    return StepCosts(tuple(range(1, len(seconds) + 1)), (64,), np.array(seconds, dtype=np.float32)[:, None])


def tree(parents: list[int], scores: list[float]) -> Draft:
    n = len(parents)
    return Draft(
        np.arange(n, dtype=np.int64), np.array(parents, dtype=np.int64), ["x"] * n, np.array(scores, dtype=np.float32)
    )


@st.composite
def trees(draw: st.DrawFn, most: int = 6) -> Draft:
    n = draw(st.integers(0, most))
    parents = [draw(st.integers(NO_PARENT, i - 1)) for i in range(n)]
    return tree(parents, [draw(st.floats(0.01, 1.0)) for _ in range(n)])


def subtrees(drafts: list[Draft]) -> list[tuple[int, float]]:
    """(nodes, expected accepted tokens) of every choice of nodes that keeps ancestors."""
    found = []
    nodes = [(d, i) for d, draft in enumerate(drafts) for i in range(len(draft))]
    reach = [reaches(draft) for draft in drafts]
    for kept in itertools.product((False, True), repeat=len(nodes)):
        chosen = {node for node, keep in zip(nodes, kept, strict=True) if keep}
        if all(drafts[d].parents[i] < 0 or (d, int(drafts[d].parents[i])) in chosen for d, i in chosen):
            found.append((len(chosen), float(sum(reach[d][i] for d, i in chosen))))
    return found


@given(st.lists(trees(5), min_size=1, max_size=2), st.integers(0, 8))
def test_tetris_takes_the_best_nodes_of_the_batch(drafts: list[Draft], nodes: int) -> None:
    budget = StepBudget([len(d) for d in drafts], nodes, [10] * len(drafts))
    chosen = Tetris().choose(drafts, budget)
    assert sum(map(len, chosen)) <= nodes
    best = max(value for n, value in subtrees(drafts) if n <= nodes)
    assert sum(map(expected_accepted, chosen)) == pytest.approx(best, abs=1e-4)


@given(st.lists(trees(5), min_size=1, max_size=2), st.lists(st.floats(0.0, 0.5), min_size=13, max_size=13))
def test_goodput_takes_the_nodes_that_pay(drafts: list[Draft], added: list[float]) -> None:
    times = (1.0 + np.cumsum(added)).tolist()
    planner = Goodput(table(times))
    sequences = len(drafts)
    budget = StepBudget([len(d) for d in drafts], 13 - sequences, [10] * sequences)
    chosen = planner.choose(drafts, budget)
    possible = [(sequences + value, times[sequences - 1 + n]) for n, value in subtrees(drafts)]
    plain = sequences / times[sequences - 1]  # nothing was observed yet
    rate = max(plain, 0.8 * max(tokens / seconds for tokens, seconds in possible))
    best = max(tokens - rate * seconds for tokens, seconds in possible)
    tokens, nodes = sequences + sum(map(expected_accepted, chosen)), sum(map(len, chosen))
    assert tokens - rate * times[sequences - 1 + nodes] >= best - 0.01 * tokens - 1e-3


def test_goodput_is_plain_decoding_when_rows_cost_what_they_bring() -> None:
    draft = tree([NO_PARENT, 0, 1], [0.5, 0.5, 0.5])
    budget = StepBudget([3], 3, [10])
    assert len(Goodput(table([1.0, 2.0, 3.0, 4.0])).choose([draft], budget)[0]) == 0
    assert len(Goodput(table([1.0, 1.01, 1.02, 1.03])).choose([draft], budget)[0]) == 3


def test_goodput_keeps_its_floor_below_every_node_that_pays() -> None:
    planner = Goodput(table([1.0, 1.3, 1.31, 1.32, 1.6]))
    budget = StepBudget([4], 4, [10])
    budgets, market = planner.offer(budget)
    assert budgets == [4] and market.rate == pytest.approx(1.0)
    # Three nodes of probability p each cost 0.32: they pay from p = 0.1067 on, and no other number pays earlier.
    assert market.floor == pytest.approx(0.32 / 3, rel=1e-4)


def test_goodput_goes_by_what_the_engine_makes_of_a_second() -> None:
    planner = Goodput(table([1.0, 1.1, 1.2, 1.3]))
    draft = tree([NO_PARENT, NO_PARENT, NO_PARENT], [0.5, 0.3, 0.15])
    budget = StepBudget([3], 3, [10])
    assert len(planner.choose([draft], budget)[0]) == 3
    for _ in range(50):
        planner.observe(rows=1, context=10, tokens=2, draft_s=0.0, step_s=1.0)
    # Two tokens a second: a row of 0.1 s must bring 0.2.
    assert len(planner.choose([draft], budget)[0]) == 2
    assert any("50 steps" in line for line in planner.explain())


def test_goodput_learns_what_rows_cost_in_the_steps_that_are_run() -> None:
    """By the table the rows of a draft are free; in truth they cost a quarter of a step. All steps are disturbed."""
    planner = Goodput(table([1.0, 1.0, 1.0, 1.0]))
    draft, budget = tree([NO_PARENT, 0, 1], [0.05, 0.05, 0.05]), StepBudget([3], 3, [10])
    assert len(planner.choose([draft], budget)[0]) > 0
    noise = np.random.default_rng(0)
    for step in range(300):
        planner.offer(budget)
        rows, seconds = ((4, 1.25), (1, 1.0), (2, 1.2))[step % 3]
        disturbed = seconds * float(np.exp(noise.normal(0, 0.15))) * (5.0 if step % 50 == 0 else 1.0)
        planner.observe(rows=rows, context=10, tokens=1, draft_s=0.0, step_s=disturbed)
    assert 0.05 < planner.offer(budget)[1].floor < 0.12  # of a token: 0.2 for the first row, 0.25 for all three
    assert len(planner.choose([draft], budget)[0]) == 0
    assert planner.plain_seconds(1, 10) == pytest.approx(1.0, rel=0.25)


def test_a_table_of_a_busy_machine_is_found_out() -> None:
    """By the table a draft's rows cost three steps; in truth they are nearly free."""
    planner = Goodput(table([1.0, 4.0, 4.0, 4.0]))
    draft, budget = tree([NO_PARENT, 0, 1], [0.5, 0.5, 0.5]), StepBudget([3], 3, [10])
    chosen = []
    for _ in range(400):
        offered = draft if planner.offer(budget)[1].floor < 0.5 else Draft.empty()
        rows = 1 + len(planner.choose([offered], budget)[0])
        chosen.append(rows - 1)
        planner.observe(rows=rows, context=10, tokens=1, draft_s=0.0, step_s=1.0 + 0.01 * rows)
    assert sum(chosen[:16]) == 0 and all(chosen[-50:])
    planner.offer(budget)
    short = tree([NO_PARENT], [0.5])  # steps of two rows were never run, and cost no more than those of four
    assert len(planner.choose([short], budget)[0]) == 1


def test_more_rows_than_were_ever_run_are_as_much_cheaper() -> None:
    planner, budget = Goodput(table([1.0, *[4.0] * 7])), StepBudget([7], 7, [10])
    draft = tree([NO_PARENT, *range(6)], [0.5] * 7)
    planner.offer(budget)
    assert len(planner.choose([draft], budget)[0]) == 0
    for _ in range(100):
        planner.observe(rows=4, context=10, tokens=3, draft_s=0.0, step_s=1.0)
        planner.observe(rows=1, context=10, tokens=1, draft_s=0.0, step_s=1.0)
    assert len(planner.choose([draft], budget)[0]) > 3


def test_drafts_that_do_not_pay_are_tried_seldom() -> None:
    planner = Goodput(table([1.0, 1.1, 1.2, 1.3]))
    draft, budget = tree([NO_PARENT, 0, 1], [0.01, 0.01, 0.01]), StepBudget([3], 3, [10])
    tried = 0
    for _ in range(2000):
        planner.offer(budget)
        rows = 1 + len(planner.choose([draft], budget)[0])
        tried += rows > 1
        planner.observe(rows=rows, context=10, tokens=1, draft_s=0.0, step_s=1.0 + 0.1 * (rows - 1))
    assert 8 <= tried <= 18


def test_a_slower_machine_does_not_change_what_rows_cost_beside_a_step() -> None:
    planner, budget = Goodput(table([1.0, 1.1, 1.2, 1.3])), StepBudget([3], 3, [10])
    before = planner.offer(budget)[1].floor
    for _ in range(3000):
        planner.observe(rows=1, context=10, tokens=1, draft_s=0.0, step_s=1.7)
    planner.observe(rows=2, context=10, tokens=1, draft_s=0.0, step_s=1.7 * 1.1)  # else it tries what rows cost
    market = planner.offer(budget)[1]
    assert market.floor == pytest.approx(before, rel=1e-3) and market.rate == pytest.approx(1 / 1.7, rel=1e-3)
    planner.offer(StepBudget([3, 3], 6, [10, 10]))  # two sequences: other rows are plain decoding now
    assert planner.plain_seconds(2, 10) == pytest.approx(1.7 * 1.1, rel=1e-3)


def test_fixed_shares_fairly_and_keeps_all() -> None:
    budget = StepBudget([10, 2, 10], 12, [1, 1, 1])
    assert Fixed().offer(budget)[0] == [5, 2, 5]
    draft = tree([NO_PARENT], [0.1])
    assert Fixed().choose([draft], budget) == [draft]


@given(trees(8), st.integers(0, 8))
def test_kept_nodes_keep_parents_tokens_and_order(draft: Draft, count: int) -> None:
    kept = keep_best([draft], count, [reaches(draft)])[0]
    assert len(kept) == min(count, len(draft))
    paths = {tuple(_path(draft, i)) for i in range(len(draft))}
    assert {tuple(_path(kept, i)) for i in range(len(kept))} <= paths


def _path(draft: Draft, node: int) -> list[int]:
    path = []
    while node != NO_PARENT:
        path.append(int(draft.tokens[node]))
        node = int(draft.parents[node])
    return path[::-1]


def test_costs_are_monotone_and_go_on_beyond_the_table() -> None:
    costs = StepCosts((1, 4, 8), (64, 1024), np.array([[1.2, 2.0], [1.0, 2.2], [2.0, 4.0]], dtype=np.float32))
    curve = costs.curve(12, 64)
    assert (np.diff(curve) >= 0).all()
    assert curve[0] == pytest.approx(curve[3], rel=1e-3)  # the dearer single row was a disturbance
    assert curve[11] > curve[7]
    assert costs.step(8, 2000) > costs.step(8, 1024) > costs.step(8, 64)


# -- drafters that must repay their time ------------------------------------------------------------------------------


def run(benefit: Benefit, gain: float, steps: int, rate: float = 100.0, seconds: float = 0.001, id: int = 1) -> int:
    """How often a drafter is called that adds `gain` tokens at each call of `seconds`."""
    called, owed = 0, 0.0
    sequence = Sequence(id, [1, 2, 3], 3, SamplingParams())
    for _ in range(steps):
        if benefit.select([sequence], [0.0], rate):
            called += 1
            owed += gain
            benefit.record_call(seconds, [sequence], [tree([NO_PARENT], [0.5])])
            benefit.record_step(id, 0.0, int(owed), seconds)
            owed -= int(owed)
    return called


def test_a_drafter_that_never_gains_is_left_alone() -> None:
    benefit = Benefit()
    first = run(benefit, gain=0.0, steps=300)
    later = run(benefit, gain=0.0, steps=1000)
    assert first < 150
    assert later <= 1000 / 50  # tried now and then


def test_a_drafter_that_pays_is_always_called() -> None:
    assert run(Benefit(), gain=0.5, steps=500) == 500


def test_a_drafter_comes_back_when_the_text_changes() -> None:
    benefit = Benefit()
    run(benefit, gain=0.0, steps=600)
    assert run(benefit, gain=1.0, steps=600) > 300


def test_the_rate_decides() -> None:
    # 0.2 tokens for 1 ms: it pays at 100 tokens/s, not at 1,000.
    assert run(Benefit(), gain=0.2, steps=1000, rate=100.0) > 900
    assert run(Benefit(), gain=0.2, steps=1000, rate=1000.0) < 500


def test_a_costly_drafter_reads_no_text_that_the_target_is_not_certain_of() -> None:
    benefit, rate = Benefit(), 20.0
    run(benefit, gain=1.0, steps=20, rate=rate, seconds=0.02)  # a forward costs 0.4 tokens
    noise, text = (Sequence(id, [1, 2, 3], 3, SamplingParams()) for id in (2, 3))
    assert benefit.needs_certainty(2, rate) and not benefit.needs_certainty(1, rate)
    benefit.record_certainty(2, 0.05)
    benefit.record_certainty(3, 0.6)
    assert benefit.select([noise, text], [0.0, 0.0], rate) == [1]
    for _ in range(5):
        benefit.record_certainty(2, 0.9)
    assert benefit.select([noise], [0.0], rate) == [0], "it became certain"
    cheap = Benefit()
    run(cheap, gain=1.0, steps=20, rate=rate, seconds=0.0001)
    assert not cheap.needs_certainty(2, rate), "a cheap forward needs no certainty"


def test_certainty_is_looked_at_when_a_drafter_may_be_asked_and_no_more_often() -> None:
    """It costs a pass over the vocabulary for each row, so not in every step of a large batch."""
    benefit, rate = Benefit(), 20.0
    run(benefit, gain=1.0, steps=20, rate=rate, seconds=0.02)
    [text] = [Sequence(2, [1, 2, 3], 3, SamplingParams())]
    looked = 0
    for _ in range(64):
        for _ in range(3):  # steps in which nobody is asked
            if benefit.needs_certainty(2, rate):
                benefit.record_certainty(2, 0.05)
                looked += 1
        assert not benefit.select([text], [0.0], rate)
    assert 8 <= looked <= 16
    assert not benefit.needs_certainty(2, 10 * rate), "it costs more than it can ever gain"


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_no_token_is_drawn_more_often_than_the_certainty_says(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32) * 3
    params = SamplingParams(temperature=temperature)
    expected = distribution(logits, SamplingParams(temperature=temperature or 1.0)).max()
    assert certainty(logits, params) == pytest.approx(expected, rel=1e-5)


def test_merged_records_the_certainty_of_the_first_row() -> None:
    merged, sequence = Merged([Ngram()]), Sequence(0, [1, 2, 3], 3, SamplingParams())
    merged.begin(sequence)
    market, merged.benefits[0].forward_s = Market(rate=20.0), 0.01
    propose(merged, [sequence], [0], market)
    outputs = TargetOutputs.of(torch.tensor([[0.0, 0.0, 0.0, 0.0]]))
    merged.observe(sequence, Observation(Accepted([], [1]), Draft.empty(), outputs, "prefill"))
    sequence.tokens.append(1)
    merged.benefits[0]._bins[0].trials = 9
    assert merged.benefits[0]._records[0].certainty == pytest.approx(0.25)
    assert propose(merged, [sequence], [4], market)[0].tokens.size, "0.25 is more than 0.2"
    merged.benefits[0].forward_s = 0.02
    merged.benefits[0]._records[0].prefilled = False
    assert not propose(merged, [sequence], [4], market)[0].tokens.size


def test_a_sequence_does_not_pay_for_another() -> None:
    benefit = Benefit()
    for _ in range(40):
        run(benefit, gain=1.0, steps=5, id=1)
        run(benefit, gain=0.0, steps=5, id=2, rate=500.0)
    assert run(benefit, gain=1.0, steps=100, id=1, rate=500.0) > 90
    assert run(benefit, gain=0.0, steps=100, id=2, rate=500.0) < 60


def test_a_skipped_drafter_is_neither_called_nor_shown_anything() -> None:
    ngram = Ngram()
    merged = Merged([ngram])
    sequence = Sequence(0, [1, 2, 3, 1, 2, 3, 1, 2], 8, SamplingParams())
    merged.begin(sequence)
    market = Market(rate=1.0)
    assert len(propose(merged, [sequence], [9], market)[0]) == 9  # a trial
    for _ in range(3):
        merged.benefits[0].record_step(0, 0.0, 0, seconds=5.0)
    assert len(propose(merged, [sequence], [9], market)[0]) == 0
    assert merged.taps.topk == 0
    sequence.tokens += [3, 1]
    for _ in range(9):
        merged.benefits[0].record_step(0, 0.0, 500, seconds=5.0)
    draft = propose(merged, [sequence], [4], market)[0]
    assert draft.tokens.tolist() == [2, 3, 1, 2], "it must catch up with what it was not shown"


def test_planners_are_registered_and_named() -> None:
    assert {m.name for m in methods("planner")} == {"fixed", "goodput", "tetris"}
    assert isinstance(make_planner("goodput", lambda: table([1.0, 1.1])), Goodput)
    with pytest.raises(MethodError, match="fixed, goodput, tetris"):
        make_planner("best", lambda: table([1.0, 1.1]))


@given(st.integers(-5, 60), st.lists(st.integers(-1, 40), max_size=12))
def test_rows_are_shared_fairly(available: int, caps: list[int]) -> None:
    shares = share_rows(available, caps)
    assert all(0 <= s <= max(0, c) for s, c in zip(shares, caps, strict=True))
    assert sum(shares) == min(max(0, available), sum(max(0, c) for c in caps))
    below_cap = [s for s, c in zip(shares, caps, strict=True) if s < c]
    if below_cap:  # who could use more has, but for one row, at least what anyone has
        assert max(shares) - min(below_cap) <= 1
