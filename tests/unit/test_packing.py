"""Packing a model: blocks of a file as they are, floats as the slow path makes them, whatever the threads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import toy_gguf
from gguf import GGMLQuantizationType as Q
from numpy.typing import NDArray
from test_formats import random_rows, scales_at
from toy import ARCHITECTURES, toy_checkpoint

from outpace.errors import CorruptModel, UnsupportedModel
from outpace.models import packing
from outpace.models.block import describe
from outpace.models.checkpoint import Checkpoint
from outpace.models.config import ModelConfig
from outpace.models.formats import FORMATS, dequantise, quantise_q4_1
from outpace.models.gguf import GGUFCheckpoint
from outpace.models.packed import Tensors, head_width, pack_product, padded
from outpace.models.packing import is_quantised, own_formats, pack
from outpace.models.safetensors import SafetensorsCheckpoint
from outpace.ops.reference import rotate
from outpace.types import Precision

MIXED = {
    "attn_q": "Q4_K", "attn_k": "Q4_0", "attn_v": "Q6_K", "attn_output": "Q5_K", "ffn_gate": "Q8_0", "ffn_up": "Q5_1",
    "ffn_down": "Q5_0",
}  # fmt: skip


def mixed(
    path: Path, arch: str = "llama", head: str | None = None, bad: str = "", kinds: Mapping[str, str] = MIXED
) -> GGUFCheckpoint:
    """A file whose matrices are in many formats; without `head` it is tied. `bad`: the tensor of a NaN."""
    shapes = toy_gguf.shapes(arch, 263, 256, 2, 4, 2) | {"output.weight": (263, 256)}
    formats = {f"blk.{i}.{name}.weight": FORMATS[kind] for i in range(2) for name, kind in kinds.items()}
    formats["token_embd.weight"] = FORMATS["Q4_1"]
    if head:
        formats["output.weight"] = FORMATS[head]
    tensors: dict[str, Any] = {}
    for i, (name, form) in enumerate(formats.items()):
        tensors[name] = random_rows(form, shapes[name][0], 256 // form.block, i)
    if bad:
        at = scales_at(formats[bad])[-1]
        tensors[bad][-1, at : at + 2] = 0xFF
    raw_types = {name: Q[form.name] for name, form in formats.items()}
    toy_gguf.write(path, arch, width=256, layers=2, tensors=tensors, raw_types=raw_types)
    return GGUFCheckpoint(path)


@pytest.mark.parametrize("head", [None, "Q6_K", "F16"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_files_blocks_are_those_of_its_weights(arch: str, head: str | None, tmp_path: Path) -> None:
    checkpoint = mixed(tmp_path / "m.gguf", arch, head)
    weights = pack(checkpoint, "file", 2)
    model = describe(checkpoint.config)
    parts = {f"{prefix}{p.name}": p for prefix, product in model.products() for p in product.parts}
    if head:
        parts["embedding"] = model.embedding
    assert weights.formats.keys() == parts.keys()
    assert {n for n in weights.tensors if n.endswith(".w")} == {f"{n}.w" for n in parts}
    assert "embedding" not in weights.tensors and not any(n.endswith(".scale") for n in weights.tensors)
    for name, part in parts.items():
        got = dequantise(weights.tensors[f"{name}.w"], weights.formats[name], part.outputs.size, part.inputs.size)
        assert got.tobytes() == checkpoint.tensor(f"{part.source}.weight").tobytes(), name
    assert weights.formats["0.q"].name == "Q4_K" and weights.formats["1.down"].name == "Q5_0"
    if arch == "qwen2":
        biases = [checkpoint.tensor(f"model.layers.1.self_attn.{p}_proj.bias") for p in "qkv"]
        assert (weights.tensors["1.qkv.bias"] == np.concatenate(biases)).all()
    assert (weights.tensors["1.norm_2"] == checkpoint.tensor("model.layers.1.post_attention_layernorm.weight")).all()


def padded_heads(w: NDArray[np.float32], heads: int, config: ModelConfig) -> NDArray[np.float32]:
    """[heads * C, K] with zero rows behind each head."""
    c, head = config.head_dim, head_width(config)
    return np.pad(w.reshape(heads, c, -1), ((0, 0), (0, head - c), (0, 0))).reshape(heads * head, -1)


def slow(checkpoint: Checkpoint, precision: Precision) -> Tensors:
    """What `pack` makes of floats, product by product: heads padded, parts joined, then panels."""
    config = checkpoint.config
    out: Tensors = {}
    for prefix, product in describe(config).products():
        parts = []
        for part in product.parts:
            w = checkpoint.tensor(f"{part.source}.weight")
            if part.outputs.heads:
                w = padded_heads(w, part.outputs.heads, config)
            if part.inputs.heads:
                w = padded_heads(np.ascontiguousarray(w.T), part.inputs.heads, config).T
            parts.append(np.pad(w, ((0, padded(len(w)) - len(w)), (0, 0))))
        joined = np.concatenate(parts)
        if product.in_turn:
            joined = np.stack([p.reshape(-1, 16, p.shape[1]) for p in parts], axis=1).reshape(joined.shape)
        name = f"{prefix}{product.name}"
        out[f"{name}.w"], out[f"{name}.scale"] = pack_product(joined, precision)
    return out


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_panels_are_those_of_the_slow_path(
    architecture: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = toy_checkpoint(architecture)
    monkeypatch.setattr(packing, "_FLOATS", 3000)  # more pieces than one
    want = slow(checkpoint, precision)
    for threads in (1, 3):
        got = pack(checkpoint, precision, threads).tensors
        for name, array in want.items():
            assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    table = got["embedding"][:, : embedding.shape[1]]
    if precision == "float32":
        assert (table == embedding).all()
    else:
        assert (torch.from_numpy(embedding).to(torch.bfloat16).view(torch.int16).numpy() == table).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_int4_is_blocks_of_q4_1(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each part by itself, its heads padded; an embedding that is no head stays as exact as bf16 is."""
    checkpoint, _ = toy_checkpoint(architecture)
    config, q4_1 = checkpoint.config, FORMATS["Q4_1"]
    monkeypatch.setattr(packing, "_FLOATS", 3000)
    weights = pack(checkpoint, "int4", 2)
    assert ("embedding" in weights.tensors) != config.tie_embeddings
    for prefix, product in describe(config).products():
        for part in product.parts:
            w = checkpoint.tensor(f"{part.source}.weight")
            if part.outputs.heads:
                w = padded_heads(w, part.outputs.heads, config)
            if part.inputs.heads:
                w = padded_heads(np.ascontiguousarray(w.T), part.inputs.heads, config).T
            name = f"{prefix}{part.name}"
            assert weights.formats[name] is q4_1
            got = dequantise(weights.tensors[f"{name}.w"], q4_1, *w.shape)
            rounded = gguf.quants.dequantize(quantise_q4_1(w), Q.Q4_1)[:, : w.shape[1]]
            # ties of errors may fall either way, see test_formats
            assert (got == rounded).mean() > 0.97 and np.abs(got - w).max() <= np.abs(rounded - w).max() * 1.2


