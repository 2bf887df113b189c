"""The file of packed weights: read back as written, refused when damaged or another model's, and then rebuilt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import ARCHITECTURES, MemoryCheckpoint, Rig, random_tokens, toy_checkpoint

from outpace.errors import CorruptModel
from outpace.models import digests, packed_file
from outpace.models.config import ModelConfig
from outpace.models.native import NativeDecoder
from outpace.models.packed import Weights, layout
from outpace.models.packing import pack
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


ONES = Weights({"a": np.ones(4, np.float32)}, {})


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    return Opened(toy_checkpoint("gemma3")[0], tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "sound.bin"
    packed_file.save(pack(toy_checkpoint("llama")[0], "int8"), path)
    return path


def load_kept(opened: Opened, **more: Any) -> NativeDecoder:
    """Loaded, and the file is written."""
    decoder = NativeDecoder.load(opened, "int8", 1, **more)
    packed_file.end_keepers()
    return decoder


def logits(decoder: NativeDecoder) -> np.ndarray:
    rig = Rig(decoder)
    return rig.feed(rig.cache.new(), random_tokens(9, 1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(architecture, precision, tmp_path):
    checkpoint, _ = toy_checkpoint(architecture)
    weights = pack(checkpoint, precision)
    path = tmp_path / packed_file.file_name(precision)
    packed_file.save(weights, path)
    read = packed_file.load_checked(path, checkpoint.config, precision)
    assert read.formats == weights.formats
    tensors = weights.tensors
    assert read.tensors.keys() == tensors.keys() == layout(checkpoint.config, precision, weights.formats).keys()
    for name, array in tensors.items():
        assert read.tensors[name].dtype == array.dtype and read.tensors[name].shape == array.shape
        assert read.tensors[name].tobytes() == array.tobytes()
    assert {f.name for f in tmp_path.iterdir()} <= {path.name, f"{path.name}.checked"}


def test_packing_happens_once(opened):
    steps: list[tuple[int, int]] = []
    first = load_kept(opened, progress=lambda done, total: steps.append((done, total)))
    total = steps[-1][1]
    assert opened.reads == 1 and steps == sorted(steps) and steps[-1] == (total, total) and steps[0][0] < total
    second = NativeDecoder.load(opened, "int8", 1)
    assert opened.reads == 1
    assert (logits(first) == logits(second)).all()
    assert (logits(first) == logits(NativeDecoder.from_checkpoint(opened.toy, "int8", 1))).all()


def test_no_copy_is_kept_unless_wanted(opened):
    NativeDecoder.load(opened, "int8", 1, keep=False)
    packed_file.end_keepers()
    assert not list(opened.prepared_dir.iterdir())


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1, -70_000])
def test_a_truncated_file_is_refused(sound, keep, tmp_path):
    path = tmp_path / "cut.bin"
    path.write_bytes(sound.read_bytes()[:keep])
    with pytest.raises(CorruptModel, match=r"cut\.bin"):
        packed_file.load(path)


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
        tensors = packed_file.load_checked(path, config, "int8").tensors
    except CorruptModel:
        assert changed
        return
    good = packed_file.load(sound).tensors
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
        packed_file.load(path)


def test_another_models_file_is_refused(sound):
    with pytest.raises(CorruptModel, match=r"sound\.bin.*is missing, misshapen or unknown"):
        packed_file.load_checked(sound, toy_checkpoint("mistral")[0].config, "int8")
    with pytest.raises(CorruptModel):
        packed_file.load_checked(sound, toy_checkpoint("llama")[0].config, "int4")
    with pytest.raises(CorruptModel):  # all of its own and more
        packed_file.load_checked(sound, toy_checkpoint("llama", num_hidden_layers=2)[0].config, "int8")
    with pytest.raises(CorruptModel, match=r"none\.bin"):
        packed_file.load(sound.with_name("none.bin"))


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "another's"])
def test_a_damaged_file_is_rebuilt_with_a_note(opened, damage, capsys):
    expected = logits(load_kept(opened))
    path = opened.prepared_dir / packed_file.file_name("int8")
    data = path.read_bytes()
    if damage == "another's":
        packed_file.save(pack(toy_checkpoint("qwen2")[0], "int8"), path)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "garbage": os.urandom(len(data)), "empty": b""}[damage])
    assert capsys.readouterr().err == ""
    assert (logits(load_kept(opened)) == expected).all()
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
    expected = logits(load_kept(opened))
    path = opened.prepared_dir / packed_file.file_name("int8")
    data = path.read_bytes()
    flip(path, name, at, bits)
    with pytest.raises(CorruptModel, match=f"tensor {name} is not what was written"):
        packed_file.load(path)
    assert (logits(load_kept(opened)) == expected).all()
    note = "\n".join(line for line in capsys.readouterr().err.splitlines() if "CPU kernels" not in line)
    assert "\n" not in note and name in note and "packing the weights anew" in note
    assert path.read_bytes() == data and opened.reads == 2


def test_a_scale_that_is_no_number_is_found(opened, capsys):
    load_kept(opened)
    path = opened.prepared_dir / packed_file.file_name("int8")
    tensors = {name: array.copy() for name, array in packed_file.load(path).tensors.items()}
    good = digests.digests(tensors)
    tensors["1.qkv.scale"][3] = np.nan
    from safetensors.numpy import save_file

    save_file(tensors, path, {"digests": json.dumps(good), "formats": "{}"})
    assert np.isfinite(logits(load_kept(opened))).all()
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
    real = packed_file.damaged
    monkeypatch.setattr(packed_file, "damaged", lambda *a: looked.append(1) or real(*a))

    def times() -> int:
        looked.clear()
        packed_file.load(path)
        packed_file.load(path)
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
    packed_file.verify(path)
    assert looked
    monkeypatch.setattr(digests, "_boot", lambda: None)  # a system that does not say when it started
    assert times() == 2


def test_a_stamp_does_not_hide_damage_from_verify(sound, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(sound.read_bytes())
    packed_file.verify(path)
    stat = path.stat()
    flip(path, "head.w", 9)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    packed_file.load(path)  # the disk went wrong behind the system's back
    for _ in range(2):
        with pytest.raises(CorruptModel, match=r"head\.w"):
            packed_file.verify(path)
    with pytest.raises(CorruptModel, match=r"head\.w"):
        packed_file.load(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"digests": "[]", "formats": "{}"},
        {"digests": "{}", "formats": "{}"},
        {"digests": "[" * 50_000, "formats": "{}"},
    ],
)
def test_a_file_without_digests_is_refused(sound, metadata, tmp_path):
    from safetensors.numpy import save_file

    save_file(packed_file.load(sound).tensors, tmp_path / "odd.bin", metadata)
    with pytest.raises(CorruptModel, match=r"odd\.bin"):
        packed_file.load(tmp_path / "odd.bin")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    code = f"""
