"""Weights in the layout of the CPU kernels: which tensors there are, and how floats become panels.

In float32, bfloat16 and int8 the weights of a product lie in panels of sixteen outputs; within a panel the depth runs
in rows of 64 bytes (see ops.cpu.linear). int8 has one symmetric scale per output. Widths are padded to sixteen and
depths to a panel's KiB with zeros. Gate and up projections alternate panel by panel, so that the gated activation
happens in the epilogue.

In "file" and int4 each projection is a tensor of its own, in a format of models.formats: the file's, or blocks of Q4_1
made here. A tied embedding is then not there twice: its rows are read out of the head.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..types import Precision
from .block import Axis, Projection, describe
from .config import ModelConfig
from .formats import FORMATS, Format

DEPTH_UNIT: dict[Precision, int] = {"float32": 16, "bfloat16": 32, "int8": 64}
_PANEL_TYPES: dict[Precision, Any] = {"float32": np.float32, "bfloat16": np.int16, "int8": np.int8}
IN_BLOCKS: tuple[Precision, ...] = ("file", "int4")
Tensors = dict[str, NDArray[Any]]
Spec = tuple[tuple[int, ...], Any]  # shape and type
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Weights:
    """`formats`: of the parts of products ("0.q", "head", "embedding") that are in a format of models.formats."""

    tensors: Tensors
    formats: Mapping[str, Format]


def padded(n: int, unit: int = 16) -> int:
    return -(-n // unit) * unit


def head_width(config: ModelConfig) -> int:
    """Head width in the kernels: half a tile of bf16 pairs must be whole."""
    return padded(config.head_dim, 32)


def width_of(axis: Axis, head: int) -> int:
    """Of an axis in the kernels, whose heads are `head` wide."""
    return axis.heads * head if axis.heads else axis.size


def float_formats(config: ModelConfig) -> dict[str, Format]:
    """Of int4: all parts in Q4_1."""
    products = describe(config).products()
    return {f"{prefix}{part.name}": FORMATS["Q4_1"] for prefix, product in products for part in product.parts}


def layout(config: ModelConfig, precision: Precision, formats: Mapping[str, Format]) -> dict[str, Spec]:
    """Names, shapes and types of all tensors of a model. `formats`: as in Weights."""
    model, head = describe(config), head_width(config)
    specs: dict[str, Spec] = {}

    def part_panels(part: Projection) -> int:
        return padded(width_of(part.outputs, head)) // 16

    for prefix, product in model.products():
        name, panels = f"{prefix}{product.name}", sum(map(part_panels, product.parts))
        if product.bias:
            specs[f"{name}.bias"] = ((16 * panels,), np.float32)
        depth = width_of(product.parts[0].inputs, head)
        if precision in IN_BLOCKS:
            for part in product.parts:
                form = formats[f"{prefix}{part.name}"]
                specs[f"{prefix}{part.name}.w"] = (form.shape(16 * part_panels(part), depth), np.uint8)
            continue
        unit = DEPTH_UNIT[precision]
        shape: tuple[int, ...] = (panels, padded(depth, unit) // (unit // 16), 16, unit // 16)
        specs[f"{name}.w"], specs[f"{name}.scale"] = (shape, _PANEL_TYPES[precision]), ((16 * panels,), np.float32)
    for prefix, norm in model.norms():
        specs[f"{prefix}{norm.name}"] = ((padded(width_of(norm.axis, head)),), np.float32)
    table = (config.vocab_size, padded(config.hidden_size))
    if "embedding" in formats:
        specs["embedding.w"] = (formats["embedding"].shape(*table), np.uint8)
    elif precision not in IN_BLOCKS or not config.tie_embeddings:
        specs["embedding"] = (table, np.float32 if precision == "float32" else np.int16)
    return specs


def allocate(specs: Mapping[str, Spec]) -> Tensors:
    """Zeros, one behind the other, in memory backed by huge pages where the system has them (streaming 1.5 GB of
    weights through 4 KiB pages costs a tenth of the bandwidth). Nothing is touched yet."""
    sizes = {name: int(np.prod(shape)) * np.dtype(kind).itemsize for name, (shape, kind) in specs.items()}
    memory = huge_memory(sum(padded(size, 4096) for size in sizes.values()))
    out: Tensors = {}
    at = 0
    for name, (shape, kind) in specs.items():
        count = sizes[name] // np.dtype(kind).itemsize
        out[name] = np.frombuffer(memory, dtype=kind, count=count, offset=at).reshape(shape)
        at += padded(sizes[name], 4096)
    return out


def huge_memory(size: int) -> mmap.mmap:
    kind = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, max(size, 1), **kind)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def bfloat16_bits(w: NDArray[np.float32]) -> NDArray[np.int16]:
    """Rounded half to even; finite values only."""
    bits = w.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.int16)


def pack_product(w: NDArray[np.float32], precision: Precision) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """f32[N, K] -> panels (int8, bf16 bits as i16, or float32) and scales f32[N] (ones but for int8).

    int8 weights are rotated in blocks of 64 as the kernel rotates the activations (rows.pack_row): int8 then
    costs 0.5 % of perplexity where it cost 3 % (SmolLM2), without calibration. The idea is QuaRot's (arXiv 2404.00456).
    """
    n, k = w.shape
    unit = DEPTH_UNIT[precision]
    rows = np.ascontiguousarray(np.pad(w, ((0, padded(n) - n), (0, padded(k, unit) - k))), dtype=np.float32)
    scales = np.ones(len(rows), dtype=np.float32)
    values: NDArray[Any] = rows
    if precision == "int8":
        from ..ops.cpu.rotation import BLOCK, rotate_weights

        rows = rotate_weights(rows, 1)
        rows /= np.float32(BLOCK)
        scales = np.abs(rows).max(axis=1) / np.float32(127)
        rows /= np.maximum(scales, np.float32(1e-30))[:, None]
        values = np.rint(rows, out=rows).astype(np.int8)
    elif precision == "bfloat16":
        values = bfloat16_bits(rows)
    per_row = unit // 16
    panels = values.reshape(len(rows) // 16, 16, -1, per_row).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(panels), scales


def take_outputs(
    w: NDArray[Any], scales: NDArray[np.float32], outputs: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """A packed product with some outputs only, in that order: panels and scales as `pack_product` makes them.

    The padding repeats the last output.
    """
    wanted = np.append(outputs, np.repeat(outputs[-1:], padded(len(outputs)) - len(outputs)))
    panel, lane = (part.reshape(-1, 16) for part in np.divmod(wanted, 16))

    def take(parts: NDArray[Any]) -> NDArray[Any]:
        """[N/16, rows, 16, ...] -> [n/16, rows, 16, ...]"""
        rows = np.arange(parts.shape[1])[None, :, None]
        return parts[panel[:, None], rows, lane[:, None]]

    return np.ascontiguousarray(take(w)), scales[wanted]
