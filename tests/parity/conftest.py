"""The decoders that parity tests run over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch

from outpace.models.checkpoint import Checkpoint
from outpace.models.decoder import Decoder
from outpace.models.torch_decoder import TorchDecoder
from outpace.types import Precision

Load = Callable[..., Decoder]


def _torch(checkpoint: Checkpoint, precision: Precision = "float32") -> Decoder:
    return TorchDecoder.from_checkpoint(checkpoint, precision, "cpu")


def _padded(checkpoint: Checkpoint, precision: Precision = "float32") -> Decoder:
    """Sequences attend together in one padded call, as they do on CUDA."""
    decoder = TorchDecoder.from_checkpoint(checkpoint, precision, "cpu")
    decoder.padded_rows = 64
    return decoder


def _cuda(checkpoint: Checkpoint, precision: Precision = "float32") -> Decoder:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return TorchDecoder.from_checkpoint(checkpoint, precision, "cuda")


def _native(checkpoint: Checkpoint, precision: Precision = "float32") -> Decoder:
    from outpace.models.native import NativeDecoder

    return NativeDecoder.from_checkpoint(checkpoint, precision, threads=2)


DECODERS = [
    pytest.param(_torch, id="torch"),
    pytest.param(_padded, id="padded"),
    pytest.param(_cuda, id="cuda", marks=pytest.mark.cuda),
]
if find_spec("outpace.models.native"):
    DECODERS.append(pytest.param(_native, id="native"))


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Toy operations are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DECODERS)
def load(request: pytest.FixtureRequest) -> Load:
    """load(checkpoint, precision="float32") -> a decoder"""
    return request.param
