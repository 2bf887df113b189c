"""GGUF files: every quantisation, the writers' changes undone, clear refusals."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import toy_gguf
from gguf import GGMLQuantizationType as Q
from numpy.typing import NDArray

from outpace.errors import CorruptModel, UnsupportedModel
from outpace.models import gguf as files
from outpace.models import gguf_header
from outpace.models.gguf import SUPPORTED_TYPES, GGUFCheckpoint

MLP_UP, UP = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"


def load_up(path: Path, values: NDArray[np.generic], kind: Q) -> NDArray[np.float32]:
    toy_gguf.write(path, width=256, tensors={MLP_UP: values}, raw_types={MLP_UP: kind})
    return GGUFCheckpoint(path).tensor(UP)


# ----------------------------------------------------------------------------------------------- quantisations


@pytest.mark.parametrize(("kind", "step"), [("F32", 0.0), ("F16", 2**-11), ("BF16", 2**-8)])
def test_float_types(tmp_path: Path, kind: str, step: float) -> None:
    x = np.random.default_rng(1).standard_normal((256, 256)).astype(np.float32)
    got = load_up(tmp_path / "m.gguf", gguf.quants.quantize(x, Q[kind]), Q[kind])
    assert got.dtype == np.float32 and got.flags.c_contiguous
    assert (np.abs(got - x) <= np.abs(x) * step).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_block_types_stay_within_one_step(tmp_path: Path, kind: str) -> None:
    x = np.random.default_rng(2).standard_normal((256, 256)).astype(np.float32)
    got = load_up(tmp_path / "m.gguf", gguf.quants.quantize(x, Q[kind]), Q[kind])
    blocks, back = x.reshape(-1, 32), got.reshape(-1, 32)
    span = np.ptp(blocks, axis=1) if kind.endswith("_1") else np.abs(blocks).max(1)
    levels = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31}[kind]
    step = span / levels
    error = np.abs(blocks - back).max(1)
    assert (error <= step * 1.01 + 1e-3 * span).all()
    assert (error > 0).all()  # it is quantised: a copy of the input would prove nothing


def scale_min(j: int, s: NDArray[np.uint8]) -> tuple[int, int]:
    """The 6-bit scale and minimum of sub-block j of a Q4_K or Q5_K block."""
    a = [int(v) for v in s]
    if j < 4:
        return a[j] & 63, a[j + 4] & 63
    return (a[j + 4] & 15) | (a[j - 4] >> 6 << 4), (a[j + 4] >> 4) | (a[j] >> 6 << 4)


def q45_k(block: NDArray[np.uint8], five: bool) -> NDArray[np.float64]:
    d, dmin = block[:4].view("<f2").astype(np.float64)
    scales, high, low = block[4:16], block[16:48] if five else np.zeros(32, np.uint8), block[48 if five else 16 :]
    out = np.empty(256)
    for j in range(8):
        nibbles = low[32 * (j // 2) : 32 * (j // 2) + 32] >> (4 * (j % 2)) & 15
        q = nibbles.astype(int) + 16 * (high >> j & 1)
        scale, least = scale_min(j, scales)
        out[32 * j : 32 * j + 32] = d * scale * q - dmin * least
    return out


def q6_k(block: NDArray[np.uint8]) -> NDArray[np.float64]:
    low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), block[208:].view("<f2")
    out = np.empty(256)
    for i in range(256):
        half, r = divmod(i, 128)
        quarter, lane = divmod(r, 32)
        nibble = int(low[64 * half + 32 * (quarter % 2) + lane]) >> (4 * (quarter // 2)) & 15
        top = int(high[32 * half + lane]) >> (2 * quarter) & 3
        out[i] = float(d[0]) * int(scales[i // 16]) * ((nibble | top << 4) - 32)
    return out


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_types_equal_the_definition(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(3)
    size = gguf.GGML_QUANT_SIZES[Q[kind]][1]
    blocks = rng.integers(0, 256, (256, size), dtype=np.uint8)
    scale = rng.uniform(0.001, 0.01, (256, 2)).astype("<f2").view(np.uint8).reshape(256, 4)
    if kind == "Q6_K":
        blocks[:, 208:] = scale[:, :2]
    else:
        blocks[:, :4] = scale
    got = load_up(tmp_path / "m.gguf", blocks, Q[kind])
    want = [q6_k(b) if kind == "Q6_K" else q45_k(b, kind == "Q5_K") for b in blocks[:16]]
    np.testing.assert_allclose(got[:16], np.array(want), rtol=1e-5, atol=1e-6)


def test_every_supported_type_is_tested_above() -> None:
    tested = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}
    assert tested == set(SUPPORTED_TYPES)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "IQ2_XS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"])
def test_another_quantisation_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    block, size = gguf.GGML_QUANT_SIZES[Q[kind]]
    raw = np.zeros((256, 256 // block * size), np.uint8)
    with pytest.raises(UnsupportedModel, match=rf"m\.gguf.*ffn_up.*{kind}.*Q4_K_M.*supported: Q4_0"):
        load_up(path, raw, Q[kind])


def test_rows_that_are_no_multiple_of_a_block_say_so(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    toy_gguf.write(path, width=64)
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 16  # behind the number of dimensions and two of them
    assert data[at : at + 4] == struct.pack("<I", Q.F32)
    data[at : at + 4] = struct.pack("<I", Q.Q4_K)
    path.write_bytes(data)
    with pytest.raises(CorruptModel, match=r"m\.gguf: tensor 'blk\.0\.ffn_up.*Q4_K.* 64 values.*blocks of 256"):
        GGUFCheckpoint(path)


def test_vocabularies_are_decoded_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    toy_gguf.write(path)
    monkeypatch.setattr(gguf_header._Cursor, "strings", lambda *_: pytest.fail("decoded"))
    checkpoint = GGUFCheckpoint(path)
    checkpoint.tensor(UP)
    monkeypatch.undo()
    assert "the" in checkpoint.tokenizer_files().tokenizer_json
    data = path.read_bytes().replace("Ġthe".encode(), b"\xff\xfethe")  # as long, and no text
    path.write_bytes(data)
    with pytest.raises(CorruptModel, match=r"m\.gguf.*not UTF-8"):
        GGUFCheckpoint(path).tokenizer_files()


# ------------------------------------------------------------------------------------------- layout of the writers


def interleaved(x: NDArray[np.float64], angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotary embedding of pairs (2i, 2i + 1), as llama's GGUF files want it. x [heads, C]"""
    a, b = x[:, 0::2], x[:, 1::2]
    out = np.empty_like(x)
    out[:, 0::2] = a * np.cos(angles) - b * np.sin(angles)
    out[:, 1::2] = b * np.cos(angles) + a * np.sin(angles)
    return out


