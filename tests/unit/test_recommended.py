"""How a model's makers want it sampled: from the file, the folder, the catalog, or a stated default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from outpace.models.catalog import CATALOG
from outpace.models.recommended import TEMPERATURE, TOP_P, recommended_of
from outpace.models.source import ModelSource
from outpace.types import SamplingParams


def gguf(tmp_path: Path, name: str = "mine", **keys: float) -> ModelSource:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in keys.items():
        key = f"general.sampling.{key}"
        writer.add_int32(key, value) if isinstance(value, int) else writer.add_float32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelSource(name, path, "gguf", "key")


def folder(tmp_path: Path, **config: Any) -> ModelSource:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    return ModelSource("mine", tmp_path, "safetensors", "key")


def test_of_a_gguf_file(tmp_path: Path) -> None:
    found = recommended_of(gguf(tmp_path, temp=0.6, top_k=20, top_p=0.95, min_p=0.0, penalty_repeat=1.05, mirostat=2))
    assert found.values == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.05,
    }
    assert found.source == "the model's file"
    SamplingParams(**found.values)  # type: ignore[arg-type]


def test_values_out_of_range_are_left_out(tmp_path: Path) -> None:
    found = recommended_of(gguf(tmp_path, temp=0.5, top_k=-1, top_p=1.5, min_p=1.0, penalty_repeat=0.0))
    assert found.values == {"temperature": 0.5, "top_k": 0}
    assert recommended_of(gguf(tmp_path, temp=-1.0)).values["temperature"] == TEMPERATURE
    assert recommended_of(gguf(tmp_path, temp=float("nan"))).values["temperature"] == TEMPERATURE


def test_of_a_folder(tmp_path: Path) -> None:
    found = recommended_of(folder(tmp_path, do_sample=True, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=3))
    assert found.values == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    assert found.source == "generation_config.json"
    assert recommended_of(folder(tmp_path, do_sample=False, temperature=0.7)).values == {"temperature": 0.0}
    for odd in ({"temperature": True}, {"temperature": "hot"}, {"temperature": None}, {}):
        assert recommended_of(folder(tmp_path, **odd)).values == {"temperature": TEMPERATURE, "top_p": TOP_P}
    for text in ("[]", "{", "[" * 100_000):
        (tmp_path / "generation_config.json").write_text(text)
        assert "names none" in recommended_of(ModelSource("mine", tmp_path, "safetensors", "key")).source


def test_the_catalog_speaks_where_the_file_does_not(tmp_path: Path) -> None:
    found = recommended_of(gguf(tmp_path, name="qwen2.5-coder-1.5b"))
    assert (
        found.values == CATALOG["qwen2.5-coder-1.5b"].sampling and found.source == "recommended by the model's makers"
    )


@pytest.mark.parametrize("model", CATALOG.values(), ids=lambda m: m.name)
def test_what_the_catalog_recommends_can_be_used(model: Any) -> None:
    assert model.sampling and SamplingParams(**model.sampling).temperature > 0
