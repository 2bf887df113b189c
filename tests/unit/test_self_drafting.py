"""Drafting with the target itself: fewer layers, coarser weights, part of the keys and values.

Over real (toy-size) decoders, since what these methods leave out is part of one. The loop's output must be that of
plain decoding, and a view that leaves nothing out must be right every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hashing import engine_options
from hypothesis import given
from hypothesis import strategies as st
from toy import VOCAB, Rig, random_tokens, toy_checkpoint

from outpace import LLM
from outpace.cache.pages import PAGE_SIZE
from outpace.decoding.contracts import Drafter, DrafterContext, Sequence
from outpace.decoding.drafters.guessers import LookupGuesser, ModelGuesser
from outpace.decoding.drafters.magicdec import MagicDec
from outpace.decoding.drafters.sparse import Streaming
from outpace.decoding.drafters.swift import SkipSearch, Swift, speedup, uniform_skips
from outpace.decoding.drafters.triforce import TriForce
from outpace.decoding.methods import make_drafter
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.decoding.verify.rejection import RejectionVerifier
from outpace.engine.engine import Engine, new_cache
from outpace.errors import MethodError, ParameterError
from outpace.models.batch import Span, pack
from outpace.models.decoder import Taps
from outpace.models.native import NativeDecoder
from outpace.models.torch_decoder import TorchDecoder
from outpace.models.views import keep_pages
from outpace.ops.masks import Tree
from outpace.types import Precision, Result, SamplingParams

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.95, seed=5)
PENALISED = replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.2)
PROMPTS = [random_tokens(n, n).tolist() for n in (5, 70, 33)]
CONFIG = engine_options(kv_tokens=1024, max_batch=3)


@cache
def native(architecture: str = "qwen2", precision: Precision = "int8", **overrides: Any) -> NativeDecoder:
    return NativeDecoder.from_checkpoint(toy_checkpoint(architecture, **overrides)[0], precision, 1)


@pytest.fixture(scope="module")
def deep() -> NativeDecoder:
    return native(num_hidden_layers=8)


def context_of(target: Any, **fields: Any) -> DrafterContext:
    fields.setdefault("cache", new_cache(target, CONFIG))
    fields.setdefault("target_in", lambda precision: native(precision=precision, num_hidden_layers=8))
    return DrafterContext(target.config.vocab_size, target=target, **fields)


def run(
    target: Any, method: str, params: SamplingParams = GREEDY, verifier: Any = None, **fields: Any
) -> tuple[list[Result], Drafter, Engine]:
    """All prompts at once; checks the books after every step."""
    context = context_of(target, sampled=verifier is not None and verifier.uses_q, **fields)
    drafter = make_drafter(method, context)
    engine = Engine(target, drafter, verifier or CoupledVerifier(), options=CONFIG, cache=context.cache)
    ids = [engine.add(prompt, params) for prompt in PROMPTS]
    results: dict[int, Result] = {}
    while len(results) < len(ids):
        for event in engine.step():
            if event.result is not None:
                results[event.id] = event.result
        engine.check_integrity()
    assert engine.cache.bytes_used == 0
    return [results[i] for i in ids], drafter, engine


METHODS = [
    "swift:skip=0.2,window=8",
    "quantspec",
    "magicdec:sinks=16,window=16",
    "triforce:budget=16,window=16,rebuild=8",
    "magicdec:window=16+ngram",
]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED])
@pytest.mark.parametrize("method", METHODS)
def test_the_output_is_that_of_plain_decoding(deep: NativeDecoder, method: str, params: SamplingParams) -> None:
    plain, _, _ = run(deep, "plain", params)
    ours, _, _ = run(deep, method, params)
    assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
    assert all(r.stats.drafted > 0 and r.exactness == "identical" for r in ours)


@pytest.mark.parametrize("method", ["magicdec:sinks=16,window=16", "triforce:budget=16,window=16,third_window=16"])
def test_with_a_draft_model(deep: NativeDecoder, method: str) -> None:
    draft = native(seed=0, num_hidden_layers=2)
    for params in (GREEDY, SAMPLED):
        plain, _, _ = run(deep, "plain", params)
        ours, drafter, _ = run(deep, method, params, draft=draft, draft_pages=64)
        assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
        source = drafter.source if isinstance(drafter, MagicDec) else drafter.third.source  # type: ignore[attr-defined]
        source.cache.check_integrity()
        assert source.cache.pages_in_use == 0 and source.decoder is draft


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
@pytest.mark.parametrize(
    "method",
    ["swift:skip=0,trials=0,min_reach=0", "magicdec:min_reach=0,window=2048", "triforce:min_reach=0,budget=2048"],
)
def test_a_view_without_loss_is_always_right(deep: NativeDecoder, method: str, params: SamplingParams) -> None:
    results, drafter, _ = run(deep, method, params)
    assert all(r.stats.acceptance_rate == 1 for r in results)
    longest = drafter.max_tokens  # type: ignore[attr-defined]
    assert results[0].stats.mean_accepted > 0.6 * (1 + min(longest, CONFIG.step_rows // 3 - 1))


@pytest.mark.parametrize("method", METHODS[:4])
def test_drafts_carry_q_where_the_verifier_wants_it(deep: NativeDecoder, method: str) -> None:
    params = replace(SAMPLED, temperature=1.2, top_p=1.0)
    results, _, _ = run(deep, method, params, RejectionVerifier())
    assert all(len(r.token_ids) == params.max_tokens and r.exactness == "distribution" for r in results)
    assert sum(r.stats.accepted for r in results) > 0


def test_every_method_says_what_it_cannot_do(deep: NativeDecoder) -> None:
    gemma, shallow = native("gemma3"), native()
    torch_target = TorchDecoder.from_checkpoint(toy_checkpoint("qwen2")[0])
    for method, target, message in (
        ("swift", shallow, "at least 8 layers, and this one has 3"),
        ("quantspec", native(precision="int4"), "not in int4"),
        ("quantspec", native(precision="float32"), "not in float32"),
        ("quantspec", torch_target, "needs the CPU decoder"),
        ("magicdec", gemma, "sliding-window layers"),
        ("triforce", gemma, "sliding-window layers"),
        ("triforce", torch_target, "needs the CPU decoder"),
    ):
        with pytest.raises(MethodError, match=message):
            make_drafter(method, context_of(target))
    for method in ("swift", "quantspec", "magicdec", "triforce"):
        with pytest.raises(MethodError, match=f"{method!r} drafts with the target model in its own KV cache"):
            make_drafter(method, DrafterContext(VOCAB))
    for spec in (
        "swift:skip=1", "swift:window=4", "swift:trials=-1", "swift:max_tokens=0", "magicdec:window=0",
        "magicdec:sinks=-1", "triforce:budget=0", "triforce:guesses=0", "triforce:rebuild=0", "quantspec:min_reach=2",
    ):  # fmt: skip
        with pytest.raises(ParameterError, match="out of range"):
            make_drafter(spec, context_of(deep))


def test_no_room_in_the_cache_no_draft(deep: NativeDecoder) -> None:
    """Prompts fill the cache to the last page but what they were admitted with."""
    config = engine_options(kv_tokens=96, max_batch=1)
    for method in METHODS[:4]:
        cache = new_cache(deep, config)
        drafter = make_drafter(method, context_of(deep, cache=cache))
        engine = Engine(deep, drafter, CoupledVerifier(), options=config, cache=cache)
        engine.add(PROMPTS[1], replace(GREEDY, max_tokens=96 - len(PROMPTS[1])))
        while not engine.idle:
            engine.step()
            engine.check_integrity()


# views of the cache


@given(st.integers(0, 80), st.integers(0, 64), st.integers(1, 64))
def test_streaming_keeps_the_ends(full: int, sinks: int, window: int) -> None:
    pages = Streaming("m", sinks, window).pages(full).tolist()
    assert pages == sorted(set(pages)) and all(0 <= p < full for p in pages)
    assert set(pages) >= {*range(min(-(-sinks // PAGE_SIZE), full))} | {
        p for p in range(full) if p >= full - window / 16
    }
    assert len(pages) <= -(-sinks // PAGE_SIZE) + -(-window // PAGE_SIZE)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_sparse_view_is_the_text_without_the_pages_left_out(precision: Precision) -> None:
    """Against a mask over the whole text: a tree of rows that list every place they may see."""
    decoder, tokens = native(precision=precision), random_tokens(75, 3)
    rig = Rig(decoder)
    seq = rig.cache.new()
    rig.feed(seq, tokens)
    parents, new = np.array([-1, 0, 0, 2]), random_tokens(5, 9)
    rig.cache.reserve(seq, 5)
    batch = pack([Span(new, 75, Tree(parents))], rig.cache.page_tables([seq]))
    whole = decoder.forward(batch, rig.cache.storage).logits.numpy().copy()
    same = keep_pages(batch, [np.arange(4)])
    assert (decoder.forward(same, rig.cache.storage).logits.numpy() == whole).all()
    sparse = keep_pages(batch, [np.array([0, 2])])
    assert sparse.committed.tolist() == [75 - 2 * PAGE_SIZE] and sparse.positions.tolist() == batch.positions.tolist()
    got = decoder.forward(sparse, rig.cache.storage).logits.numpy().copy()
    torch_rig = Rig(TorchDecoder.from_checkpoint(toy_checkpoint("qwen2")[0]))
    seq = torch_rig.cache.new()
    torch_rig.feed(seq, tokens)
    torch_rig.cache.reserve(seq, 5)
    batch = pack([Span(new, 75, Tree(parents))], torch_rig.cache.page_tables([seq]))
    storage: Any = torch_rig.cache.storage
    for page in (1, 3):  # left out for good: keys that no query can meet, by values of zero and scores of nothing
        slots = torch_rig.cache.page_table(seq)[page] * PAGE_SIZE + np.arange(PAGE_SIZE)
        storage.v_slots[:, slots] = 0
    expected = torch_rig.decoder.forward(keep_pages(batch, [np.array([0, 2])]), storage).logits.numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=(1e-4 if precision == "float32" else 0.1) * scale)
    assert np.abs(got - whole).max() > 0.01 * scale


def test_retrieval_finds_the_page_that_the_query_asks_for() -> None:
    """The chosen pages are those of the largest mean attention score, counted by hand from the last layer's keys."""
    decoder = native(precision="float32")
    context = context_of(decoder)
    drafter = make_drafter("triforce:budget=32,window=16", context)
    assert isinstance(drafter, TriForce) and context.cache is not None
    cache, tokens = context.cache, random_tokens(16 * 9 + 5, 8)
    seq = cache.new()
    cache.reserve(seq, len(tokens))
    batch = pack([Span(tokens, 0)], cache.page_tables([seq]))
    last = decoder.config.num_layers - 1
    queries = decoder.forward(batch, cache.storage, Taps(queries=(last,))).queries[last][-1]
    cache.commit(seq, range(len(tokens)))
    sequence = Sequence(0, [*tokens.tolist(), 7], 3, GREEDY, kv=seq)
    drafter.retrieval.choose(sequence, queries)
    pages = drafter.retrieval.pages(sequence, 9)
    storage: Any = cache.storage
    keys = storage.keys[-1, cache.page_table(seq)[:9], :, :, :, 0]  # [9, Hkv, C, 16]
    shares = []
    for head, query in enumerate(queries):
        scores = np.array([query @ keys[p, head // 2].mean(axis=-1) for p in range(9)])
        shares.append(np.exp(scores) / np.exp(scores).sum())
    score = np.mean(shares, axis=0)[:8]
    best = {0, *[p for p in np.argsort(-score).tolist() if p > 0][:1]}
    assert pages.tolist() == [*sorted(best), 8]
    assert not drafter.retrieval.stale(sequence)
    sequence.tokens += [1] * 64
    assert drafter.retrieval.stale(sequence) and drafter.retrieval.pages(sequence, 13).tolist() == [*range(13)]


# swift


@given(st.integers(8, 60), st.floats(0, 0.99))
def test_uniform_skips_leave_the_ends_alone(layers: int, ratio: float) -> None:
    for part in uniform_skips(layers, ratio):
        assert len(part) == min(round(ratio * layers), layers - 2)
        assert all(0 < i < layers - 1 for i in part)


def test_speedup_is_that_of_the_best_length() -> None:
    assert speedup(1.0, 0.5) == pytest.approx(9 / 5)
    assert speedup(0.0, 0.5) == pytest.approx(1 / 1.5)
    assert speedup(0.5, 0.1) == pytest.approx(
        max(sum(0.5**i for i in range(n + 1)) / (1 + 0.1 * n) for n in range(1, 9))
    )


def test_the_search_finds_what_may_be_skipped() -> None:
    """Sublayers 3, 5, 6 of attention and 2 of the MLP do nothing; each other one that is skipped costs agreement."""
    idle = {3, 5, 6}, {2}

    def measure(skips: Any) -> tuple[float, float]:
        harm = sum(len(part - free) for part, free in zip(skips, idle, strict=True))
        return 0.9 * 0.6**harm, 1 - sum(map(len, skips)) / 20

    search = SkipSearch(10, 0.45, 300)
    search.rate(*measure(search.best))
    start = search.value
    while not search.over:
        skips = search.candidate()
        search.offer(skips, *measure(skips))
    assert search.value > 1.2 * start and search.tried <= 300
    assert len(search.best[0] & idle[0]) >= 2 and len(search.best[0] - idle[0]) + len(search.best[1] - idle[1]) <= 1


def test_swift_judges_sets_on_text_that_the_target_said(deep: NativeDecoder) -> None:
    """With nothing skipped the replayed stretch says again what it said; the cache is as it was."""
    context = context_of(deep)
    drafter = make_drafter("swift:skip=0,window=16", context)
    assert isinstance(drafter, Swift) and context.cache is not None
    engine = Engine(deep, drafter, CoupledVerifier(), options=CONFIG, cache=context.cache)
    engine.add(PROMPTS[2], replace(GREEDY, max_tokens=60))
    judged: list[float] = []
    inner = drafter._matchness

    def spy(stretch: Any) -> float | None:
        drafter._view.skip((), ())
        free = context.cache.free_pages  # type: ignore[union-attr]
        found = inner(stretch)
        assert context.cache.free_pages == free and found is not None  # type: ignore[union-attr]
        judged.append(found)
        return found

    drafter._matchness = spy  # type: ignore[method-assign]
    while not engine.idle:
        engine.step()
        engine.check_integrity()
    assert len(judged) > 3 and set(judged) == {1.0}


def test_swift_improves_on_its_first_set(deep: NativeDecoder) -> None:
    _, drafter, _ = run(deep, "swift:window=16", replace(GREEDY, max_tokens=120))
    assert isinstance(drafter, Swift)
    search = drafter.search
    assert search.tried > 10 and search.best != uniform_skips(8, 0.45)
    assert drafter._view.skipped == search.best and "skips attention of layers" in drafter.explain()[0]


# third drafters


def test_the_third_drafter_s_right_guesses_save_forwards(deep: NativeDecoder) -> None:
    """The target itself as third drafter is right every time: each forward of the middle gives 1 + guesses tokens."""
    twin = native(num_hidden_layers=8)
    counts: list[int] = []
    for draft in (None, twin):
        context = context_of(deep, draft=draft, draft_pages=64)
        drafter = make_drafter("triforce:min_reach=0,budget=2048,guesses=3,max_tokens=9", context)
        assert isinstance(drafter, TriForce)
        assert isinstance(drafter.third, LookupGuesser if draft is None else ModelGuesser)
        engine = Engine(deep, drafter, CoupledVerifier(), options=CONFIG, cache=context.cache)
        engine.add(PROMPTS[1], GREEDY)
        extend, forwards = drafter.source.extend, 0

        def counted(rows: Any, extend: Any = extend) -> Any:
            nonlocal forwards
            forwards += 1
            return extend(rows)

        drafter.source.extend = counted  # type: ignore[method-assign]
        results = []
        while not engine.idle:
            results += [e.result for e in engine.step() if e.result is not None]
        counts.append(forwards)
        assert results[0].stats.acceptance_rate == 1
    steps = -(-39 // 10)
    assert counts[1] == 2 * steps and counts[0] > counts[1]


# real text


@pytest.fixture(scope="module")
def real() -> Iterator[LLM]:
    with LLM("smollm2-135m", method="plain", threads=1, max_batch=1, kv_tokens=1024) as llm:
        yield llm


QUESTION = "List the planets of the solar system in order, each with one short fact about it."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "least"),
    [("quantspec", 2.5), ("swift", 1.2), ("magicdec:window=64,sinks=16", 2.0), ("triforce:window=32,budget=32", 2.0)],
)
def test_on_real_text(real: LLM, method: str, least: float) -> None:
    params = SamplingParams(max_tokens=96, ignore_eos=True)
    plain = real.chat(QUESTION, params)
    llm = real.with_method(method)
    ours = llm.chat(QUESTION, params)
    assert ours.token_ids == plain.token_ids and ours.stats.mean_accepted >= least
    llm.check_integrity()
