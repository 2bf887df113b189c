"""Faults that are injected are found by the audit, each by the check that is there for it; a sound engine passes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from faulty import (
    CountedFault,
    ForgetsNothing,
    KeepsToOwners,
    LeaksWhileShared,
    Leaky,
    OneIn500,
    OnlyDistribution,
    WrongResidual,
    registered,
)
from hashing import HashDecoder, toy_loaded

from outpace import LLM, ParameterError
from outpace.bench import audit_samplers, audit_verifiers, language
from outpace.bench.audit import AuditConfig, AuditSection, audit
from outpace.bench.audit_checks import prove
from outpace.bench.audit_engine import check_owners, check_ragged, check_seeds, stream_fault
from outpace.bench.audit_frequencies import check_frequencies
from outpace.bench.audit_samplers import check_samplers
from outpace.bench.audit_verifiers import check_verifier
from outpace.bench.evidence import (
    chi_square,
    looks_for,
    seen_one_in,
    seen_variation,
    sign_test,
    total_variation,
    wilson,
)
from outpace.bench.requests import TimedRequest, run_all
from outpace.bench.settings import Setting, of_temperature, setting
from outpace.bench.workloads import Prompt
from outpace.decoding import sampling
from outpace.engine.engine import Engine
from outpace.types import SamplingParams

PROMPTS = [Prompt(f"p{i}", "chat", (text,)) for i, text in enumerate(["abcabcabcabc", "hello", "xyxyxyxy", "0101"])]

LONG = [Prompt(f"p{i}", "chat", (f"{i}abcabcab" * 3,)) for i in range(40)]


def toy(**options: object) -> LLM:
    return LLM(toy_loaded(template=None), **{"method": "plain", "kv_tokens": 4096, **options})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps and texts, enough for these faults."""
    monkeypatch.setattr(audit_samplers, "_ROWS", 20)
    monkeypatch.setattr(audit_samplers, "_DRAWS", 1600)
    monkeypatch.setattr(audit_verifiers, "_WALKS", 500)
    monkeypatch.setattr(audit_verifiers, "_TEXTS", 600)


# -- verifiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["coupled", "rejection", "block"])
def test_sound_verifiers_hold(spec: str) -> None:
    checks = list(check_verifier(spec))
    assert all(check.holds for check in checks), [c.evidence for c in checks if not c.holds]
    enumerated = [c for c in checks if c.kind == "enumeration"]
    assert len(enumerated) == 8 and all(c.numbers["total_variation"] <= 1e-9 for c in enumerated)
    assert any(c.kind in ("walk", "frequencies") for c in checks)


@pytest.mark.parametrize("spec", ["typical", "topk", "tolerance:epsilon=2"])
def test_approximate_verifiers_are_measured_and_hold_what_they_say(spec: str) -> None:
    checks = list(check_verifier(spec))
    assert all(c.holds and c.numbers["declared"] == "approximate" for c in checks)
    assert max(c.numbers["total_variation"] for c in checks) > 0.1  # the measure is not blind


@pytest.mark.parametrize("cls", [OneIn500, CountedFault])
def test_one_wrong_token_in_500_is_found_without_a_model(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_verifiers, "_WALKS", 4000)
    some = {name: language.SAMPLERS[name] for name in ("greedy", "temperature", "penalties")}
    monkeypatch.setattr(language, "SAMPLERS", some)
    with registered(cls) as name:
        failed = next(check for check in check_verifier(name) if check.kind == "walk" and not check.holds)
    assert "differ from plain sampling" in failed.evidence and failed.numbers["wrong"] < 40


def test_a_fault_that_is_drawn_is_found_by_enumeration() -> None:
    with registered(OneIn500) as name:
        found = {c.subject: c for c in islice(check_verifier(name), 2)}
    check = found[f"{name}, temperature"]
    assert not check.holds and 1e-9 < check.numbers["total_variation"] < 0.01  # as small as it is


