"""The prepared folder: used when right, made anew when not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_gguf
import toy_model

from outpace.errors import CorruptModel, ParameterError
from outpace.models import prepared
from outpace.models.config import ModelConfig
from outpace.models.prepared import config_from_json, config_to_json, open_model, prepared_folders
from outpace.models.source import ModelSource

FILES = ["config.json", "manifest.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    toy_gguf.write(tmp_path / "toy.gguf")
    return str(tmp_path / "toy.gguf")


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ModelSource) -> None:
        raise AssertionError("the checkpoint was opened")

    monkeypatch.setattr(ModelSource, "checkpoint", refuse)


def test_second_opening_reads_no_checkpoint(gguf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_model(gguf)
    assert sorted(p.name for p in first.prepared_dir.iterdir()) == FILES
    tensor = first.checkpoint().tensor("model.norm.weight")
    assert tensor.shape == (32,) and first.checkpoint() is first.checkpoint()
    forbid_reading(monkeypatch)
    second = open_model(gguf)
    assert second.config == first.config and second.name == "toy"
    chat = [{"role": "user", "content": "the 12"}]
    assert second.tokenizer.chat(chat) == first.tokenizer.chat(chat)
    assert second.tokenizer.eos_ids == first.tokenizer.eos_ids
    with pytest.raises(AssertionError):
        second.checkpoint()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "short", "changed", "binary"])
def test_damaged_folder_is_made_anew(gguf: str, name: str, damage: str) -> None:
    first = open_model(gguf)
    (first.prepared_dir / "weights-int8-v1.bin").write_bytes(b"kept")
    file = first.prepared_dir / name
    before = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"short": before[:-5], "changed": before.replace(b"e", b"f"), "binary": b"\xff\xfe"}[damage])
    again = open_model(gguf)
    assert again.config == first.config and file.read_bytes() == before
    assert (first.prepared_dir / "weights-int8-v1.bin").read_bytes() == b"kept"


def test_another_version_is_made_anew(gguf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_model(gguf).prepared_dir
    monkeypatch.setattr(prepared, "VERSION", prepared.VERSION + 1)
    assert open_model(gguf).prepared_dir == folder
    forbid_reading(monkeypatch)
    open_model(gguf)


def test_a_changed_file_has_another_key(gguf: str, tmp_path: Path) -> None:
    first = open_model(gguf)
    toy_gguf.write(Path(gguf), layers=2)
    second = open_model(gguf)
    assert second.prepared_dir != first.prepared_dir and second.config.num_layers == 2
    assert {f.model for f in prepared_folders()} == {"toy"} and len(prepared_folders()) == 2
    link = tmp_path / "toy.link.gguf"
    link.symlink_to(gguf)
    assert open_model(str(link)).source.key.split("-")[-1] == second.source.key.split("-")[-1]


def test_folder_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_model.write_folder(tmp_path / "My model", 2)
    first = open_model(str(tmp_path / "My model"))
    assert first.source.kind == "safetensors" and first.source.key.startswith("My-model-")
    assert "model.norm.weight" in first.checkpoint().names()
    forbid_reading(monkeypatch)
    assert open_model(str(tmp_path / "My model")).config == first.config


def test_nothing_damaged_is_kept(tmp_path: Path, cache: Path) -> None:
    toy_model.write_folder(tmp_path / "m")
    (tmp_path / "m/tokenizer.json").write_text("{}")
    with pytest.raises(CorruptModel, match="damaged tokenizer"):
        open_model(str(tmp_path / "m"))
    assert prepared_folders() == []


def test_cache_that_cannot_be_written(gguf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ParameterError, match=r"cannot be written.*OUTPACE_CACHE"):
        open_model(gguf)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {"model_type": "gemma3_text", "sliding_window": 16, "head_dim": 8, "eos_token_id": [1, 106]},
        {"model_type": "qwen3", "head_dim": 8},
        {"model_type": "mistral", "sliding_window": 64},
    ],
)
def test_configuration_round_trip(raw: dict[str, object]) -> None:
    config = ModelConfig.from_hf(toy_model.HF_CONFIG | raw, source="toy")
    assert config_from_json(config_to_json(config)) == config


def test_opening_imports_neither_torch_nor_transformers(gguf: str) -> None:
    open_model(gguf)
    code = "import sys; from outpace.models.prepared import open_model; open_model(sys.argv[1]).tokenizer.encode('x')\n"
    code += "print([m for m in ('torch', 'transformers', 'gguf', 'numba') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code, gguf], capture_output=True, text=True, env=dict(os.environ))
    assert run.stdout.strip() == "[]", run.stderr
