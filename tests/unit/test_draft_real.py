"""Methods with a draft model on real text: the default model drafts for itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from outpace import LLM, Result, SamplingParams
from outpace.errors import DownloadError

PROMPTS = ["def fibonacci(n):\n", "The tide went out in the morning and"]
NOTES = "\n".join(
    f"Note {i}. The {colour} boat sailed to {town} with a load of {load} on a calm day in {month}."
    for i, (colour, town, load, month) in enumerate(
        (c, t, g, m)
        for c, t in (("red", "Bergen"), ("blue", "Lisbon"), ("green", "Odessa"))
        for g in ("salt", "timber", "copper")
        for m in ("March", "June", "October")
    )
)
QUESTION = f"{NOTES}\n\nQuestion: what did the green boat carry to Odessa in June? Answer: The green boat carried"


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    try:
        llm = LLM("smollm2-135m", method="plain", kv_tokens=4096, threads=1)
    except DownloadError as e:
        pytest.skip(f"the default model is neither in the cache nor to be had: {e}")
    with llm:
        yield llm


def drafting(plain: LLM, method: str, verifier: str = "coupled") -> LLM:
    return LLM(plain.loaded, draft_model=plain.loaded, method=method, verifier=verifier, kv_tokens=4096)


def tau(results: list[Result]) -> float:
    return float(np.mean([r.stats.mean_accepted for r in results]))


@pytest.fixture(scope="module")
def params() -> list[SamplingParams]:
    return [SamplingParams(max_tokens=24), SamplingParams(max_tokens=24, temperature=0.8, seed=3)]


@pytest.fixture(scope="module")
def expected(plain: LLM, params: list[SamplingParams]) -> list[list[int]]:
    return [r.token_ids for r in plain.generate(PROMPTS, params)]


@pytest.mark.parametrize(
    ("method", "least"),
    [
        ("draft", 5.0),  # every draft is right: 6 of 6, and the bonus
        ("specdec", 4.0),
        ("draft-tree", 3.0),
        ("dyspec", 3.0),
        ("rsd-c", 3.5),
        ("rsd-s", 3.5),
        ("vocabtrim:trim=8192", 2.5),
        ("rapid", 4.0),
        ("draft-tree:trim=8192", 2.0),
    ],
)
def test_the_text_is_that_of_plain_decoding(
    plain: LLM, params: list[SamplingParams], expected: list[list[int]], method: str, least: float
) -> None:
    with drafting(plain, method) as llm:
        results = llm.generate(PROMPTS, params)
        llm.check_integrity()
    assert [r.token_ids for r in results] == expected
    assert tau(results) >= least


@pytest.mark.parametrize(("method", "least"), [("draft", 5.0), ("rsd-c", 3.5), ("rsd-s", 3.5)])
def test_a_draft_from_the_target_s_own_distribution_is_never_rejected(plain: LLM, method: str, least: float) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=3)
    with drafting(plain, method, "rejection") as llm:
        results = llm.generate(PROMPTS, params)
    assert tau(results) >= least
    assert {r.exactness for r in results} == {"distribution"}
    if method == "draft":
        assert all(r.stats.accepted == r.stats.drafted for r in results)


def test_a_retrieved_part_of_a_long_prompt_is_enough_to_draft_from(plain: LLM) -> None:
    [whole] = plain.generate([QUESTION], SamplingParams(max_tokens=16))
    assert whole.stats.prompt_tokens > 600
    with drafting(plain, "rapid:prompt=192,chunk=24") as llm:
        [result] = llm.generate([QUESTION], SamplingParams(max_tokens=16))
    assert result.token_ids == whole.token_ids
    assert result.stats.mean_accepted >= 1.5