import os, signal
import numpy as np
from pathlib import Path
from outpace.models import digests, packed_file
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all is written, but not yet in its place
from outpace.models.packed import Weights
packed_file.save(Weights({{"a": np.zeros(1 << 20, np.float32)}}, {{}}), Path({str(tmp_path)!r}) / "weights.bin")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "weights.bin").exists()
    assert len(list(tmp_path.glob("*.partial"))) == 1
    packed_file.save(ONES, tmp_path / "weights.bin")
    assert (packed_file.load(tmp_path / "weights.bin").tensors["a"] == 1).all()
    assert not list(tmp_path.glob("*.partial"))  # what the killed one left


def test_an_interrupted_writer_cleans_up(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed_file.save(ONES, tmp_path / "weights.bin")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    packed_file.keep(ONES, tmp_path / "file" / "weights.bin")
    packed_file.end_keepers()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "are not kept" in err and "OUTPACE_CACHE" in err


def test_a_writer_that_is_told_to_stop_leaves_nothing(tmp_path):
    stop = threading.Event()
    stop.set()
    packed_file.save(ONES, tmp_path / "weights.bin", stop)
    assert not list(tmp_path.iterdir())


def test_one_process_writes_at_a_time(tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / "weights.bin.lock"):
        packed_file.save(ONES, tmp_path / "weights.bin")
    assert not (tmp_path / "weights.bin").exists()


def test_files_of_earlier_layouts_go(tmp_path):
    for name in ("weights-int8-v1.bin", "weights-int4-v5.bin", "weights-int4-v5.bin.checked", "other-v1.bin"):
        (tmp_path / name).write_bytes(b"x" * 8)
    packed_file.save(ONES, tmp_path / packed_file.file_name("int8"))
    left = {f.name for f in tmp_path.iterdir()} - {f"{packed_file.file_name('int8')}.checked"}
    assert left == {packed_file.file_name("int8"), "other-v1.bin"}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("moment", ["packing", "at the end"])
def test_ctrl_c_leaves_nothing(tmp_path, moment):
    """While weights are made it ends the process; while they are kept it only ends that."""
    code = f"""
import os, signal, threading, time
import numpy as np
from pathlib import Path
from outpace.models import packed_file, packing
from outpace.models.packed import Weights
folder, moment = Path({str(tmp_path)!r}), {moment!r}
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
if moment == "packing":
    tasks = [packing._Task(lambda: time.sleep(0.01), 1) for _ in range(1000)]
    packing._run(tasks, 2, lambda done, total: done == 20 and interrupt())
packed_file._CHUNK = 1
packed_file.keep(Weights({{"a": np.zeros(1 << 24, np.float32)}}, {{}}), folder / "weights.bin")
timer = threading.Timer(1.0, interrupt)
timer.daemon = True
timer.start()
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert not list(tmp_path.iterdir())
    if moment == "packing":
        assert "KeyboardInterrupt" in done.stderr and time.monotonic() - start < 30
    else:
        assert done.returncode == 0 and "keeping the packed weights" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("rows", "width", "threads"), [(1, 64, 1), (16, 128, 3), (33, 576, 2)])
def test_the_compiled_rotation_has_the_bits_of_the_reference(rows: int, width: int, threads: int) -> None:
    w = torch.randn(rows, width) * torch.logspace(-6, 6, width)
    assert torch.equal(torch.from_numpy(rotate_weights(w.numpy(), threads)), rotate(w))
