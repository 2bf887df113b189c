"""The compiled sampler against the plain one, and what must not matter to it."""

from __future__ import annotations

import threading
from contextlib import suppress

import numpy as np
import pytest

from outpace.decoding import sampling
from outpace.errors import OutpaceError
from outpace.ops.cpu.draws import Draws
from outpace.types import SamplingParams

PARAMS = [
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1e-7),
    SamplingParams(temperature=1.0, top_k=3),
    SamplingParams(temperature=1.0, top_k=50, top_p=0.9),
    SamplingParams(temperature=0.7, top_p=0.95),
    SamplingParams(temperature=1.2, min_p=0.05),
    SamplingParams(temperature=1.0, top_p=0.5, min_p=0.1),
    SamplingParams(temperature=1.0, top_k=700, top_p=0.99, min_p=1e-4),
    SamplingParams(temperature=1.5, top_p=1e-6),
]


def plain(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    """What the sampler says in numpy: weights, then the inverse of their running sum."""
    ids, weights = sampling._weights(logits, params)
    index = sampling.draw(weights, sampling.uniform(params.seed, position))
    return index if ids is None else int(ids[index])


def row(rng: np.random.Generator, size: int, spread: float) -> np.ndarray:
    logits = (rng.standard_normal(size) * spread).astype(np.float32)
    if size > 40:
        logits[7:20] = logits[3]  # ties
        logits[21:30] = -np.inf  # what a grammar forbids
        logits[size // 2] = logits.max() + 1
    return logits


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 50, 255, 256, 257, 511, 1000, 4099, 70_000])
@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
def test_the_same_tokens_as_the_plain_sampler(size: int, spread: float) -> None:
    rng = np.random.default_rng(size)
    for params in PARAMS:
        logits = row(rng, size, spread)
        for position in range(12):
            assert sampling.choose(logits, params, position) == plain(logits, params, position), params


def test_equal_logits_are_drawn_evenly_and_all_stay() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    for params in (SamplingParams(temperature=1, top_k=5), SamplingParams(temperature=1, top_p=0.1)):
        drawn = {sampling.choose(logits, params, position) for position in range(300)}
        assert len(drawn) > 200 and max(drawn) > 900  # ties with the last one kept stay


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_batch_is_its_rows_alone(threads: int) -> None:
    rng = np.random.default_rng(1)
    asked = [
        (row(rng, 3000, 4.0), SamplingParams(**{**vars_of(p), "seed": i}), 10 * i) for i, p in enumerate(PARAMS * 3)
    ]
    alone = [sampling.choose(*one) for one in asked]
    assert sampling.choose_rows(asked, threads) == alone
    assert sampling.choose_rows(asked[::-1], threads) == alone[::-1]


def vars_of(params: SamplingParams) -> dict[str, float]:
    return {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}


def test_rows_may_lie_anywhere_and_are_not_changed() -> None:
    """Rows of a step are slices of one array; what lies behind them is another row."""
    rng = np.random.default_rng(2)
    table = rng.standard_normal((5, 1000)).astype(np.float32)
    before = table.copy()
    for params in PARAMS:
        for own in table[:, 3:990]:
            assert sampling.choose(own, params, 1) == sampling.choose(own.copy(), params, 1) < 987
    assert (table == before).all()
    strided = np.asfortranarray(table)
    assert sampling.choose(strided[2], PARAMS[0], 1) == sampling.choose(table[2], PARAMS[0], 1)


def test_frequencies_are_those_of_the_distribution() -> None:
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal(600) * 2).astype(np.float32)
    for params in PARAMS[3:7]:
        wanted = sampling.distribution(logits, params)
        counts = np.zeros(600)
        for position in range(4000):
            counts[sampling.choose(logits, params, position)] += 1
        assert not counts[wanted == 0].any()
        likely = wanted > 0.01
        deviation = (counts[likely] - 4000 * wanted[likely]) / np.sqrt(4000 * wanted[likely])
        assert np.abs(deviation).max() < 5


@pytest.mark.parametrize("seed", [0, 1, 2**62, 2**63 - 1])
@pytest.mark.parametrize("position", [0, 1, 31, 2**20])
def test_random_numbers_are_those_of_their_key(seed: int, position: int) -> None:
    """With n equal logits the token is the uniform number itself, in steps of 1 / n."""
    logits = np.zeros(50_000, dtype=np.float32)
    token = sampling.choose(logits, SamplingParams(temperature=1, seed=seed), position)
    assert token == int(sampling.uniform(seed, position) * 50_000)


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(damage: float) -> None:
    logits = np.full(300, damage, dtype=np.float32)
    for params in PARAMS:
        with pytest.raises(OutpaceError, match="not numbers"):
            sampling.choose(logits, params, 0)


def test_one_that_is_no_number_is_refused_or_never_drawn() -> None:
    logits = np.zeros(300, dtype=np.float32)
    logits[5] = np.nan
    for params in PARAMS:
        with suppress(OutpaceError):
            assert 5 != sampling.choose(logits, params, 0) < 300


def test_threads_of_python_draw_at_once() -> None:
    rng = np.random.default_rng(4)
    rows = [row(rng, 20_000, 3.0) for _ in range(4)]
    wanted = [[sampling.choose(r, PARAMS[4], p) for p in range(50)] for r in rows]
    got: list[list[int]] = [[] for _ in rows]

    def draw(i: int) -> None:
        for p in range(50):
            got[i].append(sampling.choose(rows[i], PARAMS[4], p))

    workers = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == wanted


def test_one_batch_may_be_larger_than_the_last() -> None:
    draws = Draws(100, 1)
    logits = np.random.default_rng(5).standard_normal((40, 100)).astype(np.float32)
    for n in (1, 40, 3):
        tokens = draws([(int(r.ctypes.data), 1.0, 0, 1.0, 0.0, 0, 7, 0, 3) for r in logits[:n]])
        params = SamplingParams(temperature=1, seed=7)
        assert tokens.tolist() == [plain(r, params, 3) for r in logits[:n]]
