"""Ways to advance beside drafting: a canvas that is refined over several forwards, branches, several drafts in a row.

Each shares steps, pages and the scheduler with ordinary requests, and writes what it writes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hashing import EOS, HashDecoder, Scripted, engine_options, oracle, plain_tokens
from toy import toy_checkpoint

from outpace.decoding.advance import Advance, Outcome, Work
from outpace.decoding.contracts import Observation
from outpace.decoding.contracts import Sequence as TokenSequence
from outpace.decoding.draft_verify import DraftVerify
from outpace.decoding.drafters.plain import Plain
from outpace.decoding.modes.superposed import Superposed
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.planners.planner import StepBudget
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine
from outpace.errors import CapacityError, ParameterError
from outpace.models.native import NativeDecoder
from outpace.models.tokenizer import Tokenizer
from outpace.ops.masks import Bidirectional
from outpace.types import Accepted, Exactness, Result, SamplingParams

MASK = 38  # stands for what is not known yet
BLOCK = 5
PROMPTS = [[1, 2, 3], [7], list(range(30)), [5, 5, 6] * 20, [9, 8]]


class Canvas(Advance):
    """Writes blocks of `BLOCK` tokens. All of a block begin masked; every step settles the first masked one, by the
    answer of its row, which sees the whole block. Once nothing is masked one step more writes what is kept."""

    name = "canvas"
    rows = 1 + BLOCK
    reads_last = False
    shares_output = False

    def __init__(self) -> None:
        self.blocks: dict[int, list[int]] = {}
        self.breaks = -1  # the sequence that is judged no more

    @property
    def exactness(self) -> Exactness:
        return "approximate"

    def begin(self, sequence: TokenSequence) -> None:
        assert sequence.id not in self.blocks

    def pause(self, sequence: TokenSequence) -> None:
        self.blocks.pop(sequence.id, None)

    def end(self, sequence: TokenSequence) -> None:
        self.blocks.pop(sequence.id, None)

    def spans(self, sequences: Sequence[TokenSequence], budget: StepBudget) -> list[Work]:
        assert not any(budget.caps)
        works = []
        for sequence in sequences:
            size = min(BLOCK, sequence.params.max_tokens - len(sequence.output))
            block = self.blocks.setdefault(sequence.id, [MASK] * size)
            works.append(Work([sequence.tokens[-1], *block], len(sequence.tokens) - 1, Bidirectional()))
        return works

    def judge(self, sequence: TokenSequence, work: Work, outputs: TargetOutputs) -> Outcome:
        block = self.blocks[sequence.id]
        assert sequence.id != self.breaks
        if MASK in block:
            at = block.index(MASK)
            block[at] = settled(outputs.best(1 + at), at)
            return Outcome(Accepted([], []))
        return Outcome(Accepted(list(range(len(block) - 1)), self.blocks.pop(sequence.id)))


def settled(answer: int, at: int) -> int:
    """All rows of a block have the same answer, since they see the same: the place makes the difference."""
    return (answer + at) % MASK


def canvas_tokens(decoder: HashDecoder, prompt: list[int], n: int) -> list[int]:
    """What a canvas writes, by definition."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + n:
        block = [MASK] * min(BLOCK, len(prompt) + n - len(tokens))
        for at in range(len(block)):
            seen = [*tokens, *block]
            block[at] = settled(int(decoder.logits(np.array([seen, range(len(seen))]).T).argmax()), at)
        tokens += block
    return tokens[len(prompt) :]