def test_a_residual_from_the_wrong_position_is_found() -> None:
    with registered(WrongResidual, "distribution") as name:
        failed = {(c.kind, c.subject) for c in check_verifier(name) if not c.holds}
    assert ("enumeration", f"{name}, temperature") in failed
    assert ("frequencies", f"{name}, steps in a row") in failed


def test_a_greedy_text_has_a_distribution_of_one_text() -> None:
    """What keeps the distribution keeps the tokens at temperature 0: a fault there is no chance."""
    with registered(OnlyDistribution, "distribution") as name:
        walk = next(c for c in check_verifier(name) if c.kind == "walk")
        section = audit(
            toy(verifier=name, method="recycling"), PROMPTS, AuditConfig(("recycling",), (4,), (0.0, 0.8), 40)
        )
    assert not walk.holds and walk.subject == f"{name}, greedy"
    greedy, sampled = (row for row in section.rows if row.method == "recycling")
    assert greedy.exactness == sampled.exactness == "distribution"
    assert greedy.differing and not greedy.holds and sampled.differing and sampled.holds
    assert all("BROKEN PROMISE" in d.explanation for d in greedy.divergences)


# -- the sampler ----------------------------------------------------------------------------------------------------


def test_a_sound_sampler_is_its_definition() -> None:
    checks = list(check_samplers([of_temperature(0.8), of_temperature(0.3)]))
    assert all(c.holds for c in checks) and len(checks) == 10 + 9  # of each a definition; greedy is not drawn
    assert all(c.numbers["seen_variation"] < 0.12 for c in checks if "drawn" in c.subject)


def with_changed_draws(monkeypatch: pytest.MonkeyPatch, **change: Callable[[Any], Any]) -> None:
    """Tokens are drawn with parameters that nobody asked for; the distribution is told as before."""
    choose_rows = sampling.choose_rows

    def changed(params: SamplingParams) -> SamplingParams:
        return replace(params, **{name: f(getattr(params, name)) for name, f in change.items()})

    monkeypatch.setattr(
        sampling,
        "choose_rows",
        lambda asked, threads=1: choose_rows([(a, changed(p), n) for a, p, n in asked], threads),
    )


def test_a_biased_draw_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with_changed_draws(monkeypatch, temperature=lambda t: 1.2 * t)
    failed = {c.subject for c in check_samplers() if not c.holds}
    assert {"temperature, drawn", "top-p, drawn", "temperature, definition"} <= failed


