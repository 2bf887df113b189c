"""Kernels are ready before the first step, in the types that steps use; a machine's first run says what it does."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from numba.core.dispatcher import Dispatcher
from toy import Rig, random_tokens, toy_checkpoint

from outpace.cache.native_storage import NativeStorage
from outpace.models.native import NativeDecoder
from outpace.ops.cpu import compiled, ready
from outpace.ops.cpu.step import decoder_step
from outpace.ops.cpu.team import post, serve, work
from outpace.ops.select import row_argmax

ENTRIES = (work, serve, post)


def test_steps_use_the_kernels_that_were_made_ready() -> None:
    ready.make_ready()
    before = [entry.signatures for entry in ENTRIES]
    assert all(len(signatures) == 1 for signatures in before)
    rig = Rig(NativeDecoder.from_checkpoint(toy_checkpoint("llama")[0], "int8", 2))
    logits = rig.feed(rig.cache.new(), random_tokens(5))
    assert (row_argmax(torch.from_numpy(logits)) == logits.argmax(-1)).all()
    assert [entry.signatures for entry in ENTRIES] == before
    assert compiled.is_cached(decoder_step) or compiled._folder() is None


def test_only_the_first_run_on_a_machine_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for cached in (True, False):
        monkeypatch.setattr(ready, "is_cached", lambda _, cached=cached: cached)
        with ready.made_ready():
            pass
        said = capsys.readouterr()
        assert said.out == "" and ("compiling the CPU kernels" in said.err) == (not cached)
        assert said.err.count("\n") == (not cached)
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)
    assert not compiled.is_cached(decoder_step)
    monkeypatch.setattr(compiled, "_folder", lambda: None)
    assert not compiled.is_cached(decoder_step)


def test_compiled_code_is_kept_apart_for_every_change_of_a_source(tmp_path: Path) -> None:
    """Of all files of the package, also those that hold no entry point: the step is inlined from several."""
    own = Path(compiled.__file__).parent
    copies = [shutil.copy(source, tmp_path) for source in own.glob("*.py")]
    found = {compiled.sources_digest(own)}
    assert found == {compiled.sources_digest(tmp_path)} and len(copies) > 10
    for copy in map(Path, copies):
        before = copy.read_text("utf-8")
        copy.write_text(before + "# changed\n", "utf-8")
        found.add(compiled.sources_digest(tmp_path))
        copy.write_text(before, "utf-8")
    assert len(found) == 1 + len(copies)


def test_all_that_is_compiled_lies_beside_the_digest() -> None:
    """A function of another folder that a kernel calls would be missing from the digest."""
    own = Path(compiled.__file__).parent
    modules = [module for name, module in sys.modules.items() if name.startswith("outpace.ops.cpu")]
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)]
    assert len(kernels) > 20
    assert {Path(kernel.py_func.__code__.co_filename).parent for kernel in kernels} == {own}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="platform: reads /proc")
def test_an_unwritten_cache_takes_no_memory() -> None:
    """Nor does a token in it take a huge page of every layer."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[always]" in huge.read_text():
        pytest.skip("this system uses huge pages everywhere")
    before = resident()
    storage = NativeStorage(30, 4096, 3, 64, bf16=True)
    assert storage.keys.nbytes + storage.values.nbytes > 1 << 30
    storage.keys[:, 7, :, :, 3] = 1
    storage.values[:, 7, :, 1, :, 1] = 1
    assert resident() - before < 16 << 20
    assert not storage.keys[:, :7].any() and storage.keys[:, 7].sum() == 30 * 3 * 32 * 2
