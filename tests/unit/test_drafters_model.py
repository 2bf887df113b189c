"""What every draft that is grown from logits keeps to, whatever its shape, with a second model and with the target."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import pytest
from drafting import NO_OUTPUTS, PARAMS, FakeDecoder, V, plain, propose, step
from hashing import HashDecoder, engine_options

from outpace.decoding.contracts import DrafterContext, Market, Observation, Sequence
from outpace.decoding.drafters.draft_model import DraftChain
from outpace.decoding.drafters.draft_tree import DraftTree
from outpace.decoding.drafters.dyspec import DySpec
from outpace.decoding.drafters.grown import Draws, Grown
from outpace.decoding.drafters.merged import Merged
from outpace.decoding.drafters.plain import Plain
from outpace.decoding.drafters.rsd_c import RsdC
from outpace.decoding.drafters.rsd_s import RsdS
from outpace.decoding.drafters.sources import ModelSource, SelfSource, Source
from outpace.decoding.drafters.specdec import SpecDec
from outpace.decoding.methods import make_drafter
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine, new_cache
from outpace.errors import MethodError, ParameterError
from outpace.models.batch import PAGE_SIZE, ForwardBatch
from outpace.models.decoder import Decoder
from outpace.types import Accepted, Draft, Result, SamplingParams

SHAPES: dict[str, Callable[[Source], Grown]] = {
    "draft": DraftChain,
    "draft-tree": DraftTree,
    "specdec": SpecDec,
    "dyspec": DySpec,
    "dyspec, node by node": lambda source: DySpec(source, threshold=0.0),
    "rsd-c": RsdC,
    "rsd-s": RsdS,
}


def make(shape: str, decoder: Decoder, pages: int = 64) -> Grown:
    return SHAPES[shape](ModelSource(decoder, pages, V))


def source_of(drafter: Grown) -> ModelSource:
    assert isinstance(drafter.source, ModelSource)
    return drafter.source


# -- a second model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("salt", [0, 1])
def test_a_ragged_batch_decodes_as_plain(shape: str, params: SamplingParams, salt: int) -> None:
    """salt 0: the draft model is the target; 1: it knows nothing."""
    drafter = make(shape, FakeDecoder(salt))
    prompts = [[1, 2, 3], [4] * 20, list(range(10)) * 4]
    sequences = [Sequence(i, list(p), len(p), params) for i, p in enumerate(prompts)]
    for sequence in sequences:
        drafter.begin(sequence)
    total = 0
    for round_ in range(12):
        budgets = [(round_ + 3 * i) % 8 for i in range(3)]
        total += step(drafter, sequences, budgets)[0]
        source_of(drafter).cache.check_integrity()
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.tokens == plain(prompt, params, len(sequence.output))
    if salt == 0 and params.greedy:
        assert total > 36 * 2
    for sequence in sequences:
        drafter.end(sequence)
        drafter.end(sequence)
    assert source_of(drafter).cache.pages_in_use == 0 and not drafter._growths


@pytest.mark.parametrize("shape", SHAPES)
def test_drafted_for_alone_or_together_is_the_same(shape: str) -> None:
    prompts = [[1, 2, 3], [4] * 30, [7, 7, 2, 9]]
    for params in PARAMS:
        alone = []
        for prompt in prompts:
            drafter = make(shape, FakeDecoder(1))
            sequence = Sequence(0, list(prompt), len(prompt), params)
            drafter.begin(sequence)
            alone.append(propose(drafter, [sequence], [7])[0])
        drafter = make(shape, FakeDecoder(1))
        sequences = [Sequence(i, list(p), len(p), params) for i, p in enumerate(prompts)]
        for sequence in sequences:
            drafter.begin(sequence)
        for one, other in zip(alone, propose(drafter, sequences, [7, 7, 7]), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.parents.tolist() == other.parents.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_no_room_no_draft(shape: str) -> None:
    small = make(shape, FakeDecoder(), pages=2)
    sequences = [Sequence(i, [1] * 12, 12, SamplingParams()) for i in range(3)]
    for sequence in sequences:
        small.begin(sequence)
    sizes = [len(d) for d in propose(small, sequences, [4, 4, 4])]
    assert sizes[0] > 0 and sizes[-1] == 0
    source_of(small).cache.check_integrity()
    short = make(shape, FakeDecoder(max_position=12))
    short.begin(sequences[0])
    assert len(propose(short, [sequences[0]], [8])[0]) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_an_abandoned_or_broken_round_leaves_nothing(shape: str) -> None:
    decoder = FakeDecoder()
    drafter = make(shape, decoder)
    sequence = Sequence(0, [1, 2, 3], 3, SamplingParams())
    drafter.begin(sequence)
    first = propose(drafter, [sequence], [6])[0]
    again = propose(drafter, [sequence], [6])[0]
    assert first.tokens.tolist() == again.tokens.tolist()
    decoder.fail = True
    with pytest.raises(RuntimeError, match="broke"):
        propose(drafter, [sequence], [6])
    decoder.fail = False
    cache = source_of(drafter).cache
    cache.check_integrity()
    assert cache.reserved(source_of(drafter)._kv[0]) == 0
    step(drafter, [sequence], [6])
    assert sequence.tokens == plain([1, 2, 3], SamplingParams(), len(sequence.output))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_planner_s_floors_cut_drafts_and_forwards(shape: str) -> None:
    decoder = FakeDecoder(1)
    sizes, forwards = [], []
    for floor, forward_floor in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.9), (1.1, 1.1)):
        drafter, decoder.forwards = make(shape, decoder), 0
        market = Market(floor, forward_floor)
        sequence = Sequence(0, [1, 2, 3], 3, SamplingParams())
        drafter.begin(sequence)
        [draft] = propose(drafter, [sequence], [7], market)
        sizes.append(len(draft))
        forwards.append(decoder.forwards)
        assert draft.scores is not None
        reach = [np.prod(draft.scores[: i + 1]) for i in range(len(draft))] if shape == "draft" else []
        assert all(r >= floor for r in reach)
    assert sizes[0] > sizes[1] >= sizes[3] == 0 and sizes[0] >= sizes[2]
    assert forwards[0] > forwards[2] >= forwards[3] == 1


def test_a_long_prompt_is_read_in_chunks() -> None:
    decoder = FakeDecoder()
    drafter = make("draft", decoder, pages=200)
    prompts = [np.random.default_rng(i).integers(V, size=n).tolist() for i, n in enumerate((700, 5, 620))]
    sequences = [Sequence(i, list(p), len(p), SamplingParams()) for i, p in enumerate(prompts)]
    for sequence in sequences:
        drafter.begin(sequence)
    assert step(drafter, sequences, [3, 3, 3])[0] == 12
    assert decoder.rows == 700 + 5 + 620 + 3 * 2
    source_of(drafter).cache.check_integrity()


def test_a_foreseen_last_token_is_read_again() -> None:
    """Another drafter's shorter draft was verified, and the target's own token was one that this draft had too."""
    drafter = make("draft", FakeDecoder())
    sequence = Sequence(0, [1, 2], 2, SamplingParams())
    drafter.begin(sequence)
    [draft] = propose(drafter, [sequence], [6])
    sequence.tokens += draft.tokens[:3].tolist()
    drafter.observe(
        sequence, Observation(Accepted([], draft.tokens[:3].tolist()), Draft.empty(), NO_OUTPUTS, "prefill")
    )
    step(drafter, [sequence], [6])
    assert sequence.tokens == plain([1, 2], SamplingParams(), len(sequence.output))
    assert len(sequence.output) == 3 + 7


def test_a_stop_inside_the_draft_keeps_only_what_was_committed() -> None:
    drafter = make("draft", FakeDecoder())
    sequence = Sequence(0, [1, 2], 2, SamplingParams())
    drafter.begin(sequence)
    [draft] = propose(drafter, [sequence], [6])
    sequence.tokens += draft.tokens[:2].tolist()
    drafter.observe(sequence, Observation(Accepted([], draft.tokens[:2].tolist()), draft, NO_OUTPUTS, "prefill"))
    assert source_of(drafter).cache.length(source_of(drafter)._kv[0]) == 4
    source_of(drafter).cache.check_integrity()


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


def test_under_rejection_sampling_nothing_is_drawn_with_the_target_s_uniforms() -> None:
    context = DrafterContext(V, FakeDecoder(), 64, sampled=True)
    alone, in_tree = make_drafter("draft", context), make_drafter("draft-tree", context)
    merged = make_drafter("ngram+draft", context)
    assert isinstance(alone, DraftChain) and isinstance(in_tree, DraftTree) and isinstance(merged, Merged)
    together = merged.drafters[1]
    assert isinstance(together, DraftChain)
    assert (alone.draws, together.draws, in_tree.draws) == (Draws.SAMPLED, Draws.LIKELIEST, Draws.SAMPLED)


# -- the target itself ---------------------------------------------------------------------------------------


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Result]:
    ids = [engine.add(p, q) for p, q in zip(prompts, params, strict=True)]
    results: dict[int, Result] = {}
    while not engine.idle:
        for event in engine.step():
            if event.result is not None:
                results[event.id] = event.result
        engine.check_integrity()
    return [results[id] for id in ids]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_target_drafts_in_its_own_cache(shape: str, temperature: float) -> None:
    """A target that drafts for itself is always right, leaves nothing behind, and reads no prompt twice."""
    prompts = [[1, 2, 3], [7], list(range(30)), [5, 5, 6] * 20]
    params = [SamplingParams(max_tokens=n, temperature=temperature, seed=n) for n in (30, 9, 25, 17)]
    reference = [
        run(Engine(HashDecoder(), Plain(), CoupledVerifier()), [p], [q]) for p, q in zip(prompts, params, strict=True)
    ]
    decoder, config = HashDecoder(), engine_options(kv_tokens=480)
    cache = new_cache(decoder, config)
    source = SelfSource.of(DrafterContext(40, target=decoder, cache=cache), shape)
    engine = Engine(decoder, SHAPES[shape](source), CoupledVerifier(), options=config, cache=cache)
    results = run(engine, prompts, params)
    assert [r.token_ids for r in results] == [r.token_ids for [r] in reference]
    tau = np.mean([r.stats.mean_accepted for r in results])
    assert tau > (2 if temperature == 0 or shape != "draft-tree" else 1.2)
    assert source.cache is engine.cache


class Forgetful(HashDecoder):
    """Answers from the tokens that it sees wherever they stand, and remembers the first that it saw in each row."""

    def __init__(self) -> None:
        super().__init__()
        self.first: list[int] = []

    def logits(self, seen: np.ndarray) -> np.ndarray:
        self.first.append(int(seen[0, 1]))
        return super().logits(np.stack([seen[:, 0], np.arange(len(seen))], axis=1))


def test_a_sparse_view_drafts_from_part_of_the_cache() -> None:
    """The first page is left out of what the drafting target sees; the text is as without drafts."""
    prompts, params = [list(range(30)), [5, 6] * 10], [SamplingParams(max_tokens=12)] * 2
    decoder, config = Forgetful(), engine_options(kv_tokens=480)
    plain_results = run(Engine(decoder, Plain(), CoupledVerifier()), prompts, params)
    assert set(decoder.first) == {0}
    cache = new_cache(decoder, config)

    def without_first_page(batch: ForwardBatch, sequences: Seq[Sequence]) -> ForwardBatch:
        assert [s.kv for s in sequences] and len(sequences) == len(batch.committed)
        return replace(batch, committed=batch.committed - PAGE_SIZE, page_tables=batch.page_tables[:, 1:])

    source = SelfSource(decoder, cache, view=without_first_page)
    engine = Engine(decoder, DraftChain(source), CoupledVerifier(), options=config, cache=cache)
    assert [r.token_ids for r in run(engine, prompts, params)] == [r.token_ids for r in plain_results]
    assert set(decoder.first) == {0, PAGE_SIZE}


def test_without_a_model_or_a_target_a_method_says_what_it_needs() -> None:
    with pytest.raises(MethodError, match="'draft' needs a draft model"):
        make_drafter("draft", DrafterContext(V))
    with pytest.raises(MethodError, match="'mine' drafts with the target"):
        SelfSource.of(DrafterContext(V), "mine")


@pytest.mark.parametrize(
    "spec", ["draft:max_tokens=0", "draft:min_reach=1.5", "draft-tree:width=0", "draft-tree:min_reach=-1"]
)
def test_options_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(ParameterError, match="out of range"):
        make_drafter(spec, DrafterContext(V, FakeDecoder(), 8))
