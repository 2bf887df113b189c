"""The sampler against definitions written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outpace.decoding.sampling import (
    History,
    Stream,
    choose,
    distribution,
    draw,
    host_row,
    logprobs,
    process,
    sample,
    uniform,
)
from outpace.errors import ParameterError
from outpace.types import SamplingParams


def logits_of(seed: int, size: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, top-k, top-p, min-p in float64 with a full sort. No ties among the logits."""
    x = logits.astype(np.float64) / params.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p)
    if 0 < params.top_k < len(p):
        p[order[params.top_k :]] = 0
        p /= p.sum()
    if params.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(p[order]), params.top_p)) + 1
        p[order[kept:]] = 0
        p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 7, 511, 512, 513, 3000]),
    st.sampled_from([0.2, 0.8, 1.0, 1.7]),
    st.sampled_from([0, 1, 3, 40]),
    st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.6]),
)
def test_distribution_is_the_textbook_one(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = logits_of(seed, size)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_allclose(distribution(logits, params), reference(logits, params), atol=2e-6)


def test_ties_with_the_last_kept_token_stay() -> None:
    logits = np.array([1.0, 3.0, 1.0, 2.0, 2.0], dtype=np.float32)
    assert np.flatnonzero(distribution(logits, SamplingParams(temperature=1, top_k=2))).tolist() == [1, 3, 4]
    assert np.flatnonzero(distribution(logits, SamplingParams(temperature=1, top_p=0.7))).tolist() == [
        1,
        3,
        4,
    ]


def test_greedy_takes_the_smaller_id_of_a_tie() -> None:
    logits = np.array([0, 5, 5, 1], dtype=np.float32)
    assert sample(logits, SamplingParams(), None, 0) == 1
    assert distribution(logits, SamplingParams()).tolist() == [0, 1, 0, 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 1000), st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_running_sum(size: int, seed: int, u: float) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.random(size) * (rng.random(size) < 0.3)).astype(np.float32)
    weights[rng.integers(size)] = 0.5
    index = draw(weights, u)
    exact = np.cumsum(weights.astype(np.float64))
    assert weights[index] > 0
    assert exact[index] >= u * exact[-1] - 1e-9
    assert index == 0 or exact[index - 1] <= u * exact[-1] + 1e-9


def test_draw_at_the_ends() -> None:
    weights = np.zeros(1300, dtype=np.float32)
    weights[3] = weights[700] = 1
    assert draw(weights, 0.0) == 3
    assert draw(weights, 0.5) == 700
    assert draw(weights, 1 - 2**-53) == 700


def test_a_draw_beyond_the_running_sum_takes_the_last_token_that_has_weight() -> None:
    """The sum of a block and the last of its running sums are rounded otherwise."""
    beyond, u = 0, 1 - 2**-53
    for seed in range(200):
        weights = np.random.default_rng(seed).random(512)
        weights[400:] = 0
        total, inside = weights.sum(), np.cumsum(weights)
        beyond += u * total >= inside[-1]
        assert draw(weights, u) == 399
    assert beyond > 10


def test_streams_have_the_numbers_that_seeds_rest_on() -> None:
    """A seed gives the same text in every version, and no two purposes share a number."""
    assert [stream.value for stream in Stream] == [0, 1, 2]
    assert uniform(7, 3) == uniform(7, 3, Stream.TARGET) == 0.43900223090044976
    assert len({uniform(7, 3, stream) for stream in Stream}) == len({uniform(7, 3, draw=d) for d in range(3)}) == 3


def test_uniform_depends_on_its_key_alone() -> None:
    keys = [(s, p, k, d) for s in (0, 1, 2**63 - 1) for p in (0, 1, 5000) for k in Stream for d in (0, 1)]
    values = [uniform(*key) for key in keys]
    assert values == [uniform(*key) for key in keys]
    assert len(set(values)) == len(keys)
    many = np.array([uniform(7, i) for i in range(4000)])
    assert many.min() >= 0 and many.max() < 1
    counts = np.histogram(many, bins=10, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 28  # chi-squared, 9 degrees of freedom, p = 0.001


def test_samples_follow_the_distribution() -> None:
    logits = logits_of(1, 12, scale=1.0)
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=11)
    expected = distribution(logits, params)
    drawn = np.bincount([sample(logits, params, None, i) for i in range(5000)], minlength=12) / 5000
    assert np.abs(drawn - expected).max() < 0.03
    assert not drawn[expected == 0].any()


