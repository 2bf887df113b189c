from __future__ import annotations

from collections.abc import Iterator

import pytest

from outpace import LLM


@pytest.fixture(scope="module")
def default_llm() -> Iterator[LLM]:
    with LLM("smollm2-135m", method="plain", max_batch=4, kv_tokens=2048) as llm:
        yield llm
