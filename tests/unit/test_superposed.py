"""Superposed Decoding over toy models with real arithmetic, and over the default model's real text."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from toy import EOS, VOCAB, Rig, toy_checkpoint

from outpace import LLM
from outpace.decoding.ngram_model import NgramModel
from outpace.engine.load import LoadedModel
from outpace.errors import CapacityError, DownloadError, ParameterError
from outpace.models.native import NativeDecoder
from outpace.models.tokenizer import Tokenizer
from outpace.models.torch_decoder import TorchDecoder
from outpace.registry import method
from outpace.types import SamplingParams

PROMPT = list(b"the tide went out")
PRINTABLE = {i: -100.0 for i in range(94, VOCAB)}  # the tokens before it are the visible letters of ASCII


def toy(kind: str = "torch") -> LLM:
    checkpoint, _ = toy_checkpoint("llama")
    decoder = (
        TorchDecoder.from_checkpoint(checkpoint, "float32", "cpu")
        if kind == "torch"
        else NativeDecoder.from_checkpoint(checkpoint, "int8", threads=1)
    )
    loaded = LoadedModel("toy", decoder, Tokenizer(checkpoint.tokenizer_files()))
    return LLM(loaded, method="plain", max_batch=1, kv_tokens=256)


@pytest.mark.parametrize("kind", ["torch", "native"])
def test_one_draft_is_greedy_decoding(kind: str) -> None:
    with toy(kind) as llm:
        for seed in range(3):
            prompt = np.random.default_rng(seed).integers(0, 256, 5 + seed).tolist()
            params = SamplingParams(max_tokens=20, repetition_penalty=1.1 if seed == 2 else 1.0)
            plain = llm.generate(prompt, params)[0]
            found = llm.superposed(prompt, 1, params)
            assert [draft.token_ids for draft in found.drafts] == [plain.token_ids]
            assert found.drafts[0].text == plain.text
            assert found.drafts[0].finished == (plain.finish_reason == "stop")


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_step_costs_one_row_whatever_k_is(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with toy() as llm:
        rows: list[int] = []
        forward = llm.decoder.forward

        def counted(batch, *args):  # type: ignore[no-untyped-def]
            rows.append(len(batch.tokens))
            return forward(batch, *args)

        monkeypatch.setattr(llm.decoder, "forward", counted)
        params = SamplingParams(max_tokens=12, ignore_eos=True, logit_bias=PRINTABLE)
        found = llm.superposed(PROMPT, k, params)
        assert rows == [len(PROMPT)] + [1] * 11 and found.stats.steps == 11
        assert len(found.drafts) == k and all(len(draft.token_ids) == 12 for draft in found.drafts)
        assert len({tuple(draft.token_ids) for draft in found.drafts}) == k
        assert len({draft.text for draft in found.drafts}) == k
        scores = [draft.score for draft in found.drafts]
        assert scores == sorted(scores, reverse=True)


def test_scores_are_those_of_the_superposed_model() -> None:
    """Two drafts and no n-grams, followed by hand."""
    with toy() as llm:
        decoder = llm.decoder
        found = llm.superposed(PROMPT, 2, SamplingParams(max_tokens=2), ngram_weight=0.0)
        rig = Rig(decoder)
        seq = rig.cache.new()
        first = torch.log_softmax(torch.from_numpy(rig.feed(seq, PROMPT)[-1]), -1)
        p, ids = first.topk(2)
        gamma = torch.softmax(p, -1).numpy()
        mixed = (gamma[:, None] * decoder.embedding(ids.numpy())).sum(axis=0, keepdims=True).astype(np.float32)
        rig.cache.reserve(seq, 1)
        from outpace.models.batch import Span, pack

        batch = pack([Span([0], len(PROMPT))], rig.cache.page_tables([seq]))
        batch.embeddings = mixed
        second = torch.log_softmax(decoder.forward(batch, rig.cache.storage).logits[0], -1)
        q, tokens = second.topk(2)
        expected = sorted(
            ((float(p[i] + q[j]), [int(ids[i]), int(tokens[j])]) for i in range(2) for j in range(2)),
            reverse=True,
        )[:2]
        assert [draft.token_ids for draft in found.drafts] == [tokens for _, tokens in expected]
        np.testing.assert_allclose([draft.score for draft in found.drafts], [s for s, _ in expected], atol=1e-4)


def test_n_grams_of_a_named_text_decide() -> None:
    """The toy model knows nothing of English; the text does, and k drafts follow it."""
    with toy() as llm:
        text = "the tide went out and the boats lay on the sand. " * 4
        found = llm.superposed(
            "the tide went", 2, SamplingParams(max_tokens=8, ignore_eos=True), [text], ngram_weight=0.95
        )
        assert found.drafts[0].text == " out and"
        without = llm.superposed("the tide went", 2, SamplingParams(max_tokens=8, ignore_eos=True))
        assert without.drafts[0].text != " out and"


def test_a_stop_ends_a_draft_and_the_others_go_on() -> None:
    with toy() as llm:
        bias = {EOS: 30.0}
        ended = llm.superposed(PROMPT, 3, SamplingParams(max_tokens=6, logit_bias=bias))
        assert any(draft.finished and draft.token_ids[-1] == EOS for draft in ended.drafts)
        assert len({draft.text for draft in ended.drafts}) == len(ended.drafts)
        plain = llm.superposed(PROMPT, 3, SamplingParams(max_tokens=6, ignore_eos=True)).drafts
        stop = plain[0].text[2]
        cut = llm.superposed(PROMPT, 3, SamplingParams(max_tokens=6, ignore_eos=True, stop=(stop,)))
        assert all(stop not in draft.text for draft in cut.drafts)


@pytest.mark.parametrize(
    "options",
    [{"k": 0}, {"k": 17}, {"ngram_weight": 1.0}, {"ngram_weight": -0.1}, {"ngram_order": 1}],
)
def test_senseless_options_are_refused(options: dict[str, float]) -> None:
    with toy() as llm, pytest.raises(ParameterError, match=f"{next(iter(options))}="):
        llm.superposed(PROMPT, **options)  # type: ignore[arg-type]


def test_what_it_cannot_follow_is_refused() -> None:
    with toy() as llm:
        with pytest.raises(ParameterError, match="temperature=0"):
            llm.superposed(PROMPT, 2, SamplingParams(temperature=0.5))
        with pytest.raises(ParameterError, match="empty"):
            llm.superposed([], 2)
        with pytest.raises(CapacityError, match="context is 512"):
            llm.superposed(PROMPT, 2, SamplingParams(max_tokens=600))
    with pytest.raises(ParameterError, match="closed"):
        llm.superposed(PROMPT)
    assert method("superposed", "mode").exactness == "approximate"


def test_ngram_model_is_a_distribution_and_follows_its_text() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3]
    model = NgramModel([text], order=3)
    base = np.full(6, 1 / 6)
    p = np.array([model.probability([1, 2], t, base[t]) for t in range(6)])
    assert p.sum() == pytest.approx(1.0) and p.argmax() == 3
    # after (1, 2): 3 twice, 4 once, of two kinds; below it after (2): the same counts
    below = (2 + 2 / 6) / 5
    assert p[3] == pytest.approx((2 + 2 * below) / 5)
    assert model.probability([5, 5], 3, 0.25) == 0.25
    assert model.continuations([1, 2]) == [3, 4] and model.continuations([5]) == []
    read = Counter({3: 2, 4: 1})
    assert model._after[(1, 2)] == read


def test_real_text() -> None:
    """Three different beginnings, the first token of each among the model's own three likeliest."""
    try:
        llm = LLM("smollm2-135m", method="plain", threads=1, max_batch=1, kv_tokens=512)
    except DownloadError as e:
        pytest.skip(f"the default model is neither in the cache nor to be had: {e}")
    with llm:
        prompt = "The three most important inventions of the 19th century are"
        found = llm.superposed(prompt, 3, SamplingParams(max_tokens=10))
        assert len({draft.text for draft in found.drafts}) == 3 and found.stats.steps <= 9
        assert any(word in draft.text for draft in found.drafts for word in ("telephone", "wheel", "bicycle", "light"))
        first = {draft.token_ids[0] for draft in found.drafts}
        logprobs = llm.generate(prompt, SamplingParams(max_tokens=1, logprobs=3))[0].top_logprobs
        assert logprobs is not None and first <= {token for token, _ in logprobs[0]}
        greedy = llm.generate(prompt, SamplingParams(max_tokens=10))[0]
        assert llm.superposed(prompt, 1, SamplingParams(max_tokens=10)).drafts[0].token_ids == greedy.token_ids
