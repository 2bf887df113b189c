"""All of a model's weights in the layout of the CPU kernels, made from a checkpoint panel by panel on all threads.

What a file has in blocks is moved, not computed (ops.cpu.interleave): that takes about as long as reading it. Other
precisions are made from floats, some panels at a time, so that little memory is needed beside the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptModel, UnsupportedModel
from ..ops.cpu.interleave import KINDS, Jobs, interleave
from ..ops.cpu.quantise import quantise_rows
from ..types import Precision
from . import packed_file
from .block import Axis, Projection, describe
from .checkpoint import Checkpoint
from .config import ModelConfig
from .formats import Format
from .packed import (
    DEPTH_UNIT,
    IN_BLOCKS,
    Progress,
    Tensors,
    Weights,
    allocate,
    bfloat16_bits,
    float_formats,
    head_width,
    layout,
    pack_product,
    padded,
)

_FLOATS = 1 << 18  # that a thread takes at a time


@dataclass(frozen=True, slots=True)
class _Task:
    run: Callable[[], None]
    size: int  # bytes that it writes


def own_formats(checkpoint: Checkpoint) -> dict[str, Format]:
    """Of the parts of all products, as the file has them. Raises UnsupportedModel where they cannot run so."""
    config, found = checkpoint.config, _found_formats(checkpoint)
    if not found:
        raise UnsupportedModel(
            "precision 'file' runs the formats of GGUF files; this model's weights are floats: use bfloat16 or int8"
        )
    if head_width(config) != config.head_dim:
        raise UnsupportedModel(
            f"heads of {config.head_dim} are no multiple of 32, which blocks of a file cannot be padded to: "
            "precision 'file' does not work for this model, int8 does"
        )
    return found


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether most of the matrices are in blocks in the file."""
    formats = _found_formats(checkpoint).values()
    return 2 * sum(form.is_quantised for form in formats) > len(formats)


def _found_formats(checkpoint: Checkpoint) -> dict[str, Format]:
    """Of the parts of all products; none at all where one of them is only to be had as floats."""
    found = {}
    for name, part in _parts(checkpoint.config):
        raw = checkpoint.raw(f"{part.source}.weight")
        if raw is None:
            return {}
        found[name] = raw.form
    return found


def _parts(config: ModelConfig) -> Iterator[tuple[str, Projection]]:
    """Of all products, and the embedding where it is not the head."""
    model = describe(config)
    for prefix, product in model.products():
        yield from ((f"{prefix}{part.name}", part) for part in product.parts)
    if not config.tie_embeddings:
        yield "embedding", model.embedding


def weight_bytes(opened: Any, precision: Precision) -> int:
    """Of an opened model (models.prepared.OpenModel) in memory, without reading any weights. Raises as `pack`."""
    formats = _formats(opened.checkpoint() if precision == "file" else None, opened.config, precision)
    return sum(
        int(np.prod(shape)) * np.dtype(kind).itemsize
        for shape, kind in layout(opened.config, precision, formats).values()
    )


def _formats(checkpoint: Checkpoint | None, config: ModelConfig, precision: Precision) -> Mapping[str, Format]:
    if precision == "file":
        assert checkpoint is not None
        return own_formats(checkpoint)
    return float_formats(config) if precision in IN_BLOCKS else {}


def weights_of(
    model: Any,
    precision: Precision,
    threads: int,
    progress: Progress | None = None,
    keep: bool = True,
    meanwhile: Callable[[], object] | None = None,
) -> Weights:
    """Of an opened model: its own blocks, a file of packed weights, or packed now (see `pack`). With `keep` such a file
    is then written in the background; one that is damaged is made anew, with a line on stderr."""
    folder = Path(model.prepared_dir)
    if precision == "file":  # nothing is gained by a copy
        packed_file.remove_old(folder)
        return pack(model.checkpoint(), precision, threads, progress, meanwhile)
    path = folder / packed_file.file_name(precision)
    if path.exists():
        try:
            return packed_file.load_checked(path, model.config, precision)
        except CorruptModel as error:
            print(f"{error}; packing the weights anew", file=sys.stderr, flush=True)
    weights = pack(model.checkpoint(), precision, threads, progress, meanwhile)
    if keep:
        packed_file.keep(weights, path)
    return weights


