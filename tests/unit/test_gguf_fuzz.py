"""Damaged GGUF files: a ModelError that names the file, never anything else, never a hang."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outpace.errors import ModelError
from outpace.models.gguf import GGUFCheckpoint
from outpace.models.gguf_header import read_header
from outpace.models.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param) / "sound.gguf"
    gemma = {"attention.sliding_window": 16, "attention.key_length": 8, "attention.value_length": 8}
    toy_gguf.write(
        path, request.param, spm=request.param == "gemma3", metadata=gemma if "gemma" in request.param else {}
    )
    return path


def read_all(path: Path) -> None:
    checkpoint = GGUFCheckpoint(path)
    for name in checkpoint.names():
        checkpoint.tensor(name)
    Tokenizer(checkpoint.tokenizer_files(), checkpoint.config.eos_ids, str(path)).encode("the text")


def read_damaged(path: Path) -> None:
    try:
        read_all(path)
    except ModelError as e:
        assert path.name in str(e)


def test_sound(sound: Path) -> None:
    read_all(sound)


def test_truncated_anywhere(sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    last = max(t.start + t.nbytes for t in read_header(sound).tensors.values())
    cuts = {*range(0, 400), *range(400, last, 97), last - 1}
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            GGUFCheckpoint(tmp_path / "cut.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), header=st.booleans(), count=st.integers(1, 8)
)
def test_bytes_changed(sound: Path, tmp_path: Path, place: float, value: int, header: bool, count: int) -> None:
    data = bytearray(sound.read_bytes())
    first = min(t.start for t in read_header(sound).tensors.values())
    at = int(place * (first if header else len(data)))
    data[at : at + count] = bytes([value] * len(data[at : at + count]))
    (tmp_path / "bad.gguf").write_bytes(data)
    read_damaged(tmp_path / "bad.gguf")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=300))
def test_noise_after_a_good_beginning(tmp_path: Path, noise: bytes) -> None:
    (tmp_path / "noise.gguf").write_bytes(b"GGUF\3\0\0\0" + noise)
    with pytest.raises(ModelError):
        read_all(tmp_path / "noise.gguf")
