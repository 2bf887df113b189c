"""QuantSpec's compact copy of the keys and values: the codes, the attention that reads them, and the drafter over them.

The slow reference is numpy in float64 over `decoded` pages, written from the definition of the codes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hashing import engine_options
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from toy import Rig, random_tokens, toy_checkpoint

from outpace.cache.native_storage import NativeStorage
from outpace.cache.pages import PagedKVCache
from outpace.cache.quantized import QuantizedPages
from outpace.decoding.contracts import DrafterContext
from outpace.decoding.drafters.quantspec import QuantSpec
from outpace.decoding.methods import make_drafter
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine, new_cache
from outpace.errors import MethodError, ParameterError
from outpace.models.batch import ForwardBatch, Span, Tree, pack
from outpace.models.native import NativeDecoder
from outpace.models.views import keep_pages
from outpace.ops.cpu import isa
from outpace.types import Precision, Result, SamplingParams

F64 = NDArray[np.float64]
each_bits = pytest.mark.parametrize("bits", [4, 8])


def floats(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def new_pages(layers: int, pages: int, heads: int, width: int, seed: int = 0) -> PagedKVCache:
    """A cache whose pages are full of numbers: channels of very different size and mean, as keys have them."""
    rng = np.random.default_rng(seed)
    storage = NativeStorage(layers, pages, heads, width, bf16=True)
    spread = rng.lognormal(sigma=1.5, size=(layers, 1, heads, width, 1))
    centre = 20 * rng.normal(size=spread.shape)
    numbers = (spread * rng.normal(size=(layers, pages, heads, width, 16)) + centre).astype(np.float32)
    pairs = numbers.reshape(layers, pages, heads, width // 2, 2, 16).swapaxes(-1, -2)
    storage.keys[:] = bf16(pairs)
    numbers = rng.normal(size=(layers, pages, heads, 8, 2, width)).astype(np.float32)
    storage.values[:] = bf16(numbers.swapaxes(-1, -2))
    return PagedKVCache(storage)


def keys_of(storage: NativeStorage) -> NDArray[np.float32]:
    """[L, pages, Hkv, place, C]"""
    k = floats(storage.keys)
    return k.transpose(0, 1, 2, 4, 3, 5).reshape(*k.shape[:3], 16, -1)


def values_of(storage: NativeStorage) -> NDArray[np.float32]:
    """[L, pages, Hkv, place, C]"""
    v = floats(storage.values)
    return v.transpose(0, 1, 2, 3, 5, 4).reshape(*v.shape[:3], 16, -1)


def nibbles(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[..., n * 64] bytes -> [..., n, 2 (bits 0-3, 4-7), 16 lanes, 4 bytes]"""
    parts = codes.reshape(*codes.shape[:-1], -1, 1, 16, 4)
    return np.concatenate((parts & 15, parts >> 4), axis=-3).astype(np.int64)


