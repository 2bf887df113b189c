"""Which arithmetic a model gets by itself: its file's formats where they run, else int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toy_gguf
from gguf import GGMLQuantizationType as Q
from gguf import quants

from outpace import LLM, SamplingParams
from outpace.engine import load
from outpace.engine.load import best_precision, load_draft_model, load_model
from outpace.errors import CapacityError, CorruptModel
from outpace.models import native, packed_file
from outpace.models.decoder import Cpu
from outpace.models.gguf import GGUFCheckpoint
from outpace.models.prepared import open_model
from outpace.models.two_speed import TwoSpeed


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert native.NativeDecoder.row_invariant  # compiled kernels stay where they were found on import
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def written(path: Path, kind: str | None = "Q4_0", heads: int = 2, seed: int = 0) -> str:
    """A model whose matrices are of that kind; None: floats. Heads are 64 / `heads` wide."""
    made = toy_gguf.write(path, width=64, heads=heads, kv_heads=2, layers=2, seed=seed)
    if kind:
        matrices = {name: w for name, w in made.items() if w.ndim == 2}
        blocks = {name: quants.quantize(w.astype(np.float32) / 8, Q[kind]) for name, w in matrices.items()}
        toy_gguf.write(
            path, width=64, heads=heads, kv_heads=2, layers=2, tensors=blocks, raw_types=dict.fromkeys(blocks, Q[kind])
        )
    return str(path)


def test_a_quantised_file_runs_in_its_own_formats(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(written(cache / "m.gguf"), threads=1, method="plain", kv_tokens=256) as llm:
        assert (llm.precision, llm.arithmetic, llm.loaded.formats) == ("file", "file (Q4_0)", ("Q4_0",))
        (result,) = llm.generate("the", SamplingParams(max_tokens=4))
        assert len(result.token_ids) >= 1
    assert not list((cache / "cache").rglob("weights-*")), "nothing is gained by a copy"


def test_floats_run_in_int8_and_a_copy_is_kept(cache: Path) -> None:
    loaded = load_model(written(cache / "m.gguf", None), threads=1)
    assert loaded.decoder.precision == "int8" and loaded.formats == ()
    assert loaded.in_precision("int4").precision == "int4"  # a method's own need, of which no copy is kept
    packed_file.end_keepers()
    assert [f.suffix for f in (cache / "cache").rglob("weights-int8-*.bin")] == [".bin"]
    assert not list((cache / "cache").rglob("weights-int4-*"))


def test_heads_that_blocks_cannot_be_padded_for(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_model(written(cache / "m.gguf", heads=4))
    assert best_precision(opened, Cpu()) == "int8"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("m runs in int8: heads of 16 are no multiple of 32")


def test_the_same_weights_in_another_precision(cache: Path) -> None:
    loaded = load_model(written(cache / "m.gguf"), threads=1)
    int4 = loaded.in_precision("int4")
    assert (
        int4.precision == "int4"
        and loaded.in_precision("int4") is int4
        and loaded.in_precision("file") is loaded.decoder
    )


def test_a_draft_model_runs_as_its_target_does(cache: Path) -> None:
    quantised, floats = written(cache / "m.gguf"), written(cache / "f.gguf", None)
    own = load_model(quantised, threads=1)
    assert load_draft_model(quantised, own, threads=1).decoder.precision == "file"
    assert isinstance(load_draft_model(floats, own, threads=1).decoder, TwoSpeed)
    int8 = load_model(quantised, precision="int8", threads=1)
    assert isinstance(load_draft_model(quantised, int8, threads=1).decoder, TwoSpeed)
    assert load_draft_model(quantised, int8, "file", threads=1).decoder.precision == "file"


@pytest.mark.parametrize("kv_tokens", [None, 10_000_000])
def test_a_model_beyond_the_memory_is_refused(
    cache: Path, kv_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = written(cache / "m.gguf")
    monkeypatch.setattr(load, "available_bytes", lambda device: 1000 if kv_tokens is None else 100 << 20)
    with pytest.raises(CapacityError, match=r"m in file needs .* GB \(.* of weights, .* of KV cache\)") as error:
        load_model(name, threads=1, kv_tokens=kv_tokens)
    assert ("kv_tokens" in str(error.value)) == (kv_tokens is not None)


def test_a_scale_that_is_no_number_names_file_and_tensor(cache: Path) -> None:
    path = Path(written(cache / "m.gguf"))
    info = GGUFCheckpoint(path)._infos["model.layers.1.mlp.up_proj.weight"]
    data = bytearray(path.read_bytes())
    data[info.start : info.start + 2] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(
        CorruptModel, match=r"m\.gguf: tensor 'blk\.1\.ffn_up\.weight' holds scales that are not numbers"
    ):
        load_model(str(path), threads=1)
