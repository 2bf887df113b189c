"""Segments: what is kept by layer and head is what attention reads, and what is given up is free."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Rig, random_tokens, toy_checkpoint

from outpace.cache.pages import PAGE_SIZE, PagedKVCache
from outpace.cache.segments import HeadPages, Kept
from outpace.errors import CapacityError, ParameterError
from outpace.models.batch import Span, pack
from outpace.models.decoder import NO_TAPS, Taps
from outpace.models.native import NativeDecoder
from outpace.models.torch_decoder import TorchDecoder
from outpace.ops.masks import CAUSAL, Mask, Tree


def decoder_of(precision: Any = "float32", **overrides: Any) -> NativeDecoder:
    return NativeDecoder.from_checkpoint(toy_checkpoint("qwen2", **overrides)[0], precision, 1)


@pytest.fixture(scope="module")
def decoder() -> NativeDecoder:
    return decoder_of()


def step(rig: Rig, seq: int, tokens: np.ndarray, mask: Mask = CAUSAL, taps: Taps = NO_TAPS) -> Any:
    """One step of a sequence, with what it keeps. Nothing is committed."""
    cache = rig.cache
    cache.reserve(seq, len(tokens))
    before = cache.before(seq)
    span = Span(tokens, cache.length(seq) - before, mask, before=before)
    batch = pack([span], cache.page_tables([seq]))
    batch.ragged = cache.ragged([seq])
    return rig.decoder.forward(batch, cache.storage, taps)


def feed(rig: Rig, seq: int, tokens: np.ndarray) -> np.ndarray:
    rows = np.array(step(rig, seq, tokens).rows)
    rig.cache.commit(seq, range(len(tokens)))
    return rows


def random_kept(rng: np.random.Generator, places: int, layers: int = 3, heads: int = 2) -> Kept:
    """Other places in each layer and head, and other numbers of them."""
    counts = rng.integers(0, places // PAGE_SIZE + 1, (layers, heads)) * PAGE_SIZE
    return [[np.sort(rng.permutation(places)[:n]) for n in row] for row in counts]


def everything(places: int, layers: int = 3, heads: int = 2) -> Kept:
    return [[np.arange(places)] * heads] * layers


def test_keeping_everything_changes_no_bit(decoder: NativeDecoder) -> None:
    text, more = random_tokens(70, 1), random_tokens(9, 2)
    rig = Rig(decoder)
    whole, cut = rig.cache.new(), rig.cache.new()
    for seq in (whole, cut):
        feed(rig, seq, text)
    assert rig.cache.compact(cut, 64, everything(64)) == 0
    assert rig.cache.length(cut) == 70 and rig.cache.before(cut) == 64
    rig.cache.check_integrity()
    for tokens in (more[:1], more[1:5], more[5:]):
        assert np.array_equal(feed(rig, whole, tokens), feed(rig, cut, tokens))
    tree = Tree(np.array([-1, 0, -1, 2, 1]))
    draft = random_tokens(6, 3)
    assert np.array_equal(step(rig, whole, draft, tree).rows, step(rig, cut, draft, tree).rows)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_each_head_reads_its_own_places(precision: str) -> None:
    """One layer, beside attention by numpy over what is kept."""
    decoder = decoder_of(precision, num_hidden_layers=1)
    checkpoint = toy_checkpoint("qwen2", num_hidden_layers=1)[0]
    rig, rng = Rig(decoder), np.random.default_rng(5)
    seq = rig.cache.new()
    feed(rig, seq, random_tokens(50, 4))
    rig.cache.compact(seq, 48, [[np.sort(rng.permutation(48)[:32]), np.sort(rng.permutation(48)[:16])]])
    feed(rig, seq, random_tokens(16, 5))
    token = random_tokens(1, 6)
    out = step(rig, seq, token, taps=Taps(hidden=(0,), queries=(0,)))
    rig.cache.commit(seq, range(1))
    sealed = rig.cache.length(seq) - rig.cache.before(seq)
    heads, group, attended = decoder.config.num_kv_heads, 2, []
    for head in range(heads):
        keys, values, positions = rig.cache.read(seq, 0, head, -(-sealed // PAGE_SIZE) * PAGE_SIZE)
        count = (32, 16)[head] + sealed
        keys, values = keys[:count, :16], values[:count, :16]
        assert positions[:count].tolist() == sorted(positions[:count].tolist()) and positions[count - 1] == 66
        for query in out.queries[0][0, head * group : (head + 1) * group, :16]:
            weights = np.exp(keys @ query - (keys @ query).max())
            attended.append(weights / weights.sum() @ values)
    x = np.array(decoder.embedding(token))[0]
    x = x + checkpoint.tensor("model.layers.0.self_attn.o_proj.weight") @ np.concatenate(attended)
    y = x / np.sqrt(np.square(x).mean() + decoder.config.rms_norm_eps)
    y = y * checkpoint.tensor("model.layers.0.post_attention_layernorm.weight")
    gate, up, down = (checkpoint.tensor(f"model.layers.0.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
    x = x + down @ (gate @ y / (1 + np.exp(-(gate @ y))) * (up @ y))
    tolerance = 1e-4 if precision == "float32" else 0.1
    np.testing.assert_allclose(out.hidden[0][0], x, rtol=tolerance, atol=tolerance)


def test_a_second_compaction_keeps_of_what_the_first_kept(decoder: NativeDecoder) -> None:
    rig, rng = Rig(decoder), np.random.default_rng(7)
    seq = rig.cache.new()
    feed(rig, seq, random_tokens(64, 1))
    first = random_kept(rng, 48)
    rig.cache.compact(seq, 48, first)
    feed(rig, seq, random_tokens(20, 2))
    held = [[rig.cache.read(seq, i, h, 32) for h in range(2)] for i in range(3)]
    second = [[np.sort(rng.permutation(len(held[i][h][2]))[:16]) for h in range(2)] for i in range(3)]
    rig.cache.compact(seq, 32, second)
    rig.cache.check_integrity()
    assert rig.cache.before(seq) == 80 and rig.cache.length(seq) == 84
    for i in range(3):
        for h in range(2):
            keys, values, positions = rig.cache.read(seq, i, h, 0)
            for new, old in zip((keys, values, positions), held[i][h], strict=True):
                assert np.array_equal(new, old[second[i][h]])
            known = [*first[i][h].tolist(), *range(48, 80)]
            assert positions.tolist() == [known[n] for n in second[i][h]]


def test_bytes_that_are_reported_are_free(decoder: NativeDecoder) -> None:
    rig = Rig(decoder, pages=12)
    seq, cache = rig.cache.new(), rig.cache
    feed(rig, seq, random_tokens(160, 1))
    before, used = cache.available_pages, cache.bytes_held(seq)
    quarter = [[np.arange(0, 144, 4)[:32]] * 2] * 3
    freed = cache.compact(seq, 144, quarter)
    assert cache.available_pages - before == 7  # nine pages less two
    assert freed == used - cache.bytes_held(seq) == 7 * cache.storage.bytes_per_page
    other = cache.new()
    feed(rig, other, random_tokens(100, 2))  # in the pages that were given back
    cache.check_integrity()
    for one in (seq, other):
        cache.free(one)
    cache.check_integrity()
    assert cache.available_pages == 12


def test_forks_share_a_segment(decoder: NativeDecoder) -> None:
    rig, more = Rig(decoder), random_tokens(20, 3)
    seq = rig.cache.new()
    feed(rig, seq, random_tokens(70, 1))
    rig.cache.compact(seq, 64, random_kept(np.random.default_rng(1), 64))
    twin = rig.cache.fork(seq)
    rig.cache.check_integrity()
    assert np.array_equal(feed(rig, seq, more), feed(rig, twin, more))
    rig.cache.compact(twin, 16, [[np.empty(0, np.int64)] * 2] * 3)  # its own affair
    rig.cache.check_integrity()
    rig.cache.free(twin)
    feed(rig, seq, more)
    rig.cache.free(seq)
    rig.cache.check_integrity()
    assert rig.cache.available_pages == rig.cache.storage.num_pages


def test_what_cannot_be(decoder: NativeDecoder) -> None:
    rig = Rig(decoder, pages=7)
    seq, cache = rig.cache.new(), rig.cache
    feed(rig, seq, random_tokens(80, 1))
    for wrong in (np.arange(15), np.arange(1, 81)[-16:], np.arange(16)[::-1].copy(), np.zeros(16, np.int64)):
        with pytest.raises(ParameterError, match="a multiple of 16 ascending places below 64"):
            cache.compact(seq, 64, [[np.arange(16), wrong], *everything(64)[:2]])
    twin = cache.fork(seq)
    with pytest.raises(CapacityError, match="others use the same"):
        cache.compact(seq, 80, everything(80))
    cache.check_integrity()
    assert cache.length(seq) == 80 and not cache.before(seq)
    cache.free(twin)
    cache.compact(seq, 64, everything(64))
    with pytest.raises(AssertionError, match="cannot truncate"):
        cache.truncate(seq, 60)
    cache.truncate(seq, 70)
    assert cache.length(seq) == 70
    for call in (lambda: cache.swap_out(seq), lambda: cache.share(seq, 64)):
        with pytest.raises(AssertionError):
            call()
    torch_cache = PagedKVCache(TorchDecoder.from_checkpoint(toy_checkpoint("qwen2")[0], "float32").new_storage(4))
    with pytest.raises(ParameterError, match="CPU decoder alone"):
        torch_cache.compact(torch_cache.new(), 0, everything(0))
    with pytest.raises(ParameterError, match="CPU decoder alone"):
        torch_cache.heads  # noqa: B018


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=25), st.integers(1, 5))
def test_head_pages_are_lost_or_given_twice_never(calls: list[tuple[bool, int]], per_page: int) -> None:
    heads, taken, next_page = HeadPages(per_page), list[list[int]](), 0
    for takes, count in calls:
        if takes:
            for _ in range(heads.pages_needed(count)):
                heads.split(next_page, np.arange(next_page * per_page, (next_page + 1) * per_page))
                next_page += 1
            taken.append(heads.take(count))
        elif taken:
            one = taken.pop(count % len(taken))
            whole = heads.give(one)
            assert len(set(whole)) == len(whole) and not set(whole) & set(heads.split_pages)
        heads.check_integrity([number for one in taken for number in one])
    least = -(-sum(map(len, taken)) // per_page)
    assert len(heads.split_pages) >= least


def test_queries_of_all_layers_are_those_of_the_reference(decoder: NativeDecoder) -> None:
    tokens, taps = random_tokens(9, 1), Taps(queries=(0, 1, 2))
    rigs = Rig(decoder), Rig(TorchDecoder.from_checkpoint(toy_checkpoint("qwen2")[0], "float32"))
    found = []
    for rig in rigs:
        seq = rig.cache.new()
        rig.step((seq, tokens, CAUSAL), taps=taps)
        found.append([np.asarray(rig.output.queries[i])[..., :16] for i in range(3)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-4)
