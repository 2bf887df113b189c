"""The sampler against its definition: what every other check takes for the truth.

The definition is written here once more, step by step in float64 and as slowly as it reads. Random rows of logits go
through both; then tokens are drawn with the random numbers that requests use, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..decoding import sampling
from ..decoding.sampling import History
from ..types import SamplingParams
from .evidence import ALARM, Check, chi_square, seen_variation
from .settings import SAMPLERS, Setting, setting

CLOSE = 1e-5  # total variation that float32 may leave
_ROWS, _VOCAB, _DRAWS, _POSITIONS, _FEW = 200, 300, 8000, 40, 12
_LEAST = 5.0  # expected times that a cell needs for chi-square to be what it says


def definition(
    logits: NDArray[np.float32], params: SamplingParams, tokens: Sequence[int], prompt_length: int
) -> NDArray[np.float64]:
    """The distribution f64[V] of the token behind `tokens`: penalties, bias, then temperature, top-k, top-p and min-p,
    in this order, ties with the last one kept staying. Grammars apart."""
    z = logits.astype(np.float64)
    output = list(tokens[prompt_length:])
    for token in {*tokens}:
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
        z[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
    for token, bias in params.logit_bias.items():
        z[token] += bias
    if params.temperature == 0:
        return (np.arange(len(z)) == np.flatnonzero(z == z.max())[0]).astype(np.float64)
    kept = z >= (np.sort(z)[-params.top_k] if 0 < params.top_k < len(z) else -np.inf)
    p = np.where(kept, np.exp((z - z.max()) / params.temperature), 0.0)
    p /= p.sum()
    if params.top_p < 1:
        heaviest = np.sort(p)[::-1]
        enough = next(i for i in range(len(p)) if heaviest[: i + 1].sum() >= params.top_p or i + 1 == len(p))
        p[p < heaviest[enough]] = 0.0
    p[p < params.min_p * p.max()] = 0.0
    return p / p.sum()


def check_samplers(settings: Sequence[Setting] = ()) -> Iterator[Check]:
    """Every named setting, and these."""
    every = {each.name: each for each in (*map(setting, SAMPLERS), *settings)}
    for n, how in enumerate(every.values()):
        yield _by_definition(how, n)
        if not how.base.greedy:
            yield _drawn(how, n, len(every))


def _by_definition(how: Setting, seed: int) -> Check:
    """The distribution that is drawn from, over random rows and texts, and the token drawn from each row: the one at
    which the definition's running sum passes the request's random number."""
    rng, worst, wrong = np.random.default_rng([seed, 3]), 0.0, 0
    for _ in range(_ROWS):
        logits = (3 * rng.standard_normal(_VOCAB)).astype(np.float32)
        tokens = rng.integers(_VOCAB, size=40).tolist()
        said, wanted = (
            sampling.distribution(logits, how.base, History(tokens, 15)),
            definition(logits, how.base, tokens, 15),
        )
        worst = max(worst, float(np.abs(said - wanted).sum()) / 2)
        token, u = sampling.sample(logits, how.base, History(tokens, 15), 40), sampling.uniform(how.base.seed, 40)
        below = float(wanted[:token].sum())
        wrong += (
            not (how.base.greedy and wanted[token] == 1) and not below - CLOSE <= u <= below + wanted[token] + CLOSE
        )
    evidence = (
        f"total variation {worst:.2g} at most from the definition, and {wrong} wrong tokens drawn, over {_ROWS} rows"
    )
    numbers = {"total_variation": worst, "wrong_tokens": wrong}
    return Check("sampler", f"{how.name}, definition", worst <= CLOSE and not wrong, evidence, numbers)


def _drawn(how: Setting, seed: int, checks: int) -> Check:
    """Tokens as requests draw them, one seed and position each, over a small vocabulary."""
    logits = np.random.default_rng([seed, 4]).standard_normal(_FEW).astype(np.float32)
    bias = {token: value for token, value in how.base.logit_bias.items() if token < _FEW}
    params, text = replace(how.base, logit_bias=bias), [1, 2, 3, 2]
    p = definition(logits, params, text, 2)
    history = History(text, 2) if params.edits_logits else None
    counts = np.zeros(_FEW)
    for first in range(0, _DRAWS, _POSITIONS):  # positions differ as in one answer, seeds as between requests
        seeded = replace(params, seed=first)
        for position in range(4, 4 + _POSITIONS):
            counts[sampling.sample(logits, seeded, history, position)] += 1
    rare = (p > 0) & (p * _DRAWS < _LEAST)
    observed = [*counts[~rare], *([counts[rare].sum()] if rare.any() else [])]
    expected = [*(_DRAWS * p[~rare]), *([_DRAWS * p[rare].sum()] if rare.any() else [])]
    statistic, _, found = chi_square(observed, expected)
    seen = seen_variation(_DRAWS, sum(e > 0 for e in expected) - 1, ALARM / checks)
    said = (
        f"chi-square {statistic:.1f}, p = {found:.2g}, over {_DRAWS} tokens; a shift of {seen:.2g} would have been seen"
    )
    return Check("sampler", f"{how.name}, drawn", found > ALARM / checks, said, {"p": found, "seen_variation": seen})
