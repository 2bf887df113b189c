"""Drafters that need no second model, in the engine: the tokens of plain decoding, for every batch and sampler."""

from __future__ import annotations

import numpy as np
import pytest
from hashing import VOCAB, HashDecoder, engine_options, plain_tokens

from outpace.decoding.contracts import DrafterContext
from outpace.decoding.drafters.plain import Plain
from outpace.decoding.methods import make_drafter
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine
from outpace.types import Result, SamplingParams

SPECS = [
    "ngram",
    "suffix",
    "suffix:memory=40",
    "recycling",
    "recycling:tree=published",
    "recycling:tree=fitted",
    "iad",
    "aded:simulations=12",
    "jacobi",
    "jacobi:form=gauss-seidel,window=5,start=random",
    "jacobi:form=hybrid,parallel=10",
    "sjd",
    "lookahead",
    "lookahead:window=2,ngram=4,from_text=false",
    "rescored",
    "rescored:base=recycling",
    "iad+lookahead+rescored",
]
PROMPTS = [[1, 2, 3], [7], list(range(30)), [5, 5, 6] * 7, [9, 8]]
LENGTHS = [24, 1, 18, 2, 21]


class LocalDecoder(HashDecoder):
    """The next token depends on the last two alone, so that texts repeat themselves and drafts are accepted."""

    def logits(self, seen: np.ndarray) -> np.ndarray:
        assert (seen[:, 1] == np.arange(len(seen))).all()
        last = seen[-2:, 0].copy()
        return super().logits(np.array([last % 12, range(len(last))]).T)


def run(decoder: HashDecoder, spec: str, params: list[SamplingParams], **limits: int) -> list[Result]:
    drafter = Plain() if spec == "plain" else make_drafter(spec, DrafterContext(vocab_size=VOCAB))
    engine = Engine(decoder, drafter, CoupledVerifier(), options=engine_options(**limits))
    predictions = [[], [3, 4], list(range(9)), [5, 5, 6], []]
    ids = [engine.add(p, q, e) for p, q, e in zip(PROMPTS, params, predictions, strict=True)]
    results: dict[int, Result] = {}
    while not engine.idle:
        for event in engine.step():
            if event.result is not None:
                results[event.id] = event.result
        engine.check_integrity()
    return [results[id] for id in ids]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("max_batch", [1, 4])
def test_greedy_equals_definition_for_every_batch(spec: str, max_batch: int) -> None:
    decoder = HashDecoder()
    results = run(decoder, spec, [SamplingParams(max_tokens=n) for n in LENGTHS], max_batch=max_batch, prefill_rows=16)
    for prompt, n, result in zip(PROMPTS, LENGTHS, results, strict=True):
        assert result.token_ids == plain_tokens(decoder, prompt, n)
        assert result.exactness == "identical" and not result.notes


@pytest.mark.parametrize("spec", SPECS)
def test_sampled_with_penalties_equals_plain_and_drafts_are_accepted(spec: str) -> None:
    decoder = LocalDecoder()
    kinds = [{}, {"top_p": 0.8}, {"repetition_penalty": 1.2}, {"frequency_penalty": 0.5}, {"temperature": 0.0}]
    params = [
        SamplingParams(max_tokens=60, **{"temperature": 0.4, "seed": i} | kind)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds)
    ]
    plain = run(decoder, "plain", params)
    drafted = run(decoder, spec, params, max_rows=9, max_step_rows=40)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert sum(r.stats.accepted for r in drafted) > 0