def key_numbers(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[..., 8 C] bytes -> [..., place, C]"""
    parts = nibbles(codes)  # eight channels, halves of them, place, channel
    lead = parts.shape[:-4]
    return np.moveaxis(parts, -2, -4).reshape(*lead, 16, -1)


def value_numbers(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[..., 8 C] bytes -> [..., place, C]"""
    lead = codes.shape[:-1]
    parts = nibbles(codes).reshape(*lead, -1, 2, 2, 16, 4)  # sixteen channels, half, quarter, channel, place
    n = parts.ndim
    order = [*range(n - 5), n - 4, n - 3, n - 1, n - 5, n - 2]
    return parts.transpose(order).reshape(*lead, 16, -1)


def decoded(store: QuantizedPages) -> tuple[F64, F64]:
    """All keys and values as the codes say them, [L, pages, Hkv, place, C]."""
    w, codes = store.width, store.codes
    assert store.spread is not None

    def part(first: int, size: int, dtype: Any) -> NDArray[Any]:
        return np.ascontiguousarray(codes[..., first : first + size]).view(dtype)

    gain, mid = part(0, 64, np.float32), floats(part(64, 2 * w, np.uint16))
    value_scale, value_mid = part(64 + 10 * w, 64, np.float32), part(128 + 10 * w, 64, np.float32)
    keys, values = key_numbers(part(64 + 2 * w, 8 * w, np.uint8)) - 7.5, value_numbers(codes[..., 192 + 10 * w :]) - 7.5
    if store.lower is not None:
        keys = keys + (key_numbers(store.lower[..., : 8 * w]) - 8) / 16
        values = values + (value_numbers(store.lower[..., 8 * w :]) - 8) / 16
    step = gain[..., None].astype(np.float64) * store.spread[:, None, :, None]
    return keys * step + mid[..., None, :], values * value_scale[..., None].astype(np.float64) + value_mid[..., None]


def all_pages(cache: PagedKVCache) -> NDArray[np.int32]:
    return np.arange(cache.storage.num_pages, dtype=np.int32)


# the codes


@each_bits
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([32, 64, 96, 128]), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_number_is_within_half_a_step_of_its_code(bits: int, layers: int, heads: int, width: int, seed: int) -> None:
    cache = new_pages(layers, 3, heads, width, seed)
    store = QuantizedPages(cache, bits)
    store.refresh(all_pages(cache))
    storage: Any = cache.storage
    assert store.spread is not None
    keys, values = decoded(store)
    record = np.ascontiguousarray(store.codes[..., : 64 + 2 * width])
    gain, mid = record[..., :64].copy().view(np.float32), floats(record[..., 64:].copy().view(np.uint16))
    exact, spread = keys_of(storage), store.spread[:, None, :, None].astype(np.float64)
    top, bottom = exact.max(axis=3), exact.min(axis=3)
    assert (np.abs(mid - (top + bottom) / 2) <= 2**-8 * np.abs(top + bottom) / 2).all()
    reach = (np.abs(exact - mid[..., None, :]) / spread).max(axis=4)
    np.testing.assert_allclose(gain, reach / 7.5, rtol=1e-5)
    steps = [np.abs(keys - exact) / (gain[..., None] * spread)]
    exact = values_of(storage)
    steps.append(np.abs(values - exact) / ((exact.max(axis=4, keepdims=True) - exact.min(axis=4, keepdims=True)) / 15))
    for off in steps:
        # the lower four bits are a signed number: at the upper end of a step they fall short by half of theirs
        assert off.max() <= (0.501 if bits == 4 else 1.01 / 16)
        assert np.sqrt((off**2).mean()) < (0.35 if bits == 4 else 0.4 / 16)


def test_pages_of_one_number_and_of_zeros_have_finite_codes() -> None:
    cache = new_pages(1, 3, 1, 32)
    storage: Any = cache.storage
    storage.keys[:, 0], storage.values[:, 0] = 0, 0
    storage.keys[:, 1], storage.values[:, 1] = 0x4049, 0x4049
    storage.keys[:, 2], storage.values[:, 2] = 1, 1  # denormal
    store = QuantizedPages(cache, 8)
    store.refresh(all_pages(cache))
    for numbers in decoded(store):
        assert np.isfinite(numbers).all()
        assert np.abs(numbers[:, 0]).max() == 0 and np.abs(numbers[:, 2]).max() < 1e-30
        np.testing.assert_allclose(numbers[:, 1], floats(np.array([0x4049], dtype=np.uint16))[0], rtol=1e-6)


def test_the_upper_bits_are_the_same_with_and_without_the_lower_ones() -> None:
    cache = new_pages(2, 4, 2, 64)
    four, eight = QuantizedPages(cache, 4), QuantizedPages(cache, 8)
    for store in (four, eight):
        store.refresh(all_pages(cache))
        store.check_integrity()
    assert (four.codes == eight.codes).all() and four.lower is None
    storage: Any = cache.storage
    for exact, coarse, fine in zip((keys_of(storage), values_of(storage)), decoded(four), decoded(eight), strict=True):
        assert 8 * np.abs(fine - exact).mean() < np.abs(coarse - exact).mean()


def test_memory_is_what_the_class_says() -> None:
    cache = new_pages(2, 4, 2, 128)
    storage: Any = cache.storage
    four, eight = QuantizedPages(cache, 4), QuantizedPages(cache, 8)
    assert four.bytes_per_page == 2 * 2 * (18 * 128 + 192) < 0.31 * storage.bytes_per_page
    assert eight.bytes_per_page == four.bytes_per_page + 2 * 2 * 16 * 128 < 0.56 * storage.bytes_per_page
    four.refresh(np.array([2], dtype=np.int32))
    assert four.bytes_used == four.bytes_per_page and four.bytes_total == 4 * four.bytes_per_page


# the copies


def test_a_page_is_quantised_once_and_anew_when_it_was_let_go() -> None:
    cache = new_pages(1, 8, 1, 32)
    store, seen = QuantizedPages(cache, 4), list[int]()
    inner = store._quantise

    def spy(pages: NDArray[np.int32], *rest: Any) -> None:
        seen.extend(pages.tolist())
        inner(pages, *rest)

    store._quantise = spy  # type: ignore[method-assign]
    seq = cache.new()
    cache.reserve(seq, 70)
    cache.commit(seq, range(70))
    table = cache.page_table(seq).tolist()
    assert store.compact([seq], 1).pages.tolist() == [3] and seen == table[:3]
    twin = cache.fork(seq)
    assert store.compact([seq, twin], 0).pages.tolist() == [4, 4] and seen == table[:4]
    store.check_integrity()
    cache.free(seq)
    store.compact([twin], 0)
    assert seen[4:] == table[:4]  # check_integrity looked at all four; freeing one of two holders lets go of nothing
    cache.free(twin)
    other = cache.new()
    cache.reserve(other, 32)
    assert set(cache.page_table(other)) <= set(table) and store.pages_held == 2 + (table[4] in cache.page_table(other))
    storage: Any = cache.storage
    storage.keys[:, cache.page_table(other)] ^= 0x55
    cache.commit(other, range(32))
    store.compact([other], 0)
    assert seen[8:] == cache.page_table(other).tolist()
    store.check_integrity()


@pytest.mark.parametrize("how", ["truncate", "reopen"])
def test_places_that_may_be_written_again_are_forgotten(how: str) -> None:
    cache = new_pages(1, 8, 1, 32)
    store = QuantizedPages(cache, 8)
    seq = cache.new()
    cache.reserve(seq, 64)
    cache.commit(seq, range(64))
    store.compact([seq], 0)
    if how == "truncate":
        cache.truncate(seq, 40)
    else:
        cache.reopen(seq, 24)
    assert store.pages_held == 2
    storage: Any = cache.storage
    storage.values[:, cache.page_table(seq)[2]] ^= 0x33
    store.check_integrity()
    cache.reserve(seq, 24)
    cache.commit(seq, range(24))
    store.compact([seq], 0)
    store.check_integrity()
    assert store.pages_held == 4


def test_a_stale_copy_is_noticed() -> None:
    cache = new_pages(1, 2, 1, 32)
    store = QuantizedPages(cache, 8)
    store.refresh(all_pages(cache))
    storage: Any = cache.storage
    storage.keys[0, 1, 0, 0, 0, 0] += 64
    with pytest.raises(AssertionError, match=r"bits of pages \[1\]"):
        store.check_integrity()


# the attention


@cache
def decoder(architecture: str = "qwen2", precision: Precision = "int8", **overrides: Any) -> NativeDecoder:
    return NativeDecoder.from_checkpoint(toy_checkpoint(architecture, **overrides)[0], precision, 1)


def decode_into(store: QuantizedPages, pages: NDArray[np.int32]) -> None:
    """Write back what the codes of some pages say, rounded to bf16: the storage that the compact copy stands for."""
    storage: Any = store.storage
    keys, values = (x.astype(np.float32)[:, pages] for x in decoded(store))
    count = keys.shape[:3]
    storage.keys[:, pages] = bf16(keys.reshape(*count, 16, -1, 2).transpose(0, 1, 2, 4, 3, 5))
    storage.values[:, pages] = bf16(values.reshape(*count, 8, 2, -1).swapaxes(-1, -2))


@each_bits
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("qwen2", {}),
        ("llama", {"head_dim": 96}),
        ("qwen3", {"head_dim": 128}),
        ("qwen3", {"num_attention_heads": 12}),
        ("qwen2", {"num_attention_heads": 20, "num_key_value_heads": 1}),
        ("gemma3", {"sliding_window": 50}),
    ],
)
def test_attention_over_codes_is_attention_over_the_numbers_they_stand_for(
    architecture: str, overrides: dict[str, Any], bits: int
) -> None:
    """A step over the copies, against the same step over pages into which the decoded numbers were written: a chain of
    one row, one of three and a tree, in one batch."""
    model = decoder(architecture, "bfloat16", **overrides)
    rig, lengths = Rig(model), (150, 64, 83)
    seqs = []
    for n in lengths:
        seqs.append(rig.cache.new())
        rig.feed(seqs[-1], random_tokens(n, n))
    spans = [
        Span(random_tokens(1, 7), lengths[0]),
        Span(random_tokens(3, 8), lengths[1]),
        Span(random_tokens(5, 9), lengths[2], Tree(np.array([-1, 0, 0, 2]))),
    ]
    for seq, span in zip(seqs, spans, strict=True):
        rig.cache.reserve(seq, len(span.tokens))
    batch = pack(spans, rig.cache.page_tables(seqs))
    exact = model.forward(batch, rig.cache.storage).logits.numpy().copy()
    store = QuantizedPages(rig.cache, bits)
    compact = store.compact(seqs, 1)
    assert compact.pages.tolist() == [8, 3, 4]
    got = model.forward(replace(batch, compact=compact), rig.cache.storage).logits.numpy().copy()
    for seq, count in zip(seqs, compact.pages.tolist(), strict=True):
        decode_into(store, rig.cache.page_table(seq)[:count])
    expected = model.forward(batch, rig.cache.storage).logits.numpy().copy()
    harm, off = (float(np.sqrt(np.square(x - expected).mean())) for x in (exact, got))
    assert 0 < off < 0.02 * np.sqrt(np.square(exact).mean()), "queries and weights of eight bits round a little"
    if bits == 4:
        assert off < 0.3 * harm, "the codes were read, not the pages"


