"""Blocks of files in the kernels' panels: what comes back has the bits of the field's own dequantisation."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import toy_gguf
from gguf import GGMLQuantizationType as Q
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from toy import toy_checkpoint

from outpace.errors import CorruptModel
from outpace.models.formats import FORMATS, Format, dequantise, quantise_q4_1, regions_of, take_outputs
from outpace.models.gguf import GGUFCheckpoint
from outpace.ops.cpu.dequantise import dequantise_rows
from outpace.ops.cpu.interleave import KINDS, Jobs, interleave
from outpace.ops.cpu.quantise import quantise_rows

BLOCKS = [name for name, form in FORMATS.items() if form.is_quantised]
FLOATS = [name for name, form in FORMATS.items() if not form.is_quantised]
each_block = pytest.mark.parametrize("name", BLOCKS)
each_format = pytest.mark.parametrize("name", FORMATS)
seeds = st.integers(0, 2**32 - 1)


def scales_at(form: Format) -> list[int]:
    """Where a block of a file has its f16 numbers."""
    if form.name == "Q6_K":
        return [208]
    return [0, 2] if form.has_minima else [0]


def random_rows(form: Format, rows: int, blocks: int, seed: int) -> NDArray[np.uint8]:
    """Bytes as a file may have them: every bit is random, but scales and values are finite."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, blocks, form.block_bytes), dtype=np.uint8)
    if not form.is_quantised:
        values = rng.standard_normal((rows, blocks)).astype(np.float32)
        return gguf.quants.quantize(values, Q[form.name]).view(np.uint8).reshape(rows, -1)
    for at in scales_at(form):
        data[..., at + 1] &= 0xBF  # exponents up to 15
    return data.reshape(rows, -1)


def into_panels(data: NDArray[np.uint8], form: Format, depth: int, order: NDArray[np.int64]) -> NDArray[np.uint8]:
    panels = np.full(form.shape(len(order), depth), 0xA5, dtype=np.uint8)
    rows = np.pad(order, (0, -len(order) % 16), constant_values=-1)
    assert interleave(data, KINDS[form.name], rows, panels) == 0
    return panels


def theirs(data: NDArray[np.uint8], form: Format) -> NDArray[np.float32]:
    kinds = {"F32": "<f4", "F16": "<f2"}
    if form.name in kinds:
        return data.view(kinds[form.name]).astype(np.float32)
    return gguf.quants.dequantize(data, Q[form.name])


@given(name=st.sampled_from(list(FORMATS)), rows=st.integers(1, 40), blocks=st.integers(1, 5), seed=seeds)
def test_panels_hold_what_the_file_holds(name: str, rows: int, blocks: int, seed: int) -> None:
    form = FORMATS[name]
    count = blocks if form.is_quantised else 7 * blocks
    data = random_rows(form, rows, count, seed)
    order = np.random.default_rng(seed).permutation(rows)
    depth = count * form.block
    panels = into_panels(data, form, depth, order)
    want = theirs(data, form)[order]
    got = dequantise(panels, form, rows, depth)
    assert got.tobytes() == want.tobytes()
    padded = dequantise(panels, form, len(panels) * 16, panels.shape[1] * form.unit_depth)
    assert not padded[rows:].any() and not padded[:, depth:].any()
    bytes_ = {
        name: r.transpose(0, 3, 1, 2, 4).reshape(len(panels) * 16, -1) for name, r in regions_of(panels, form).items()
    }
    assert not any(region[rows:].any() for region in bytes_.values()), "padding is zero bytes"


@each_block
def test_sizes(name: str) -> None:
    form = FORMATS[name]
    assert (form.block, form.block_bytes) == gguf.GGML_QUANT_SIZES[Q[name]]
    sizes = {"Q4_0": 576, "Q4_1": 640, "Q5_0": 704, "Q5_1": 768, "Q8_0": 1088, "Q4_K": 2304, "Q5_K": 2816, "Q6_K": 3392}
    assert form.unit_bytes == sizes[name]
    assert form.row_bytes(512) == 512 // form.block * form.block_bytes


