"""Reads the header of a GGUF file (versions 2 and 3, little endian) and trusts nothing in it.

Layout: magic, version, counts; `kv_count` metadata entries; `tensor_count` tensor descriptions; padding to the
alignment; the tensors' data. Every count and length is checked against the bytes that are left before it is used,
and every tensor must lie inside the file without overlapping another. Specification:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import CorruptModel, UnsupportedModel

T = TypeVar("T")
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_NAME = 1 << 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` slowest dimension first, as PyTorch has it. `start` counts from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Strings:
    """An array of strings that has not been decoded."""

    start: int
    count: int


class Metadata(Mapping[str, Any]):
    """The entries by key. Arrays of strings are decoded when they are asked for: a vocabulary has hundreds of
    thousands, and of a model that was used before it is not needed. Raises CorruptModel then for one that is no text.
    """

    def __init__(self, path: Path, entries: dict[str, Any]) -> None:
        self._path, self._entries = path, entries

    def __getitem__(self, key: str) -> Any:
        value = self._entries[key]
        if isinstance(value, _Strings):
            value = self._entries[key] = _opened(self._path, lambda c: c.strings(value))
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True, slots=True)
class Header:
    metadata: Metadata
    tensors: dict[str, TensorInfo]


class _Cursor:
    """A position in the mapped file; reading beyond the end is CorruptModel, never a short answer."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)

    def corrupt(self, what: str) -> NoReturn:
        raise CorruptModel(f"{self.path}: {what} (byte {self.at} of {self.end}); fetch or copy the file again")

    def take(self, n: int) -> bytes:
        if n > self.end - self.at:
            self.corrupt(f"the file ends within its header, {n} bytes were expected")
        piece = self.data[self.at : self.at + n]
        self.at += n
        return piece

    def scalar(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def string(self, longest: int | None = None) -> str:
        n = self.scalar(_U64)
        if longest is not None and n > longest:
            self.corrupt(f"a name of {n} bytes")
        try:
            return self.take(n).decode("utf-8")
        except UnicodeDecodeError:
            self.corrupt("a string that is not UTF-8")

    def skip_strings(self, n: int) -> _Strings:
        found, at, length = _Strings(self.at, n), self.at, _U64.unpack_from
        try:
            for _ in range(n):
                at += 8 + length(self.data, at)[0]
        except (struct.error, OverflowError):  # beyond the end
            at = self.end + 1
        if at > self.end:
            self.corrupt(f"an array of {n} strings that do not fit the file")
        self.at = at
        return found

    def strings(self, where: _Strings) -> list[str]:
        self.at = where.start
        return [self.string() for _ in range(where.count)]

    def array(self) -> list[Any] | _Strings:
        kind, n = self.scalar(_U32), self.scalar(_U64)
        if kind == _STRING:
            if n > (self.end - self.at) // _U64.size:
                self.corrupt(f"an array of {n} strings")
            return self.skip_strings(n)
        if kind not in _SCALARS:
            self.corrupt(f"an array of unknown type {kind}")
        form = _SCALARS[kind]
        if n > (self.end - self.at) // form.size:
            self.corrupt(f"an array of {n} numbers")
        return list(struct.unpack(f"<{n}{form.format[-1]}", self.take(n * form.size)))

    def value(self) -> Any:
        kind = self.scalar(_U32)
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            self.corrupt(f"a value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])


def read_header(path: Path) -> Header:
    """Raises CorruptModel for a damaged or truncated file, UnsupportedModel for another version or byte order."""
    return _opened(path, _read)


def _opened(path: Path, read: Callable[[_Cursor], T]) -> T:
    try:
        with path.open("rb") as f:
            if os.fstat(f.fileno()).st_size < 24:
                raise CorruptModel(f"{path}: too short for a GGUF file; fetch or copy the file again")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return read(_Cursor(path, data))
    except OSError as e:
        raise CorruptModel(f"{path}: cannot be read: {e.strerror or e}") from e


def _read(c: _Cursor) -> Header:
    if c.take(4) != b"GGUF":
        raise CorruptModel(f"{c.path}: not a GGUF file (it does not begin with the letters GGUF)")
    version = c.scalar(_U32)
    if version not in (2, 3):
        kind = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
        raise UnsupportedModel(f"{c.path}: {kind} GGUF; supported: little-endian GGUF of versions 2 and 3")
    tensor_count, kv_count = c.scalar(_U64), c.scalar(_U64)
    if tensor_count + kv_count > (c.end - c.at) // 12:  # the least bytes that an entry takes
        c.corrupt(f"{tensor_count} tensors and {kv_count} metadata entries do not fit the file")
    metadata: dict[str, Any] = {}
    for _ in range(kv_count):
        key = c.string(_MAX_NAME)
        if key in metadata:
            c.corrupt(f"metadata entry {key!r} twice")
        metadata[key] = c.value()
    described = [_describe(c) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        c.corrupt(f"general.alignment={alignment!r} is not a power of two")
    return Header(Metadata(c.path, metadata), _place(c, described, alignment))


def _describe(c: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, n_dims = c.string(_MAX_NAME), c.scalar(_U32)
    if not 1 <= n_dims <= _MAX_DIMS:
        c.corrupt(f"tensor {name!r} has {n_dims} dimensions")
    shape = tuple(c.scalar(_U64) for _ in range(n_dims))[::-1]
    return name, shape, c.scalar(_U32), c.scalar(_U64)


def _place(c: _Cursor, described: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, TensorInfo]:
    """Give every tensor its bytes in the file, or refuse the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    base = -(-c.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type_id, offset in described:
        if name in tensors:
            c.corrupt(f"tensor {name!r} twice")
        try:
            kind = GGMLQuantizationType(type_id)
        except ValueError:
            raise UnsupportedModel(
                f"{c.path}: tensor {name!r} has the unknown type {type_id}; take a file in Q4_K_M, Q6_K or Q8_0"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = math.prod(shape)
        if count == 0:
            c.corrupt(f"tensor {name!r} has the shape {shape}")
        if shape[-1] % block:
            c.corrupt(
                f"tensor {name!r} of type {kind.name} has rows of {shape[-1]} values, which are no multiple of its "
                f"blocks of {block}"
            )
        nbytes = count // block * block_bytes
        if offset % alignment or base + offset + nbytes > c.end:
            c.corrupt(f"tensor {name!r} does not lie within the file")
        tensors[name] = TensorInfo(name, shape, type_id, kind.name, base + offset, nbytes)
    placed = sorted(tensors.values(), key=lambda t: t.start)
    for a, b in pairwise(placed):
        if a.start + a.nbytes > b.start:
            c.corrupt(f"tensors {a.name!r} and {b.name!r} overlap")
    return tensors