def test_no_complete_old_page_no_difference() -> None:
    model, rig = decoder(), Rig(decoder())
    seq = rig.cache.new()
    rig.feed(seq, random_tokens(40, 1))
    rig.cache.reserve(seq, 1)
    batch = pack([Span([5], 40)], rig.cache.page_tables([seq]))
    expected = model.forward(batch, rig.cache.storage).logits.numpy().copy()
    compact = QuantizedPages(rig.cache, 4).compact([seq], 2)
    assert compact.pages.tolist() == [0]
    assert (model.forward(replace(batch, compact=compact), rig.cache.storage).logits.numpy() == expected).all()


def test_a_batch_that_reads_few_bits_loses_no_pages() -> None:
    _, batch = one_step(4)
    with pytest.raises(AssertionError, match="left out before"):
        keep_pages(batch, [np.arange(2)])


def one_step(bits: int) -> tuple[Rig, ForwardBatch]:
    rig = Rig(decoder())
    seq = rig.cache.new()
    rig.feed(seq, random_tokens(60, 1))
    rig.cache.reserve(seq, 1)
    batch = pack([Span([5], 60)], rig.cache.page_tables([seq]))
    return rig, replace(batch, compact=QuantizedPages(rig.cache, bits).compact([seq], 0))


# the drafter

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.95, seed=5)
PROMPTS = [random_tokens(n, n).tolist() for n in (5, 130, 73)]
CONFIG = engine_options(kv_tokens=1024, max_batch=2)