class Letters:
    """Each token is a letter."""

    def add(self, ids: Iterable[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)

    def finish(self) -> str:
        return ""


class Restless(Scripted):
    """Sequences may begin and come back at any moment."""

    def observe(self, sequence: TokenSequence, seen: Observation) -> None:
        self.live[sequence.id] += len(seen.new_tokens)


def engine_of(decoder: HashDecoder, **limits: object) -> Engine:
    drafter = Restless(oracle(decoder, right=0.7, tree=True))
    engine = Engine(
        decoder, drafter, CoupledVerifier(), detokenizer=Letters, eos_ids=[EOS], options=engine_options(**limits)
    )
    engine.scheduler.limits = replace(engine.scheduler.limits, swap_least=1)  # short texts are swapped too
    return engine


def finish(engine: Engine) -> dict[int, Result]:
    """Run to the end; the books are checked after every step, and events add up to results."""
    results: dict[int, Result] = {}
    tokens: dict[int, list[int]] = {}
    while not engine.idle:
        for event in engine.step():
            assert event.error is None and len(event.sources) == len(event.token_ids)
            tokens.setdefault(event.id, []).extend(event.token_ids)
            if event.result is not None:
                results[event.id] = event.result
        engine.check_integrity()
    for id, result in results.items():
        assert result.token_ids[len(result.token_ids) - len(tokens[id]) :] == tokens[id]
    return results


# -- a canvas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [
        {"max_batch": 1},
        {"max_batch": 10, "prefill_rows": 8},
        {"max_batch": 10, "prefix_cache": True},
        {"max_batch": 10, "kv_tokens": 176, "prefix_cache": True},  # they preempt each other
        {"max_batch": 10, "kv_tokens": 176, "swap_tokens": 1 << 20},
    ],
    ids=["alone", "together", "prefixes", "recomputed", "swapped"],
)
def test_a_canvas_shares_steps_with_ordinary_requests(limits: dict[str, object]) -> None:
    decoder, canvas = HashDecoder(), Canvas()
    engine = engine_of(decoder, **limits)
    n = 33 if "kv_tokens" not in limits else 66  # more than what has room when a request starts
    params = SamplingParams(max_tokens=n, ignore_eos=True)
    drawn, ordinary = [], []
    for prompt in PROMPTS:
        drawn.append(engine.add(prompt, params, advance=canvas))
        ordinary.append(engine.add(prompt, params))
    results = finish(engine)
    for prompt, one, other in zip(PROMPTS, drawn, ordinary, strict=True):
        assert results[one].token_ids == canvas_tokens(decoder, prompt, n)
        assert results[other].token_ids == plain_tokens(decoder, prompt, n)
        assert results[one].method == "canvas" and results[one].exactness == "approximate"
        assert results[other].exactness == "identical"
    assert not canvas.blocks
    if "kv_tokens" in limits:
        assert sum(result.stats.preemptions for result in results.values()) > 0
        assert (engine.scheduler.stats.swapped > 0) == ("swap_tokens" in limits)


def test_a_region_stays_open_until_its_block_is_written() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder)
    id = engine.add([1, 2, 3], SamplingParams(max_tokens=2 * BLOCK, ignore_eos=True), advance=Canvas())
    open_rows, given = [], []
    while not engine.idle:
        events = engine.step()
        given.append(sum(len(event.token_ids) for event in events))
        if not engine.idle:
            open_rows.append(engine.cache.reserved(engine._requests[id].kv))
    # the first step reads the prompt but for its last token, which is the first row of every step of the block
    assert given == [0, *[0] * BLOCK, BLOCK, *[0] * BLOCK, BLOCK]
    assert open_rows == [0, *[1 + BLOCK] * BLOCK, 0, *[1 + BLOCK] * BLOCK]
    assert {rows for _, rows in decoder.forwards} == {2, 1 + BLOCK}


