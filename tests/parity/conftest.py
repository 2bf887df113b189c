"""The decoders that parity tests run over."""

from __future__ import annotations

from collections.abc import Callable
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


def _cuda(checkpoint: Checkpoint, precision: Precision = "float32") -> Decoder:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return TorchDecoder.from_checkpoint(checkpoint, precision, "cuda")


def _native(checkpoint: Checkpoint, precision: Precision = "float32") -> Decoder:
    from outpace.models.native import NativeDecoder

    return NativeDecoder.from_checkpoint(checkpoint, precision, threads=2)


DECODERS = [pytest.param(_torch, id="torch"), pytest.param(_cuda, id="cuda", marks=pytest.mark.cuda)]
if find_spec("outpace.models.native"):
    DECODERS.append(pytest.param(_native, id="native"))


@pytest.fixture(params=DECODERS)
def load(request: pytest.FixtureRequest) -> Load:
    """load(checkpoint, precision="float32") -> a decoder"""
    return request.param
