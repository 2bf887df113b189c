"""Compiled code on disk is read only as it was written, from a folder that is nobody else's."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from outpace.ops.cpu import compiled, kept

CODE = "def {name}(x):\n    return x * 2 + {more}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path / "kernels")
    kept._said.clear()
    return tmp_path / "kernels"


def make(tmp_path: Path, more: int = 1) -> Any:
    """A function of a source file, as a new process would decorate it."""
    source = tmp_path / "toy_kernel.py"
    if not source.exists():
        source.write_text(CODE.format(name="double", more=more))
    scope: dict[str, Any] = {"__name__": "toy_kernel"}
    exec(compile(source.read_text(), str(source), "exec"), scope)
    return compiled.compiled(scope["double"])


def loaded(function: Any) -> bool:
    """Whether the call's code came from disk."""
    assert function(20) == 41
    return sum(function.stats.cache_hits.values()) == 1


def test_code_is_kept_and_read_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not loaded(make(tmp_path))
    (base,) = kept.bases(folder)
    assert kept.damaged(base) is None and len(kept.files(base)) == 2
    assert loaded(make(tmp_path))
    assert capsys.readouterr().err == ""


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "gone", "bomb"])
def test_what_is_not_as_written_is_never_unpickled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ending: str, damage: str,
) -> None:  # fmt: skip
    make(tmp_path)(20)
    (base,) = kept.bases(folder)
    (file,) = (f for f in kept.files(base) if f.name.endswith(ending))
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "bomb":
        monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
        file.write_bytes(pickle.dumps(Bomb()) * 2)
    else:
        changed = bytes([data[-1] ^ 4])
        file.write_bytes({"bit": data[:-1] + changed, "cut": data[: len(data) // 2], "empty": b""}[damage])
    assert not loaded(make(tmp_path))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and file.name in said and "compiled anew" in said
    assert not (tmp_path / "ran").exists()
    assert kept.damaged(base) is None and loaded(make(tmp_path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", [None, "", "[]", "[" * 100_000, "{}", '{"x": 1}'])
def test_code_without_its_list_is_made_anew(folder: Path, tmp_path: Path, text: str | None) -> None:
    """As a process leaves it that is killed between writing and noting."""
    make(tmp_path)(20)
    (base,) = kept.bases(folder)
    listed = base.with_name(base.name + ".digests.json")
    if text is None:
        listed.unlink()
    else:
        listed.write_text(text)
    assert not loaded(make(tmp_path))
    assert loaded(make(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX owners and modes")
def test_a_folder_of_others_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    kept._said.clear()
    find = compiled._folder.__wrapped__
    found = find()
    assert found is not None and found.stat().st_mode & 0o777 == 0o700
    found.chmod(0o777)
    found.parent.chmod(0o775)
    assert find() == found and not (found.stat().st_mode | found.parent.stat().st_mode) & 0o022
    assert capsys.readouterr().err == ""
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert find() is None and find() is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "another user" in said and "OUTPACE_CACHE" in said
