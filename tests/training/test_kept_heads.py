"""The heads that the repository has, on the model that they were trained for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from outpace import LLM, MethodError, SamplingParams
from outpace.models.heads import read, write

HEAD = Path(__file__).parents[2] / "heads" / "smollm2-135m.safetensors"
PROMPT = "Explain in two sentences how tea is made."


def test_it_drafts_and_changes_no_text(default_llm: LLM) -> None:
    params = SamplingParams(max_tokens=32)
    with LLM(default_llm.loaded, head=str(HEAD), method="spark", max_batch=4, kv_tokens=2048) as drafted:
        result = drafted.chat(PROMPT, params)
    assert result.token_ids == default_llm.chat(PROMPT, params).token_ids
    assert result.stats.accepted >= 4 and result.stats.steps <= 28


def test_one_that_is_wired_wrongly_is_found_by_its_own_text(default_llm: LLM, tmp_path: Path) -> None:
    head = read(HEAD)
    wrong = {name: -array if name in ("fuse", "edge") else array for name, array in head.arrays.items()}
    write(tmp_path / "wrong.safetensors", head.config, head.hot, wrong)
    with pytest.raises(MethodError, match=r"is right on \d.* of another model than smollm2-135m"):
        LLM(default_llm.loaded, head=str(tmp_path / "wrong.safetensors"))
    hot = np.sort(np.random.default_rng(0).permutation(49152)[: len(head.hot)])
    write(tmp_path / "other.safetensors", head.config, hot, head.arrays)
    with pytest.raises(MethodError, match="or of another version"):
        LLM(default_llm.loaded, head=str(tmp_path / "other.safetensors"))
    with pytest.raises(MethodError, match="has no use for head"):
        LLM(default_llm.loaded, head=str(HEAD), method="ngram")
