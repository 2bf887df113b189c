"""Sampling from the real default model: with drafts, tokens come as often as the target's own distribution says."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from toy import Rig

from outpace import LLM, SamplingParams
from outpace.decoding.sampling import distribution
from outpace.engine.load import load_model

PROMPT = "one two three, one two three, one two"
TOKENS, SEEDS = 4, 400
HOW = {"max_tokens": TOKENS, "temperature": 1.0, "top_k": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM("smollm2-135m", method="plain", threads=1, kv_tokens=2048)


def probabilities(llm: LLM) -> dict[tuple[int, ...], float]:
    """Of every output that can occur, from the target's logits after each beginning."""
    prompt, params = llm.tokens(PROMPT), SamplingParams(**HOW)  # type: ignore[arg-type]
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(TOKENS):
        longer: dict[tuple[int, ...], float] = {}
        for text, p in found.items():
            rig = Rig(llm.decoder)
            after = distribution(rig.feed(rig.cache.new(), [*prompt, *text])[-1], params)
            longer |= {(*text, int(t)): p * float(after[t]) for t in np.flatnonzero(after)}
        found = longer
    return found


def surprise(counts: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """How many standard deviations the chi-square statistic is above what it should be (Wilson and Hilferty)."""
    n = sum(counts.values())
    assert counts.keys() <= exact.keys()
    common = [text for text, p in exact.items() if n * p >= 5]
    observed = np.array([*(counts[text] for text in common), 0.0])
    expected = np.array([*(n * exact[text] for text in common), 0.0])
    observed[-1], expected[-1] = n - observed.sum(), n - expected.sum()  # the rare ones together
    if expected[-1] < 1:
        observed, expected = observed[:-1], expected[:-1]
    statistic, df = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    return float(((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / (2 / (9 * df)) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, verifier", list(itertools.product(["draft", "ngram"], ["coupled", "rejection", "block"]))
)
def test_frequencies_are_those_of_the_target(plain: LLM, method: str, verifier: str) -> None:
    draft = load_model("smollm2-135m", precision="int4", threads=1) if method == "draft" else None
    llm = LLM(plain.loaded, draft_model=draft, method=method, verifier=verifier, kv_tokens=2048)
    params = [SamplingParams(seed=seed, **HOW) for seed in range(SEEDS)]  # type: ignore[arg-type]
    results = llm.generate([PROMPT] * SEEDS, params)
    drafted, accepted = (sum(getattr(r.stats, name) for r in results) for name in ("drafted", "accepted"))
    assert 0 < accepted < drafted
    exact = probabilities(plain)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-9)
    assert surprise(Counter(tuple(r.token_ids) for r in results), exact) < 3.5
    if verifier == "coupled":
        own = plain.generate([PROMPT] * 60, params[:60])
        assert [r.token_ids for r in results[:60]] == [r.token_ids for r in own]
