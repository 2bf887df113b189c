"""The description of a model: a part that is added there is in every file, in the reference and in packed weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_gguf
from toy import MemoryCheckpoint, toy_checkpoint

from outpace.errors import CorruptModel, UnsupportedModel
from outpace.models import block as blocks
from outpace.models.config import ModelConfig
from outpace.models.gguf import GGUFCheckpoint
from outpace.models.layout import check_layout, expected_shapes
from outpace.models.native import NativeDecoder
from outpace.models.packed import layout
from outpace.models.packing import pack
from outpace.models.torch_decoder import TorchDecoder
from outpace.types import Precision


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm of the whole query and a gate for each head's output, which no model has."""
    real = blocks._block

    def block(config: ModelConfig, layer: int) -> blocks.Block:
        sound = real(config, layer)
        (q, k, v), source = sound.attention.products[0].parts, f"model.layers.{layer}.made_up"
        norm = blocks.Norm("norm_3", f"{source}_norm", f"blk.{layer}.made_up_norm", q.outputs)
        gate = blocks.Projection("heads", source, f"blk.{layer}.made_up", blocks.Axis(5), q.inputs, bias=True)
        products = (blocks.Product("qkv", (q, k, v, gate)), *sound.attention.products[1:])
        attention = blocks.Sublayer((*sound.attention.norms, norm), products)
        return replace(sound, attention=attention)

    monkeypatch.setattr(blocks, "_block", block)


def test_a_made_up_part_is_expected_of_files(made_up: None, tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match=r"missing: model\.layers\.0\.made_up\.weight.*made_up_norm\.weight"):
        toy_gguf.write(tmp_path / "m.gguf")
        GGUFCheckpoint(tmp_path / "m.gguf")
    shapes = {"made_up_norm.weight": (32,), "made_up.weight": (5, 32), "made_up.bias": (5,)}
    added = {f"blk.0.{name}": np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    toy_gguf.write(tmp_path / "m.gguf", tensors=added)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    for name, shape in shapes.items():
        assert checkpoint.tensor(f"model.layers.0.{name}").shape == shape


def made_up_checkpoint() -> MemoryCheckpoint:
    checkpoint, _ = toy_checkpoint("llama")
    shapes = expected_shapes(checkpoint.config)
    extra = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if "made_up" in name}
    return MemoryCheckpoint(checkpoint.config, checkpoint.tensors | extra)


def test_a_made_up_part_is_in_the_reference(made_up: None) -> None:
    checkpoint = made_up_checkpoint()
    layer = TorchDecoder.from_checkpoint(checkpoint)._layers[2]
    c = checkpoint.config
    assert layer.norms["norm_3"].shape == (c.num_heads * c.head_dim,)
    assert layer.attention["qkv"](layer.norms["norm_1"]).shape == ((c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 5,)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_made_up_part_is_in_the_packed_weights(made_up: None, precision: Precision) -> None:
    checkpoint = made_up_checkpoint()
    tensors, c = pack(checkpoint, precision).tensors, checkpoint.config
    columns = (c.num_heads + 2 * c.num_kv_heads) * 32
    assert tensors["2.norm_3"].shape == (c.num_heads * 32,)
    assert len(tensors["2.qkv.w"]) == columns // 16 + 1 and len(tensors["2.qkv.scale"]) == columns + 16
    np.testing.assert_array_equal(np.flatnonzero(tensors["2.qkv.bias"]), columns + np.arange(5))
    assert tensors.keys() == layout(c, precision, {}).keys()


def test_a_made_up_part_is_in_no_kernel(made_up: None) -> None:
    """Its weights are found, but the step has no place for a norm of that name."""
    weights = pack(made_up_checkpoint(), "float32")
    with pytest.raises(AttributeError, match="L_NORM_3"):
        NativeDecoder(toy_checkpoint("llama")[0].config, weights.tensors, "float32", threads=1)


def test_missing_misshapen_and_unknown_tensors_are_named() -> None:
    config = toy_checkpoint("llama")[0].config
    name, extra = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.bias"
    shapes = expected_shapes(config)
    check_layout("here", config, shapes)
    with pytest.raises(CorruptModel, match=f"here: .*missing: {name}"):
        check_layout("here", config, {n: shape for n, shape in shapes.items() if n != name})
    with pytest.raises(CorruptModel, match=rf"{name}.*\(3, 4\).*\(96, 96\)"):
        check_layout("here", config, shapes | {name: (3, 4)})
    with pytest.raises(UnsupportedModel, match=extra):
        check_layout("here", config, shapes | {extra: (96,)})
    with pytest.raises(UnsupportedModel, match="brand_new"):
        check_layout("here", config, shapes, ["brand_new"])
