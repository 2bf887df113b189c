"""Folders with safetensors: one file, several, every type, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_model
from safetensors.numpy import save_file

from outpace.errors import CorruptModel, ModelNotFound, UnsupportedModel
from outpace.models.safetensors import SafetensorsCheckpoint
from outpace.models.tokenizer import Tokenizer

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor(tmp_path: Path, shards: int) -> None:
    tensors = toy_model.write_folder(tmp_path / "m", shards)
    checkpoint = SafetensorsCheckpoint(tmp_path / "m")
    assert checkpoint.names() == set(tensors)
    for name, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), values)
    assert Tokenizer(checkpoint.tokenizer_files()).decode([3 + ord("A") - 33]) != ""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    tensors = toy_model.write_folder(tmp_path / "m")
    half = {name: torch.from_numpy(t).to(getattr(torch, dtype)) for name, t in tensors.items()}
    save_torch(half, tmp_path / "m/model.safetensors")
    got = SafetensorsCheckpoint(tmp_path / "m").tensor(UP)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, half[UP].float().numpy())


def test_a_stored_copy_of_tied_embeddings_is_left_out(tmp_path: Path) -> None:
    tensors = toy_model.write_folder(tmp_path / "m")
    copy = tensors["model.embed_tokens.weight"].copy()
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors | {"lm_head.weight": copy} | inv_freq, tmp_path / "m/model.safetensors")
    assert SafetensorsCheckpoint(tmp_path / "m").names() == set(tensors)


def test_untied(tmp_path: Path) -> None:
    toy_model.write_folder(tmp_path / "m", tie_word_embeddings=False)
    assert "lm_head.weight" in SafetensorsCheckpoint(tmp_path / "m").names()


def test_generation_config_says_where_to_stop(tmp_path: Path) -> None:
    toy_model.write_folder(tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert SafetensorsCheckpoint(tmp_path / "m").config.eos_ids == (2, 0)


def test_chat_template_file_wins(tmp_path: Path) -> None:
    toy_model.write_folder(tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text("{{ messages[0].content }}")
    files = SafetensorsCheckpoint(tmp_path / "m").tokenizer_files()
    assert files.tokenizer_config["chat_template"] == "{{ messages[0].content }}"


def test_missing_shard(tmp_path: Path) -> None:
    toy_model.write_folder(tmp_path / "m", 3)
    (tmp_path / "m/model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CorruptModel, match=r"model-00002-of-00003.*missing"):
        SafetensorsCheckpoint(tmp_path / "m")


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    toy_model.write_folder(tmp_path / "m", 2)
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: "../x.safetensors"}}))
    with pytest.raises(CorruptModel, match="not a file of this folder"):
        SafetensorsCheckpoint(tmp_path / "m")


def test_truncated_anywhere(tmp_path: Path) -> None:
    toy_model.write_folder(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    data = file.read_bytes()
    for cut in [0, 4, 8, 20, 500, len(data) // 2, len(data) - 1]:
        file.write_bytes(data[:cut])
        with pytest.raises(CorruptModel, match=r"model\.safetensors"):
            SafetensorsCheckpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({UP: None}, CorruptModel, "missing: model.layers.0.mlp.up_proj"),
        ({UP: np.ones((3, 3), np.float32)}, CorruptModel, r"shape \(3, 3\)"),
        ({"model.extra.weight": np.ones(3, np.float32)}, UnsupportedModel, "model.extra.weight"),
        ({UP: np.ones((48, 32), np.int8)}, UnsupportedModel, "I8; supported: BF16, F16, F32"),
    ],
)
def test_wrong_tensors(tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors: dict[str, Any] = toy_model.write_folder(tmp_path / "m") | change
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / "m/model.safetensors")
    with pytest.raises(error, match=message):
        SafetensorsCheckpoint(tmp_path / "m")


def test_infinite_weights(tmp_path: Path) -> None:
    tensors = toy_model.write_folder(tmp_path / "m")
    tensors[UP][3, 3] = np.inf
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(CorruptModel, match="not numbers"):
        SafetensorsCheckpoint(tmp_path / "m").tensor(UP)


def test_pickles_are_refused(tmp_path: Path) -> None:
    toy_model.write_folder(tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin.*refused.*save_pretrained"):
        SafetensorsCheckpoint(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"model_type": "bert"}'])
def test_bad_configuration(tmp_path: Path, text: str) -> None:
    toy_model.write_folder(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(text)
    with pytest.raises((CorruptModel, UnsupportedModel), match=r"config\.json"):
        SafetensorsCheckpoint(tmp_path / "m")


def test_no_tokenizer(tmp_path: Path) -> None:
    toy_model.write_folder(tmp_path / "m")
    (tmp_path / "m/tokenizer.json").unlink()
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json.*AutoTokenizer"):
        SafetensorsCheckpoint(tmp_path / "m").tokenizer_files()
