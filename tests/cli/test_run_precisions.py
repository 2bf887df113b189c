"""`outpace run` with a toy model from a folder, through the real loader and the CPU decoder, in every precision."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file
from toy import toy_checkpoint

from outpace.cli import main
from outpace.engine.load import PRECISIONS
from outpace.models import native, packed_file
from outpace.types import Precision


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in a folder. What is made of it goes elsewhere; compiled kernels stay where they were found on import."""
    assert native.NativeDecoder.row_invariant
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    checkpoint, model = toy_checkpoint("llama")
    files = checkpoint.tokenizer_files()
    made = tmp_path / "toy-model"
    made.mkdir()
    save_file(checkpoint.tensors, made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(model.config.to_dict()))
    (made / "tokenizer.json").write_text(files.tokenizer_json)
    (made / "tokenizer_config.json").write_text(json.dumps(files.tokenizer_config))
    return made


def test_the_cpu_has_all_precisions() -> None:
    assert set(PRECISIONS["cpu"]) == set(get_args(Precision))


def test_floats_have_no_formats_of_a_file(folder: Path) -> None:
    args = ["run", "-m", str(folder), "--precision", "file", "--device", "cpu", "--threads", "1", "--raw", "abc"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 3 and "floats: use bfloat16 or int8" in result.stderr
    assert not list((folder.parent / "cache").rglob("weights-*"))


def test_too_little_memory_is_said_before_any_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outpace.engine import load

    monkeypatch.setattr(load, "available_bytes", lambda device: 300_000)
    monkeypatch.setattr(native.NativeDecoder, "load", lambda *_, **__: pytest.fail("it was loaded"))
    args = ["run", "-m", str(folder), "--device", "cpu", "--raw", "--max-tokens", "2", "--precision"]
    result = CliRunner().invoke(main, [*args, "float32", "abc"])
    assert result.exit_code == 4 and result.stderr.count("\n") == 1
    assert re.search(r"toy-model in float32 needs [\d.]+ GB \([\d.]+ of weights, [\d.]+ of KV cache\)", result.stderr)
    assert "end other programs" in result.stderr


@pytest.mark.parametrize("precision", [p for p in get_args(Precision) if p != "file"])
def test_run_in_every_precision_is_identical(folder: Path, precision: str) -> None:
    args = ["run", "-m", str(folder), "--precision", precision, "--device", "cpu", "--threads", "1", "--raw", "--json"]
    result = CliRunner().invoke(main, [*args, "--max-tokens", "24", "--against-plain", "abababab"])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["precision"] == precision and record["exactness"] == "identical" and record["notes"] == []
    assert record["against_plain"]["identical"] and record["stats"]["tokens"] >= 1
    packed_file.end_keepers()  # as at the end of a process: they are written in the background
    assert list((folder.parent / "cache").rglob(f"weights-{precision}-*.bin"))
    help_text = CliRunner().invoke(main, ["run", "--help"]).stdout
    assert precision in help_text