def test_a_row_is_sampled_alike_wherever_it_lies() -> None:
    rows = torch.from_numpy(logits_of(3, 7 * 1003).reshape(7, 1003))
    for params in (SamplingParams(temperature=0.8), SamplingParams(temperature=1.2, top_k=50, top_p=0.9)):
        for i in range(7):
            alone = sample(host_row(rows[i].clone()), params, None, 40 + i)
            assert sample(host_row(rows[i]), params, None, 40 + i) == alone


def test_extreme_temperatures() -> None:
    logits = logits_of(5, 100)
    assert sample(logits, SamplingParams(temperature=1e-40), None, 3) == int(logits.argmax())
    flat = distribution(logits, SamplingParams(temperature=100))
    assert flat.max() / flat.min() < 1.3


def test_process_is_the_identity_without_edits() -> None:
    logits = logits_of(0, 10)
    assert process(logits, SamplingParams(temperature=0.5, top_k=3), None) is logits


def test_penalties_and_bias_written_out() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5, 0.0, 4.0], dtype=np.float32)
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 1.5, 0: -1.0}
    )
    history = History([0, 1, 2, 2, 0], prompt_length=2)  # prompt 0 1, output 2 2 0
    before = logits.copy()
    edited = process(logits, params, history)
    assert edited.tolist() == [2 / 2 - 0.25 - 0.5 - 1, -2 * 2, 1 / 2 - 0.5 - 0.5, 0.5, 1.5, 4.0]
    assert (logits == before).all()


def test_what_ends_an_output_waits_for_min_tokens() -> None:
    logits = np.array([3.0, 2.0, 1.0], dtype=np.float32)
    params = SamplingParams(min_tokens=2)
    history = History([1, 1], prompt_length=2, stop_ids=[0, 5])
    assert process(logits, params, history).tolist() == [-np.inf, 2, 1]
    history.append(1)
    assert process(logits, params, history).tolist() == [-np.inf, 2, 1]
    history.append(1)
    assert process(logits, params, history).tolist() == [3, 2, 1]
    alone = History([], stop_ids=[0])
    row = np.array([3.0, -np.inf], dtype=np.float32)
    assert process(row, params, alone).tolist() == [3, -np.inf], "where nothing else is left it may end"


def test_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ParameterError, match="token 10"):
        process(logits_of(0, 10), SamplingParams(logit_bias={10: 1.0}), None)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 6), st.lists(st.one_of(st.integers(0, 200), st.none()), max_size=300))
def test_history_counts_like_a_fresh_one(prompt_length: int, moves: list[int | None]) -> None:
    history, tokens = History(prompt_length=prompt_length), list[int]()
    for move in moves:
        if move is None:
            tokens = tokens[: len(tokens) // 2]
            history.truncate(len(tokens))
        else:
            tokens.append(move)
            history.append(move)
    assert history.tokens == tokens
    assert history.ids.tolist() == list(dict.fromkeys(tokens))
    output = tokens[prompt_length:]
    assert history.output_counts.tolist() == [output.count(t) for t in history.ids]


@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_logprobs_are_a_log_softmax(k: int) -> None:
    logits = logits_of(2, 20)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    chosen, top = logprobs(logits, 13, k)
    assert chosen == pytest.approx(float(expected[13]), abs=1e-5)
    values, ids = expected.topk(k)
    assert [i for i, _ in top] == ids.tolist()
    assert [v for _, v in top] == pytest.approx(values.tolist(), abs=1e-5)


def test_what_a_grammar_forbids_is_never_listed() -> None:
    row = np.array([-np.inf, 1.0, -np.inf, 0.0, 1.0], dtype=np.float32)
    _, top = logprobs(row, 1, 4)
    assert [token for token, _ in top] == [1, 4, 3] and all(np.isfinite(value) for _, value in top)


def test_a_history_without_a_prompt_is_all_output() -> None:
    assert History([5, 5]).output_counts.tolist() == [2]


def test_choose_is_sample_of_processed_logits() -> None:
    logits, history = logits_of(4, 50), History([1, 2, 3, 3], 1)
    edits: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.4}
    for position in range(20):
        params = SamplingParams(temperature=1.0, seed=5, **edits)
        assert sample(logits, params, history, position) == choose(process(logits, params, history), params, position)
