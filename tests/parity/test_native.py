"""The CPU decoder as a whole: a row's bits depend on nothing but what the row sees, in every precision and with any
number of threads; and the team of threads that runs it."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy import ARCHITECTURES, MemoryCheckpoint, Rig, hf_logits, random_tokens, toy_checkpoint

from outpace.cache.pages import PagedKVCache
from outpace.models.batch import Span, pack
from outpace.models.decoder import Taps
from outpace.models.native import NativeDecoder
from outpace.models.torch_decoder import TorchDecoder
from outpace.ops.cpu import blocks, isa
from outpace.ops.cpu.isa import BF16, PORTABLE
from outpace.ops.cpu.linear import KIND_INT8
from outpace.ops.cpu.rows import pack_row
from outpace.ops.masks import CAUSAL, Tree
from outpace.types import Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8", "int4")
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_precision = pytest.mark.parametrize("precision", PRECISIONS)
#  last ── 0 ── 1 ── 3 ── 5        nodes 1, 3, 5 go on as the text does, the others do not
#             └─ 2 ── 4
PARENTS = np.array([-1, 0, 0, 1, 2, 3])
PATH = [0, 1, 3, 5]


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A lost wake-up would hang for ever: end the run with every thread's stack instead."""
    faulthandler.dump_traceback_later(240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def native(architecture: str, precision: Precision, threads: int = 1, level: int | None = None) -> NativeDecoder:
    return NativeDecoder.from_checkpoint(toy_checkpoint(architecture)[0], precision, threads, level)


def one_by_one(decoder: NativeDecoder, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of every place, each token a step of its own."""
    rig = Rig(decoder)
    seq = rig.cache.new()
    return np.concatenate([rig.feed(seq, tokens[i : i + 1]) for i in range(len(tokens))])


def in_chunks(decoder: NativeDecoder, tokens: NDArray[np.int64], sizes: list[int]) -> NDArray[np.float32]:
    rig = Rig(decoder)
    seq = rig.cache.new()
    return np.concatenate([rig.feed(seq, chunk) for chunk in np.split(tokens, np.cumsum(sizes)) if len(chunk)])


@each_precision
@each_architecture
def test_company_changes_no_bit(architecture, precision):
    check_company(native(architecture, precision))


@pytest.mark.parametrize("group", [6, 20])
@pytest.mark.parametrize("level", isa.levels())
def test_company_changes_no_bit_of_queries_that_share_a_head(group, level):
    """Groups wider than the blocks of queries that attention computes together."""
    checkpoint, _ = toy_checkpoint("qwen2", num_attention_heads=group, num_key_value_heads=1)
    check_company(NativeDecoder.from_checkpoint(checkpoint, "int8", 1, level))


def check_company(decoder: NativeDecoder) -> None:
    tokens = random_tokens(59, 1)
    alone = one_by_one(decoder, tokens)
    assert np.isfinite(alone).all() and len(np.unique(alone.argmax(-1))) > 5
    for sizes in ([], [17, 1, 3, 33], [16, 16, 16], [40]):
        assert (in_chunks(decoder, tokens, sizes) == alone).all(), f"chunks of {sizes}"

    rig = Rig(decoder)
    others = [random_tokens(n, 10 + n) for n in (3, 21, 48)]
    filler = [rig.cache.new() for _ in others]
    for seq, prompt in zip(filler, others, strict=True):
        rig.feed(seq, prompt)
    seq, at = rig.cache.new(), 0
    for n in (11, 1, 20):  # beside single tokens, a tree and a long prompt
        fresh = rig.cache.new()
        tree = (filler[1], random_tokens(1 + len(PARENTS), at), Tree(PARENTS))
        before, ours, *_ = rig.step(
            (filler[0], [at], CAUSAL), (seq, tokens[at : at + n], CAUSAL), tree, (fresh, random_tokens(30), CAUSAL)
        )
        assert len(before) == 1 and (ours == alone[at : at + n]).all(), f"batched from {at}"
        rig.cache.commit(seq, range(n))
        for other in (filler[0], filler[1], fresh):
            rig.cache.rollback(other)
        at += n

    rows = random_tokens(1 + len(PARENTS), 3)
    rows[[0, *(i + 1 for i in PATH)]] = tokens[at : at + 5]
    wrong = [n + 1 for n in range(len(PARENTS)) if n not in PATH]
    rows[wrong] = (tokens[at + 1] + 1) % 256
    (ours,) = rig.step((seq, rows, Tree(PARENTS)))
    path = [0, *(i + 1 for i in PATH)]
    assert (ours[path] == alone[at : at + 5]).all(), "tree"
    branch = np.concatenate((tokens[: at + 2], rows[[3, 5]]))
    assert (ours[[3, 5]] == one_by_one(decoder, branch)[-2:]).all(), "the other branch"
    rig.cache.commit(seq, path)
    assert (rig.feed(seq, tokens[at + 5 :]) == alone[at + 5 :]).all(), "behind the accepted path"
    rig.cache.check_integrity()


@each_precision
@each_architecture
def test_rows_without_logits_leave_the_others_and_the_cache_as_they_are(architecture, precision):
    """The last layer does no more for them than keys and values, unless its hidden states are asked for."""
    texts = [random_tokens(n, n) for n in (5, 21, 18, 2)]
    rows = {"none": slice(0, 0), "last": slice(-1, None), "all": slice(None)}
    kinds: list[Any] = ["none", "last", "all", "last"]
    wanted = [one_by_one(native(architecture, precision), np.append(text, 7)) for text in texts]
    for threads, layers in ((1, ()), (3, ()), (2, (1,))):
        decoder = native(architecture, precision, threads)
        cache = PagedKVCache(decoder.new_storage(16))
        seqs = [cache.new() for _ in texts]
        for seq, text in zip(seqs, texts, strict=True):
            cache.reserve(seq, len(text))
        spans = [Span(text, 0, logits=kind) for text, kind in zip(texts, kinds, strict=True)]
        out = decoder.forward(pack(spans, cache.page_tables(seqs)), cache.storage, Taps(hidden=layers))
        expected = [whole[:-1][rows[kind]] for whole, kind in zip(wanted, kinds, strict=True)]
        assert (out.logits.numpy() == np.concatenate(expected)).all()
        assert all(len(hidden) == sum(map(len, texts)) for hidden in out.hidden.values())
        for seq, text, whole in zip(seqs, texts, wanted, strict=True):
            cache.commit(seq, range(len(text)))
            cache.reserve(seq, 1)
            span = Span(np.array([7]), len(text))
            (logits,) = decoder.forward(pack([span], cache.page_tables([seq])), cache.storage).logits.numpy()
            assert (logits == whole[-1]).all(), "what was left in the cache"
            cache.commit(seq, range(1))


@each_precision
@each_architecture
def test_threads_change_no_bit(architecture, precision):
    tokens = random_tokens(45, 2)
    single, *others = (in_chunks(native(architecture, precision, n), tokens, [30, 1, 1]) for n in (1, 2, 3))
    assert all((single == other).all() for other in others)


@pytest.mark.skipif(isa.best_level() == PORTABLE, reason="this CPU has one level")
@pytest.mark.parametrize("precision", ["int8", "int4"])
@each_architecture
def test_levels_agree(architecture, precision):
    """To the bit, but for those whose attention rounds queries and probabilities to bfloat16."""
    tokens = random_tokens(45, 4)
    levels = isa.levels()
    portable, *others = (in_chunks(native(architecture, precision, level=n), tokens, [30, 1]) for n in levels)
    for level, other in zip(levels[1:], others, strict=True):
        assert level >= BF16 or (other == portable).all()
        assert error(other, portable) < 0.05


class Bf16Slots:
    """Slots of a storage that keeps bfloat16, as the CPU decoder's does."""

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots = slots

    def __getitem__(self, where: Any) -> Any:
        return Bf16Slots(self.slots[where]) if isinstance(where, int) else self.slots[where]

    def __setitem__(self, where: Any, value: torch.Tensor) -> None:
        self.slots[where] = value.to(torch.bfloat16).float()


class DefinedInt8(TorchDecoder):
    def new_storage(self, num_pages: int) -> Any:
        storage: Any = super().new_storage(num_pages)
        storage.k_slots, storage.v_slots = Bf16Slots(storage.k_slots), Bf16Slots(storage.v_slots)
        return storage


def error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Of a row, relative, in the mean."""
    return float((np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).mean())


@pytest.mark.parametrize("threads", [1, 2])
@each_architecture
def test_int8_is_its_definition(architecture, threads):
    """But for the rounding of float32, which now and then turns a whole number into its neighbour. From BF16 on
    queries and probabilities are rounded to bfloat16 besides: held to be as near to float32 as the definition is."""
    toy, _ = toy_checkpoint(architecture, head_dim=32)  # heads that are padded are rotated with their padding
    name = "model.embed_tokens.weight"
    rounded = torch.from_numpy(toy.tensors[name]).to(torch.bfloat16).float().numpy()
    checkpoint = MemoryCheckpoint(toy.config, toy.tensors | {name: rounded})
    tokens = random_tokens(40, 5)
    logits = []
    for decoder in (DefinedInt8.from_checkpoint(checkpoint, "int8"), TorchDecoder.from_checkpoint(checkpoint)):
        rig = Rig(decoder)
        logits.append(rig.feed(rig.cache.new(), tokens))
    defined, exact = logits
    for level in isa.levels():
        ours = in_chunks(NativeDecoder.from_checkpoint(checkpoint, "int8", threads, level), tokens, [33])
        assert level >= BF16 or error(ours, defined) < 0.005
        assert error(ours, exact) < 1.25 * error(defined, exact)


@each_architecture
def test_int4_is_nearer_to_float32_than_chance(architecture):
    tokens = random_tokens(40, 6)
    exact, ours = (one_by_one(native(architecture, p), tokens) for p in ("float32", "int4"))
    assert 0.001 < error(ours, exact) < 0.5


@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 48])
def test_heads_of_any_even_width(head_dim):
    """qwen3 norms its heads, so weights must be there for the padding too."""
    checkpoint, model = toy_checkpoint("qwen3", head_dim=head_dim)
    tokens = random_tokens(40, 15)
    expected = hf_logits(model, tokens)
    for precision, tolerance in (("float32", 1e-4), ("bfloat16", 0.03), ("int8", 0.1)):
        ours = in_chunks(NativeDecoder.from_checkpoint(checkpoint, precision, 2), tokens, [33, 1])
        assert error(ours, expected) < tolerance


@each_architecture
def test_hidden_states_of_chosen_layers(architecture):
    """In any order, in a step of several sequences, and without a change to the logits."""
    tokens, other = random_tokens(20, 7), random_tokens(9, 8)
    rigs = [Rig(TorchDecoder.from_checkpoint(toy_checkpoint(architecture)[0])), Rig(native(architecture, "float32", 2))]
    hidden, logits = [], []
    for rig in rigs:
        seqs = [rig.cache.new() for _ in range(2)]
        rig.feed(seqs[0], tokens)
        rows = rig.step(
            (seqs[0], random_tokens(7, 9), Tree(PARENTS)), (seqs[1], other, CAUSAL), taps=Taps(hidden=(2, 0))
        )
        hidden.append(rig.hidden)
        logits.append(np.concatenate(rows))
        assert set(rig.hidden) == {0, 2} and rig.hidden[0].shape[0] == 16
    for layer in (0, 2):
        np.testing.assert_allclose(hidden[1][layer], hidden[0][layer], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4)
    rigs[1].cache.rollback(seqs[0])
    rigs[1].cache.rollback(seqs[1])
    again = rigs[1].step((seqs[0], random_tokens(7, 9), Tree(PARENTS)), (seqs[1], other, CAUSAL))
    assert (np.concatenate(again) == logits[1]).all() and rigs[1].hidden == {}


# the team


def test_threads_wake_up_after_a_pause():
    tokens = random_tokens(24, 11)
    expected = one_by_one(native("llama", "int8", 1), tokens)
    for threads in (2, 3):
        rig = Rig(native("llama", "int8", threads))
        seq = rig.cache.new()
        for i in range(len(tokens)):
            assert (rig.feed(seq, tokens[i : i + 1]) == expected[i]).all()
            if i % 3 == 0:
                time.sleep(0.05)  # longer than idle threads spin


def test_decoders_share_a_team():
    """In turns and from two threads of the caller at once."""
    a, b = native("llama", "int8", 2), native("gemma3", "bfloat16", 2)
    assert a._team is b._team
    tokens = random_tokens(60, 12)
    expected = [one_by_one(native("llama", "int8"), tokens), one_by_one(native("gemma3", "bfloat16"), tokens)]
    rigs = [Rig(a), Rig(b)]
    seqs = [rig.cache.new() for rig in rigs]
    for i in range(20):
        for rig, seq, logits in zip(rigs, seqs, expected, strict=True):
            assert (rig.feed(seq, tokens[i : i + 1]) == logits[i]).all()
    right: list[bool] = []

    def rest(rig: Rig, seq: int, logits: NDArray[np.float32]) -> None:
        got = [rig.feed(seq, tokens[i : i + 1])[0] for i in range(20, len(tokens))]
        right.append(bool((np.array(got) == logits[20:]).all()))

    callers = [threading.Thread(target=rest, args=job) for job in zip(rigs, seqs, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert right == [True, True]


def test_many_short_steps():
    """A race between the end of one step and the start of the next would show sooner or later."""
    rig = Rig(native("qwen2", "int8", 2))
    seq = rig.cache.new()
    rig.feed(seq, random_tokens(3, 13))
    (first,) = rig.step((seq, [65], CAUSAL))
    for _ in range(2000):
        (again,) = rig.step((seq, [65], CAUSAL))
        assert (again == first).all()
        rig.cache.rollback(seq)


def test_decoders_come_and_go():
    """A slow thread may still be leaving the last barrier when the decoder whose step it was is freed."""
    tokens = random_tokens(4, 14)
    expected = one_by_one(native("llama", "int8"), tokens)
    for _ in range(15):
        assert (one_by_one(native("llama", "int8", 3), tokens) == expected).all()


def test_a_first_step_may_want_no_logits():
    """The first chunk of a long prompt, with a decoder that has run nothing yet."""
    decoder = native("llama", "int8")
    tokens = random_tokens(20)
    cache = PagedKVCache(decoder.new_storage(2))
    seq = cache.new()
    cache.reserve(seq, 20)
    batch = pack([Span(tokens, 0, logits="none")], cache.page_tables([seq]))
    assert decoder.forward(batch, cache.storage).logits.shape == (0, decoder.config.vocab_size)


def test_rows_of_denormal_numbers_are_zero():
    """Attention to one place only leaves next to nothing of the others: 127 over that is infinite."""
    width = 64
    x = np.full(width, 1e-44, dtype=np.float32)
    out, scale, spare = np.zeros(4 * width, np.int8), np.ones(2, np.float32), np.zeros(4 * width, np.float32)
    pack_row(KIND_INT8, x.ctypes.data, width, spare.ctypes.data, out.ctypes.data, scale.ctypes.data)
    assert not out[:width].any() and np.isfinite(scale).all()
    block = np.zeros(blocks.X_BLOCK, np.int8)
    blocks.pack_blocks(x.ctypes.data, width, block.ctypes.data, 0, 0)
    assert not block[: blocks.X_SCALES].any() and np.isfinite(block[blocks.X_SCALES :].view(np.float32)).all()