@each_block
def test_a_tail_of_32_is_zero_bytes(name: str) -> None:
    form = FORMATS[name]
    if form.block != 32:
        return
    panels = into_panels(random_rows(form, 16, 3, 1), form, 96, np.arange(16))
    for region, part in regions_of(panels, form).items():
        rows = part.shape[2]
        last = part[:, 1, rows // 2 :] if region != "nibbles" else part[:, 1] >> 4
        assert not last.any(), region


@each_format
def test_bad_scales_are_counted(name: str) -> None:
    form = FORMATS[name]
    data = random_rows(form, 5, 2 if form.is_quantised else 64, 3)
    panels = np.empty(form.shape(5, 2 * form.block if form.is_quantised else 64), dtype=np.uint8)
    rows = np.pad(np.arange(5), (0, 11), constant_values=-1)
    kind = KINDS[name]
    places = [0] if not form.is_quantised else [form.block_bytes + at for at in scales_at(form)]
    for at in places:
        for value in (np.inf, -np.inf, np.nan):
            for row in (0, 4):
                wrong = data.copy()
                if name in ("F32", "BF16"):
                    bits = np.array([value], dtype="<f4").view(np.uint8)
                    wrong[row, at : at + form.block_bytes] = bits[-form.block_bytes :]
                else:
                    wrong[row, at : at + 2] = np.array([value], dtype="<f2").view(np.uint8)
                assert interleave(wrong, kind, rows, panels) == 1
    assert interleave(data, kind, rows, panels) == 0


@each_format
def test_some_panels_only(name: str) -> None:
    form = FORMATS[name]
    data = random_rows(form, 64, 2 if form.is_quantised else 64, 4)
    depth = 2 * form.block if form.is_quantised else 64
    whole = into_panels(data, form, depth, np.arange(64))
    parts = np.zeros_like(whole)
    for first, last in ((2, 4), (0, 1), (1, 2)):
        interleave(data, KINDS[name], np.arange(64), parts, first, last)
    assert (parts == whole).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_jobs_of_many_threads(threads: int) -> None:
    jobs, made, told, called = Jobs(), [], [], []
    for i, name in enumerate(FORMATS):
        form = FORMATS[name]
        blocks = 2 if form.is_quantised else 64
        data = random_rows(form, 64, blocks, i)
        order = np.random.default_rng(i).permutation(64)
        panels = np.zeros(form.shape(64, blocks * form.block), dtype=np.uint8)
        if name == "Q5_K":
            data[7, 1] |= 0x7C
        jobs.add(data, KINDS[name], order, panels, name, at_once=3000)
        made.append((data, form, blocks * form.block, order, panels))
    bad = jobs.run(threads, lambda done, total: told.append((done, total)), lambda: called.append(1))
    assert bad == ["Q5_K"] and called == [1]
    assert told[-1][0] == told[-1][1] == sum(panels.nbytes for *_, panels in made) and told == sorted(told)
    for data, form, depth, order, panels in made:
        if form.name != "Q5_K":
            assert (dequantise(panels, form, 64, depth) == theirs(data, form)[order]).all()
    assert Jobs().run() == []


def test_jobs_end_with_what_goes_wrong_meanwhile() -> None:
    def wrong() -> None:
        raise KeyboardInterrupt

    form = FORMATS["Q4_0"]
    for how in ({"meanwhile": wrong}, {"progress": lambda done, total: wrong()}):
        jobs = Jobs()
        data, panels = np.zeros((1 << 14, 18 * 64), np.uint8), np.zeros(form.shape(1 << 14, 2048), np.uint8)
        jobs.add(data, KINDS["Q4_0"], np.arange(1 << 14), panels, at_once=1)
        with pytest.raises(KeyboardInterrupt):
            jobs.run(2, **how)  # type: ignore[arg-type]


@each_format
@pytest.mark.parametrize("count", [1, 16, 21])
def test_taken_outputs(name: str, count: int) -> None:
    form = FORMATS[name]
    depth = form.block if form.is_quantised else 48
    data = random_rows(form, 40, depth // form.block, 5)
    wanted = np.random.default_rng(6).integers(0, 40, count)
    taken = take_outputs(into_panels(data, form, depth, np.arange(40)), form, wanted)
    last = np.append(wanted, np.repeat(wanted[-1:], -count % 16))
    assert (dequantise(taken, form, len(last), depth) == theirs(data, form)[last]).all()


@given(seed=seeds, rows=st.integers(1, 5), depth=st.sampled_from([32, 64, 96, 40]), scale=st.floats(-4, 3))
def test_made_blocks_are_no_worse_than_the_plain_ones(seed: int, rows: int, depth: int, scale: float) -> None:
    w = (np.random.default_rng(seed).standard_normal((rows, depth)) * 10**scale).astype(np.float32)
    padded = np.pad(w, ((0, 0), (0, -depth % 32)))
    ours = gguf.quants.dequantize(quantise_q4_1(w), Q.Q4_1)
    plain = gguf.quants.dequantize(gguf.quants.quantize(padded, Q.Q4_1), Q.Q4_1)
    assert np.square(ours - padded).sum() <= np.square(plain - padded).sum() * 1.02 + 1e-12


def test_blocks_of_q4_1_come_back() -> None:
    """Weights that were Q4_1 once, in groups of all sixteen steps, are not rounded again."""
    data = random_rows(FORMATS["Q4_1"], 64, 8, 7).reshape(-1, 20)
    data[:, 1] &= 0x7F  # scales above zero
    data[:, 4], data[:, 19] = data[:, 4] & 0xF0, data[:, 19] | 0xF0
    w = gguf.quants.dequantize(data, Q.Q4_1).reshape(64, 256)
    again = gguf.quants.dequantize(quantise_q4_1(w), Q.Q4_1)
    np.testing.assert_allclose(again, w, rtol=2e-3, atol=2e-3 * np.abs(w).max())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_files_own_rows(name: str, arch: str, tmp_path: Path) -> None:
    """Without floats in between, llama's rows included: the matrix that the checkpoint's own `tensor` gives."""
    form, path = FORMATS[name], tmp_path / "m.gguf"
    layers = {f"blk.0.{p}.weight": n for p, n in (("attn_q", 256), ("attn_k", 128), ("ffn_up", 256))}
    tensors = {t: random_rows(form, n, 256 // form.block, i) for i, (t, n) in enumerate(layers.items())}
    toy_gguf.write(path, arch, width=256, tensors=tensors, raw_types=dict.fromkeys(tensors, Q[name]))
    checkpoint = GGUFCheckpoint(path)
    for part, n in (("self_attn.q_proj", 256), ("self_attn.k_proj", 128), ("mlp.up_proj", 256)):
        tensor = f"model.layers.0.{part}.weight"
        raw = checkpoint.raw(tensor)
        assert raw is not None and raw.form is form and raw.data.shape == (n, form.row_bytes(256))
        assert (raw.rows is not None) == (arch == "llama" and "attn" in part)
        rows = np.arange(n) if raw.rows is None else raw.rows
        got = dequantise(into_panels(raw.data, form, 256, rows), form, n, 256)
        assert got.tobytes() == checkpoint.tensor(tensor).tobytes()
    assert checkpoint.raw("model.norm.weight") is None and checkpoint.raw("nope") is None
    whole = checkpoint.raw("model.embed_tokens.weight")
    assert whole is not None and whole.form.name == "F32"


def test_floats_have_no_rows_of_blocks() -> None:
    assert toy_checkpoint("llama")[0].raw("model.embed_tokens.weight") is None


def test_a_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    toy_gguf.write(path)
    checkpoint = GGUFCheckpoint(path)
    os.truncate(path, path.stat().st_size - 64)
    last = max(checkpoint._infos, key=lambda name: checkpoint._infos[name].start)
    with pytest.raises(CorruptModel, match=r"m\.gguf.*shorter"):
        checkpoint.tensor(last)


@given(
    seed=seeds,
    rows=st.integers(1, 4),
    blocks=st.integers(1, 4),
    scale=st.floats(-8, 3),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
)
def test_compiled_blocks_are_those_of_the_reference(
    seed: int, rows: int, blocks: int, scale: float, offset: float
) -> None:
    rng = np.random.default_rng(seed)
    w = ((rng.standard_normal((rows, 32 * blocks)) + offset) * 10**scale).astype(np.float32)
    w[rng.random(w.shape) < 0.1] = 0
    got, want = np.zeros((rows, 20 * blocks), np.uint8), quantise_q4_1(w)
    assert quantise_rows(w, got) == 0
    same = (got == want).reshape(-1, 20).all(1)
    assert same.mean() > 0.9 or same.sum() >= len(same) - 1  # sums in another order: ties may fall otherwise
    errors = [
        np.square(gguf.quants.dequantize(x, Q.Q4_1).astype(np.float64) - w).reshape(-1, 32).sum(1) for x in (got, want)
    ]
    np.testing.assert_allclose(*errors, rtol=1e-4, atol=1e-18)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6, -1e6])
def test_weights_that_f16_cannot_scale_are_counted(value: float) -> None:
    w = np.ones((4, 64), np.float32)
    w[2, 40] = value
    assert quantise_rows(w, np.zeros((4, 40), np.uint8)) == 1


def test_blocks_of_equal_and_of_zero_weights() -> None:
    w = np.repeat(np.array([0.0, 0.5, -2.0, 1e-7, -3e-5], np.float32)[:, None], 32, axis=1)
    out = np.zeros((5, 20), np.uint8)
    assert quantise_rows(w, out) == 0
    np.testing.assert_allclose(gguf.quants.dequantize(out, Q.Q4_1), w, rtol=1e-3, atol=2.0**-25)


@given(name=st.sampled_from(BLOCKS), rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=seeds)
def test_compiled_dequantisation_has_the_bits_of_the_slow_one(name: str, rows: int, blocks: int, seed: int) -> None:
    form = FORMATS[name]
    data = random_rows(form, rows, blocks, seed)
    got = dequantise_rows(data, name, blocks * form.block)
    assert got.shape == (rows, blocks * form.block) and got.tobytes() == theirs(data, form).tobytes()
    part = data[::2]  # not contiguous
    assert (dequantise_rows(part, name, blocks * form.block) == got[::2]).all()
