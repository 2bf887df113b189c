"""Views of a decoder: sublayers left out, a head cut down, embeddings instead of tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import ARCHITECTURES, VOCAB, Rig, random_tokens, toy_checkpoint

from outpace.cache.pages import PagedKVCache
from outpace.errors import ParameterError, UnsupportedModel
from outpace.models.batch import Span, pack
from outpace.models.decoder import Decoder
from outpace.models.native import NativeDecoder
from outpace.models.torch_decoder import TorchDecoder
from outpace.models.views import skip_sublayers, trim_head
from outpace.ops.masks import CAUSAL
from outpace.types import Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8", "int4")
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
TOKENS = random_tokens(40, 3)


def feed(decoder: Decoder) -> np.ndarray:
    rig = Rig(decoder)
    return rig.feed(rig.cache.new(), TOKENS)


def native(architecture: str, precision: Precision = "float32", threads: int = 1) -> NativeDecoder:
    return NativeDecoder.from_checkpoint(toy_checkpoint(architecture)[0], precision, threads)


@each_architecture
def test_skipping_nothing_is_the_decoder(load, architecture):
    decoder = load(toy_checkpoint(architecture)[0])
    view = skip_sublayers(decoder)
    assert (feed(view) == feed(decoder)).all() and view.weight_bytes == decoder.weight_bytes


@pytest.mark.parametrize(("attention", "mlp"), [((1,), ()), ((), (0,)), ((0, 2), (1, 2)), ((0, 1, 2), (0, 1, 2))])
@each_architecture
def test_skipped_sublayers_as_the_reference_without_them(architecture, attention, mlp):
    """The reference is a model in which these sublayers add nothing: the weights of their last product are zero."""
    checkpoint, _ = toy_checkpoint(architecture)
    tensors = dict(checkpoint.tensors)
    for part, layers in (("self_attn.o_proj", attention), ("mlp.down_proj", mlp)):
        for i in layers:
            name = f"model.layers.{i}.{part}.weight"
            tensors[name] = np.zeros_like(tensors[name])
    expected = feed(TorchDecoder.from_checkpoint(type(checkpoint)(checkpoint.config, tensors)))
    reference = skip_sublayers(TorchDecoder.from_checkpoint(checkpoint), attention, mlp)
    np.testing.assert_allclose(feed(reference), expected, rtol=0, atol=1e-5)
    whole = native(architecture, threads=2)
    view = skip_sublayers(whole, attention, mlp)
    np.testing.assert_allclose(feed(view), expected, rtol=0, atol=2e-4)
    assert view.weight_bytes < whole.weight_bytes
    assert reference.weight_bytes < TorchDecoder.from_checkpoint(checkpoint).weight_bytes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_skipping_view_is_row_invariant_and_leaves_skipped_layers_alone(precision):
    view = skip_sublayers(native("qwen2", precision, 2), attention=(1,), mlp=(0, 2))
    together = feed(view)
    rig = Rig(view)
    seq = rig.cache.new()
    assert (np.concatenate([rig.feed(seq, TOKENS[i : i + 1]) for i in range(len(TOKENS))]) == together).all()
    keys, values = rig.cache.storage.keys, rig.cache.storage.values
    assert not keys[1].any() and not values[1].any() and keys[0].any() and keys[2].any()


def test_the_skipped_set_changes_between_forwards_and_the_decoder_stays_whole():
    decoder = native("llama")
    whole = feed(decoder)
    view = skip_sublayers(decoder, (1,), (1,))
    without = feed(view)
    view.skip((), ())
    assert (feed(view) == whole).all() and not (without == whole).all()
    view.skip((1,), (1,))
    assert (feed(view) == without).all() and (feed(decoder) == whole).all()
    assert (feed(view.view()) == without).all()


def test_a_view_runs_in_the_decoders_storage():
    decoder = native("mistral", "int8")
    expected = feed(decoder)
    rig = Rig(decoder)
    seq = rig.cache.new()
    rig.feed(seq, TOKENS[:20])
    rig.decoder = skip_sublayers(decoder)
    assert (rig.feed(seq, TOKENS[20:30]) == expected[20:30]).all()
    rig.decoder = decoder
    assert (rig.feed(seq, TOKENS[30:]) == expected[30:]).all()


@pytest.mark.parametrize("count", [1, 16, 37, VOCAB])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_trimmed_logits_are_the_full_ones(precision, count):
    decoder = native("qwen2", precision, 2)
    ids = np.random.default_rng(count).permutation(VOCAB)[:count]
    full, trimmed = feed(decoder), feed(trim_head(decoder, ids))
    assert (trimmed[:, ids] == full[:, ids]).all()
    assert (np.delete(trimmed, ids, axis=1) == -np.inf).all() and trimmed.shape == full.shape
    assert (feed(decoder) == full).all()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_trimmed_logits_of_the_torch_decoder(precision):
    decoder = TorchDecoder.from_checkpoint(toy_checkpoint("gemma3")[0], precision)
    ids = np.array([200, 3, 77])
    full, trimmed = feed(decoder), feed(trim_head(decoder, ids))
    np.testing.assert_allclose(trimmed[:, ids], full[:, ids], rtol=0, atol=1e-5)
    assert (np.delete(trimmed, ids, axis=1) == -np.inf).all()


def test_views_of_views():
    decoder = native("qwen3", "int4", 2)
    ids = np.arange(5, 60)
    both = skip_sublayers(trim_head(decoder, ids), (1,), ())
    other_way = trim_head(skip_sublayers(decoder, (1,), ()), ids)
    further = trim_head(both, ids[::3])
    expected = feed(skip_sublayers(decoder, (1,), ()))
    for view, kept in ((both, ids), (other_way, ids), (further, ids[::3])):
        assert (feed(view)[:, kept] == expected[:, kept]).all()
    assert both.weight_bytes == other_way.weight_bytes < decoder.weight_bytes
    with pytest.raises(ParameterError, match="only be trimmed further"):
        trim_head(further, ids)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@each_architecture
def test_embeddings_of_tokens_are_the_tokens(load, architecture, precision):
    decoder = load(toy_checkpoint(architecture)[0], precision)
    vectors = decoder.embedding(TOKENS)
    assert vectors.shape == (len(TOKENS), decoder.config.hidden_size) and vectors.dtype == np.float32
    logits = []
    for embeddings in (None, vectors, vectors + 0.1):
        cache = PagedKVCache(decoder.new_storage(8))
        seq = cache.new()
        cache.reserve(seq, len(TOKENS))
        batch = pack([Span(TOKENS, 0, CAUSAL)], cache.page_tables([seq]))
        batch = replace(batch, embeddings=embeddings)
        logits.append(decoder.forward(batch, cache.storage).logits.float().cpu().numpy().copy())
    assert (logits[0] == logits[1]).all() and not (logits[0] == logits[2]).any(axis=1).all()


def test_what_does_not_work_is_refused():
    class Other(Decoder):
        config, precision, device = toy_checkpoint("llama")[0].config, "float32", torch.device("cpu")
        new_storage = forward = None  # type: ignore[assignment]

    decoder = native("llama")
    with pytest.raises(UnsupportedModel, match="Other has no views"):
        skip_sublayers(Other())
    with pytest.raises(UnsupportedModel, match="Other does not give out"):
        Other().embedding(TOKENS)
    with pytest.raises(ParameterError, match="no layer 3: the model has the layers 0 to 2"):
        skip_sublayers(decoder, (1, 3))
    for ids in (np.array([], dtype=np.int64), np.array([-1]), np.array([VOCAB])):
        with pytest.raises(ParameterError, match="tokens 0 to 271"):
            trim_head(decoder, ids)
