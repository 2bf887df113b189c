"""OmniDraft over two toy vocabularies: hash decoders for exactness, decoders that know a text for what it gains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from drafting import propose
from hashing import HashDecoder
from test_translation import CODE, PROSE, toy_tokenizer

from outpace import LLM
from outpace.decoding.contracts import DrafterContext, Sequence
from outpace.decoding.drafters.merged import Merged
from outpace.decoding.drafters.omnidraft import OmniDraft
from outpace.decoding.methods import make_drafter
from outpace.decoding.tree import check_draft
from outpace.engine.load import LoadedModel
from outpace.errors import DownloadError, MethodError, ParameterError
from outpace.models.tokenizer import Tokenizer
from outpace.types import SamplingParams

TEXT = (PROSE + CODE) * 2
TARGET, DRAFT = toy_tokenizer(420, PROSE + CODE), toy_tokenizer(300, PROSE)


class Reciter(HashDecoder):
    """Knows one text and says it on, in its own tokens; off the text it talks as a hash decoder does."""

    def __init__(self, tokenizer: Tokenizer, text: str, **options: int) -> None:
        size = len(tokenizer.vocabulary.bytes)
        super().__init__(vocab=size, speakable=size, eos=1, **options)
        self.vocabulary, self.text = tokenizer.vocabulary, text.encode()

    def logits(self, seen: np.ndarray) -> np.ndarray:
        logits = super().logits(seen)
        read = self.vocabulary.text(seen[:, 0].tolist())
        if self.text.startswith(read) and len(read) < len(self.text):
            logits[self.vocabulary.encode(self.text[len(read) :])[0]] = 30.0
        return logits


def llm_of(target: HashDecoder, draft: HashDecoder, method: str = "omnidraft", **options: object) -> LLM:
    return LLM(
        LoadedModel("target", target, TARGET),
        draft_model=LoadedModel("draft", draft, DRAFT),
        method=method,
        planner="fixed",
        kv_tokens=2048,
        **options,  # type: ignore[arg-type]
    )


def drafter_of(llm: LLM) -> OmniDraft:
    drafter = llm._drafter
    found = drafter.drafters[0] if isinstance(drafter, Merged) else drafter
    assert isinstance(found, OmniDraft)
    return found


def hashed(tokenizer: Tokenizer, **options: int) -> HashDecoder:
    size = len(tokenizer.vocabulary.bytes)
    return HashDecoder(vocab=size, speakable=size, eos=1, **options)


PARAMS = [
    SamplingParams(max_tokens=40),
    SamplingParams(max_tokens=40, temperature=0.9, seed=3),
    SamplingParams(max_tokens=40, repetition_penalty=1.2),
]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("make", [lambda: hashed(DRAFT), lambda: Reciter(DRAFT, TEXT.replace("boats", "ships"))])
def test_batches_are_what_plain_decoding_says(params: SamplingParams, make: Callable[[], HashDecoder]) -> None:
    """Right drafts, wrong drafts and senseless ones; senseless targets write half characters."""
    prompts = [TEXT[:40], TEXT[:200], "tide <s> 日"]
    with llm_of(Reciter(TARGET, TEXT), make()) as llm:
        results = llm.generate(prompts, params)
        with llm.with_method("plain") as plain:
            for prompt, result in zip(prompts, results, strict=True):
                assert result.token_ids == plain.generate(prompt, params)[0].token_ids
                assert result.exactness == "identical"
        llm.check_integrity()
        drafter = drafter_of(llm)
        assert not drafter._states and drafter.source.cache.pages_in_use == 0
        drafter.source.cache.check_integrity()


def test_a_draft_model_that_knows_the_text_is_followed() -> None:
    params = SamplingParams(max_tokens=120)
    with llm_of(Reciter(TARGET, TEXT), Reciter(DRAFT, TEXT)) as llm:
        result = llm.generate(TEXT[:30], params)[0]
        assert TEXT.startswith(TEXT[:30] + result.text)
        assert result.stats.mean_accepted > 3.0 and result.stats.acceptance_rate > 0.75
        drafter = drafter_of(llm)
        assert len(drafter.words[""]) > 10
        # what is told of the draft model's text is what was read: nothing is read again but changed ends
        rows = sum(n for _, n in drafter.source.decoder.forwards)  # type: ignore[attr-defined]
        assert rows < 3.0 * len(DRAFT.encode(TEXT[:30] + result.text))


def test_sequences_of_different_owners_teach_each_other_nothing() -> None:
    context = DrafterContext(
        420, Reciter(DRAFT, TEXT), 64, tokenizer=TARGET, draft_tokenizer=DRAFT, owner_of=lambda s: s.id // 10
    )
    drafter = make_drafter("omnidraft", context)
    assert isinstance(drafter, OmniDraft)
    for id, text in ((1, TEXT), (11, "no"), (2, "no")):
        drafter.begin(Sequence(id, TARGET.encode(text), 1, SamplingParams()))
        propose(drafter, [Sequence(id, TARGET.encode(text), 1, SamplingParams())], [0])
    assert len(drafter.words[0]) > 10 and not len(drafter.words[1])
    assert drafter._states[2].twin.words is drafter._states[1].twin.words


def test_a_step_that_was_not_observed_is_caught_up_with() -> None:
    drafter = make_drafter(
        "omnidraft", DrafterContext(420, Reciter(DRAFT, TEXT), 64, tokenizer=TARGET, draft_tokenizer=DRAFT)
    )
    assert isinstance(drafter, OmniDraft)
    tokens = TARGET.encode(TEXT)
    sequence = Sequence(0, tokens[:20], 20, SamplingParams())
    drafter.begin(sequence)
    for stop in (20, 31, 33, 60):
        sequence.tokens += tokens[len(sequence.tokens) : stop]
        [draft] = propose(drafter, [sequence], [8])
        check_draft(draft, 8, 420)
        assert len(draft) and draft.tokens.tolist() == tokens[stop : stop + len(draft)]
        state = drafter._states[0]
        assert state.twin.tokens == DRAFT.encode(TARGET.decode(sequence.tokens))
        drafter.source.cache.check_integrity()
    drafter.end(sequence)
    drafter.end(sequence)


class Sure(HashDecoder):
    """Always says one token, and means it."""

    def logits(self, seen: np.ndarray) -> np.ndarray:
        logits = super().logits(seen)
        logits[DRAFT.encode("sand")[0]] = 30.0
        return logits


def test_a_sure_and_wrong_draft_model_is_soon_disbelieved() -> None:
    size = len(DRAFT.vocabulary.bytes)
    with llm_of(Reciter(TARGET, TEXT), Sure(vocab=size, speakable=size)) as llm:
        before = drafter_of(llm).rates.value.copy()
        params = SamplingParams(max_tokens=100)
        first, later = (llm.generate(TEXT[:30], params)[0].stats for _ in range(2))
        assert (drafter_of(llm).rates.value <= before + 1e-6).all()
        assert 0 < first.drafted < 60 and later.drafted < first.drafted / 2


def test_the_beginning_token_of_the_draft_model() -> None:
    drafter = OmniDraft.create(DrafterContext(420, hashed(DRAFT), 64, tokenizer=TARGET, draft_tokenizer=DRAFT))
    assert list(drafter.lead) == []
    begin = next(iter(DRAFT.vocabulary.control))
    drafter = OmniDraft(drafter.source, drafter.translator, lead=[begin])
    for id, tokens in enumerate((TARGET.encode("the"), [begin, *TARGET.encode("the")])):
        sequence = Sequence(id, tokens, 1, SamplingParams())
        drafter.begin(sequence)
        propose(drafter, [sequence], [0])
        assert drafter._states[id].twin.tokens == [begin, *DRAFT.encode("the")]


def test_nothing_to_read_and_no_room_give_no_draft() -> None:
    begin = next(iter(TARGET.vocabulary.control))
    context = DrafterContext(
        420, hashed(DRAFT), 2, tokenizer=TARGET, draft_tokenizer=toy_tokenizer(300, PROSE, ("<a>", "<b>"))
    )
    drafter = make_drafter("omnidraft", context)
    sequences = [Sequence(0, [begin], 1, SamplingParams()), Sequence(1, TARGET.encode(TEXT), 1, SamplingParams())]
    for sequence in sequences:
        drafter.begin(sequence)
    assert [len(d) for d in propose(drafter, sequences, [4, 4])] == [0, 0]


def test_what_does_not_work_is_refused() -> None:
    same = DrafterContext(420, hashed(TARGET), 64, tokenizer=TARGET, draft_tokenizer=toy_tokenizer(420, PROSE + CODE))
    with pytest.raises(MethodError, match="the target's own: use method draft"):
        make_drafter("omnidraft", same)
    with pytest.raises(MethodError, match="needs a draft model"):
        make_drafter("omnidraft", DrafterContext(420, tokenizer=TARGET, draft_tokenizer=DRAFT))
    with pytest.raises(MethodError, match="tokenizers of both"):
        make_drafter("omnidraft", DrafterContext(420, hashed(DRAFT), 64))
    with pytest.raises(MethodError, match="vocabularies differ"):
        llm_of(hashed(TARGET), hashed(DRAFT), "draft")
    for spec, name in (("max_tokens=0", "max_tokens"), ("min_reach=2", "min_reach"), ("max_owners=0", "max_owners")):
        with pytest.raises(ParameterError, match=name):
            llm_of(hashed(TARGET), hashed(DRAFT), f"omnidraft:{spec}")


def test_merged_with_lookup() -> None:
    params = SamplingParams(max_tokens=60)
    with llm_of(Reciter(TARGET, TEXT), Reciter(DRAFT, TEXT), "suffix+omnidraft") as llm:
        result = llm.generate(TEXT[:30], params)[0]
        with llm.with_method("plain") as plain:
            assert result.token_ids == plain.generate(TEXT[:30], params)[0].token_ids
        assert result.stats.accepted_by_source["omnidraft"] > 10


@pytest.mark.slow
def test_a_real_pair_of_vocabularies() -> None:
    """SmolLM2 (49152 tokens) drafts for Qwen2.5-Coder (151665)."""
    try:
        llm = LLM(
            "qwen2.5-coder-0.5b",
            draft_model="smollm2-135m",
            method="omnidraft",
            planner="fixed",
            max_batch=1,
            kv_tokens=1024,
        )
    except DownloadError as e:
        pytest.skip(f"the models are neither in the cache nor to be had: {e}")
    prompts = [
        "Write a Python function that reverses a linked list, then explain it.",
        "List the planets of the solar system.",
    ]
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=96, temperature=temperature, seed=1)
        with llm.with_method("omnidraft") as fast, llm.with_method("plain") as plain:
            for prompt in prompts:
                result = fast.chat(prompt, params)
                assert result.token_ids == plain.chat(prompt, params).token_ids
                assert result.stats.mean_accepted > (1.8 if temperature == 0 else 1.2)
