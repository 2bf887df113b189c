"""Requests that share, make room, are routed, fail and leave: what every other one gets must not change."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hashing import VOCAB, HashDecoder, Scripted, engine_options, oracle, plain_tokens

from outpace.decoding.contracts import Drafter
from outpace.decoding.drafters.ngram import Ngram
from outpace.decoding.drafters.plain import Plain
from outpace.decoding.drafters.recycling import Recycling
from outpace.decoding.drafters.suffix import Suffix
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine
from outpace.errors import MethodError, QueueFull
from outpace.types import RequestOptions, Result, SamplingParams


def engine_of(decoder: HashDecoder, drafter: Drafter | None = None, **limits: object) -> Engine:
    methods = {"ngram": Ngram(), "suffix": Suffix()}
    config = engine_options(**limits)  # type: ignore[arg-type]
    return Engine(decoder, drafter or Plain(), CoupledVerifier(), options=config, methods=methods)


def drain(engine: Engine) -> dict[int, Result]:
    results: dict[int, Result] = {}
    for _ in range(20_000):
        if engine.idle:
            return results
        for event in engine.step():
            if event.result is not None:
                results[event.id] = event.result
        engine.check_integrity()
    raise AssertionError("the engine does not finish")


@pytest.mark.parametrize("swap_tokens", [0, 4096])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("drafter", ["plain", "oracle", "suffix", "recycling"])
def test_requests_that_make_room_get_the_same_tokens(drafter: str, prefix_cache: bool, swap_tokens: int) -> None:
    decoder = HashDecoder(speakable=VOCAB - 1)  # nobody ends early
    make = {
        "plain": Plain,
        "oracle": lambda: Scripted(oracle(decoder, right=0.7, tree=True)),
        "suffix": Suffix,
        "recycling": lambda: Recycling(VOCAB),
    }[drafter]
    engine = engine_of(
        decoder, make(), max_batch=6, kv_tokens=16 * 10, prefill_rows=24, prefix_cache=prefix_cache,
        swap_tokens=swap_tokens,
    )  # fmt: skip
    engine.scheduler.limits = replace(engine.scheduler.limits, swap_least=1)  # these are all short
    rng = random.Random(drafter)
    shared = [rng.randrange(VOCAB) for _ in range(20)]
    submitted = []
    for n in range(14):
        prompt = shared[: rng.randrange(21)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))]
        submitted.append((engine.add(prompt, SamplingParams(max_tokens=rng.randrange(50, 90))), prompt, n))
    results = drain(engine)
    for id, prompt, _ in submitted:
        result = results[id]
        wanted = plain_tokens(decoder, prompt, len(result.token_ids))
        assert result.token_ids == wanted and result.exactness == "identical"
    stats = engine.scheduler.stats
    assert stats.swapped + stats.recomputed > 0, "the cache was meant to be too small"
    assert (stats.swapped > 0) == (swap_tokens > 0)
    assert sum(r.stats.preemptions for r in results.values()) == stats.swapped + stats.recomputed


def test_a_second_turn_reads_only_what_is_new() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, Scripted(oracle(decoder)), prefix_cache=True)
    first = list(range(37))
    one = engine.add(first, SamplingParams(max_tokens=11))
    answer = drain(engine)[one].token_ids
    second = [*first, *answer, 3, 1, 4]
    two = engine.add(second, SamplingParams(max_tokens=5))
    result = drain(engine)[two]
    assert result.stats.cached_tokens == len(first) + len(answer) - 1  # the last token was never run
    assert result.token_ids == plain_tokens(decoder, second, 5)
    other = engine.add(second, SamplingParams(max_tokens=5), options=RequestOptions(owner="somebody else"))
    assert drain(engine)[other].stats.cached_tokens == 0


def test_a_group_reads_its_beginning_once() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, max_batch=8, prefix_cache=True, prefill_rows=16)
    common = [n % VOCAB for n in range(64)]
    ids = [engine.add([*common, n], SamplingParams(max_tokens=4), options=RequestOptions(group="g")) for n in range(6)]
    results = drain(engine)
    assert [results[id].stats.cached_tokens for id in ids] == [0] + [64] * 5
    assert all(results[id].token_ids == plain_tokens(decoder, [*common, n], 4) for n, id in enumerate(ids))


def test_each_request_drafts_with_the_method_it_names() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, Scripted(oracle(decoder)))
    submitted = {None: None, "plain": None, "ngram": None, "suffix": None}
    prompt = [1, 2, 3, 1, 2, 3, 1, 2]
    for method in submitted:
        submitted[method] = engine.add(prompt, SamplingParams(max_tokens=20), options=RequestOptions(method=method))
    results = drain(engine)
    for method, id in submitted.items():
        result = results[id]
        assert result.token_ids == plain_tokens(decoder, prompt, 20)
        assert result.method == (method or "scripted")
        assert set(result.sources) <= {"target", *({"left", "right"} if method is None else {method})}
    assert results[submitted["plain"]].stats.drafted == 0 < results[submitted[None]].stats.accepted
    with pytest.raises(MethodError, match="plain, ngram, suffix"):
        engine.add(prompt, options=RequestOptions(method="recycling"))


def test_a_request_may_limit_its_drafts() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, Scripted(oracle(decoder)), max_rows=8)
    few = engine.add([5], SamplingParams(max_tokens=31), options=RequestOptions(max_draft=2))
    none = engine.add([6], SamplingParams(max_tokens=31), options=RequestOptions(max_draft=0))
    results = drain(engine)
    assert results[few].stats.mean_accepted == 3.0
    assert results[none].stats.drafted == 0 and results[none].stats.mean_accepted == 1.0


def test_an_exactness_that_cannot_be_had_is_refused() -> None:
    engine = engine_of(HashDecoder(row_invariant=False))
    sampled = SamplingParams(temperature=1.0)
    with pytest.raises(MethodError, match="only 'distribution'"):
        engine.add([1], sampled, options=RequestOptions(exactness="identical"))
    engine.add([1], sampled, options=RequestOptions(exactness="distribution"))


def test_a_full_queue_says_when_to_come_back() -> None:
    engine = engine_of(HashDecoder(), max_batch=1, max_queue=2)
    for _ in range(2):
        engine.add([1], SamplingParams(max_tokens=3))
    with pytest.raises(QueueFull) as refused:
        engine.add([1], SamplingParams(max_tokens=3))
    assert refused.value.retry_after_s >= 1
    assert len(drain(engine)) == 2
    engine.add([1])


class Explosive(Plain):
    """Fails in one of its calls, for one sequence."""

    def __init__(self, where: str, id: int) -> None:
        self.where, self.id = where, id

    def begin(self, sequence):
        if self.where == "begin" and sequence.id == self.id:
            raise RuntimeError("begin")

    def observe(self, sequence, seen):
        if self.where == "observe" and sequence.id == self.id and len(sequence.output) > 3:
            raise RuntimeError("observe")


@pytest.mark.parametrize("where", ["begin", "observe"])
def test_an_error_of_one_request_ends_that_one_alone(where: str) -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, Explosive(where, 1))
    ids = [engine.add([n], SamplingParams(max_tokens=9)) for n in range(3)]
    failed, results = [], {}
    while not engine.idle:
        for event in engine.step():
            if event.error is not None:
                failed.append(event.id)
                assert event.result is not None and event.result.finish_reason == "error"
            elif event.result is not None:
                results[event.id] = event.result
        engine.check_integrity()
    assert failed == [1]
    assert all(results[id].token_ids == plain_tokens(decoder, [id], 9) for id in (ids[0], ids[2]))


@pytest.mark.parametrize("swap_tokens", [0, 2048])
def test_cancelling_at_any_moment_loses_nothing(swap_tokens: int) -> None:
    decoder = HashDecoder()
    rng = random.Random(7)
    engine = engine_of(
        decoder, Scripted(oracle(decoder, right=0.5)), max_batch=5, kv_tokens=16 * 10, prefix_cache=True,
        swap_tokens=swap_tokens,
    )  # fmt: skip
    live: dict[int, list[int]] = {}
    finished = 0
    for _ in range(400):
        if rng.random() < 0.3:
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 50))]
            live[engine.add(prompt, SamplingParams(max_tokens=rng.randrange(1, 60)))] = prompt
        if live and rng.random() < 0.1:
            id = rng.choice(list(live))
            result = engine.cancel(id)
            assert result is not None and result.finish_reason == "cancelled"
            assert result.token_ids == plain_tokens(decoder, live.pop(id), len(result.token_ids))
        for event in engine.step():
            if event.result is not None:
                assert event.result.token_ids == plain_tokens(decoder, live.pop(event.id), len(event.result.token_ids))
                finished += 1
        engine.check_integrity()
    for id in list(live):
        engine.cancel(id)
    engine.check_integrity()
    assert engine.idle and finished > 20