def test_a_draw_of_another_position_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the right frequencies, but is not the token of this seed and position."""
    choose_rows = sampling.choose_rows
    monkeypatch.setattr(
        sampling, "choose_rows", lambda asked, threads=1: choose_rows([(a, p, n + 1) for a, p, n in asked], threads)
    )
    failed = {c.subject for c in check_samplers() if not c.holds}
    assert "temperature, definition" in failed and "temperature, drawn" not in failed


@pytest.mark.parametrize("where", ["distribution", "draws"])
def test_a_filter_that_keeps_too_much_is_found(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = sampling._nucleus_cut
    if where == "distribution":
        monkeypatch.setattr(sampling, "_nucleus_cut", lambda weights, top_p: cut(weights, min(1.0, top_p + 0.01)))
    else:
        with_changed_draws(monkeypatch, top_p=lambda p: min(1.0, p + 0.01) if p < 1 else p)
    failed = {c.subject for c in check_samplers() if not c.holds}
    assert "top-p, definition" in failed and "top-k, definition" not in failed


# -- with an engine -------------------------------------------------------------------------------------------------


def proved(
    llm: LLM, methods: tuple[str, ...], kinds: Sequence[str], max_tokens: int = 12, texts: int = 200
) -> AuditSection:
    config = AuditConfig(methods=methods, batch_sizes=(1, 3), max_tokens=max_tokens)
    section = audit(llm, PROMPTS, config)
    prove(llm, PROMPTS, config, section, kinds, texts=texts)
    return section


def test_a_sound_engine_passes() -> None:
    section = proved(toy(), ("ngram", "suffix", "recycling", "suffix+recycling", "auto"), ("ragged", "seeds", "owners"))
    assert section.holds, [(c.subject, c.evidence) for c in section.checks if not c.holds]
    kinds = [check.kind for check in section.checks]
    assert kinds.count("owners") == 5 * 4 and kinds.count("seeds") == 6
    assert kinds.count("ragged") == kinds.count("streams") == 6 * 2
    # the comparison was of something: nodes were proposed, and the same as alone after another's prompt
    nodes = [c.numbers["nodes"] for c in section.checks if c.subject == "recycling, prompts"]
    assert nodes[0] > 20
    assert section.to_json()["checks"][0].keys() >= {"kind", "subject", "holds", "evidence", "numbers"}


def test_one_wrong_token_in_500_is_found_in_the_tokens() -> None:
    with registered(OneIn500) as name:
        llm = toy(verifier=name, method="recycling")
        config = AuditConfig(methods=("recycling",), batch_sizes=(8,), max_tokens=64, temperatures=(0.8,))
        section = audit(llm, LONG, config)
    row = section.rows[-1]
    assert row.method == "recycling" and row.exactness == "identical"
    assert row.differing and not section.holds
    assert "BROKEN PROMISE" in row.divergences[0].explanation


@pytest.mark.parametrize(
    "cls, where",
    [
        (Leaky, "prompts"),
        (Leaky, "outputs"),
        (Leaky, "together"),
        (ForgetsNothing, "outputs"),
        (LeaksWhileShared, "together"),
    ],
)
def test_a_drafter_that_leaks_another_owners_text_is_found(cls: type, where: str) -> None:
    with registered(cls) as name:
        found = {c.subject: c for c in check_owners(toy(), name)}
    check = found[f"{name}, {where}"]
    assert not check.holds and check.numbers["leaked"] > 0, check.evidence
    if cls is LeaksWhileShared:
        assert found[f"{name}, outputs"].holds  # nobody is there any more
    assert found[f"{name}, prefixes"].holds


@pytest.mark.parametrize("seed", range(6))
def test_what_an_owner_wrote_himself_is_no_leak(seed: int) -> None:
    """His other requests hold pieces of the first owner's text too, and his pairs make three tokens of it by chance."""
    with registered(KeepsToOwners) as name:
        found = list(check_owners(toy(), name, seed))
    assert all(c.holds for c in found), [c.evidence for c in found if not c.holds]
    assert found[0].numbers["nodes"] > 0


def test_prefixes_shared_between_owners_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    add = Engine.add
    monkeypatch.setattr(
        Engine, "add", lambda self, ids, params, prediction=(), options=None: add(self, ids, params, prediction)
    )
    found = {c.subject: c for c in check_owners(toy(), "ngram")}
    assert not found["ngram, prefixes"].holds and found["ngram, prefixes"].numbers["cached_tokens"] > 0


def test_a_seed_that_is_ignored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_seeds(toy(), "ngram", PROMPTS, of_temperature(0.8), 12, 0).holds
    with_changed_draws(monkeypatch, seed=lambda seed: 5)
    deaf = check_seeds(toy(), "ngram", PROMPTS, of_temperature(0.8), 12, 0)
    assert not deaf.holds and "seed changes nothing" in deaf.evidence


def test_output_that_depends_on_more_than_the_seed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with_changed_draws(monkeypatch, seed=lambda seed: random.getrandbits(40))
    check = check_seeds(toy(), "plain", PROMPTS, of_temperature(0.8), 12, 0)
    assert not check.holds and check.numbers["differing"]


