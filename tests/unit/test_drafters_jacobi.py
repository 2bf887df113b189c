"""Drafters that iterate on the target's answers: Jacobi, lookahead and rescoring, step by step on small targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from drafting import propose

from outpace.decoding.contracts import Drafter, DrafterContext, Observation, Proposal, Sequence
from outpace.decoding.drafters.jacobi import Jacobi
from outpace.decoding.drafters.lookahead import Lookahead
from outpace.decoding.drafters.merged import Merged
from outpace.decoding.drafters.recycling import Recycling
from outpace.decoding.drafters.rescored import NgramModel, Rescored, lattice_of
from outpace.decoding.methods import make_drafter
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import sample
from outpace.decoding.tree import check_draft, path_to
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.errors import MethodError, ParameterError
from outpace.types import NO_PARENT, Draft, SamplingParams

V = 30
Target = Callable[[list[int]], np.ndarray]


def counting(tokens: list[int]) -> np.ndarray:
    """Says the number after the last one."""
    return np.eye(V, dtype=np.float32)[(tokens[-1] + 1) % V] * 9


def by_position(tokens: list[int]) -> np.ndarray:
    """Says something that depends on the position alone: one iteration settles every guess."""
    return (np.random.default_rng(len(tokens)).standard_normal(V) * 3).astype(np.float32)


def by_last_two(tokens: list[int]) -> np.ndarray:
    return (np.random.default_rng(tokens[-2:]).standard_normal(V) * 3).astype(np.float32)


def step(drafter: Drafter, sequence: Sequence, target: Target, budget: int) -> Draft:
    [draft] = propose(drafter, [sequence], [budget])
    check_draft(draft, budget, V)
    commit(drafter, sequence, target, draft)
    return draft


def commit(drafter: Drafter, sequence: Sequence, target: Target, draft: Draft) -> None:
    paths = [[], *(draft.tokens[path_to(draft.parents, node)].tolist() for node in range(len(draft)))]
    outputs = TargetOutputs.of(torch.from_numpy(np.stack([target(sequence.tokens + path) for path in paths])))
    accepted = CoupledVerifier().verify(sequence, draft, outputs)
    sequence.tokens += accepted.tokens
    drafter.observe(sequence, Observation(accepted, draft, outputs))


def begin(drafter: Drafter, prompt: list[int], **params: float) -> Sequence:
    sequence = Sequence(0, list(prompt), len(prompt), SamplingParams(**params))  # type: ignore[arg-type]
    drafter.begin(sequence)
    return sequence


# -- Jacobi --------------------------------------------------------------------------------------------------


def test_the_answers_are_the_next_guesses() -> None:
    drafter = Jacobi(V, window=4)
    sequence = begin(drafter, [5, 20])
    assert step(drafter, sequence, counting, 8).tokens.tolist() == [5, 20, 5, 20]
    assert sequence.tokens[2:] == [21]
    # answers after 5, 20, 5, 20: the guesses from position 3 on
    assert step(drafter, sequence, counting, 8).tokens.tolist() == [6, 21, 6, 21]
    assert step(drafter, sequence, counting, 8).tokens.tolist() == [7, 22, 7, 22]
    assert sequence.tokens == [5, 20, 21, 22, 23]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_iteration_settles_what_depends_on_the_position_alone(temperature: float) -> None:
    """Where the target samples, the guess is its coupled draw."""
    drafter = Jacobi(V, window=6)
    sequence = begin(drafter, [1, 2, 3], temperature=temperature, seed=4)
    for _ in range(8):
        step(drafter, sequence, by_position, 6)
    assert len(sequence.output) > 8 * 3  # a window is guessed anew when all of it was right: every other step
    for position in range(3, len(sequence.tokens)):
        expected = sample(by_position(sequence.tokens[:position]), sequence.params, None, position)
        assert sequence.tokens[position] == expected


def test_penalties_count_what_is_guessed_before_a_position() -> None:
    """The favourite loses to the second choice once it was said, and a guess of it counts as said."""
    logits = np.zeros(V, dtype=np.float32)
    logits[[29, 4]] = 3, 2
    drafter = Jacobi(V, window=3)
    sequence = begin(drafter, [29], frequency_penalty=2.0)
    assert step(drafter, sequence, lambda tokens: logits, 3).tokens.tolist() == [29, 29, 29]
    assert sequence.output == [29, 4]
    assert [g.token for g in drafter._states[0].guesses] == [4, 4]


def test_gauss_seidel_finishes_a_block_before_the_next() -> None:
    drafter = Jacobi(V, form="gauss-seidel", window=5)
    sequence = begin(drafter, [1, 2, 3])
    sizes, ends = [], set()
    for _ in range(12):
        start = len(sequence.tokens)
        draft = step(drafter, sequence, by_last_two, 8)
        sizes.append(len(draft))
        ends.add(start + len(draft))
    assert max(sizes) == 5 and min(sizes) < 5
    # every draft ends where some block does
    blocks = [b for _, b in itertools.pairwise(sizes) if b == 5]
    assert len(ends) == len(blocks) + (sizes[0] == 5)


def test_hybrid_decodes_plainly_after_its_parallel_part() -> None:
    drafter = Jacobi(V, form="hybrid", window=4, parallel=6)
    sequence = begin(drafter, [1, 2, 3])
    while len(sequence.output) < 20:
        draft = step(drafter, sequence, by_last_two, 8)
    assert len(draft) == 0 and len(propose(drafter, [sequence], [8])[0]) == 0


def test_random_starts_are_the_sequence_s_own_and_do_not_change() -> None:
    drafts = []
    for seed in (1, 1, 2):
        drafter = Jacobi(V, window=8, start="random")
        drafts.append(propose(drafter, [begin(drafter, [1], seed=seed)], [8])[0].tokens.tolist())
    assert drafts[0] == drafts[1] != drafts[2]


def test_guesses_are_found_in_a_merged_draft_and_kept_where_they_were_left_out() -> None:
    jacobi = Jacobi(V, window=4)
    sequence = begin(jacobi, [5, 20])
    [own] = propose(jacobi, [sequence], [4])
    verified = Draft(np.array([9, 5, 20]), np.array([NO_PARENT, NO_PARENT, 1]), ["x"] * 3)  # half of it, elsewhere
    assert own.tokens.tolist() == [5, 20, 5, 20]
    commit(jacobi, sequence, counting, verified)
    assert [g.token for g in jacobi._states[0].guesses] == [6, 21, 20]


def test_scores_are_measured() -> None:
    drafter = Jacobi(V, window=6)
    sequence = begin(drafter, [1, 2, 3])
    before = drafter._rates.value.copy()
    for _ in range(40):
        step(drafter, sequence, by_position, 6)
    assert (drafter._rates.value[:6, 0] > before[:6, 0] + 0.2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "gauss"}, "jacobi, gauss-seidel, hybrid"),
        ({"start": "x"}, "prompt, random"),
        ({"window": 0}, "window=0"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Jacobi(V, **options)  # type: ignore[arg-type]


# -- lookahead -----------------------------------------------------------------------------------------------


def test_the_two_branches_share_a_step() -> None:
    drafter = Lookahead(window=3, ngram=3, guesses=2)
    sequence = begin(drafter, [7, 1, 2, 7, 3, 4, 7])
    [draft] = propose(drafter, [sequence], [15])
    check_draft(draft, 15, V)
    roots = draft.tokens[draft.parents == NO_PARENT].tolist()
    assert roots[:2] == [3, 1]  # the pool's n-grams after 7, the youngest first
    state = drafter._states[0]
    node = NO_PARENT
    for column, end in zip(state.window, state.ends, strict=True):
        path = draft.tokens[path_to(draft.parents, end)].tolist()
        assert path[-2:] == column  # a column hangs on the chain of the oldest guesses
        assert len(path) == state.window.index(column) + 2 or column in state.window[:-1]
        node = end
    assert node != NO_PARENT


def test_an_answer_makes_an_ngram_for_the_pool() -> None:
    drafter = Lookahead(window=2, ngram=3, from_text=False)
    sequence = begin(drafter, [5, 20])
    columns = [list(column) for column in drafter._states[0].window]
    step(drafter, sequence, counting, 15)
    state = drafter._states[0]
    for old, new in zip(columns, state.window, strict=True):
        answer = old[1] + 1
        assert new == [old[1], answer]
        assert (old[1], answer) in state.pool[old[0]]


def test_lookahead_harvests_what_no_text_has_shown() -> None:
    """A target that counts: after a few steps the columns count too, ahead of the text."""
    drafter = Lookahead(window=5, ngram=4, from_text=False)
    sequence = begin(drafter, [0, 9, 18, 27, 4, 13])
    steps = 0
    while len(sequence.output) < 60:
        step(drafter, sequence, counting, 31)
        steps += 1
    assert 60 / steps > 1.8
    assert all(len(known) <= 5 for known in drafter._states[0].pool.values())


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 6, 15])
def test_lookahead_keeps_its_budget(budget: int) -> None:
    drafter = Lookahead()
    sequence = begin(drafter, [7, 1, 2, 7, 3, 4, 7, 5, 6, 7])
    for _ in range(6):
        step(drafter, sequence, by_last_two, budget)


# -- rescored ------------------------------------------------------------------------------------------------


def test_the_ngram_model_is_a_distribution_that_interpolates() -> None:
    model = NgramModel(3, V)
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 5]
    model.extend(text[:4])
    model.extend(text)
    for before in ([1, 2], [9, 2], [9, 9], [5], []):
        assert sum(model.probabilities(before, range(V))) == pytest.approx(1)
    three, four, six = model.probabilities([1, 2], [3, 4, 6])
    assert three > four > six > 0
    # by hand, Witten-Bell: c = 3 and d = 2 after (1, 2) and after (2), c = 10 and d = 5 for no context
    unigram = (2 + 5 / V) / 15
    bigram = (2 + 2 * unigram) / 5
    assert three == pytest.approx((2 + 2 * bigram) / 5)


def test_a_tree_is_cut_into_columns() -> None:
    draft = Draft(
        np.array([1, 2, 3, 3, 4]),
        np.array([-1, -1, 0, 1, 0]),
        ["x"] * 5,
        np.array([0.6, 0.2, 0.5, 1, 0.25], np.float32),
    )
    first, second = lattice_of(draft)
    assert first == pytest.approx({1: 0.75, 2: 0.25})
    assert second == pytest.approx({3: 0.3 / 0.45, 4: 0.15 / 0.45})


def test_rescoring_prefers_the_way_that_the_text_knows() -> None:
    """The lattice says 1 2, but in the text 1 goes before 3 again and again."""

    class Tree(Recycling):
        def propose(self, sequences: object, budgets: object, market: object) -> Proposal:  # type: ignore[override]
            scores = np.array([0.9, 0.5, 0.45], np.float32)
            return Proposal([Draft(np.array([1, 2, 3]), np.array([-1, 0, 0]), ["x"] * 3, scores)])

    text = [1, 3, 5, 1, 3, 6, 1, 3, 7, 0]
    for weight, second in ((0.0, 2), (0.7, 3)):
        drafter = Rescored(V, Tree(V), weight=weight)
        sequence = begin(drafter, text)
        [draft] = propose(drafter, [sequence], [2])
        assert draft.tokens.tolist() == [1, second] and draft.sources == ["rescored"] * 2


def test_the_best_way_through_jacobi_s_lattice_is_its_next_guess() -> None:
    drafter = Rescored(V, Jacobi(V, window=4), k=3)
    sequence = begin(drafter, [1, 2, 1, 2, 1, 3])
    for _ in range(8):
        [draft] = propose(drafter, [sequence], [12])
        inner = drafter.inner._states[0]  # type: ignore[attr-defined]
        assert draft.tokens[:4].tolist() == [g.token for g in inner.guesses]
        assert draft.parents[:4].tolist() == [NO_PARENT, 0, 1, 2]
        commit(drafter, sequence, by_last_two, draft)
        assert all(g.lattice is not None and len(g.lattice[0]) == 3 for g in inner.guesses)
    assert drafter.taps.topk == 3


def test_rescored_settles_what_depends_on_the_position_alone() -> None:
    drafter = Rescored(V, Jacobi(V, window=6), weight=0.2)
    sequence = begin(drafter, [1, 2, 3])
    for _ in range(10):
        step(drafter, sequence, by_position, 12)
    assert len(sequence.output) / 10 > 3


def test_the_base_of_rescored_is_a_drafter_that_can_be_had() -> None:
    context = DrafterContext(vocab_size=V)
    made = make_drafter("rescored:base=suffix,weight=0.3", context)
    assert isinstance(made, Rescored) and made.inner.name == "suffix"
    with pytest.raises(ParameterError, match="no lattice"):
        make_drafter("rescored:base=plain", context)
    with pytest.raises(MethodError, match="no drafter 'nobody'"):
        make_drafter("rescored:base=nobody", context)
    with pytest.raises(MethodError, match="draft model"):
        make_drafter("rescored:base=draft", context)


def test_they_join_others() -> None:
    merged = make_drafter("jacobi+lookahead+recycling", DrafterContext(vocab_size=V))
    assert isinstance(merged, Merged)
    sequence = begin(merged, [1, 2, 3, 1, 2])
    for _ in range(20):
        step(merged, sequence, by_last_two, 10)
    expected = [1, 2, 3, 1, 2]
    while len(expected) < len(sequence.tokens):
        expected.append(int(by_last_two(expected).argmax()))
    assert sequence.tokens == expected