def test_int8_is_what_it_says() -> None:
    w = np.random.default_rng(1).standard_normal((32, 128)).astype(np.float32)
    panels, scales = pack_product(w, "int8")
    values = panels.transpose(0, 2, 1, 3).reshape(32, 128) * scales[:, None]
    want = rotate(torch.from_numpy(w)).numpy() / 64
    assert np.abs(values - want).max() <= np.abs(want).max() / 127 / 2 * 1.01 and scales.min() > 0


@pytest.mark.parametrize("precision", ["file", "int8"])
@pytest.mark.parametrize("bad", ["blk.1.attn_k.weight", "blk.0.ffn_down.weight", "token_embd.weight"])
def test_scales_that_are_no_numbers_name_the_tensor(precision: Precision, bad: str, tmp_path: Path) -> None:
    checkpoint = mixed(tmp_path / "m.gguf", bad=bad)
    named = bad if precision == "file" else "weight"  # the field's name for it, or the file's
    with pytest.raises(CorruptModel, match=rf"m\.gguf.*{named}.*not numbers"):
        pack(checkpoint, precision, 2)


def test_what_cannot_run_in_its_own_format_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="floats: use bfloat16 or int8"):
        own_formats(toy_checkpoint("llama")[0])
    toy_gguf.write(tmp_path / "m.gguf", width=64, heads=4)
    with pytest.raises(UnsupportedModel, match=r"heads of 16 are no multiple of 32.*int8"):
        own_formats(GGUFCheckpoint(tmp_path / "m.gguf"))


def test_whether_a_model_is_quantised(tmp_path: Path) -> None:
    assert is_quantised(mixed(tmp_path / "a.gguf"))
    assert not is_quantised(mixed(tmp_path / "b.gguf", kinds={"attn_q": "Q4_K"}))
    assert not is_quantised(toy_checkpoint("llama")[0])


def test_rows_of_a_checkpoint(tmp_path: Path) -> None:
    _, model = toy_checkpoint("qwen3")
    model.save_pretrained(tmp_path)
    for checkpoint in (mixed(tmp_path / "m.gguf"), SafetensorsCheckpoint(tmp_path), toy_checkpoint("qwen3")[0]):
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            name = f"model.layers.0.{part}.weight"
            assert (checkpoint.rows(name, 5, 40) == checkpoint.tensor(name)[5:40]).all()
