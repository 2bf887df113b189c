"""The file that packed weights are kept in, so that later starts need not make them again.

It is in the safetensors format, with a digest of each tensor (see models.digests). It is read in one sweep into memory
backed by huge pages. It is written in the background, from the arrays that are in use, under another name until it is
whole: whoever is killed leaves at most a partial file, which the next writer removes.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptModel
from ..types import Precision
from .config import ModelConfig
from .digests import damaged, forget_checked, is_checked, new_digest, note_checked, note_used
from .formats import FORMATS
from .packed import Tensors, Weights, huge_memory, layout

FORMAT = 6  # part of the file's name: a new layout gets a new file
_DTYPES: dict[str, Any] = {
    "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U8": np.dtype(np.uint8),
}
_DIGESTS, _FORMATS = "digests", "formats"  # where the file's metadata have them
_CHUNK = 1 << 24


def file_name(precision: Precision) -> str:
    return f"weights-{precision}-v{FORMAT}.bin"


def save(weights: Weights, path: Path, stop: threading.Event | None = None) -> None:
    """Write the file, unless another process just does. Given up, without a trace, when `stop` is set.

    Raises OSError.
    """
    from filelock import FileLock, Timeout

    lock, partial = (path.with_name(f"{path.name}.{ending}") for ending in ("lock", f"{os.getpid()}.partial"))
    try:
        with FileLock(lock, timeout=0):
            for left in path.parent.glob(f"{path.name}.*.partial"):  # of writers that were killed
                left.unlink(missing_ok=True)
            try:
                if not _write(weights, partial, stop):
                    return
                os.replace(partial, path)
            finally:
                for file in (partial, lock):
                    with suppress(OSError):
                        file.unlink()
            note_checked(path)
            remove_old(path.parent)
    except Timeout:
        return


def remove_old(folder: Path) -> int:
    """Files of earlier layouts, which nothing reads any more; bytes freed."""
    freed = 0
    for old in old_files(folder):
        with suppress(OSError):
            freed += old.stat().st_size
            old.unlink()
            forget_checked(old)
    return freed


def is_being_written(partial: Path) -> bool:
    """Whether a partial file has a writer that is alive."""
    from filelock import FileLock, Timeout

    lock = partial.with_name(f"{partial.name.rsplit('.', 2)[0]}.lock")
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError):
        return True


def old_files(folder: Path) -> list[Path]:
    return [f for f in folder.glob("weights-*.bin") if (m := re.search(r"-v(\d+)\.", f.name)) and int(m[1]) != FORMAT]


def _write(weights: Weights, partial: Path, stop: threading.Event | None) -> bool:
    """Whether all was written. Digests are taken on the way, into room that was left for them."""
    kinds = {dtype: name for name, dtype in _DTYPES.items()}
    digests = {name: new_digest(name, tensor) for name, tensor in weights.tensors.items()}
    entries: dict[str, Any] = {}
    at = 0
    for name, tensor in weights.tensors.items():
        places = [at, at := at + tensor.nbytes]
        entries[name] = {"dtype": kinds[tensor.dtype], "shape": tensor.shape, "data_offsets": places}
    formats = json.dumps({name: form.name for name, form in weights.formats.items()})

    def header() -> bytes:
        found = json.dumps({name: digest.hexdigest() for name, digest in digests.items()})
        text = json.dumps({"__metadata__": {_DIGESTS: found, _FORMATS: formats}, **entries}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with partial.open("wb") as f:
        f.write(header())
        for name, tensor in weights.tensors.items():
            data = memoryview(np.ascontiguousarray(tensor)).cast("B") if tensor.size else memoryview(b"")
            for a in range(0, len(data), _CHUNK):
                if stop is not None and stop.is_set():
                    return False
                digests[name].update(data[a : a + _CHUNK])
                f.write(data[a : a + _CHUNK])
        f.seek(0)
        f.write(header())
    return True


class _Keeper(threading.Thread):
    """Writes one file at the lowest priority: decoding goes first."""

    def __init__(self, weights: Weights, path: Path) -> None:
        super().__init__(name="outpace-keep", daemon=True)
        self.weights, self.path = weights, path
        self.stop, self.done = threading.Event(), threading.Event()

    def run(self) -> None:
        with suppress(OSError, AttributeError):  # of this thread alone, which only Linux has
            if sys.platform == "linux":
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            save(self.weights, self.path, self.stop)
        except OSError as error:
            print(
                f"the packed weights are not kept: {error}; later starts take as long as this one; make room, or set "
                "OUTPACE_CACHE to a folder that can be written to",
                file=sys.stderr,
                flush=True,
            )
        finally:
            _keepers.discard(self)
            self.done.set()

    def end(self) -> None:
        """Before the process ends. (A join that Ctrl-C interrupted takes the thread for ended.)"""
        try:
            if not self.done.wait(0.2):
                size = sum(tensor.nbytes for tensor in self.weights.tensors.values()) / 1e9
                print(
                    f"keeping the packed weights for later starts ({size:.1f} GB; Ctrl-C leaves it)…",
                    file=sys.stderr,
                    flush=True,
                )
                self.done.wait()
        except KeyboardInterrupt:
            self.stop.set()
            self.done.wait()


_keepers: set[_Keeper] = set()


def keep(weights: Weights, path: Path) -> None:
    """`save` in the background. What cannot be written is said on stderr."""
    keeper = _Keeper(weights, path)
    _keepers.add(keeper)
    keeper.start()


@atexit.register
def end_keepers() -> None:
    for keeper in list(_keepers):
        keeper.end()


def load(path: Path) -> Weights:
    """Read a file that `save` wrote. Raises CorruptModel when it is damaged; the tensors' bytes are looked at when
    the file is first used after a start of the machine."""
    weights, recorded = _read(path)
    if not is_checked(path):
        if wrong := damaged(weights.tensors, recorded):
            forget_checked(path)
            raise CorruptModel(f"{path}: {_named(wrong)} not what was written (wrong digest)")
        note_checked(path)
    note_used(path)
    return weights


def load_checked(path: Path, config: ModelConfig, precision: Precision) -> Weights:
    """`load`; raises CorruptModel also when the file is not this model's."""
    weights = load(path)
    try:
        wanted = layout(config, precision, weights.formats)
    except KeyError as error:
        raise CorruptModel(f"{path}: the format of {error} is missing") from None
    for name in sorted(wanted.keys() | weights.tensors.keys()):
        found = weights.tensors.get(name)
        if found is None or (found.shape, found.dtype) != wanted.get(name):
            raise CorruptModel(f"{path}: {name} is missing, misshapen or unknown")
    return weights