def test_a_canvas_is_cut_at_stops_and_cancelled_at_any_moment() -> None:
    decoder, canvas = HashDecoder(), Canvas()
    truth = canvas_tokens(decoder, [1, 2, 3], 30)
    text = Letters().add(truth)
    stop = text[7:9]  # within a block
    engine = engine_of(decoder)
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop,))
    [result] = finish_one(engine, engine.add([1, 2, 3], params, advance=canvas))
    assert result.text == text[: text.index(stop)] and result.finish_reason == "stop"
    assert result.token_ids == truth[: text.index(stop) + 2]
    ends = SamplingParams(max_tokens=30, stop_token_ids=(truth[11],), ignore_eos=True)
    [result] = finish_one(engine, engine.add([1, 2, 3], ends, advance=canvas))
    assert result.token_ids == truth[: truth.index(truth[11]) + 1] and result.finish_reason == "stop"
    for steps in range(12):
        ids = [engine.add([1, 2, 3], SamplingParams(max_tokens=30), advance=canvas), engine.add([4], None)]
        for _ in range(steps):
            engine.step()
        engine.cancel(ids[0])
        engine.check_integrity()
        finish(engine)
        assert not canvas.blocks


def finish_one(engine: Engine, id: int) -> list[Result]:
    return [finish(engine)[id]]


def test_a_step_that_fails_and_a_judgement_that_fails() -> None:
    decoder, canvas = HashDecoder(), Canvas()
    engine = engine_of(decoder)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    ids = [engine.add([1, 2, 3], params, advance=canvas), engine.add([1, 2, 3], params)]
    for _ in range(3):
        engine.step()
    forward, decoder.forward = decoder.forward, lambda *a, **k: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.check_integrity()
    decoder.forward = forward  # type: ignore[method-assign]
    results = finish(engine)
    assert results[ids[0]].token_ids == canvas_tokens(decoder, [1, 2, 3], 12)
    assert results[ids[1]].token_ids == plain_tokens(decoder, [1, 2, 3], 12)
    ids = [engine.add([1, 2, 3], params, advance=canvas), engine.add([1, 2, 3], params)]
    for _ in range(3):
        engine.step()
    canvas.breaks = ids[0]
    events = []
    while not engine.idle:
        events += engine.step()
        engine.check_integrity()
    assert [event.id for event in events if event.error is not None] == ids[:1]
    assert [e.result.token_ids for e in events if e.id == ids[1] and e.result] == [plain_tokens(decoder, [1, 2, 3], 12)]


def test_what_a_way_cannot_follow_is_refused() -> None:
    engine = engine_of(HashDecoder(), max_rows=BLOCK)
    with pytest.raises(ParameterError, match=f"canvas takes {BLOCK + 1} rows.*max_rows"):
        engine.add([1], advance=Canvas())
    engine = engine_of(HashDecoder())
    with pytest.raises(ParameterError, match="canvas gives nothing of its prompt"):
        engine.add([1], SamplingParams(prompt_logprobs=1), advance=Canvas())
    assert engine.idle


# -- branches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [{}, {"kv_tokens": 192}, {"kv_tokens": 192, "swap_tokens": 1 << 20}, {"prefix_cache": True, "kv_tokens": 192}],
    ids=["room", "recomputed", "swapped", "prefixes"],
)
def test_branches_go_on_from_where_their_parent_was(limits: dict[str, object]) -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, max_batch=6, **limits)
    prompt, params = [3, 1, 4, 1, 5] * 4, SamplingParams(max_tokens=40, temperature=0.8, seed=1, ignore_eos=True)
    parent, other = engine.add(prompt, params), engine.add([2, 7], SamplingParams(max_tokens=40, ignore_eos=True))
    for _ in range(5):
        engine.step()
    before, used = list(engine._requests[parent].sequence.output), engine.cache.pages_in_use
    forks = engine.fork(parent, [2, 3, 4])
    assert engine.cache.pages_in_use == used, "pages are shared until somebody writes"
    engine.check_integrity()
    results = finish(engine)
    assert results[other].token_ids == plain_tokens(decoder, [2, 7], 40)
    for id, seed in zip([parent, *forks], [1, 2, 3, 4], strict=True):
        # a fork is what a request would be whose prompt is all that was written until then
        alone = engine_of(decoder)
        rest = SamplingParams(max_tokens=40 - len(before), temperature=0.8, seed=seed, ignore_eos=True)
        [result] = finish_one(alone, alone.add([*prompt, *before], rest))
        assert results[id].token_ids == before + result.token_ids
        assert results[id].text == Letters().add(results[id].token_ids)
        assert results[id].stats.tokens == len(results[id].sources) == 40
    assert len({tuple(results[id].token_ids) for id in [parent, *forks]}) == 4
    if "kv_tokens" in limits:
        assert sum(result.stats.preemptions for result in results.values()) > 0


