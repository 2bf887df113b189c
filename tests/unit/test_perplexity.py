"""Teacher forcing: chunks and windows change nothing, and the sums are the definition's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hashing import HashDecoder

from outpace.bench.teacher import forced_logits, last_logits, of_windows, perplexity
from outpace.errors import CapacityError, ParameterError

TOKENS = [(7 * i * i + 3 * i) % 31 for i in range(50)]


def rows(decoder: HashDecoder, tokens: list[int]) -> np.ndarray:
    """The definition: one full read for each token. [S, V]"""
    pairs = np.array([tokens, range(len(tokens))]).T
    return np.array([decoder.logits(pairs[: i + 1]) for i in range(len(tokens))])


@pytest.mark.parametrize("chunk", [1, 7, 16, 50, 512])
def test_logits_of_every_token(chunk: int) -> None:
    decoder = HashDecoder()
    got = torch.cat([part.clone() for part in forced_logits(decoder, TOKENS, chunk)]).numpy()
    assert np.array_equal(got, rows(decoder, TOKENS))
    assert np.array_equal(last_logits(decoder, TOKENS, chunk), got[-1])


@pytest.mark.parametrize("bos", [None, 5])
@pytest.mark.parametrize("window", [8, 49, 100])
def test_perplexity_is_that_of_the_definition(window: int, bos: int | None) -> None:
    decoder, nll, count = HashDecoder(), 0.0, 0
    for start in range(0, len(TOKENS), window):
        given = ([] if bos is None else [bos]) + TOKENS[start : start + window]
        if len(given) < 2:
            continue
        scores = rows(decoder, given)[:-1].astype(np.float64)
        norm = np.log(np.exp(scores).sum(1))
        nll += float((norm - scores[np.arange(len(given) - 1), given[1:]]).sum())
        count += len(given) - 1
    *_, last = perplexity(decoder, TOKENS, window=window, chunk=7, bos=bos)
    assert last.tokens == count
    assert last.nll == pytest.approx(nll, rel=1e-9)
    assert last.value == pytest.approx(math.exp(nll / count), rel=1e-9)


@pytest.mark.parametrize("skip", [0, 3, 7, 18])
def test_predictions_that_do_not_count(skip: int) -> None:
    decoder, windows, nll = HashDecoder(), [TOKENS[:20], TOKENS[20:38], TOKENS[38:41]], 0.0
    kept = [given for given in windows if len(given) >= 2 + skip]
    for given in kept:
        scores = rows(decoder, given)[:-1].astype(np.float64)
        each = np.log(np.exp(scores).sum(1)) - scores[np.arange(len(given) - 1), given[1:]]
        nll += float(each[skip:].sum())
    *_, last = of_windows(decoder, windows, skip=skip, chunk=7)
    assert last.tokens == sum(len(given) - 1 - skip for given in kept)
    assert last.nll == pytest.approx(nll, rel=1e-9)


def test_refusals() -> None:
    with pytest.raises(ParameterError, match="no tokens"):
        last_logits(HashDecoder(), [])
    with pytest.raises(CapacityError, match="context of 32"):
        last_logits(HashDecoder(max_position=32), TOKENS)
    with pytest.raises(ParameterError, match="at least two tokens"):
        list(perplexity(HashDecoder(), [1]))