def verify(path: Path) -> None:
    """Check every tensor of a file, whether or not it has been. Raises CorruptModel, naming the tensors."""
    forget_checked(path)
    load(path)


def _named(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]} is"
    return f"tensors {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} are"


def _read(path: Path) -> tuple[Weights, Mapping[str, str]]:
    """Tensors and their digests as the file has them."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            header_size = int.from_bytes(f.read(8), "little")
            if not 0 < header_size < min(size, 1 << 26):
                raise ValueError("header size out of range")
            header = json.loads(f.read(header_size))
            body = size - 8 - header_size
            memory = memoryview(huge_memory(body))
            done = 0
            while done < body:
                n = f.readinto(memory[done : min(body, done + (1 << 26))])
                if not n:
                    raise ValueError("truncated")
                done += n
        metadata = header.pop("__metadata__")
        recorded = json.loads(metadata[_DIGESTS])
        formats = {name: FORMATS[form] for name, form in json.loads(metadata[_FORMATS]).items()}
        if not isinstance(recorded, dict):
            raise ValueError("no digests")
        tensors: Tensors = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop <= body:
                raise ValueError(f"tensor {name} lies outside the file")
            tensors[name] = np.frombuffer(memory[start:stop], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return Weights(tensors, formats), recorded
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptModel(f"{path}: not a sound file of packed weights ({error})") from None
