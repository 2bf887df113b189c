"""KV policies in the engine: the text of a policy is one text, whatever shares its steps, drafts for it or stops it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hashing import engine_options, finished
from toy import random_tokens, toy_checkpoint

from outpace.decoding.contracts import DrafterContext
from outpace.decoding.drafters.plain import Plain
from outpace.decoding.methods import make_drafter, make_policy
from outpace.decoding.policies.policy import Scored
from outpace.decoding.policies.snapkv import pooled
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine, new_cache
from outpace.engine.jobs import StepPlan
from outpace.errors import MethodError, ParameterError
from outpace.models.native import NativeDecoder
from outpace.models.torch_decoder import TorchDecoder
from outpace.registry import methods
from outpace.types import Result, SamplingParams

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, seed=5)
PROMPTS = [random_tokens(n, n).tolist() for n in (150, 20, 121)]
NAMES = [one.name for one in methods("policy")]
SMALL = ":budget=25%,recent=16"


@pytest.fixture(scope="module")
def target() -> NativeDecoder:
    return NativeDecoder.from_checkpoint(toy_checkpoint("qwen2")[0], "float32", 1)


def engine_of(target: Any, kv: str | None, method: str = "plain", **options: Any) -> Engine:
    chosen = engine_options(**{"kv_tokens": 1024, "max_batch": 3, "kv": kv, **options})
    cache = new_cache(target, chosen)
    drafter = make_drafter(method, DrafterContext(target.config.vocab_size)) if method != "plain" else Plain()
    return Engine(target, drafter, CoupledVerifier(), options=chosen, cache=cache)


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[Result]:
    ids = [engine.add(prompt, params) for prompt in prompts]
    results = finished(engine)
    return [results[id] for id in ids]


def alone(target: Any, kv: str | None, params: SamplingParams) -> list[list[int]]:
    return [run(engine_of(target, kv), [prompt], params)[0].token_ids for prompt in PROMPTS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_rows": 7}, {"method": "ngram+recycling"}],
    ids=["batch", "chunks", "drafts"],
)
def test_a_policy_has_one_text(
    target: NativeDecoder, name: str, params: SamplingParams, options: dict[str, Any]
) -> None:
    engine = engine_of(target, name + SMALL, **options)
    results = run(engine, PROMPTS, params)
    assert [one.token_ids for one in results] == alone(target, name + SMALL, params)


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_was_preempted_is_read_and_cut_again(target: NativeDecoder, name: str, prefix_cache: bool) -> None:
    engine = engine_of(target, name + SMALL, prefix_cache=prefix_cache, prefill_rows=64)
    id, result = engine.add(PROMPTS[0], SAMPLED), None
    while result is None:
        for event in engine.step():
            result = event.result or result
        if result is None and engine.steps in (9, 20):
            plan = StepPlan()
            engine.scheduler._preempt(engine.scheduler._jobs[id], plan)
            engine._preempt(plan.preempt[0])
        engine.check_integrity()
    assert result.stats.preemptions == 2
    assert result.token_ids == alone(target, name + SMALL, SAMPLED)[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_freed_is_said_and_others_may_begin_alike(target: NativeDecoder, name: str) -> None:
    engine = engine_of(target, name + SMALL, prefix_cache=True)
    prompt, full = PROMPTS[0], engine.cache.storage.bytes_per_page
    first, second = (run(engine, [prompt], GREEDY)[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert second.stats.cached_tokens > 0 and first.stats.kv_freed == second.stats.kv_freed
    # 150 tokens: 128 may go, and of 37.5 that stay 22 are behind them: one page of sixteen
    assert first.stats.kv_freed == 7 * full
    assert first.exactness == "approximate" and name in first.notes[0] and "25%" in first.notes[0]
    short = run(engine, [PROMPTS[1]], GREEDY)[0]
    assert short.stats.kv_freed == 0 and short.exactness == "identical"
    assert short.token_ids == run(engine_of(target, None), [PROMPTS[1]], GREEDY)[0].token_ids


@pytest.mark.parametrize("name", NAMES)
def test_the_first_and_the_last_tokens_are_always_kept(target: NativeDecoder, name: str) -> None:
    engine = engine_of(target, f"{name}:budget=30%,sinks=5,recent=20")
    id = engine.add(PROMPTS[0], GREEDY)
    for _ in range(3):
        engine.step()
    kv = engine._requests[id].kv
    assert engine.cache.before(kv) == 128  # of 150, in whole pages, the last 20 left alone
    for layer in range(3):
        for head in range(2):
            *_, positions = engine.cache.read(kv, layer, head, 0)
            assert positions[:5].tolist() == [0, 1, 2, 3, 4] and len(positions) == 16


def test_a_budget_of_everything_changes_nothing(target: NativeDecoder) -> None:
    assert alone(target, "snapkv:budget=100%", GREEDY) == alone(target, None, GREEDY)
    assert alone(target, "snapkv" + SMALL, GREEDY) != alone(target, None, GREEDY)


def test_a_fork_goes_on_from_what_is_kept(target: NativeDecoder) -> None:
    engine = engine_of(target, "keydiff" + SMALL)
    id = engine.add(PROMPTS[0], GREEDY)
    results = {}
    while not engine.idle:
        for event in engine.step():
            if event.result is not None:
                results[event.id] = event.result
            elif event.id == id and len(event.token_ids) and len(results) == 0 and engine.steps == 3:
                forks = engine.fork(id, [1])
        engine.check_integrity()
    assert results[forks[0]].token_ids == results[id].token_ids == alone(target, "keydiff" + SMALL, GREEDY)[0]


def test_scores_are_the_papers() -> None:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((40, 8)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True) * rng.uniform(0.95, 1.05, (40, 1)).astype(np.float32)
    queries = 60 * np.tile(keys[[5, 20]], (3, 1, 1))  # six rows look at two places
    there = Scored(keys, keys, np.arange(40, dtype=np.int32), queries)
    assert make_policy("streaming").score(0, 0, there).argmax() == 39
    assert make_policy("knorm").score(0, 0, there).argmax() == np.linalg.norm(keys, axis=1).argmin()
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    assert make_policy("keydiff").score(0, 0, there).argmax() == (unit @ unit.T).sum(axis=1).argmin()
    snap = make_policy("snapkv:pool=1").score(0, 0, there)
    assert set(np.argsort(-snap)[:2].tolist()) == {5, 20}
    assert make_policy("snapkv:pool=3").score(0, 0, there)[[4, 6, 19, 21]].min() > snap[30]
    assert pooled(np.array([1, 5, 2, 0, 0], np.float32), 3).tolist() == [5, 5, 5, 2, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snapkv:budget=0", "budget=0.0 is out of range"),
        ("snapkv:budget=120%", "budget=1.2 is out of range"),
        ("snapkv:budget=x", "is not a number"),
        ("snapkv:pool=2", "an odd number"),
        ("streaming:sinks=-1", "sinks=-1"),
        ("knorm:size=3", "no option 'size'"),
        ("snap", "no policy 'snap'"),
    ],
)
def test_mistakes_name_what_is_allowed(target: NativeDecoder, spec: str, message: str) -> None:
    with pytest.raises((ParameterError, MethodError), match=message):
        engine_of(target, spec)


def test_what_a_policy_does_not_go_with(target: NativeDecoder) -> None:
    with pytest.raises(MethodError, match="swap_tokens"):
        engine_of(target, "knorm", swap_tokens=64)
    with pytest.raises(MethodError, match="CPU decoder alone"):
        engine_of(TorchDecoder.from_checkpoint(toy_checkpoint("qwen2")[0], "float32"), "knorm")
    with pytest.raises(MethodError, match="sliding layers"):
        engine_of(NativeDecoder.from_checkpoint(toy_checkpoint("mistral")[0], "float32", 1), "knorm")