def run(method: str, params: SamplingParams) -> tuple[list[Result], Any]:
    """Three prompts, two at a time, so that pages pass from one to another; all books are checked after every step."""
    target = decoder(num_hidden_layers=4)
    books = new_cache(target, CONFIG)
    context = DrafterContext(
        target.config.vocab_size,
        target=target,
        cache=books,
        target_in=lambda precision: decoder(precision=precision, num_hidden_layers=4),
    )
    drafter: Any = make_drafter(method, context)
    engine = Engine(target, drafter, CoupledVerifier(), options=CONFIG, cache=books)
    ids = [engine.add(prompt, params) for prompt in PROMPTS]
    results: dict[int, Result] = {}
    while len(results) < len(ids):
        results |= {event.id: event.result for event in engine.step() if event.result is not None}
        engine.check_integrity()
        if isinstance(drafter, QuantSpec) and drafter.store is not None:
            drafter.store.check_integrity()
    return [results[i] for i in ids], drafter


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
@pytest.mark.parametrize("kv", ["int4", "int8", "bf16", "auto"])
def test_the_output_is_that_of_plain_decoding(kv: str, params: SamplingParams) -> None:
    plain, _ = run("plain", params)
    ours, drafter = run(f"quantspec:kv={kv},recent=1", params)
    assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
    assert all(r.stats.drafted > 0 and r.exactness == "identical" for r in ours)
    if kv == "bf16":
        assert drafter.store is None and "own keys" in drafter.explain()[0]
    else:
        assert drafter.store.bits == (4 if kv == "int4" else 8)
        assert drafter.store.bytes_used > 0 and f"in {drafter.store.bits} bits" in drafter.explain()[0]


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ParameterError, match="kv=int2 is unknown: it must be auto, bf16, int8, int4"):
        run("quantspec:kv=int2", GREEDY)
    with pytest.raises(ParameterError, match="recent=-1 is out of range"):
        run("quantspec:recent=-1", GREEDY)
    portable = NativeDecoder.from_checkpoint(toy_checkpoint("qwen2")[0], "int8", 1, level=isa.PORTABLE)
    context = DrafterContext(
        portable.config.vocab_size,
        target=portable,
        cache=new_cache(portable, CONFIG),
        target_in=lambda precision: decoder(precision=precision),
    )
    with pytest.raises(MethodError, match="choose kv=bf16"):
        make_drafter("quantspec:kv=int4", context)
    made: Any = make_drafter("quantspec", context)
    assert made.store is None
