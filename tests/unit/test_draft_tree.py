"""Trees grown by a draft model's own probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from drafting import PARAMS, FakeDecoder, V, logits_of, plain, propose, step

from outpace.decoding.contracts import Sequence
from outpace.decoding.drafters.draft_tree import DraftTree
from outpace.decoding.drafters.sources import ModelSource
from outpace.decoding.sampling import distribution
from outpace.decoding.tree import check_draft, path_to
from outpace.types import NO_PARENT, Draft, SamplingParams


def tree(decoder: FakeDecoder, **options: float) -> DraftTree:
    return DraftTree(ModelSource(decoder, 64, V), **options)  # type: ignore[arg-type]


def test_a_perfect_tree_is_followed_to_its_depth() -> None:
    drafter = tree(FakeDecoder(), min_reach=0.0, width=2, branches=3, max_depth=5)
    sequence = Sequence(0, [3, 1], 2, SamplingParams())
    drafter.begin(sequence)
    committed, drafts = 0, list[Draft]()
    for _ in range(8):
        n, proposed = step(drafter, [sequence], [12])
        committed += n
        drafts += proposed
    assert committed > 8 * 3
    assert any(len(np.unique(d.parents)) < len(d) for d in drafts), "no draft branched"
    for draft in drafts:
        assert draft.scores is not None
        for parent in np.unique(draft.parents):
            siblings = np.flatnonzero(draft.parents == parent)
            assert len(set(draft.tokens[siblings].tolist())) == len(siblings)
            assert draft.scores[siblings].sum() <= 1 + 1e-5


def test_the_tree_holds_the_likeliest_nodes() -> None:
    """Grown one node at a time it is the best tree there is: compare with all paths to depth 3."""
    drafter = tree(FakeDecoder(), min_reach=0.0, width=1, branches=V, max_depth=12)
    prompt = [5, 2]
    sequence = Sequence(0, list(prompt), 2, SamplingParams())
    drafter.begin(sequence)
    [draft] = propose(drafter, [sequence], [10])
    reach: list[float] = []
    frontier: list[tuple[list[int], float]] = [([], 1.0)]
    for _ in range(3):
        grown = []
        for path, p in frontier:
            likely = distribution(logits_of(prompt + path), SamplingParams(temperature=1))
            grown += [([*path, t], p * float(likely[t])) for t in range(V)]
        reach += [p for _, p in grown]
        frontier = grown
    assert draft.scores is not None
    own = [float(np.prod(draft.scores[path_to(draft.parents, i)])) for i in range(len(draft))]
    shallow = [p for p, i in zip(own, range(len(draft)), strict=True) if len(path_to(draft.parents, i)) <= 3]
    floor = min(own)
    assert sorted(shallow, reverse=True) == pytest.approx(sorted((p for p in reach if p >= floor - 1e-6), reverse=True))


def test_roots_of_the_tree_hang_from_the_last_token() -> None:
    drafter = tree(FakeDecoder())
    sequence = Sequence(0, [1, 2], 2, SamplingParams())
    drafter.begin(sequence)
    [draft] = propose(drafter, [sequence], [5])
    assert draft.parents[0] == NO_PARENT
    assert draft.tokens[0] == logits_of([1, 2]).argmax()


def test_ids_beyond_the_target_s_vocabulary_are_never_proposed() -> None:
    drafter = tree(FakeDecoder(vocab_size=V + 5), branches=V + 5)
    sequence = Sequence(0, [1, 2], 2, SamplingParams())
    drafter.begin(sequence)
    check_draft(propose(drafter, [sequence], [40])[0], 40, V)


@pytest.mark.parametrize("params", PARAMS[1:])
def test_the_coupled_draw_is_among_the_children(params: SamplingParams) -> None:
    drafter = tree(FakeDecoder(), min_reach=0.0, width=1, max_depth=7)
    sequence = Sequence(0, [3, 1], 2, params)
    drafter.begin(sequence)
    assert sum(step(drafter, [sequence], [6])[0] for _ in range(8)) > 8 * 3
    assert sequence.tokens == plain([3, 1], params, len(sequence.output))
