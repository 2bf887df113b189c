"""Divergence position by position: the definition's figures, and the worst are the worst."""

from __future__ import annotations

import numpy as np
import pytest
from hashing import HashDecoder

from outpace.bench.divergence import WORST, diverge, openings
from outpace.errors import ParameterError

TEXTS = [[(7 * i * i + 3 * i) % 31 for i in range(20)], [3, 1, 4, 1, 5], [9]]


class Tilted(HashDecoder):
    """Another distribution, most of all behind token 4."""

    def logits(self, pairs: np.ndarray) -> np.ndarray:
        scores = np.array(super().logits(pairs))
        scores[5] += 4.0 if pairs[-1, 0] == 4 else 0.1
        return scores


def distributions(decoder: HashDecoder, tokens: list[int]) -> np.ndarray:
    pairs = np.array([tokens, range(len(tokens))]).T
    scores = np.array([decoder.logits(pairs[: i + 1]) for i in range(len(tokens))], dtype=np.float64)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_figures_are_those_of_the_definition(chunk: int) -> None:
    one, other = HashDecoder(), Tilted()
    found = diverge({"a": one, "b": other, "c": one}, TEXTS, chunk=chunk)
    assert list(found) == ["b", "c"] and max(found["c"].kl) == 0
    wanted, places = [], []
    for n, tokens in enumerate(TEXTS):
        p, q = distributions(one, tokens), distributions(other, tokens)
        wanted += list((p * np.log(p / q)).sum(-1))
        places += [(n, i + 1) for i in range(len(tokens))]
    np.testing.assert_allclose(found["b"].kl, wanted, rtol=1e-6)
    order = np.argsort(wanted)[::-1][:WORST]
    assert [(p.sequence, p.index) for p in sorted(found["b"].worst, reverse=True)] == [places[i] for i in order]
    top = max(found["b"].worst)
    p, q = distributions(one, TEXTS[top.sequence])[top.index - 1], distributions(other, TEXTS[top.sequence])
    assert top.token == p.argmax() and top.expected == pytest.approx(p.max(), rel=1e-6)
    assert top.got == pytest.approx(q[top.index - 1, top.token], rel=1e-6)


def test_summary_shows_what_stands_in_front() -> None:
    found = diverge({"a": HashDecoder(), "b": Tilted()}, TEXTS)["b"]
    summary = found.summary(TEXTS, lambda tokens: " ".join(map(str, tokens)))
    kl = np.array(found.kl)
    assert (summary["positions"], summary["above_0.1"]) == (26, int((kl > 0.1).sum()))
    assert summary["mean"] == pytest.approx(kl.mean(), abs=1e-6) and len(summary["worst"]) == WORST
    assert summary["quantile_99.9"] == pytest.approx(np.quantile(kl, 0.999), abs=1e-5)
    assert summary["worst"][0]["kl"] == pytest.approx(kl.max(), abs=1e-4)
    first = max(found.worst)
    shown = TEXTS[first.sequence][max(0, first.index - 16) : first.index]
    assert summary["worst"][0]["context"] == " ".join(map(str, shown)) and shown[-1] == 4


def test_openings_end_in_a_space_and_are_all_different() -> None:
    texts = openings()
    assert len(set(texts)) == len(texts) >= 50 and all(t.endswith("year ") for t in texts)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ParameterError):
        diverge({"a": HashDecoder(), "b": HashDecoder()}, [[]])