def test_a_stop_string_may_begin_before_the_fork() -> None:
    decoder = HashDecoder()
    truth = plain_tokens(decoder, [1, 2, 3], 30)
    text, engine = Letters().add(truth), engine_of(decoder, max_rows=1)
    at = next(i for i in range(5, 25) if text.index(text[i : i + 3]) == i)
    id = engine.add([1, 2, 3], SamplingParams(max_tokens=30, ignore_eos=True, stop=(text[at : at + 3],)))
    while len(engine._requests[id].sequence.output) < at + 2:
        engine.step()
    [fork] = engine.fork(id, [0])
    results = finish(engine)
    assert results[fork].text == results[id].text == text[:at]
    assert results[fork].token_ids == truth[: at + 3]


def test_what_cannot_be_forked() -> None:
    decoder = HashDecoder()
    engine = engine_of(decoder, max_batch=2, prefill_rows=8)
    id = engine.add([1] * 20, SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(2):
        with pytest.raises(ParameterError, match="cannot be forked"):
            engine.fork(id, [1])
        engine.step()
    with pytest.raises(ParameterError, match="cannot be forked"):
        engine.fork(99, [1])
    for _ in range(3):
        engine.step()
    with pytest.raises(CapacityError, match="max_batch"):
        engine.fork(id, [1, 2])
    engine.check_integrity()
    [fork] = engine.fork(id, [1])
    engine.cancel(id)
    results = finish(engine)
    assert results[fork].token_ids == plain_tokens(decoder, [1] * 20, 20)


# -- several drafts in one row --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_tokens", [1024, 160])
def test_superposed_drafts_share_steps_and_survive_preemption(kv_tokens: int) -> None:
    checkpoint, _ = toy_checkpoint("llama")
    decoder = NativeDecoder.from_checkpoint(checkpoint, "int8", threads=1)
    tokenizer = Tokenizer(checkpoint.tokenizer_files())
    prompts = [list(b"the tide went out"), list(b"once"), list(b"and the boats lay on the sand")]
    params = SamplingParams(max_tokens=56, ignore_eos=True)

    def engine(**limits: object) -> Engine:
        return Engine(decoder, Plain(), CoupledVerifier(), options=engine_options(prefix_cache=True, **limits))

    alone = []
    for prompt in prompts:
        one, mode = engine(), Superposed(decoder, tokenizer, 3)
        [result] = finish_one(one, one.add(prompt, params, advance=mode))
        alone.append([(d.token_ids, d.score) for d in mode.found(result).drafts])
    together = engine(max_batch=6, kv_tokens=kv_tokens)
    modes = [Superposed(decoder, tokenizer, 3) for _ in prompts]
    ids = [together.add(prompt, params, advance=mode) for prompt, mode in zip(prompts, modes, strict=True)]
    ordinary = [together.add(prompt, params) for prompt in prompts]
    results = finish(together)
    for id, mode, expected in zip(ids, modes, alone, strict=True):
        found = mode.found(results[id]).drafts
        assert [(d.token_ids, d.score) for d in found] == expected
        assert results[id].exactness == "approximate" and results[id].method == "superposed"
    for prompt, id in zip(prompts, ordinary, strict=True):
        one = engine()
        assert results[id].token_ids == finish_one(one, one.add(prompt, params))[0].token_ids
    preempted = sum(results[id].stats.preemptions for id in ids)
    assert (preempted > 0) == (kv_tokens < 1024)


def test_the_engine_s_own_way_is_the_only_one_that_drafts() -> None:
    engine = engine_of(HashDecoder())
    assert isinstance(engine.advance, DraftVerify) and engine.advance.rows == 1