def in_halves(x: NDArray[np.float64], angles: NDArray[np.float64]) -> NDArray[np.float64]:
    a, b = np.split(x, 2, axis=1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=1)


def test_llama_rows_are_unpermuted(tmp_path: Path) -> None:
    """Attention scores under the file's rotary convention equal those of the loaded weights under ours."""
    path = tmp_path / "m.gguf"
    stored = toy_gguf.write(path, width=64, heads=4, kv_heads=2)
    checkpoint = GGUFCheckpoint(path)
    x, y = np.random.default_rng(5).standard_normal((2, 64))
    at_x, at_y = (p * 10_000.0 ** (-np.arange(0, 16, 2) / 16) for p in (11, 4))

    def heads(w: NDArray[np.float32], v: NDArray[np.float64]) -> NDArray[np.float64]:
        return (w.astype(np.float64) @ v).reshape(-1, 16)

    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    theirs_q = interleaved(heads(stored["blk.0.attn_q.weight"], x), at_x)
    theirs_k = interleaved(heads(stored["blk.0.attn_k.weight"], y), at_y)
    ours_q, ours_k = in_halves(heads(checkpoint.tensor(q), x), at_x), in_halves(heads(checkpoint.tensor(k), y), at_y)
    np.testing.assert_allclose((theirs_q[::2] * theirs_k).sum(1), (ours_q[::2] * ours_k).sum(1), rtol=1e-9)
    assert not np.array_equal(checkpoint.tensor(q), stored["blk.0.attn_q.weight"])
    for name in (q, "model.embed_tokens.weight"):
        np.testing.assert_array_equal(checkpoint.rows(name, 3, 9), checkpoint.tensor(name)[3:9])


def test_qwen_rows_are_left_alone(tmp_path: Path) -> None:
    stored = toy_gguf.write(tmp_path / "m.gguf", "qwen2", width=64)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    for ours, theirs in (("q_proj.weight", "attn_q.weight"), ("k_proj.bias", "attn_k.bias")):
        np.testing.assert_array_equal(checkpoint.tensor(f"model.layers.0.self_attn.{ours}"), stored[f"blk.0.{theirs}"])
    assert checkpoint.config.qkv_bias and checkpoint.config.architecture == "qwen2"


def test_gemma_norms_lose_the_one(tmp_path: Path) -> None:
    window = {"attention.sliding_window": 16, "attention.key_length": 8, "attention.value_length": 8}
    stored = toy_gguf.write(tmp_path / "m.gguf", "gemma3", spm=True, layers=6, metadata=window)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    pairs = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm",
    }
    for ours, theirs in pairs.items():
        got = checkpoint.tensor(f"model.layers.5.{ours}.weight")
        np.testing.assert_array_equal(got, stored[f"blk.5.{theirs}.weight"] - 1)
    np.testing.assert_array_equal(
        checkpoint.tensor("model.layers.5.self_attn.o_proj.weight"), stored["blk.5.attn_output.weight"]
    )
    config = checkpoint.config
    assert config.norm_plus_one and config.layer_types == ("sliding",) * 5 + ("full",)
    assert (config.sliding_window, config.rope_local_theta, config.attention_scale) == (16, 10_000.0, 8**-0.5)


