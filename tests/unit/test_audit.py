"""The audit on a decoder without weights: it passes what is sound, and finds and explains what is not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hashing import HashDecoder
from toy import EOS, VOCAB, MemoryCheckpoint

from outpace import LLM, MethodError, ParameterError
from outpace.bench.audit import AuditConfig, AuditSection, audit, first_difference, split_by_length
from outpace.bench.workloads import Prompt
from outpace.engine.load import LoadedModel
from outpace.models.batch import ForwardBatch
from outpace.models.decoder import NO_TAPS, DecoderOutput, Taps
from outpace.models.tokenizer import Tokenizer
from outpace.registry import methods as registered

PROMPTS = [Prompt(f"p{i}", "chat", (text,)) for i, text in enumerate(["abcabcabcabc", "hello", "xyxyxyxy", "0101"])]


class Leaky(HashDecoder):
    """Rows that share a step change each other's logits, as rounding may do."""

    def forward(self, batch: ForwardBatch, storage: object, taps: Taps = NO_TAPS) -> DecoderOutput:
        out = super().forward(batch, storage, taps)  # type: ignore[arg-type]
        decoding = batch.committed.min() > 0
        if decoding and len(batch.tokens) > 1:
            out.logits[:, ::2] += 2.0
        return out


def toy(cls: type[HashDecoder] = HashDecoder, **options: object) -> LLM:
    decoder = cls(vocab=VOCAB, speakable=94, eos=EOS, **options)  # type: ignore[arg-type]
    tokenizer = Tokenizer(MemoryCheckpoint(decoder.config, {}).tokenizer_files())
    return LLM(LoadedModel("toy", decoder, tokenizer), method="plain", kv_tokens=4096)


def run(llm: LLM, prompts: Sequence[Prompt] = PROMPTS, **config: object) -> AuditSection:
    return audit(llm, prompts, AuditConfig(**{"max_tokens": 12, "batch_sizes": (1, 3), **config}))  # type: ignore[arg-type]


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2 == first_difference([1, 2, 3], [1, 2])
    assert first_difference([], [1]) == 0


def test_sound_methods_pass() -> None:
    told: list[tuple[int, int]] = []
    section = audit(
        toy(),
        PROMPTS,
        AuditConfig(max_tokens=12, batch_sizes=(1, 3)),
        lambda what, done, total: told.append((done, total)),
    )
    methods = {row.method for row in section.rows}
    assert {"plain", "ngram", "suffix", "recycling", "suffix+recycling", "auto"} <= methods
    assert section.holds and section.row_invariant
    assert all(row.differing == 0 and row.exactness == "identical" and row.sequences == 4 for row in section.rows)
    assert all(row.tokens == section.rows[0].tokens for row in section.rows if row.temperature == 0)
    assert [(r.method, r.batch, r.temperature) for r in section.rows if r.reference] == [
        ("plain", 1, 0.0),
        ("plain", 1, 0.8),
    ]
    assert {(r.batch, r.temperature) for r in section.rows if r.method == "ngram"} == {
        (b, t) for b in (1, 3) for t in (0.0, 0.8)
    }
    assert told[-1][0] == told[-1][1] == 4 * len(section.rows)
    assert told == sorted(told)
    # what cannot run is said, not hidden
    needy = {m.name for m in registered("drafter") if {"draft model", "draft model of any vocabulary"} & {*m.needs}}
    assert {name for name, reason in section.skipped if "draft model" in reason} == needy >= {"draft", "draft-tree"}


def test_a_broken_promise_is_found_and_explained() -> None:
    llm = toy(Leaky)  # claims to be row-invariant, and is not
    section = run(llm, methods=("plain", "ngram"), temperatures=(0.0,))
    assert not section.holds
    row = next(r for r in section.rows if r.method == "plain" and r.batch == 3)
    assert row.differing == len(row.divergences) > 0 and not row.holds
    found = row.divergences[0]
    assert found.explanation.startswith("BROKEN PROMISE")
    assert found.expected != found.got and found.expected_text != found.got_text
    # the margin is that of a plain read of prompt and common prefix
    prompt = next(p for p in PROMPTS if p.id == found.prompt)
    reference = llm.generate(prompt.text, AuditConfig(max_tokens=12).params(0.0, 0))[0].token_ids
    assert reference[found.position] == found.expected
    tokens = [*llm.tokens(prompt.text), *reference[: found.position]]
    decoder = llm.decoder
    assert isinstance(decoder, HashDecoder)
    logits = decoder.logits(np.array([tokens, range(len(tokens))]).T)
    assert found.expected is not None and found.got is not None
    assert found.logit_margin == pytest.approx(float(logits[found.expected] - logits[found.got]), rel=1e-6)
    assert found.logit_margin > 0


def test_without_a_promise_differences_are_no_failure() -> None:
    section = run(toy(Leaky, row_invariant=False), methods=("ngram",))
    assert section.holds and not section.row_invariant
    assert any(row.differing for row in section.rows)
    claims = {(row.exactness, row.temperature) for row in section.rows if row.method == "ngram"}
    assert claims == {("approximate", 0.0), ("distribution", 0.8)}
    explained = [d.explanation for row in section.rows for d in row.divergences]
    assert explained and all("rounds a row differently" in text for text in explained)
    sampled = [d.explanation for row in section.rows if row.temperature for d in row.divergences]
    assert all("probability moves across the draw" in text for text in sampled)


def test_json_holds_everything() -> None:
    section = run(toy(Leaky), methods=("ngram",), temperatures=(0.0,), batch_sizes=(3,))
    record = section.to_json()
    assert record["holds"] is False
    assert [row["method"] for row in record["rows"]] == ["plain", "plain", "ngram"]
    assert record["rows"][1]["divergences"][0].keys() >= {"prompt", "position", "expected", "got", "logit_margin"}


def test_prompts_that_do_not_fit_are_told_apart() -> None:
    llm = toy(max_position=64)
    long = Prompt("long", "chat", ("x" * 60,))
    fits, too_long = split_by_length(llm, [*PROMPTS, long], 12)
    assert fits == PROMPTS and too_long == [long]


def test_refusals() -> None:
    with pytest.raises(ParameterError, match="no prompts"):
        run(toy(), prompts=[])
    with pytest.raises(MethodError, match="needs a draft model"):
        run(toy(), methods=("draft",))
    with pytest.raises(MethodError, match="no decoding method 'nothing'"):
        run(toy(), methods=("nothing",))
    for bad in (
        {"batch_sizes": ()},
        {"batch_sizes": (0,)},
        {"methods": ()},
        {"temperatures": (-1.0,)},
        {"max_tokens": 0},
    ):
        with pytest.raises(ParameterError):
            AuditConfig(**bad)  # type: ignore[arg-type]
