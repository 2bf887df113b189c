"""Drafting by a model, over a fake decoder that checks what the cache gives it to see.

The fake's storage keeps the token and position of every slot. Each row gathers the context that the batch lets it see
and answers from a table of that context alone, so a wrong page, offset, mask or commit changes the draft.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from outpace.cache.storage import PAGE_SIZE, KVStorage
from outpace.decoding.contracts import DrafterContext, Observation, Sequence
from outpace.decoding.drafters.draft_model import _PRIOR, DraftChain, DraftModel
from outpace.decoding.drafters.draft_tree import DraftTree
from outpace.decoding.drafters.merged import Merged
from outpace.decoding.methods import make_drafter
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import History, distribution, sample
from outpace.decoding.tree import check_draft, path_to
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.decoding.verify.rejection import RejectionVerifier
from outpace.models.batch import ForwardBatch
from outpace.models.config import ModelConfig
from outpace.models.decoder import Decoder, DecoderOutput
from outpace.types import NO_PARENT, Draft, SamplingParams

V = 13


def logits_of(context: list[int], salt: int = 0) -> np.ndarray:
    """A language: the next token depends on the last two, and a little on everything before."""
    row = np.random.default_rng([salt, *context[-2:]]).standard_normal(V) * 2
    return (row + 0.05 * np.random.default_rng(context).standard_normal(V)).astype(np.float32)


class SlotStorage(KVStorage):
    def __init__(self, num_pages: int) -> None:
        self.num_pages, self.bytes_per_page = num_pages, PAGE_SIZE * 8
        self.tokens = np.full(num_pages * PAGE_SIZE, -1)
        self.positions = np.full(num_pages * PAGE_SIZE, -1)

    def copy_pages(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        for array in (self.tokens, self.positions):
            paged = array.reshape(-1, PAGE_SIZE)
            paged[target] = paged[source]

    def move(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        for array in (self.tokens, self.positions):
            array[target] = array[source]


class FakeDecoder(Decoder):
    precision = "float32"
    device = torch.device("cpu")
    weight_bytes = 0
    row_invariant = True

    def __init__(self, salt: int = 0, max_position: int = 4096, vocab_size: int = V) -> None:
        self.salt, self.rows, self.forwards, self.fail = salt, 0, 0, False
        self.config = ModelConfig(
            architecture="llama",
            vocab_size=vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            max_position=max_position,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            layer_types=("full",),
        )
        self._buffer = torch.empty(4096, vocab_size)

    def new_storage(self, num_pages: int) -> SlotStorage:
        return SlotStorage(num_pages)

    def forward(self, batch: ForwardBatch, storage: KVStorage, hidden_layers: Seq[int] = ()) -> DecoderOutput:
        assert isinstance(storage, SlotStorage)
        self.forwards += 1
        self.rows += len(batch.tokens)
        if self.fail:
            raise RuntimeError("the draft model broke")
        answers: dict[int, np.ndarray] = {}
        for b in range(len(batch.committed)):
            committed, table = int(batch.committed[b]), batch.page_tables[b]
            rows = range(int(batch.row_start[b]), int(batch.row_start[b + 1]))

            def slots(places: NDArray[np.int64], table: NDArray[np.int32] = table) -> NDArray[np.int64]:
                return table[places // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + places % PAGE_SIZE

            for t in rows:
                slot = slots(np.array([committed + int(batch.offsets[t])]))
                storage.tokens[slot], storage.positions[slot] = batch.tokens[t], batch.positions[t]
            seen: NDArray[np.int32]
            for t in rows:
                if batch.causal[b]:
                    seen = np.arange(int(batch.offsets[t]) + 1, dtype=np.int32)
                else:
                    seen = batch.visible[batch.visible_start[t] : batch.visible_start[t + 1]]
                where = slots(np.concatenate((np.arange(committed), committed + seen)))
                assert storage.positions[where].tolist() == list(range(len(where)))
                assert batch.positions[t] == len(where) - 1
                answers[t] = logits_of(storage.tokens[where].tolist(), self.salt)
        out = self._buffer[: len(batch.logit_rows)]
        out.fill_(-1e4)
        for row, t in enumerate(batch.logit_rows.tolist()):
            out[row, :V] = torch.from_numpy(answers[t])
        return DecoderOutput(out, {})


def outputs_of(tokens: list[int], draft: Draft) -> TargetOutputs:
    rows = [logits_of(tokens)]
    for node in range(len(draft)):
        rows.append(logits_of(tokens + draft.tokens[path_to(draft.parents, node)].tolist()))
    return TargetOutputs.of(torch.from_numpy(np.stack(rows)))


def plain(prompt: list[int], params: SamplingParams, n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(sample(logits_of(tokens), params, History(tokens, len(prompt)), len(tokens)))
    return tokens


def chain(decoder: Decoder, pages: int = 64, **options: float) -> DraftChain:
    return DraftChain(decoder, pages, V, **options)  # type: ignore[arg-type]


def tree(decoder: Decoder, pages: int = 64, **options: float) -> DraftTree:
    return DraftTree(decoder, pages, V, **options)  # type: ignore[arg-type]


def step(drafter: DraftModel | Merged, sequences: list[Sequence], budgets: list[int]) -> tuple[int, list[Draft]]:
    """One engine step of several sequences; returns the tokens committed."""
    drafts, total = drafter.propose(sequences, budgets), 0
    for sequence, draft, budget in zip(sequences, drafts, budgets, strict=True):
        check_draft(draft, budget, V)
        outputs = outputs_of(sequence.tokens, draft)
        accepted = CoupledVerifier().verify(sequence, draft, outputs)
        sequence.tokens += accepted.tokens.tolist()
        drafter.observe(sequence, Observation(accepted.tokens, draft, accepted, outputs))
        total += len(accepted.tokens)
    return total, drafts


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=4),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.2),
]


@pytest.mark.parametrize("make", [chain, tree])
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("salt", [0, 1])
def test_a_ragged_batch_decodes_as_plain(make: type, params: SamplingParams, salt: int) -> None:
    """salt 0: the draft model is the target; 1: it knows nothing."""
    drafter = make(FakeDecoder(salt))
    prompts = [[1, 2, 3], [4] * 20, list(range(10)) * 4]
    sequences = [Sequence(i, list(p), len(p), params) for i, p in enumerate(prompts)]
    for sequence in sequences:
        drafter.begin(sequence)
    total = 0
    for round_ in range(12):
        budgets = [(round_ + 3 * i) % 8 for i in range(3)]
        total += step(drafter, sequences, budgets)[0]
        drafter.cache.check_integrity()
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.tokens == plain(prompt, params, len(sequence.output))
    if salt == 0 and params.greedy:
        assert total > 36 * 2
    for sequence in sequences:
        drafter.end(sequence)
        drafter.end(sequence)
    assert drafter.cache.bytes_used == 0 and not drafter._states


def test_a_perfect_chain_is_accepted_whole_and_reads_nothing_twice() -> None:
    decoder = FakeDecoder()
    drafter = chain(decoder, min_reach=0.0)
    sequence = Sequence(0, [3, 1], 2, SamplingParams())
    drafter.begin(sequence)
    for _ in range(5):
        assert step(drafter, [sequence], [6])[0] == 7
    # 2 prompt tokens; per step 5 provisional rows, and the sixth node and the bonus at the next catch-up
    assert decoder.rows == 2 + 5 * 5 + 4 * 2
    assert decoder.forwards == 5 * 6


@pytest.mark.parametrize("params", PARAMS[1:])
def test_the_coupled_draw_of_a_perfect_draft_model_is_always_accepted(params: SamplingParams) -> None:
    """Sampled text: the drafter draws with the uniform that the target will draw with."""
    for drafter in (chain(FakeDecoder(), min_reach=0.0), tree(FakeDecoder(), min_reach=0.0, width=1, max_depth=7)):
        sequence = Sequence(0, [3, 1], 2, params)
        drafter.begin(sequence)
        lengths = [step(drafter, [sequence], [6])[0] for _ in range(8)]
        if isinstance(drafter, DraftChain):
            assert lengths == [7] * 8
        assert sum(lengths) > 8 * 3
        assert sequence.tokens == plain([3, 1], params, len(sequence.output))
        if not params.greedy:
            assert drafter._draws.value.sum() > np.sum(_PRIOR)


def test_under_rejection_sampling_nothing_is_drawn_with_the_target_s_uniforms() -> None:
    context = DrafterContext(V, FakeDecoder(), 64, sampled=True)
    alone, in_tree = make_drafter("draft", context), make_drafter("draft-tree", context)
    merged = make_drafter("ngram+draft", context)
    assert isinstance(alone, DraftChain) and isinstance(in_tree, DraftTree) and isinstance(merged, Merged)
    together = merged.drafters[1]
    assert isinstance(together, DraftChain)
    assert (alone.sampled, alone.coupled) == (True, False)
    assert (together.sampled, together.coupled) == (False, False)
    assert not in_tree.coupled


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
    [draft] = drafter.propose([sequence], [10])
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


def test_drafted_for_alone_or_together_is_the_same() -> None:
    prompts = [[1, 2, 3], [4] * 30, [7, 7, 2, 9]]
    for make in (chain, tree):
        alone = []
        for prompt in prompts:
            drafter = make(FakeDecoder(1))
            sequence = Sequence(0, list(prompt), len(prompt), SamplingParams())
            drafter.begin(sequence)
            alone.append(drafter.propose([sequence], [7])[0])
        drafter = make(FakeDecoder(1))
        sequences = [Sequence(i, list(p), len(p), SamplingParams()) for i, p in enumerate(prompts)]
        for sequence in sequences:
            drafter.begin(sequence)
        for one, other in zip(alone, drafter.propose(sequences, [7, 7, 7]), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.parents.tolist() == other.parents.tolist()


def test_a_long_prompt_is_read_in_chunks() -> None:
    decoder = FakeDecoder()
    drafter = chain(decoder, pages=200, min_reach=0.0)
    prompts = [np.random.default_rng(i).integers(V, size=n).tolist() for i, n in enumerate((700, 5, 620))]
    sequences = [Sequence(i, list(p), len(p), SamplingParams()) for i, p in enumerate(prompts)]
    for sequence in sequences:
        drafter.begin(sequence)
    assert step(drafter, sequences, [3, 3, 3])[0] == 12
    assert decoder.rows == 700 + 5 + 620 + 3 * 2
    drafter.cache.check_integrity()


@pytest.mark.parametrize("make", [chain, tree])
def test_no_room_no_draft(make: type) -> None:
    small = make(FakeDecoder(), pages=2)
    sequences = [Sequence(i, [1] * 12, 12, SamplingParams()) for i in range(3)]
    for sequence in sequences:
        small.begin(sequence)
    sizes = [len(d) for d in small.propose(sequences, [4, 4, 4])]
    assert sizes[0] > 0 and sizes[-1] == 0
    small.cache.check_integrity()
    short = make(FakeDecoder(max_position=14))
    short.begin(sequences[0])
    assert len(short.propose([sequences[0]], [8])[0]) == 0


@pytest.mark.parametrize("make", [chain, tree])
def test_an_abandoned_or_broken_round_leaves_nothing(make: type) -> None:
    decoder = FakeDecoder()
    drafter = make(decoder)
    sequence = Sequence(0, [1, 2, 3], 3, SamplingParams())
    drafter.begin(sequence)
    first = drafter.propose([sequence], [6])[0]
    again = drafter.propose([sequence], [6])[0]
    assert first.tokens.tolist() == again.tokens.tolist()
    decoder.fail = True
    with pytest.raises(RuntimeError, match="broke"):
        drafter.propose([sequence], [6])
    decoder.fail = False
    drafter.cache.check_integrity()
    assert drafter.cache.reserved(drafter._states[0].kv) == 0
    step(drafter, [sequence], [6])
    assert sequence.tokens == plain([1, 2, 3], SamplingParams(), len(sequence.output))


def test_a_foreseen_last_token_is_read_again() -> None:
    """Another drafter's shorter draft was verified, and the target's own token was one that this draft had too."""
    drafter = chain(FakeDecoder(), min_reach=0.0)
    sequence = Sequence(0, [1, 2], 2, SamplingParams())
    drafter.begin(sequence)
    [draft] = drafter.propose([sequence], [6])
    sequence.tokens += draft.tokens[:3].tolist()
    drafter.observe(sequence, Observation(draft.tokens[:3], Draft.empty(), None, None))
    step(drafter, [sequence], [6])
    assert sequence.tokens == plain([1, 2], SamplingParams(), len(sequence.output))
    assert len(sequence.output) == 3 + 7


def test_a_stop_inside_the_draft_keeps_only_what_was_committed() -> None:
    drafter = chain(FakeDecoder(), min_reach=0.0)
    sequence = Sequence(0, [1, 2], 2, SamplingParams())
    drafter.begin(sequence)
    [draft] = drafter.propose([sequence], [6])
    sequence.tokens += draft.tokens[:2].tolist()
    drafter.observe(sequence, Observation(draft.tokens[:2], draft, None, None))
    assert drafter.cache.length(drafter._states[0].kv) == 4
    drafter.cache.check_integrity()


def test_ids_beyond_the_target_s_vocabulary_are_never_proposed() -> None:
    drafter = DraftTree(FakeDecoder(vocab_size=V + 5), 64, V, branches=V + 5)
    sequence = Sequence(0, [1, 2], 2, SamplingParams())
    drafter.begin(sequence)
    check_draft(drafter.propose([sequence], [40])[0], 40, V)


def test_merged_with_a_model_draft() -> None:
    drafter = make_drafter("ngram+draft+draft-tree", DrafterContext(V, FakeDecoder(1), 64, sampled=True))
    assert isinstance(drafter, Merged)
    sequence = Sequence(0, [1, 2, 3, 1, 2], 5, SamplingParams(temperature=0.7, seed=1))
    drafter.begin(sequence)
    for _ in range(15):
        _, [draft] = step(drafter, [sequence], [9])
        assert draft.q is None
    assert sequence.tokens == plain([1, 2, 3, 1, 2], sequence.params, len(sequence.output))
    drafter.end(sequence)


# -- rejection sampling --------------------------------------------------------------------------------------


def test_sampled_chains_carry_the_distribution_they_were_drawn_from() -> None:
    params = SamplingParams(temperature=0.9, top_k=5, repetition_penalty=1.2, seed=3)
    drafter = DraftChain(FakeDecoder(1), 64, V, sampled=True)
    sequence = Sequence(0, [1, 2, 3], 3, params)
    drafter.begin(sequence)
    [draft] = drafter.propose([sequence], [5])
    assert draft.q is not None and draft.q.shape == (len(draft), V)
    context = [1, 2, 3]
    for node, token in enumerate(draft.tokens.tolist()):
        expected = distribution(logits_of(context, 1), params, History(context, 3))
        np.testing.assert_allclose(draft.q[node], expected, atol=1e-6)
        assert draft.q[node, token] > 0
        context.append(token)
    assert sequence.history.tokens == [1, 2, 3]


def test_the_length_of_a_sampled_chain_does_not_depend_on_its_tokens() -> None:
    drafter = DraftChain(FakeDecoder(1), 64, V, sampled=True)
    lengths, tokens = set(), set()
    for seed in range(20):
        sequence = Sequence(seed, [1, 2, 3], 3, SamplingParams(temperature=1.0, seed=seed))
        drafter.begin(sequence)
        [draft] = drafter.propose([sequence], [12])
        lengths.add(len(draft))
        tokens.add(tuple(draft.tokens.tolist()))
        drafter.end(sequence)
    assert len(lengths) == 1 and len(tokens) > 10


def test_rejection_sampling_with_a_model_draft_follows_the_target() -> None:
    """First two tokens over many seeds, against the exact joint distribution."""
    params, n, agreed = SamplingParams(temperature=1.0), 800, 0
    drafter = DraftChain(FakeDecoder(1), 64, V, sampled=True, max_tokens=2)
    counts = np.zeros((V, V))
    for seed in range(n):
        sequence = Sequence(seed, [1, 2], 2, replace(params, seed=seed))
        drafter.begin(sequence)
        while len(sequence.output) < 2:
            [draft] = drafter.propose([sequence], [2])
            outputs = outputs_of(sequence.tokens, draft)
            accepted = RejectionVerifier().verify(sequence, draft, outputs)
            agreed += not sequence.output and len(accepted.path) > 0
            sequence.tokens += accepted.tokens.tolist()
            drafter.observe(sequence, Observation(accepted.tokens, draft, accepted, outputs))
        counts[sequence.output[0], sequence.output[1]] += 1
        drafter.end(sequence)
    first = distribution(logits_of([1, 2]), params)
    joint = np.stack([first[t] * distribution(logits_of([1, 2, t]), params) for t in range(V)])
    expected = joint.ravel() * n
    pooled = expected > 5
    seen = np.append(counts.ravel()[pooled], counts.ravel()[~pooled].sum())
    should = np.append(expected[pooled], expected[~pooled].sum())
    chi2, freedom = ((seen - should) ** 2 / should).sum(), len(seen) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)
    overlap = np.minimum(first, distribution(logits_of([1, 2], 1), params)).sum()
    assert agreed / n == pytest.approx(overlap, abs=0.06)


def test_roots_of_the_tree_hang_from_the_last_token() -> None:
    drafter = tree(FakeDecoder())
    sequence = Sequence(0, [1, 2], 2, SamplingParams())
    drafter.begin(sequence)
    [draft] = drafter.propose([sequence], [5])
    assert draft.parents[0] == NO_PARENT
    assert draft.tokens[0] == logits_of([1, 2]).argmax()
