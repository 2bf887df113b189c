"""The sampler on every path: whatever chooses tokens, drafts and batches change neither the tokens nor their
log-probabilities.

The reference is plain decoding of one request at a time. The draft model reads the same hash as the target, so that
its drafts are often right; the lookups live on what repeats.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hashing import toy_loaded

from outpace import LLM, Result, SamplingParams

pytest.importorskip("llguidance")

PROMPTS = ["abcabcabc", "q", "the rain in Spain stays mainly in the plain", '{"n": 12, "s": "x"} {"n": 12, "s":']
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 999}, "s": {"type": "string", "maxLength": 5}},
    "required": ["n", "s"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
LARK = 'start: row ("," row)~0..3 ";"\nrow: /[a-c]{1,3}/ "=" ("yes"|"no")'
GBNF = 'root ::= [ab]{2,9} ("." [0-9]{1,3})? "!"'
SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.1},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-p": {"temperature": 0.9, "top_p": 0.6},
    "min-p": {"temperature": 1.0, "min_p": 0.2},
    "repetition penalty": {"temperature": 0.8, "repetition_penalty": 1.5},
    "presence and frequency": {"presence_penalty": 1.0, "frequency_penalty": -0.5},
    "bias": {"temperature": 0.7, "logit_bias": {5: 3.0, 7: -100.0, 12: 2.5}},
    "stop strings": {"temperature": 0.5, "top_k": 3, "stop": ("e", "k2", "Q")},
    "stop tokens": {"temperature": 1.0, "top_k": 8, "stop_token_ids": (40, 41, 42)},
    "min tokens": {
        "temperature": 1.0,
        "top_k": 8,
        "stop_token_ids": (40, 41, 42),
        "stop": ("e", "k"),
        "min_tokens": 25,
    },
    "schema": {"json_schema": SCHEMA},
    "schema, sampled": {"json_schema": SCHEMA, "temperature": 1.0, "top_p": 0.9},
    "regex": {"regex": r"(ab|cd)+:[0-9]{3,5}", "temperature": 1.2, "presence_penalty": 0.5},
    "lark": {"grammar": LARK, "temperature": 1.0},
    "gbnf": {"grammar": GBNF, "temperature": 1.0, "stop_token_ids": (14,)},
}
METHODS = ["ngram", "suffix+recycling", "draft", "draft-tree", "suffix+draft-tree"]


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM(toy_loaded(), method="plain", kv_tokens=4096)


@pytest.fixture(scope="module")
def drafting(plain: LLM) -> dict[str, LLM]:
    with_draft = {m: toy_loaded("draft") if "draft" in m else None for m in METHODS}
    return {m: LLM(plain.loaded, draft_model=d, method=m, kv_tokens=4096) for m, d in with_draft.items()}


def params_of(sampler: str) -> list[SamplingParams]:
    more = {"max_tokens": 40, "logprobs": 3}
    return [SamplingParams(seed=i, **more, **SAMPLERS[sampler]) for i in range(len(PROMPTS))]


def shown(result: Result) -> tuple[Any, ...]:
    return result.token_ids, result.text, result.finish_reason, result.logprobs, result.top_logprobs


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_drafts_and_batches_change_nothing(sampler: str, plain: LLM, drafting: dict[str, LLM]) -> None:
    params = params_of(sampler)
    expected = [shown(plain.generate([p], q)[0]) for p, q in zip(PROMPTS, params, strict=True)]
    assert [shown(r) for r in plain.generate(PROMPTS, params)] == expected
    for method, llm in drafting.items():
        together = llm.generate(PROMPTS, params)
        assert [shown(r) for r in together] == expected, method
        assert {r.exactness for r in together} == {"identical"}
        alone = llm.generate([PROMPTS[3]], params[3])[0]
        assert shown(alone) == expected[3], method
        if method.startswith("draft"):
            assert sum(r.stats.accepted for r in together) > 0, method
        llm.check_integrity()


@pytest.mark.parametrize("sampler", [s for s, p in SAMPLERS.items() if {"json_schema", "regex", "grammar"} & p.keys()])
def test_the_grammar_holds(sampler: str, plain: LLM) -> None:
    for result in plain.generate(PROMPTS, params_of(sampler)):
        holds(sampler, result)


def holds(sampler: str, result: Result) -> None:
    text, ended = result.text, result.finish_reason == "stop"
    if sampler.startswith("schema"):
        assert ended
        value = json.loads(text)
        assert value.keys() == {"n", "s"} and 0 <= value["n"] <= 999 and len(value["s"]) <= 5
    elif sampler == "regex":
        assert re.fullmatch(r"(ab|cd)+:[0-9]{3,5}" if ended else r"(ab|cd)*[ac]?(:[0-9]{0,5})?", text)
    elif sampler == "lark":
        assert ended and re.fullmatch(r"[a-c]{1,3}=(yes|no)(,[a-c]{1,3}=(yes|no)){0,3};", text)
    else:
        assert ended and re.fullmatch(r"[ab]{2,9}(\.[0-9]{1,3})?!|[ab]{2,9}", text)


@pytest.mark.parametrize("verifier", ["rejection", "block", "typical", "topk:k=3", "tolerance:epsilon=2"])
@pytest.mark.parametrize("method", ["draft", "draft-tree", "suffix+recycling"])
def test_no_verifier_lets_a_draft_off_the_grammar(verifier: str, method: str, plain: LLM) -> None:
    draft = toy_loaded("draft") if "draft" in method else None
    llm = LLM(plain.loaded, draft_model=draft, method=method, verifier=verifier, kv_tokens=4096)
    for sampler in ("schema", "schema, sampled", "lark"):
        results = llm.generate(PROMPTS, params_of(sampler))
        for result in results:
            holds(sampler, result)
            assert result.logprobs is not None and all(p > -100 for p in result.logprobs)
        approximate = verifier.split(":")[0] in ("typical", "topk", "tolerance")
        assert {r.exactness for r in results} == {"approximate" if approximate else "distribution"}
        assert all(bool(r.notes) == approximate for r in results)
    llm.check_integrity()


def test_nothing_ends_an_output_before_its_min_tokens(plain: LLM) -> None:
    for sampler in ("stop tokens", "stop strings"):
        params = params_of(sampler)[0]
        short = plain.generate([PROMPTS[0]], params)[0]
        most = len(short.token_ids)
        assert most < 40 and short.finish_reason == "stop", "it would end early"
        longer = plain.generate([PROMPTS[0]], replace(params, min_tokens=most + 2))[0]
        assert len(longer.token_ids) >= most + 2
    ended = replace(params_of("gbnf")[0], min_tokens=30)
    grammar = plain.generate([PROMPTS[0]], ended)[0]
    assert grammar.finish_reason == "stop" and len(grammar.token_ids) < 30, "a grammar that is complete ends it"
