"""The loop against decoding by definition: whatever is drafted, batched or cut into chunks, the tokens are the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hashing import EOS, VOCAB, HashDecoder, Scripted, engine_options, oracle, plain_tokens

from outpace.decoding.drafters.ngram import Ngram
from outpace.decoding.drafters.plain import Plain
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine
from outpace.errors import CapacityError, ParameterError
from outpace.types import Draft, Result, SamplingParams

PROMPTS = [[1, 2, 3], [7], list(range(30)), [5, 5, 6] * 20, [9, 8]]


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Result]:
    """All at once; checks the books after every step."""
    ids = [engine.add(p, q) for p, q in zip(prompts, params, strict=True)]
    results: dict[int, Result] = {}
    tokens: dict[int, list[int]] = {id: [] for id in ids}
    while not engine.idle:
        for event in engine.step():
            assert event.token_ids and len(event.sources) == len(event.token_ids)
            tokens[event.id] += event.token_ids
            if event.result is not None:
                results[event.id] = event.result
        engine.check_integrity()
    assert all(results[id].token_ids == tokens[id] for id in ids)
    return [results[id] for id in ids]


def engine_of(decoder: HashDecoder, drafter: object = None, **limits: int) -> Engine:
    return Engine(decoder, drafter or Plain(), CoupledVerifier(), options=engine_options(**limits))  # type: ignore[arg-type]


DRAFTERS = {
    "always": lambda d: Scripted(oracle(d)),
    "never": lambda d: Scripted(oracle(d, right=0.0)),
    "random": lambda d: Scripted(oracle(d, right=0.7)),
    "tree": lambda d: Scripted(oracle(d, tree=True)),
    "random tree": lambda d: Scripted(oracle(d, right=0.7, tree=True)),
    "plain": lambda d: Plain(),
    "ngram": lambda d: Ngram(),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_greedy_equals_definition_for_every_drafter_and_batch(name: str, max_batch: int) -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, DRAFTERS[name](decoder), max_batch=max_batch, prefill_rows=16)
    lengths = [40, 1, 25, 2, 33]
    results = run(engine, PROMPTS, [SamplingParams(max_tokens=n) for n in lengths])
    for prompt, n, result in zip(PROMPTS, lengths, results, strict=True):
        assert result.token_ids == plain_tokens(decoder, prompt, n)
        assert result.finish_reason == "length"
        assert result.exactness == "identical" and not result.notes
        assert len(result.sources) == n


@pytest.mark.parametrize("name", ["random", "random tree", "ngram"])
def test_sampled_equals_plain_with_the_same_seed(name: str) -> None:
    decoder = HashDecoder()
    params = [SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, seed=s) for s in range(5)]
    plain = [run(engine_of(decoder), [p], [q])[0].token_ids for p, q in zip(PROMPTS, params, strict=True)]
    drafted = run(engine_of(decoder, DRAFTERS[name](decoder)), PROMPTS, params)
    assert [r.token_ids for r in drafted] == plain
    assert len({tuple(t) for t in plain}) == len(plain)


def test_stats_of_a_perfect_drafter() -> None:
    decoder = HashDecoder()
    drafter = Scripted(oracle(decoder))
    (result,) = run(engine_of(decoder, drafter, max_rows=8), [[1, 2]], [SamplingParams(max_tokens=33)])
    stats = result.stats
    assert (stats.prompt_tokens, stats.tokens, stats.steps) == (2, 33, 4)
    assert stats.mean_accepted == 8.0
    assert stats.drafted == stats.accepted == 28 and stats.acceptance_rate == 1.0
    assert sum(stats.accepted_by_source.values()) == sum(stats.drafted_by_source.values()) == 28
    assert result.sources[0] == "target" and result.sources.count("target") == 5
    assert 0 < stats.prefill_s <= stats.time_to_first_token_s
    assert stats.decode_s > 0 and stats.draft_s > 0 and stats.tokens_per_s > 0
    assert drafter.budgets == [[7], [7], [7], [7]] and not drafter.live


def test_rows_of_a_batch_stay_within_limits() -> None:
    decoder = HashDecoder()
    drafter = Scripted(oracle(decoder))
    engine = engine_of(decoder, drafter, max_rows=16, max_step_rows=20, max_batch=4)
    run(engine, [[1], [2], [3], [4]], [SamplingParams(max_tokens=n) for n in (30, 30, 2, 30)])
    assert all(rows <= 20 for _, rows in decoder.forwards[1:])
    assert drafter.budgets[0] == [6, 5, 0, 5]  # what the short one cannot use goes to the others


def test_prompt_chunks_share_steps_with_decoding() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, prefill_rows=10)
    first = engine.add([1, 2], SamplingParams(max_tokens=20))
    engine.step()
    second = engine.add(list(range(35)), SamplingParams(max_tokens=5))
    kinds = [{e.id for e in engine.step()} for _ in range(5)]
    assert kinds == [{first}, {first}, {first}, {first, second}, {first, second}]
    assert decoder.forwards[1:5] == [(2, 11), (2, 11), (2, 11), (2, 6)]


def test_resumed_equals_fresh() -> None:
    decoder = HashDecoder()
    params = SamplingParams(max_tokens=30, temperature=0.7, seed=3)
    (whole,) = run(engine_of(decoder, Scripted(oracle(decoder))), [[4, 4, 2]], [params])
    half = [4, 4, 2, *whole.token_ids[:13]]
    more = SamplingParams(max_tokens=17, temperature=0.7, seed=3)
    (rest,) = run(engine_of(decoder, Scripted(oracle(decoder, right=0.6))), [half], [more])
    assert rest.token_ids == whole.token_ids[13:]


@pytest.mark.parametrize("eos_after", range(4, 14))
def test_end_token_inside_an_accepted_path(eos_after: int) -> None:
    decoder = HashDecoder(eos_after=eos_after)
    engine = engine_of(decoder, Scripted(oracle(HashDecoder())), max_rows=16)  # drafts on past the end
    beyond = Scripted(lambda tokens, n: Draft.chain([*plain_tokens(decoder, tokens, n), 3][:n], "past"))
    for e in (engine, engine_of(decoder, beyond)):
        (result,) = run(e, [[1, 2, 3]], [SamplingParams(max_tokens=50)])
        assert result.token_ids == plain_tokens(decoder, [1, 2, 3], 50)
        assert result.token_ids[-1] == EOS and EOS not in result.token_ids[:-1]
        assert result.finish_reason == "stop"
        assert len(result.token_ids) == eos_after - 2


def test_ignore_eos_and_stop_tokens() -> None:
    decoder = HashDecoder(eos_after=6)
    drafter = Scripted(oracle(decoder))
    (on,) = run(engine_of(decoder, drafter), [[1, 2, 3]], [SamplingParams(max_tokens=9, ignore_eos=True)])
    assert len(on.token_ids) == 9 and on.finish_reason == "length"
    tokens = plain_tokens(HashDecoder(), [1, 2, 3], 20)
    stop = tokens[11]
    params = SamplingParams(max_tokens=20, stop_token_ids=(stop,))
    (cut,) = run(engine_of(HashDecoder(), Scripted(oracle(HashDecoder()))), [[1, 2, 3]], [params])
    assert cut.token_ids == tokens[: tokens.index(stop) + 1] and cut.finish_reason == "stop"


@pytest.mark.parametrize("n", range(1, 12))
def test_max_tokens_is_exact(n: int) -> None:
    decoder = HashDecoder()
    for drafter in (Scripted(oracle(decoder)), Scripted(oracle(decoder, tree=True)), Plain()):
        (result,) = run(engine_of(decoder, drafter), [[1, 2]], [SamplingParams(max_tokens=n)])
        assert result.token_ids == plain_tokens(decoder, [1, 2], n)


def test_logprobs_follow_the_tokens() -> None:
    decoder = HashDecoder()
    params = SamplingParams(max_tokens=12, logprobs=2)
    (plain,) = run(engine_of(decoder), [[1, 2]], [params])
    (drafted,) = run(engine_of(decoder, Scripted(oracle(decoder, tree=True))), [[1, 2]], [params])
    assert plain.logprobs is not None and drafted.logprobs is not None and drafted.top_logprobs is not None
    assert len(drafted.logprobs) == len(drafted.top_logprobs) == 12
    np.testing.assert_allclose(drafted.logprobs, plain.logprobs)
    assert [top[0][0] for top in drafted.top_logprobs] == drafted.token_ids
    (none,) = run(engine_of(decoder), [[1, 2]], [SamplingParams(max_tokens=3)])
    assert none.logprobs is None and none.top_logprobs is None


def test_cancel_gives_pages_back_at_any_moment() -> None:
    decoder = HashDecoder()
    for steps, victim in itertools.product(range(6), range(3)):
        drafter = Scripted(oracle(decoder, tree=True))
        engine = engine_of(decoder, drafter, max_batch=2, prefill_rows=8)
        ids = [engine.add(list(range(20)), SamplingParams(max_tokens=30)) for _ in range(3)]
        for _ in range(steps):
            engine.step()
        cut = engine.cancel(ids[victim])
        assert cut is not None and cut.finish_reason == "cancelled"
        truth = plain_tokens(decoder, list(range(20)), 30)
        assert cut.token_ids == truth[: len(cut.token_ids)]
        engine.check_integrity()
        assert engine.cancel(ids[victim]) is None
        results = []
        while not engine.idle:
            results += [e.result for e in engine.step() if e.result]
        engine.check_integrity()
        assert [r.token_ids for r in results] == [truth, truth]
        assert not drafter.live


def test_a_failed_step_leaves_nothing_behind() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, Scripted(oracle(decoder)))
    ids = [engine.add([1, 2], SamplingParams(max_tokens=40)), engine.add([3], SamplingParams(max_tokens=40))]
    engine.step()
    forward, decoder.forward = decoder.forward, lambda *a, **k: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.check_integrity()
    decoder.forward = forward  # type: ignore[method-assign]
    engine.cancel(ids[0])
    results = []
    while not engine.idle:
        results += [e.result for e in engine.step() if e.result]
    assert results[0].token_ids == plain_tokens(decoder, [3], 40)
    engine.check_integrity()


def test_capacity_is_refused_when_asked_for() -> None:
    engine = engine_of(HashDecoder(max_position=100), kv_tokens=64)
    with pytest.raises(CapacityError, match=r"max_tokens=80 make 130.*context is 100.*at most 50"):
        engine.add([1] * 50, SamplingParams(max_tokens=80))
    with pytest.raises(CapacityError, match="shorten the prompt"):
        engine.add([1] * 100, SamplingParams(max_tokens=1))
    with pytest.raises(CapacityError, match=r"KV cache holds 64 tokens.*kv_tokens"):
        engine.add([1] * 50, SamplingParams(max_tokens=20))
    assert engine.max_new_tokens(50) == 14
    with pytest.raises(CapacityError, match="no room"):
        engine.max_new_tokens(64)
    assert engine.idle
    engine.check_integrity()


def test_requests_wait_for_room_and_all_finish() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, Scripted(oracle(decoder, tree=True)), kv_tokens=96, max_batch=8)
    results = run(engine, [[i] * 10 for i in range(9)], [SamplingParams(max_tokens=22)] * 9)
    for i, result in enumerate(results):
        assert result.token_ids == plain_tokens(decoder, [i] * 10, 22)
    assert max(b for b, _ in decoder.forwards) == 3


def test_bad_prompts_are_refused() -> None:
    engine = engine_of(HashDecoder())
    with pytest.raises(ParameterError, match="empty"):
        engine.add([])
    with pytest.raises(ParameterError, match=f"token id {VOCAB} .* {VOCAB} tokens"):
        engine.add([1, VOCAB])
    with pytest.raises(ParameterError, match="tokenizer"):
        engine.add([1], SamplingParams(stop=("x",)))
    with pytest.raises(ParameterError, match="max_batch=0"):
        engine_options(max_batch=0)


def test_exactness_is_not_claimed_beyond_the_decoder() -> None:
    decoder = HashDecoder(row_invariant=False)
    greedy, sampled = SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, temperature=1.0)
    (a, b) = run(engine_of(decoder, Ngram()), [[1], [2]], [greedy, sampled])
    assert (a.exactness, b.exactness) == ("approximate", "distribution")
    assert "float32 on cpu" in a.notes[0] and b.notes
    (alone,) = run(engine_of(decoder), [[1]], [greedy])
    assert alone.exactness == "identical" and not alone.notes
    shared = run(engine_of(decoder), [[1], [2]], [greedy, greedy])
    assert [r.exactness for r in shared] == ["approximate", "approximate"]


def test_draft_traces_tell_what_became_of_the_draft() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, Scripted(oracle(decoder, tree=True)))
    engine.add([1, 2], SamplingParams(max_tokens=20))
    events = []
    while not engine.idle:
        events += engine.step()
    assert events[0].draft is None
    for event in events[1:]:
        assert event.draft is not None
        drafted = event.draft.tokens[event.draft.accepted].tolist()
        assert event.token_ids[: len(drafted)] == drafted
        assert [event.draft.sources[i] for i in event.draft.accepted] == event.sources[: len(drafted)]
