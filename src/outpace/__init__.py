"""Outpace: language-model inference that emits more than one token per model step, with the same text.

>>> from outpace import LLM, SamplingParams
>>> llm = LLM("smollm2-135m")
>>> llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.llm import LLM
    from .engine.options import EngineOptions
    from .errors import (
        CapacityError,
        CorruptModel,
        DownloadError,
        GrammarError,
        MethodError,
        ModelError,
        ModelNotFound,
        OutpaceError,
        ParameterError,
        QueueFull,
        UnsupportedModel,
    )
    from .types import DecodingStats, RequestOptions, Result, SamplingParams

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  plainly sorted, a test keeps it so
    "CapacityError",
    "CorruptModel",
    "DecodingStats",
    "DownloadError",
    "EngineOptions",
    "GrammarError",
    "LLM",
    "MethodError",
    "ModelError",
    "ModelNotFound",
    "OutpaceError",
    "ParameterError",
    "QueueFull",
    "RequestOptions",
    "Result",
    "SamplingParams",
    "UnsupportedModel",
    "__version__",
]

_MODULES = {
    "LLM": ".engine.llm",
    "EngineOptions": ".engine.options",
    **dict.fromkeys(["DecodingStats", "RequestOptions", "Result", "SamplingParams"], ".types"),
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `import outpace` stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'outpace' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, ".errors"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
