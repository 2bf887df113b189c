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
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import ARCHITECTURES, MemoryCheckpoint, Rig, random_tokens, toy_checkpoint

from outpace.errors import CorruptModel, ParameterError
from outpace.models import digests, packed
from outpace.models.config import ModelConfig
from outpace.models.native import NativeDecoder
from outpace.ops.cpu.rotation import rotate_weights
from outpace.ops.reference import rotate
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
    assert {f.name for f in tmp_path.iterdir()} <= {path.name, f"{path.name}.checked"}


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


def flip(path: Path, name: str, at: int, bits: int = 1) -> None:
    """Other bits in a tensor's bytes, from byte `at` of it on."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start = 8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]
    for i in range(bits):
        data[start + at + i] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(("name", "at", "bits"), [("head.w", 5000, 64), ("0.norm_1", 0, 1), ("3.down.scale", 2, 1)])
def test_flipped_bits_are_found_named_and_mended(opened, name, at, bits, capsys):
    expected = logits(NativeDecoder.load(opened, "int8", 1))
    path = opened.prepared_dir / packed.file_name("int8")
    data = path.read_bytes()
    flip(path, name, at, bits)
    with pytest.raises(CorruptModel, match=f"tensor {name} is not what was written"):
        packed.load(path)
    assert (logits(NativeDecoder.load(opened, "int8", 1)) == expected).all()
    note = "\n".join(line for line in capsys.readouterr().err.splitlines() if "CPU kernels" not in line)
    assert "\n" not in note and name in note and "packing the weights anew" in note
    assert path.read_bytes() == data and opened.reads == 2


def test_a_scale_that_is_no_number_is_found(opened, capsys):
    NativeDecoder.load(opened, "int8", 1)
    path = opened.prepared_dir / packed.file_name("int8")
    tensors = {name: array.copy() for name, array in packed.load(path).items()}
    good = packed.digests(tensors)
    tensors["1.qkv.scale"][3] = np.nan
    from safetensors.numpy import save_file

    save_file(tensors, path, {"digests": json.dumps(good)})
    assert np.isfinite(logits(NativeDecoder.load(opened, "int8", 1))).all()
    assert "1.qkv.scale" in capsys.readouterr().err


def test_digests_are_of_names_types_shapes_and_bytes():
    a = np.arange(6, dtype=np.int16)
    same = {digests.digest("a", x) for x in (a, a.copy(), np.arange(12, dtype=np.int16)[:6])}
    others = {digests.digest("b", a), digests.digest("a", a.view(np.uint16)), digests.digest("a", a.reshape(2, 3))}
    others |= {digests.digest("a", a[::-1]), digests.digest("a", a[:0])}
    assert len(same) == 1 and len(others) == 5 and not same & others
    assert digests.damaged({"a": a, "b": a}, digests.digests({"a": a, "c": a})) == ["b", "c"]
    names = {str(i): np.zeros(i, np.float32) for i in range(9)}
    assert digests.digests(names) == {name: digests.digest(name, x) for name, x in names.items()}


def test_bytes_are_looked_at_once_after_each_start_of_the_machine(sound, tmp_path, monkeypatch):
    path = tmp_path / "weights.bin"
    path.write_bytes(sound.read_bytes())
    looked: list[int] = []
    real = packed.damaged
    monkeypatch.setattr(packed, "damaged", lambda *a: looked.append(1) or real(*a))

    def times() -> int:
        looked.clear()
        packed.load(path)
        packed.load(path)
        return len(looked)

    monkeypatch.setattr(digests, "_boot", lambda: "first")
    assert (times(), times()) == (1, 0)
    monkeypatch.setattr(digests, "_boot", lambda: "second")
    assert (times(), times()) == (1, 0)
    os.utime(path, ns=(1, 1))
    assert (times(), times()) == (1, 0)
    other = tmp_path / "other"
    other.write_bytes(sound.read_bytes())
    os.utime(other, ns=(1, 1))
    os.replace(other, path)  # another file of the same size and time
    assert (times(), times()) == (1, 0)
    path.with_name("weights.bin.checked").write_text("[" * 100_000)
    assert (times(), times()) == (1, 0)
    packed.verify(path)
    assert looked
    monkeypatch.setattr(digests, "_boot", lambda: None)  # a system that does not say when it started
    assert times() == 2


def test_a_stamp_does_not_hide_damage_from_verify(sound, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(sound.read_bytes())
    packed.verify(path)
    stat = path.stat()
    flip(path, "head.w", 9)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    packed.load(path)  # the disk went wrong behind the system's back
    for _ in range(2):
        with pytest.raises(CorruptModel, match=r"head\.w"):
            packed.verify(path)
    with pytest.raises(CorruptModel, match=r"head\.w"):
        packed.load(path)


@pytest.mark.parametrize("metadata", [None, {}, {"digests": "[]"}, {"digests": "{}"}, {"digests": "[" * 50_000}])
def test_a_file_without_digests_is_refused(sound, metadata, tmp_path):
    from safetensors.numpy import save_file

    save_file(dict(packed.load(sound)), tmp_path / "odd.bin", metadata)
    with pytest.raises(CorruptModel, match=r"odd\.bin"):
        packed.load(tmp_path / "odd.bin")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    code = f"""
import os, signal
import numpy as np
from pathlib import Path
from outpace.models import digests, packed
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


@pytest.mark.parametrize(("rows", "width", "threads"), [(1, 64, 1), (16, 128, 3), (33, 576, 2)])
def test_the_compiled_rotation_has_the_bits_of_the_reference(rows: int, width: int, threads: int) -> None:
    w = torch.randn(rows, width) * torch.logspace(-6, 6, width)
    assert torch.equal(torch.from_numpy(rotate_weights(w.numpy(), threads)), rotate(w))