def test_configuration(tmp_path: Path) -> None:
    toy_gguf.write(tmp_path / "m.gguf", width=64, layers=2)
    config = GGUFCheckpoint(tmp_path / "m.gguf").config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert (config.rms_norm_eps, config.rope_theta, config.max_position) == (1e-5, 10_000.0, 128)
    assert (config.bos_id, config.eos_ids, config.tie_embeddings) == (1, (2,), True)


def test_output_matrix_unties(tmp_path: Path) -> None:
    head = np.ones((263, 32), np.float32)
    toy_gguf.write(tmp_path / "m.gguf", tensors={"output.weight": head})
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert not checkpoint.config.tie_embeddings
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), head)


def test_llama3_rope_factors_become_parameters(tmp_path: Path) -> None:
    from outpace.models.config import RopeScaling
    from outpace.ops.rope import inverse_frequencies, scale_llama3

    path = tmp_path / "m.gguf"
    plain = inverse_frequencies(128, 500_000.0)
    factors = (plain / scale_llama3(plain, 32.0, 1.0, 4.0, 8192)).astype(np.float32)

    def scaling(values: NDArray[np.float32]) -> RopeScaling | None:
        toy_gguf.write(path, tensors={"rope_freqs.weight": values}, theta=500_000.0, width=512, heads=4)
        return GGUFCheckpoint(path).config.rope_scaling

    assert scaling(factors) == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert scaling(np.ones(64, np.float32)) is None
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        scaling(factors[::-1].copy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "mamba"}, "architecture 'mamba'.*supported in GGUF files: llama"),
        ({"metadata": {"expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, "yarn"),
        ({"tensors": {"blk.0.ffn_up.scale": np.ones(3, np.float32)}}, r"ffn_up\.scale"),
        ({"arch": "qwen2", "tensors": {"blk.0.attn_output.bias": np.ones(32, np.float32)}}, r"attn_output\.bias"),
    ],
)
def test_unsupported_files_say_what_and_where(tmp_path: Path, change: dict, message: str) -> None:  # type: ignore[type-arg]
    toy_gguf.write(tmp_path / "m.gguf", **change)
    with pytest.raises(UnsupportedModel, match=message) as error:
        GGUFCheckpoint(tmp_path / "m.gguf")
    assert "m.gguf" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"blk.0.ffn_up.weight": None}}, r"missing: model\.layers\.0\.mlp\.up_proj\.weight"),
        ({"tensors": {"blk.0.ffn_up.weight": np.ones((8, 32), np.float32)}}, r"shape \(8, 32\)"),
        ({"tensors": {"token_embd.weight": None}}, "token_embd"),
    ],
)
def test_incomplete_files(tmp_path: Path, change: dict, message: str) -> None:  # type: ignore[type-arg]
    toy_gguf.write(tmp_path / "m.gguf", **change)
    with pytest.raises(CorruptModel, match=message):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    bad = np.full((32, 32), np.nan, np.float32)
    toy_gguf.write(tmp_path / "m.gguf", tensors={MLP_UP: bad})
    with pytest.raises(CorruptModel, match="not numbers"):
        GGUFCheckpoint(tmp_path / "m.gguf").tensor(UP)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", CorruptModel, "too short"),
        (b"PK\3\4" + bytes(100), CorruptModel, "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), UnsupportedModel, "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), UnsupportedModel, "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62) + bytes(100), CorruptModel, "do not fit"),
    ],
)
def test_other_files(tmp_path: Path, data: bytes, kind: type[Exception], message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(kind, match=message):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_unknown_tensor_name(tmp_path: Path) -> None:
    toy_gguf.write(tmp_path / "m.gguf")
    with pytest.raises(CorruptModel, match="no tensor 'nope'"):
        GGUFCheckpoint(tmp_path / "m.gguf").tensor("nope")


def test_of_a_part_of_a_tensor_no_more_is_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_gguf.write(tmp_path / "m.gguf", width=64)
    checkpoint, sizes, floats = GGUFCheckpoint(tmp_path / "m.gguf"), [], files._floats
    monkeypatch.setattr(files, "_floats", lambda data, kind: (sizes.append(len(data)), floats(data, kind))[1])
    checkpoint.rows("model.embed_tokens.weight", 3, 9)
    assert sizes == [6]