def pack(
    checkpoint: Checkpoint,
    precision: Precision,
    threads: int = 1,
    progress: Progress | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> Weights:
    """All of a model's weights. `progress(done, total)` counts bytes; `meanwhile` is called on this thread while the
    others work.

    Raises CorruptModel for weights that are no numbers, UnsupportedModel where the precision does not work for them.
    """
    formats = _formats(checkpoint, checkpoint.config, precision)
    tensors = allocate(layout(checkpoint.config, precision, formats))
    _vectors(checkpoint, tensors)
    if precision == "file":
        bad = _own_blocks(checkpoint, formats, tensors).run(threads, progress, meanwhile)
        if bad:
            raise CorruptModel(f"{bad[0]} holds scales that are not numbers; fetch or copy the file again")
    else:
        _run(list(_tasks(checkpoint, precision, formats, tensors)), threads, progress, meanwhile)
    return Weights(tensors, formats)


def _own_blocks(checkpoint: Checkpoint, formats: Mapping[str, Format], tensors: Tensors) -> Jobs:
    jobs = Jobs()
    for name, part in _parts(checkpoint.config):
        raw = checkpoint.raw(f"{part.source}.weight")
        assert raw is not None and raw.form is formats[name]
        rows = _padded_axis(part.outputs, head_width(checkpoint.config))
        if raw.rows is not None:
            rows = np.where(rows < 0, -1, raw.rows[rows])
        jobs.add(raw.data, KINDS[raw.form.name], rows, tensors[f"{name}.w"], raw.label)
    return jobs


def _run(
    tasks: list[_Task], threads: int, progress: Progress | None = None, meanwhile: Callable[[], object] | None = None
) -> None:
    done, total = 0, sum(task.size for task in tasks)
    pool = ThreadPoolExecutor(threads, "outpace-packing")
    try:
        sizes = {pool.submit(task.run): task.size for task in tasks}
        if meanwhile:
            meanwhile()
        for future in as_completed(sizes):
            future.result()
            done += sizes[future]
            if progress:
                progress(done, total)
    finally:  # after Ctrl-C or an error too: what runs takes milliseconds, the rest is dropped
        pool.shutdown(cancel_futures=True)


def _tasks(
    checkpoint: Checkpoint, precision: Precision, formats: Mapping[str, Format], tensors: Tensors
) -> Iterator[_Task]:
    config = checkpoint.config
    model, head = describe(config), head_width(config)
    for prefix, product in model.products():
        before = 0
        for i, part in enumerate(product.parts):
            rows = _padded_axis(part.outputs, head)
            panels = len(rows) // 16
            if precision in IN_BLOCKS:
                name = f"{prefix}{part.name}"
                blocks = tensors[f"{name}.w"]
                for a, b in _pieces(panels, _FLOATS // (16 * part.inputs.size)):
                    make = partial(_make_blocks, checkpoint, part, formats[name], rows[16 * a : 16 * b], blocks[a:b])
                    yield _Task(make, blocks[a:b].nbytes)
                continue
            places = np.arange(panels) + before
            if product.in_turn:
                places = np.arange(panels) * len(product.parts) + i
            w, scales = (tensors[f"{prefix}{product.name}.{kind}"] for kind in ("w", "scale"))
            for a, b in _pieces(panels, _FLOATS // (16 * part.inputs.size)):
                make = partial(_make_panels, checkpoint, part, precision, rows[16 * a : 16 * b], w, scales, places[a:b])
                yield _Task(make, w[0].nbytes * (b - a))
            before += panels
    if "embedding" in tensors:
        table = tensors["embedding"]
        for a, b in _pieces(len(table), _FLOATS // table.shape[1]):
            yield _Task(
                partial(_make_rows, checkpoint, f"{model.embedding.source}.weight", table, a, b), table[a:b].nbytes
            )


def _pieces(n: int, size: int) -> Iterator[tuple[int, int]]:
    size = max(size, 1)
    return ((a, min(a + size, n)) for a in range(0, n, size))


def _padded_axis(axis: Axis, head: int) -> NDArray[np.int64]:
    """Which row of the checkpoint each output is, -1 for padding; whole panels."""
    rows = np.arange(axis.size)
    if axis.heads:
        rows = np.pad(rows.reshape(axis.heads, -1), ((0, 0), (0, head - axis.size // axis.heads)), constant_values=-1)
    return np.pad(rows.ravel(), (0, padded(rows.size) - rows.size), constant_values=-1)


def _make_blocks(
    checkpoint: Checkpoint, part: Projection, form: Format, rows: NDArray[np.int64], panels: NDArray[np.uint8]
) -> None:
    w = _floats(checkpoint, part, rows, form.block)
    blocks = np.zeros((len(w), form.row_bytes(w.shape[1])), dtype=np.uint8)
    if quantise_rows(w, blocks):
        raise UnsupportedModel(
            f"tensor {part.source}.weight holds weights beyond 65504, which int4 cannot scale: use int8 or bfloat16"
        )
    interleave(blocks, KINDS[form.name], np.arange(len(w)), panels)


def _make_panels(
    checkpoint: Checkpoint,
    part: Projection,
    precision: Precision,
    rows: NDArray[np.int64],
    w: NDArray[np.int8],
    scales: NDArray[np.float32],
    places: NDArray[np.int64],
) -> None:
    panels, of_rows = pack_product(_floats(checkpoint, part, rows, DEPTH_UNIT[precision]), precision)
    w[places] = panels
    scales.reshape(-1, 16)[places] = of_rows.reshape(-1, 16)


def _make_rows(checkpoint: Checkpoint, source: str, table: NDArray[np.int16], first: int, last: int) -> None:
    values = checkpoint.rows(source, first, last)
    table[first:last, : values.shape[1]] = values if table.dtype == np.float32 else bfloat16_bits(values)


def _floats(checkpoint: Checkpoint, part: Projection, rows: NDArray[np.int64], unit: int) -> NDArray[np.float32]:
    """Rows of the checkpoint (-1: zeros), with their heads and their depth padded. f32[len(rows), K]"""
    there = rows >= 0
    inputs = part.inputs
    width = head_width(checkpoint.config) * inputs.heads if inputs.heads else inputs.size
    out = np.zeros((len(rows), padded(width, unit)), dtype=np.float32)
    if not there.any():
        return out
    values = checkpoint.rows(f"{part.source}.weight", int(rows[there][0]), int(rows[there][-1]) + 1)
    if inputs.heads:
        into = out[:, :width].reshape(len(rows), inputs.heads, -1)
        into[there, :, : inputs.size // inputs.heads] = values.reshape(len(values), inputs.heads, -1)
    else:
        out[there, : inputs.size] = values
    return out


def _vectors(checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Norms and biases."""
    config = checkpoint.config
    model, head = describe(config), head_width(config)
    for prefix, norm in model.norms():
        v = checkpoint.tensor(f"{norm.source}.weight")
        tensors[f"{prefix}{norm.name}"][: len(v)] = v + np.float32(config.norm_plus_one)
    for prefix, product in model.products():
        if not product.bias:
            continue
        at, out = 0, tensors[f"{prefix}{product.name}.bias"]
        for part in product.parts:
            rows = _padded_axis(part.outputs, head)
            if part.bias:
                out[at : at + len(rows)][rows >= 0] = checkpoint.tensor(f"{part.source}.bias")
            at += len(rows)
