"""A toy tokenizer and a toy safetensors folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import toy_gguf
from numpy.typing import NDArray
from safetensors.numpy import save_file

from outpace.models.checkpoint import TokenizerFiles
from outpace.models.config import ModelConfig
from outpace.models.gguf import GGUFCheckpoint
from outpace.models.layout import expected_shapes

HF_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 263,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer_files(folder: Path, **options: Any) -> TokenizerFiles:
    toy_gguf.write(folder / "tokenizer.gguf", **options)
    return GGUFCheckpoint(folder / "tokenizer.gguf").tokenizer_files()


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(ModelConfig.from_hf(config, source="toy"))
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_folder(folder: Path, shards: int = 1, **config: Any) -> dict[str, NDArray[np.float32]]:
    """config.json, tokenizer, and weights in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = HF_CONFIG | config
    (folder / "config.json").write_text(json.dumps(merged))
    files = tokenizer_files(folder)
    (folder / "tokenizer.gguf").unlink()
    (folder / "tokenizer.json").write_text(files.tokenizer_json)
    (folder / "tokenizer_config.json").write_text(json.dumps(files.tokenizer_config))
    tensors = weights(merged)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tensors
