"""How a model's makers want it sampled: from its file, its folder or the catalog.

GGUF files say it in `general.sampling.*`, folders in `generation_config.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .catalog import CATALOG
from .source import ModelSource, resolve

#: for models that say nothing
TEMPERATURE, TOP_P = 0.7, 0.95
_GGUF = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_FOLDER = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LOWEST = {"temperature": 0.0, "top_k": 0, "top_p": 0.0, "min_p": 0.0, "repetition_penalty": 0.0}
_HIGHEST = {"temperature": 100, "top_k": math.inf, "top_p": 1.0, "min_p": 1.0, "repetition_penalty": 100}


@dataclass(frozen=True, slots=True)
class Recommended:
    """Fields of SamplingParams, and in words who says so."""

    values: Mapping[str, float | int]
    source: str


def recommended(name: str) -> Recommended:
    """For what a person writes after --model. Raises ModelError if there is no such model or its file is damaged."""
    return recommended_of(resolve(name))


def recommended_of(source: ModelSource) -> Recommended:
    """What the model's own file says, else the catalog, else a default. Values out of range are left out."""
    own, name = (_of_gguf(source.path), "the model's file") if source.kind == "gguf" else _of_folder(source.path)
    if "temperature" in own:
        return Recommended(own, name)
    known = CATALOG.get(source.name)
    if known is not None and known.sampling:
        return Recommended(dict(known.sampling), "recommended by the model's makers")
    return Recommended({"temperature": TEMPERATURE, "top_p": TOP_P}, "a default: the model's file names none")


def _of_gguf(path: Path) -> dict[str, float | int]:
    from .gguf_header import read_header

    metadata = read_header(path).metadata
    return _sound({ours: metadata[theirs] for theirs, ours in _GGUF.items() if theirs in metadata})


def _of_folder(folder: Path) -> tuple[dict[str, float | int], str]:
    path = folder / "generation_config.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):  # there need be none
        return {}, ""
    if not isinstance(raw, dict):
        return {}, ""
    if raw.get("do_sample") is False:
        return {"temperature": 0.0}, path.name
    return _sound({name: raw[name] for name in _FOLDER if raw.get(name) is not None}), path.name


def _sound(found: Mapping[str, Any]) -> dict[str, float | int]:
    """Numbers within their range, as SamplingParams has them; -1 for top_k, which some files write, is no limit."""
    values: dict[str, float | int] = {}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        number = max(int(value), 0) if name == "top_k" else round(float(value), 6)
        excluded = (name in ("top_p", "repetition_penalty") and number == 0) or (name == "min_p" and number == 1)
        if _LOWEST[name] <= number <= _HIGHEST[name] and not excluded:
            values[name] = number
    return values
