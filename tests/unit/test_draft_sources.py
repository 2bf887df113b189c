"""Draft models that read or say less than all: a trimmed head, a retrieved part of the prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drafting import PARAMS, FakeDecoder, V, plain, propose, step
from numpy.typing import NDArray

from outpace.cache.storage import KVStorage
from outpace.decoding.contracts import DrafterContext, Sequence
from outpace.decoding.drafters import trimmed
from outpace.decoding.drafters.draft_model import DraftChain
from outpace.decoding.drafters.grown import Grown
from outpace.decoding.drafters.rapid import Rapid, RetrievedSource, bm25, shorten
from outpace.decoding.drafters.sources import ModelSource
from outpace.decoding.drafters.specdec import SpecDec
from outpace.decoding.drafters.trimmed import TokenCounts
from outpace.decoding.methods import make_drafter
from outpace.errors import ParameterError
from outpace.models.batch import ForwardBatch
from outpace.models.decoder import NO_TAPS, DecoderOutput, Taps
from outpace.types import SamplingParams


class TrimmedFake(FakeDecoder):
    """What `trim_head` makes of a fake: other tokens have no logits. Shares the whole fake's storage."""

    def __init__(self, whole: FakeDecoder, ids: NDArray[np.int64]) -> None:
        super().__init__(whole.salt)
        self.whole, self.ids = whole, ids

    def forward(self, batch: ForwardBatch, storage: KVStorage, taps: Taps = NO_TAPS) -> DecoderOutput:
        out = self.whole.forward(batch, storage)
        logits = torch.full_like(out.logits, float("-inf"))
        logits[:, self.ids] = out.logits[:, self.ids]
        return DecoderOutput(logits, {})


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every head that was cut."""
    made: list[list[int]] = []

    def trim_head(decoder: FakeDecoder, ids: NDArray[np.int64]) -> TrimmedFake:
        made.append(ids.tolist())
        return TrimmedFake(decoder, ids)

    monkeypatch.setattr(trimmed, "trim_head", trim_head)
    return made


# -- trimmed heads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vocabtrim:trim=4", "draft-tree:trim=5,branches=6", "rsd-s:trim=3,width=4"])
@pytest.mark.parametrize("params", PARAMS)
def test_a_trimmed_head_drafts_only_its_tokens(method: str, params: SamplingParams, cuts: list[list[int]]) -> None:
    drafter = make_drafter(method, DrafterContext(V, FakeDecoder(), 64))
    prompts = [[1, 2, 3], [4, 9] * 10]
    sequences = [Sequence(i, list(p), len(p), params) for i, p in enumerate(prompts)]
    for sequence in sequences:
        drafter.begin(sequence)
    accepted = 0
    for _ in range(12):
        total, drafts = step(drafter, sequences, [6, 5])
        accepted += total - len(sequences)
        assert all(set(draft.tokens.tolist()) <= set(cuts[-1]) for draft in drafts)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.tokens == plain(prompt, params, len(sequence.output))
        drafter.end(sequence)
    assert accepted > 0
    assert all(len(ids) == len(cuts[0]) for ids in cuts)


def test_the_head_holds_what_was_used_and_then_the_lowest_ids(cuts: list[list[int]]) -> None:
    counts = TokenCounts(FakeDecoder(), 5)
    counts.decoder()
    counts.add([9, 9, 12, 0, 1, 2, 3, 4])
    assert cuts == [[0, 1, 2, 3, 4]]
    counts.decoder()
    assert len(cuts) == 1, "three tokens outside the head are too few for another cut"
    counts.add([9, 9, 12, 7] * 5)
    counts.decoder()
    assert cuts[1:] == [[0, 1, 7, 9, 12]]
    counts.add([9] * 100)
    counts.decoder()
    assert len(cuts) == 2, "nothing outside the head was used"
    counts.add([3, 3, 4, 4, 4, 5, 5, 5] * 4)
    counts.decoder()
    assert cuts[2:] == [[3, 4, 5, 9, 12]]


def test_owners_share_no_head(cuts: list[list[int]]) -> None:
    """What one owner's text makes likely is not drafted for another, though both share a forward's step."""
    context = DrafterContext(V, FakeDecoder(), 64, owner_of=lambda sequence: sequence.id % 2)
    drafter = make_drafter("vocabtrim:trim=4", context)
    prompts = [[12] * 8 + [11] * 8, [5] * 9 + [6] * 9, [12, 11, 10, 9] * 4]
    sequences = [Sequence(i, list(p), len(p), SamplingParams()) for i, p in enumerate(prompts)]
    for sequence in sequences:
        drafter.begin(sequence)
    propose(drafter, sequences, [4, 4, 4])
    assert cuts == [[9, 10, 11, 12], [0, 1, 5, 6]]
    for _ in range(8):
        step(drafter, sequences, [4, 4, 4])
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.tokens == plain(prompt, SamplingParams(), len(sequence.output))
    alone = make_drafter("vocabtrim:trim=4", context)
    one = Sequence(1, list(prompts[1]), len(prompts[1]), SamplingParams())
    alone.begin(one)
    for _ in range(8):
        step(alone, [one], [4])
    assert one.tokens[: len(sequences[1].tokens)] == sequences[1].tokens[: len(one.tokens)]


def test_a_head_out_of_range_is_refused_and_a_small_vocabulary_stays_whole() -> None:
    context = DrafterContext(V, FakeDecoder(), 8)
    with pytest.raises(ParameterError, match="trim=1 is out of range: it must be at least 2"):
        make_drafter("draft:trim=1", context)
    for method in ("vocabtrim", f"vocabtrim:trim={V}", "draft-tree:trim=0"):
        drafter = make_drafter(method, context)
        assert isinstance(drafter, Grown) and type(drafter.source) is ModelSource


# -- a retrieved part of the prompt --------------------------------------------------------------------------


def test_bm25_prefers_rare_words_and_short_chunks() -> None:
    chunks = [[1, 2, 3, 4], [1, 1, 1, 1], [9, 2, 3, 4], [1, 9], [5, 6, 7, 8]]
    scores = bm25(chunks, [1, 9])
    assert scores.argmax() == 3 and scores[2] > scores[0] > 0 and scores[4] == 0
    assert bm25(chunks, [42]).tolist() == [0] * 5


def test_a_long_prompt_is_shortened_to_what_the_question_is_about() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 50, 2000).tolist()
    prompt[1234:1240] = [90, 91, 92, 93, 94, 95]
    prompt[-20:-17] = [91, 93, 95]
    short = shorten(prompt, 256, 16)
    assert len(short) <= 256
    assert short[:16] == prompt[:16] and short[-64:] == prompt[-64:]
    assert {90, 91, 92, 93, 94, 95} <= set(short[16:-64])
    places = iter(range(len(prompt)))
    assert all(any(prompt[at] == token for at in places) for token in short), "the order of the prompt is kept"
    assert shorten(prompt[:256], 256, 16) == prompt[:256]


@pytest.mark.parametrize("params", PARAMS)
def test_a_draft_model_reads_the_short_prompt_and_all_of_the_output(params: SamplingParams) -> None:
    decoder = FakeDecoder(max_position=120)
    source = RetrievedSource(decoder, 64, V, limit=32, chunk=4)
    drafter = Rapid(source, threshold=1.0)
    prompts = [np.random.default_rng(1).integers(V, size=300).tolist(), [1, 2, 3]]
    sequences = [Sequence(i, list(p), len(p), params) for i, p in enumerate(prompts)]
    for sequence in sequences:
        drafter.begin(sequence)
    committed = sum(step(drafter, sequences, [4, 4])[0] for _ in range(6))
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.tokens == plain(prompt, params, len(sequence.output))
        short = shorten(prompt, 32, 4)
        assert source.text(sequence) == short + sequence.output
        drafter.end(sequence)
        drafter.end(sequence)
    assert committed > 24, "the next token depends on the last two most of all"
    assert decoder.rows < 32 + 3 + 2 * 6 * 8
    assert source.cache.pages_in_use == 0 and not source._texts and not source._seen


def test_a_prompt_without_room_for_chunks_is_refused() -> None:
    with pytest.raises(ParameterError, match="at least 4 chunks"):
        make_drafter("rapid:prompt=100,chunk=32", DrafterContext(V, FakeDecoder(), 8))


def test_stopping_follows_measured_acceptance() -> None:
    """SpecDec++: a draft model that is sure and wrong drafts short, one that is right drafts long."""
    lengths = {}
    for salt in (0, 1):
        drafter = SpecDec(trimmed.model_source(DrafterContext(V, FakeDecoder(salt), 64), "specdec"), max_tokens=8)
        sequence = Sequence(0, [3, 1], 2, SamplingParams())
        drafter.begin(sequence)
        for _ in range(40):
            step(drafter, [sequence], [8])
        lengths[salt] = [len(step(drafter, [sequence], [8])[1][0]) for _ in range(10)]
    assert np.mean(lengths[0]) > 6 and np.mean(lengths[1]) < 3
    with pytest.raises(ParameterError, match="threshold=2"):
        make_drafter("specdec:threshold=2", DrafterContext(V, FakeDecoder(), 8))


# -- what was read is not read again -------------------------------------------------------------------------


def chain_rows(
    owner: str, text: list[int], drafter: DraftChain, decoder: FakeDecoder, id: int
) -> tuple[int, list[int]]:
    """Rows that the draft model ran for one draft of three tokens after `text`, and the draft. The sequence ends."""
    sequence = Sequence(id, list(text), len(text), SamplingParams(), owner=owner)
    before = decoder.rows
    drafter.begin(sequence)
    draft = propose(drafter, [sequence], [3])[0]
    drafter.end(sequence)
    source = drafter.source
    assert isinstance(source, ModelSource) and source.prefix is not None
    source.cache.check_integrity()
    source.prefix.check_integrity()
    return decoder.rows - before, draft.tokens.tolist()


def test_a_draft_model_reads_a_shared_beginning_once_per_owner() -> None:
    decoder = FakeDecoder()
    drafter = DraftChain(ModelSource(decoder, 64, V), min_reach=0.0)
    text = list(range(10)) * 5
    first, draft = chain_rows("a", text, drafter, decoder, 0)
    again, same = chain_rows("a", text, drafter, decoder, 1)
    other, for_other = chain_rows("b", text, drafter, decoder, 2)
    longer, _ = chain_rows("a", [*text, 3, 4], drafter, decoder, 3)
    assert draft == same == for_other
    assert (again, other, longer) == (first - 49, first, first - 48)


def test_what_a_draft_model_keeps_makes_room() -> None:
    decoder = FakeDecoder()
    source = ModelSource(decoder, 5, V)
    drafter = DraftChain(source, min_reach=0.0)
    for id in range(6):
        rows, draft = chain_rows("a", [id] * 60, drafter, decoder, id)
        assert len(draft) == 3 and rows >= 60
    assert source.prefix is not None and source.prefix.evictable == source.prefix.pages > 0 == source.cache.pages_in_use