def test_a_ragged_batch_that_leaks_is_found() -> None:
    class Mixed(HashDecoder):
        def forward(self, batch, storage, taps):  # type: ignore[no-untyped-def]
            out = super().forward(batch, storage, taps)
            if len(batch.committed) > 2:
                out.logits[:, ::2] += 2.0
            return out

    llm = toy()
    config = AuditConfig(methods=("plain",), batch_sizes=(1,), max_tokens=12)
    references = audit(llm, PROMPTS, config).references["greedy"]
    llm.loaded.decoder.__class__ = Mixed
    with llm.with_method("plain", max_batch=4) as runner:
        ragged, streams = check_ragged(runner, PROMPTS, references, setting("greedy"), 12, 0)
    assert not ragged.holds and streams.holds


def test_a_stream_that_does_not_add_up_is_found() -> None:
    llm = toy(method="ngram")
    (run,) = run_all(llm, [TimedRequest("abcabcabc", SamplingParams(max_tokens=8))])
    assert stream_fault(llm, run) is None and run.drafts
    last = run.events[-1]
    last.text = last.text[:-1]
    assert "text" in str(stream_fault(llm, run))
    last.token_ids.pop()
    assert "7 tokens" in str(stream_fault(llm, run))


def test_frequencies_of_a_sound_verifier_hold_and_of_a_biased_one_do_not() -> None:
    how = Setting("top-3", SamplingParams(temperature=1.0, top_k=3))  # flat as the toy's language is: 27 texts
    prompt = Prompt("loop", "chat", ("abcabcabcabcabc",))
    llm = toy()
    for method, verifier in (("plain", "coupled"), ("recycling", "rejection"), ("suffix", "block")):
        check = check_frequencies(llm, method, prompt, how, verifier=verifier, texts=300)
        assert check.holds, check.evidence
        assert check.numbers["cells"] > 10
        assert check.numbers["claimed"] == ("identical" if verifier == "coupled" else "distribution")
    with registered(WrongResidual, "distribution") as name:
        check = check_frequencies(llm, "recycling", prompt, how, verifier=name, texts=300)
    assert not check.holds and check.numbers["p"] < 1e-6
    with pytest.raises(ParameterError, match="samples"):
        check_frequencies(llm, "plain", prompt, setting("greedy"))


@pytest.mark.parametrize("cells", [2, 12])
def test_a_shift_that_would_have_been_seen_is_seen(cells: int) -> None:
    """Of the shape that is the hardest to see: every cell off by the same share of itself."""
    texts, level, rng = 2000, 1e-4, np.random.default_rng(0)
    shift = seen_variation(texts, cells - 1, level)
    p = np.full(cells, 1 / cells)
    moved = p * (1 + 2 * shift * np.where(np.arange(cells) % 2, 1, -1))
    expected = (texts * p).tolist()
    found = [chi_square(c.tolist(), expected)[2] < level for c in rng.multinomial(texts, moved, size=400)]
    assert 0.92 < sum(found) / len(found) < 0.98
    assert seen_variation(4 * texts, cells - 1, level) == pytest.approx(shift / 2, rel=0.01)
    assert seen_variation(texts, 0, level) == float("inf")


def test_settings_and_statistics() -> None:
    assert setting("0.8") == of_temperature(0.8) and setting("mixed").base.top_k == 50
    with pytest.raises(ParameterError, match="no sampler setting 'warm'"):
        setting("warm")
    assert [s.name for s in AuditConfig(temperatures=(0.0,), samplers=("greedy", "top-p")).settings] == [
        "greedy",
        "top-p",
    ]
    statistic, freedom, p = chi_square([48, 52], [50, 50])
    assert (statistic, freedom) == (0.16, 1) and p == pytest.approx(0.6892, abs=1e-4)
    assert chi_square([1, 99], [0, 100])[2] == 0.0
    assert total_variation([1, 3], [2, 2]) == 0.25
    assert looks_for(500) == 1497 and seen_one_in(1497) == 500 and seen_one_in(0) == 0
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert sign_test(0, 5) == 0.0625 and sign_test(3, 3) == 1.0
    with pytest.raises(ParameterError, match="no check 'luck'"):
        proved(toy(), ("ngram",), ("luck",))
