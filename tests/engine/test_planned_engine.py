"""The loop with planners: the tokens never change, rows stay within limits, and the figures add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hashing import HashDecoder, Scripted, engine_options, oracle, plain_tokens
from test_engine import PROMPTS, run

from outpace.decoding.contracts import Drafter, Proposal
from outpace.decoding.drafters.merged import Merged
from outpace.decoding.drafters.ngram import Ngram
from outpace.decoding.drafters.plain import Plain
from outpace.decoding.drafters.recycling import Recycling
from outpace.decoding.drafters.suffix import Suffix
from outpace.decoding.planners.costs import StepCosts
from outpace.decoding.planners.fixed import Fixed
from outpace.decoding.planners.goodput import Goodput
from outpace.decoding.planners.planner import Planner
from outpace.decoding.planners.tetris import Tetris
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.engine.engine import Engine
from outpace.types import Result, SamplingParams

FLAT = StepCosts((1, 8, 32), (64, 1024), np.array([[1e-3, 2e-3], [1.1e-3, 2.1e-3], [1.4e-3, 2.4e-3]], dtype=np.float32))
STEEP = StepCosts((1, 32), (64,), np.array([[1e-3], [3.2e-2]], dtype=np.float32))
PLANNERS = {
    "fixed": lambda: Fixed(),
    "tetris": lambda: Tetris(),
    "goodput": lambda: Goodput(FLAT),
    "goodput, rows dear": lambda: Goodput(STEEP),
}


def planned(decoder: HashDecoder, planner: Planner, **limits: int) -> Engine:
    drafters = [
        Ngram(),
        Suffix(),
        Recycling(decoder.config.vocab_size),
        Scripted(oracle(decoder, right=0.6, tree=True)),
    ]
    drafters[3].observe = lambda *_: None  # type: ignore[method-assign]  # it may rest, and is not told then
    drafters[3].propose = lambda s, b, _: Proposal(  # type: ignore[method-assign]
        [drafters[3].script(x.tokens, n) for x, n in zip(s, b, strict=True)]
    )
    return Engine(decoder, Merged(drafters), CoupledVerifier(), options=engine_options(**limits), planner=planner)


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("max_batch", [1, 5])
def test_no_planner_changes_the_tokens(name: str, max_batch: int) -> None:
    decoder = HashDecoder()
    engine = planned(decoder, PLANNERS[name](), max_batch=max_batch, max_rows=12, max_step_rows=20, prefill_rows=16)
    lengths = [40, 1, 25, 2, 33]
    results = run(engine, PROMPTS, [SamplingParams(max_tokens=n) for n in lengths])
    for prompt, n, result in zip(PROMPTS, lengths, results, strict=True):
        assert result.token_ids == plain_tokens(decoder, prompt, n)
    rows = [rows for _, rows in decoder.forwards]
    assert max(rows) <= (16 if max_batch == 1 else 20 + 16)  # a chunk of a prompt beside the drafts
    if max_batch == 5:
        assert max(rows[8:]) <= 20  # all prompts are read


@pytest.mark.parametrize("name", PLANNERS)
def test_no_planner_changes_sampled_tokens(name: str) -> None:
    decoder = HashDecoder()
    params = [SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, seed=s) for s in range(5)]
    alone = [run(planned(decoder, Fixed()), [p], [q])[0].token_ids for p, q in zip(PROMPTS, params, strict=True)]
    together = run(planned(decoder, PLANNERS[name]()), PROMPTS, params)
    assert [r.token_ids for r in together] == alone


def test_dear_rows_make_it_plain_decoding() -> None:
    decoder = HashDecoder()
    engine = Engine(
        decoder, Merged([Ngram()]), CoupledVerifier(), planner=Goodput(STEEP), options=engine_options(max_batch=1)
    )
    (result,) = run(engine, [[5, 5, 6] * 20], [SamplingParams(max_tokens=60)])
    # n-grams promise much at first and are found out; from then on every step has one row.
    rows = [n for _, n in decoder.forwards[-20:]]
    assert rows == [1] * 20
    assert result.stats.tokens == 60


def test_figures_of_the_sources_add_up() -> None:
    decoder = HashDecoder()
    (result,) = run(planned(decoder, Goodput(FLAT), max_batch=1), [[5, 5, 6] * 20], [SamplingParams(max_tokens=80)])
    check(result)
    stats = result.stats
    assert stats.plain_s > 0 and stats.realised_speedup is not None and stats.predicted_speedup is not None
    assert stats.predicted_speedup == pytest.approx(stats.realised_speedup * stats.expected_tokens / (stats.tokens - 1))
    assert stats.verify_s > 0


def check(result: Result) -> None:
    stats = result.stats
    for name, source in stats.sources.items():
        assert source.accepted <= source.proposed
        assert all(r <= n for n, r in zip(source.tested, source.right, strict=True))
        # The last accepted token of a request may be its last token of all, which is then the target's own.
        assert source.accepted <= sum(source.right) <= source.accepted + 1, name
    assert sum(s.accepted for s in stats.sources.values()) == stats.accepted
    assert sum(s.proposed for s in stats.sources.values()) == stats.drafted
    assert sum(s.draft_s for s in stats.sources.values()) <= stats.draft_s
    # The last step may have been cut inside its draft.
    assert 1 + stats.steps + stats.accepted - stats.tokens in (0, 1)


# -- prompts that arrive while others decode --------------------------------------------------------------------------


class Timed(HashDecoder):
    """A decoder whose steps take the time of a table, times `slower`, by a clock of its own. Rows beyond the table's
    last take `beyond` times what it goes on to say."""

    def __init__(self, costs: StepCosts, slower: float = 1.0, beyond: float = 1.0) -> None:
        super().__init__()
        self.costs, self.slower, self.beyond, self.now = costs, slower, beyond, 0.0

    def seconds(self, rows: int, context: float) -> float:
        known = self.costs.step(min(rows, self.costs.rows[-1]), context)
        return self.slower * (known + self.beyond * (self.costs.step(rows, context) - known))

    def forward(self, batch: Any, storage: Any, *more: Any, **named: Any) -> Any:
        self.now += self.seconds(len(batch.tokens), float(np.mean(batch.committed)))
        return super().forward(batch, storage, *more, **named)


def arrivals(decoder: Timed, drafter: Drafter, monkeypatch: pytest.MonkeyPatch) -> tuple[Goodput, list[Result]]:
    """250 steps; a new prompt comes whenever the one before is read, so that nearly every step reads some of one."""
    for module in ("runner", "engine", "request"):
        monkeypatch.setattr(f"outpace.engine.{module}.perf_counter", lambda: decoder.now)
    options = engine_options(max_batch=4, max_rows=4, prefill_rows=40, kv_tokens=8192)
    planner = Goodput(decoder.costs)
    engine = Engine(decoder, drafter, CoupledVerifier(), options=options, planner=planner)
    results, mixed = [], 0
    for n in range(250):
        if all(request.decoding for request in engine._requests.values()):
            engine.add([n % 7] * 150, SamplingParams(max_tokens=12, ignore_eos=True))
        events = engine.step()
        results += [event.result for event in events if event.result is not None]
        mixed += decoder.forwards[-1][1] > 20
    assert mixed > 230 and len(results) > 20
    return planner, results[3:]


def test_steps_that_read_prompts_are_accounted(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Timed(FLAT, slower=2.0)
    planner, results = arrivals(decoder, Plain(), monkeypatch)
    assert planner._steps > 230
    assert planner.plain_seconds(1, 0) == pytest.approx(decoder.seconds(1, 0), rel=0.2)  # it is found to be slow
    for result in results:  # plain decoding is as fast as plain decoding
        stats = result.stats
        assert stats.realised_speedup == pytest.approx(1.0, rel=0.05)
        assert 0 < stats.verify_s < stats.decode_s and stats.expected_tokens == stats.tokens - 1 == 11


@pytest.mark.parametrize("beyond", [0.5, 2.0])
def test_what_prompts_cost_beyond_the_table_is_learned(monkeypatch: pytest.MonkeyPatch, beyond: float) -> None:
    decoder = Timed(FLAT, beyond=beyond)
    planner, _ = arrivals(decoder, Plain(), monkeypatch)
    whole, context = decoder.seconds(41, 100), 100
    own = planner.observe(1, context, 1, 0.0, whole, prompt_rows=40)
    assert own == pytest.approx(decoder.seconds(1, context), rel=0.1)
    assert planner.plain_seconds(1, context) == pytest.approx(decoder.seconds(1, context), rel=0.1)


def test_drafts_gain_while_prompts_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Timed(FLAT)
    drafter = Scripted(oracle(decoder))
    _, plain = arrivals(Timed(FLAT), Plain(), monkeypatch)
    _, results = arrivals(decoder, drafter, monkeypatch)
    assert plain[0].token_ids in [result.token_ids for result in results]
    assert all(result.stats.realised_speedup > 1.3 for result in results)  # type: ignore[operator]
    spent = [np.mean([r.stats.decode_s for r in each]) for each in (plain, results)]
    gained = np.mean([r.stats.realised_speedup for r in results])
    assert gained == pytest.approx(spent[0] / spent[1], rel=0.25)
