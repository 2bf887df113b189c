"""The file of packed weights: read back as written, refused when damaged or another model's, and then rebuilt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import ARCHITECTURES, MemoryCheckpoint, Rig, random_tokens, toy_checkpoint

from outpace.errors import CorruptModel, ParameterError
from outpace.models import packed
from outpace.models.config import ModelConfig
from outpace.models.native import NativeDecoder
from outpace.types import Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8", "int4")


@dataclass
class Opened:
    """What NativeDecoder.load asks of an opened model."""

    toy: MemoryCheckpoint
    prepared_dir: Path
    reads: int = 0

    @property
    def config(self) -> ModelConfig:
        return self.toy.config

    def checkpoint(self) -> MemoryCheckpoint:
        self.reads += 1
        return self.toy


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    return Opened(toy_checkpoint("gemma3")[0], tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "sound.bin"
    packed.save(packed.pack(toy_checkpoint("llama")[0], "int8"), path)
    return path


def logits(decoder: NativeDecoder) -> np.ndarray:
    rig = Rig(decoder)
    return rig.feed(rig.cache.new(), random_tokens(9, 1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(architecture, precision, tmp_path):
    checkpoint, _ = toy_checkpoint(architecture)
    tensors = packed.pack(checkpoint, precision)
    path = tmp_path / packed.file_name(precision)
    packed.save(tensors, path)
    read = packed.load_checked(path, checkpoint.config, precision)
    assert read.keys() == tensors.keys() == packed.expected(checkpoint.config, precision).keys()
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        assert read[name].tobytes() == array.tobytes()
    assert list(tmp_path.iterdir()) == [path]


def test_packing_happens_once(opened):
    steps: list[tuple[int, int]] = []
    first = NativeDecoder.load(opened, "int8", 1, lambda done, total: steps.append((done, total)))
    assert opened.reads == 1 and steps == [(i, 5) for i in range(1, 6)]
    second = NativeDecoder.load(opened, "int8", 1)
    assert opened.reads == 1
    assert (logits(first) == logits(second)).all()
    assert (logits(first) == logits(NativeDecoder.from_checkpoint(opened.toy, "int8", 1))).all()


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1, -70_000])
def test_a_truncated_file_is_refused(sound, keep, tmp_path):
    path = tmp_path / "cut.bin"
    path.write_bytes(sound.read_bytes()[:keep])
    with pytest.raises(CorruptModel, match=r"cut\.bin"):
        packed.load(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_damaged_header_never_passes_for_another_file(sound, tmp_path, at, byte):
    """Refused, or read to the same: spaces may stand anywhere."""
    path = tmp_path / "damaged.bin"
    data = bytearray(sound.read_bytes())
    changed = data[at] != byte
    data[at] = byte
    path.write_bytes(data)
    config = toy_checkpoint("llama")[0].config
    try:
        tensors = packed.load_checked(path, config, "int8")
    except CorruptModel:
        assert changed
        return
    good = packed.load(sound)
    assert tensors.keys() == good.keys() and all(tensors[n].shape == good[n].shape for n in good)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"head.w": 3},
        {"head.w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}},
        {"head.w": {"dtype": "I8", "shape": [3], "data_offsets": [0, 8]}},
        {"head.w": {"dtype": "I8", "shape": [8], "data_offsets": [-8, 0]}},
        {"head.w": {"dtype": "I8", "shape": [16], "data_offsets": [0, 16]}},
        {"head.w": {"dtype": "I8", "shape": [8]}},
    ],
)
def test_headers_that_make_no_sense_are_refused(header, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "odd.bin"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CorruptModel, match=r"odd\.bin"):
        packed.load(path)


def test_another_models_file_is_refused(sound):
    with pytest.raises(CorruptModel, match=r"sound\.bin.*is missing, misshapen or unknown"):
        packed.load_checked(sound, toy_checkpoint("mistral")[0].config, "int8")
    with pytest.raises(CorruptModel):
        packed.load_checked(sound, toy_checkpoint("llama")[0].config, "int4")
    with pytest.raises(CorruptModel):  # all of its own and more
        packed.load_checked(sound, toy_checkpoint("llama", num_hidden_layers=2)[0].config, "int8")
    with pytest.raises(CorruptModel, match=r"none\.bin"):
        packed.load(sound.with_name("none.bin"))


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "another's"])
def test_a_damaged_file_is_rebuilt_with_a_note(opened, damage, capsys):
    expected = logits(NativeDecoder.load(opened, "int8", 1))
    path = opened.prepared_dir / packed.file_name("int8")
    data = path.read_bytes()
    if damage == "another's":
        packed.save(packed.pack(toy_checkpoint("qwen2")[0], "int8"), path)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "garbage": os.urandom(len(data)), "empty": b""}[damage])
    assert capsys.readouterr().err == ""
    assert (logits(NativeDecoder.load(opened, "int8", 1)) == expected).all()
    assert opened.reads == 2 and path.read_bytes() == data
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and str(path) in note and "packing the weights anew" in note


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    code = f"""
import os, signal
import numpy as np
from pathlib import Path
from outpace.models import packed
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all is written, but not yet in its place
packed.save({{"a": np.zeros(1 << 20, np.float32)}}, Path({str(tmp_path)!r}) / "weights.bin")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "weights.bin").exists()
    packed.save({"a": np.ones(4, np.float32)}, tmp_path / "weights.bin")
    assert (packed.load(tmp_path / "weights.bin")["a"] == 1).all()


def test_an_interrupted_writer_cleans_up(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed.save({"a": np.ones(4, np.float32)}, tmp_path / "weights.bin")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ParameterError, match="OUTPACE_CACHE"):
        packed.save({"a": np.ones(4, np.float32)}, tmp_path / "file" / "weights.bin")
