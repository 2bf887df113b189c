"""`EngineOptions`: one record for Python and the command line; what is not allowed is refused by its public name."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hashing import toy_loaded

from outpace import LLM, EngineOptions, MethodError, ParameterError, RequestOptions, SamplingParams
from outpace.cli.common import engine_options
from outpace.cli.serve import serve
from outpace.engine.load import size_of_cache
from outpace.fields import Choice, Each, Flag, Number, Text, Whole

#: A value for each option other than its default, which all go together
OTHER: dict[str, Any] = {
    "draft_precision": "float32",
    "method": "ngram",
    "verifier": "rejection",
    "planner": "tetris",
    "methods": ("draft", "suffix"),
    "precision": "float32",
    "device": "cpu",
    "max_batch": 3,
    "max_rows": 5,
    "max_step_rows": 12,
    "prefill_rows": 64,
    "kv_tokens": 640,
    "prefix_cache": False,
    "max_queue": 7,
    "max_step_s": 0.5,
    "swap_tokens": 160,
    "draft_model": toy_loaded("small"),
    "head": None,  # the methods here have no use for one
    "kv": None,  # does not go with swap_tokens
    "threads": None,  # the toy has none of its own
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(toy_loaded(), kv_tokens=256, method="plain") as made:
        yield made


def test_every_option_arrives(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    assert OTHER.keys() == {field.name for field in fields(EngineOptions)}
    with LLM(llm.loaded, **OTHER) as opened:
        assert all(getattr(opened.options, name) == value for name, value in OTHER.items())
        engine = opened._engine
        limits = engine.scheduler.limits
        names = ("max_batch", "max_rows", "max_step_rows", "prefill_rows", "max_queue", "max_step_s", "swap_tokens")
        assert {name: getattr(limits, name) for name in names} == {name: OTHER[name] for name in names}
        assert limits.swap_pages == 10 and limits.num_pages == 40 and engine.prefixes is None
        assert engine.planner.name == opened.planner == "tetris" and engine.verifier.name == "rejection"
        assert opened.methods == ["ngram", "plain", "draft", "suffix"]


@pytest.mark.parametrize("method", ["suffix", "ngram+recycling", "auto"])
def test_another_method_drops_no_option(llm: LLM, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    with LLM(llm.loaded, **OTHER) as opened, opened.with_method(method) as other:
        assert other.options == opened.options.changed(method=method)
        assert other.draft_loaded is opened.draft_loaded and other.loaded is opened.loaded


def test_another_method_leaves_out_what_it_has_no_use_for(llm: LLM) -> None:
    given = {**OTHER, "methods": (), "max_step_s": None, "method": "draft"}
    with LLM(llm.loaded, **given) as opened:
        with opened.with_method("ngram") as other:
            assert other.options == opened.options.changed(method="ngram", draft_model=None, draft_precision="auto")
        with opened.with_method("plain") as plain:
            left = {"verifier": "auto", "planner": "auto", "max_rows": None, "max_step_rows": None}
            assert plain.options == other.options.changed(method="plain", **left)
        with opened.with_method("ngram", max_batch=2, kv_tokens=None) as other:
            assert other.options.max_batch == 2 and other.options.kv_tokens is None
        with pytest.raises(MethodError, match="nothing to verify"):
            opened.with_method("plain", verifier="rejection")
        with pytest.raises(ParameterError, match="'max_bach'; did you mean 'max_batch'"):
            opened.with_method("plain", max_bach=3)


def test_a_record_and_single_options(llm: LLM) -> None:
    options = EngineOptions(method="ngram", kv_tokens=160, max_batch=2)
    with LLM(llm.loaded, options=options) as one, LLM(llm.loaded, options=options, max_batch=3) as two:
        assert one.options is not two.options and (one.options, two.options.max_batch) == (options, 3)
        assert one._engine.cache.storage.num_pages == 10
    with pytest.raises(ParameterError, match="must be EngineOptions"):
        LLM(llm.loaded, options={"method": "ngram"})  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="there is no option 'max_bach'; did you mean 'max_batch'"):
        LLM(llm.loaded, max_bach=3)
    with pytest.raises(ParameterError, match="there is no option 'colour'; there are: draft_model"):
        LLM(llm.loaded, colour=3)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"max_batch": "2"}, "wrong type: it must be a whole number from 1 to 4,096"),
        ({"max_batch": True}, "wrong type"),
        ({"max_batch": 0}, "out of range"),
        ({"max_batch": None}, "wrong type"),
        ({"max_rows": 2.5}, "wrong type: it must be a whole number from 1 to 4,096, or None"),
        ({"max_rows": 5000}, "out of range"),
        ({"kv_tokens": 10**15}, "out of range"),
        ({"kv_tokens": 0}, "out of range"),
        ({"swap_tokens": -1}, "out of range: it must be a whole number from 0"),
        ({"max_step_s": 0}, "out of range: it must be a number, above 0, or None"),
        ({"max_step_s": math.nan}, "out of range"),
        ({"max_step_s": math.inf}, "out of range"),
        ({"max_step_s": "1"}, "wrong type"),
        ({"prefix_cache": "no"}, "wrong type: it must be True or False"),
        ({"prefix_cache": 1}, "wrong type"),
        ({"threads": 0}, "out of range"),
        ({"threads": 1.0}, "wrong type"),
        ({"precision": "int7"}, "unknown: it must be one of auto, file, float32.*did you mean 'int8'"),
        ({"precision": 8}, "wrong type"),
        ({"draft_precision": "wet"}, "unknown"),
        ({"method": 3}, "wrong type"),
        ({"method": ""}, "must be text that is not empty"),
        ({"methods": "suffix"}, "wrong type: it must be a list of methods"),
        ({"methods": ["suffix", 3]}, "wrong type"),
        ({"draft_model": 5}, "wrong type: it must be a model's name or path"),
        ({"device": None}, "wrong type"),
        ({"prefill_rows": 0}, "out of range"),
        ({"max_queue": 0}, "out of range"),
    ],
    ids=str,
)
def test_values_are_held_to_their_rules(wrong: dict[str, Any], why: str) -> None:
    (name,) = wrong
    with pytest.raises(ParameterError, match=f"^{name}=.*{why}"):
        EngineOptions(**wrong)
    with pytest.raises(ParameterError, match=f"^{name}="):
        LLM("no such model", **wrong)  # before anything is looked for


def test_options_are_described_in_the_record_itself() -> None:
    text = EngineOptions.__doc__ or ""
    assert all(f"\n{field.name} " in text and field.metadata["help"][:30] in text for field in fields(EngineOptions))
    assert "max_batch (8): Requests that decode at once." in text


def test_rows_of_one_sequence_are_rows_of_a_step(llm: LLM) -> None:
    with pytest.raises(
        MethodError, match="max_rows=9 of one sequence cannot be had in steps of max_step_rows=8: lower"
    ):
        LLM(llm.loaded, method="ngram", max_rows=9, max_step_rows=8)


def test_numbers_of_other_libraries_are_numbers() -> None:
    options = EngineOptions(max_batch=np.int64(3), max_step_s=np.float32(0.5), methods=iter(["ngram"]))
    assert (options.max_batch, options.max_step_s, options.methods) == (3, 0.5, ("ngram",))
    assert type(options.max_batch) is int and type(options.max_step_s) is float
    assert EngineOptions(max_step_s=2).max_step_s == 2.0 and EngineOptions(draft_model=Path("x")).draft_model == "x"
    assert hash(EngineOptions()) == hash(EngineOptions())


@pytest.mark.parametrize(
    "wrong", [{"precision": "int8"}, {"threads": 2}, {"device": "cuda:7"}, {"device": "tpu"}], ids=str
)
def test_a_loaded_model_is_what_it_is(llm: LLM, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ParameterError, match=f"^{name}="):
        LLM(llm.loaded, **wrong)
    with LLM(llm.loaded, precision="float32", device="cpu", kv_tokens=64) as same:
        assert same.precision == "float32"


def test_a_loaded_model_has_threads_of_its_own() -> None:
    loaded = toy_loaded()
    loaded.decoder.threads = 2  # type: ignore[attr-defined]
    LLM(loaded, threads=2, kv_tokens=64).close()
    with pytest.raises(ParameterError, match="threads=3 contradicts toy, which is loaded with threads=2"):
        LLM(loaded, threads=3, kv_tokens=64)


def test_a_cache_beyond_the_memory_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outpace.engine.load.memory_bytes", lambda device: 1 << 20)
    page = llm.decoder.new_storage(1).bytes_per_page
    most = (1 << 20) // page * 16
    assert size_of_cache(llm.decoder, most, 1) == most
    with pytest.raises(ParameterError, match=f"kv_tokens={most + 1} is out of range.*at most {most} tokens"):
        LLM(llm.loaded, kv_tokens=most + 1)


# -- the command line --------------------------------------------------------------------------------------------------


def options_of(command: click.Command) -> dict[str, click.Option]:
    return {p.name: p for p in command.params if isinstance(p, click.Option) and p.name}


def test_options_of_the_command_line_are_made_from_the_fields() -> None:
    made = options_of(click.command()(engine_options()(lambda **_: None)))
    for field in fields(EngineOptions):
        option, rule = made[field.name], field.metadata["rule"]
        assert (option.default == field.default) and field.metadata["help"] in str(option.help)
        kinds = {Whole: click.IntRange, Number: click.FloatRange, Choice: click.Choice, Flag: click.types.BoolParamType}
        assert isinstance(option.type, kinds.get(type(rule), click.ParamType))
        if isinstance(rule, Whole):
            assert (option.type.min, option.type.max) == (rule.low, rule.high)  # type: ignore[attr-defined]
        if isinstance(rule, Choice):
            assert tuple(option.type.choices) == rule.values  # type: ignore[attr-defined]
        assert isinstance(rule, Whole | Number | Choice | Flag | Each | Text), f"no option is made for {rule}"


def test_serving_offers_every_option() -> None:
    made = options_of(serve)
    assert {field.name for field in fields(EngineOptions)} <= made.keys()
    assert made["max_batch"].default == 16 and made["max_queue"].default == 256  # of a server


def test_values_of_the_command_line() -> None:
    found: dict[str, Any] = {}
    command = click.command()(engine_options()(lambda **given: found.update(given)))
    line = ["--max-step-ms", "40", "--no-prefix-cache", "--methods", "draft:max_tokens=8,min_reach=0.3, suffix"]
    assert CliRunner().invoke(command, line).exit_code == 0
    assert found["max_step_s"] == 0.04 and found["prefix_cache"] is False
    assert found["methods"] == ("draft:max_tokens=8,min_reach=0.3", "suffix")
    assert EngineOptions(**found).kv_tokens is None
    assert CliRunner().invoke(command, []).exit_code == 0 and EngineOptions(**found) == EngineOptions()
    for wrong in (["--max-step-ms", "0"], ["--max-batch", "5000"], ["--precision", "int7"]):
        refused = CliRunner().invoke(command, wrong)
        assert refused.exit_code == 2 and wrong[0] in refused.output


def test_options_load_no_torch() -> None:
    code = "import outpace, sys; outpace.EngineOptions(max_batch=3); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"max_tokens": True}, "wrong type: it must be a whole number, 1 or more"),
        ({"max_tokens": 2.0}, "wrong type"),
        ({"max_tokens": None}, "wrong type"),
        ({"ignore_eos": "no"}, "wrong type: it must be True or False"),
        ({"ignore_eos": 0}, "wrong type"),
        ({"temperature": math.nan}, "out of range: it must be a number from 0"),
        ({"temperature": False}, "wrong type"),
        ({"temperature": "0"}, "wrong type"),
        ({"top_p": 0}, "out of range: it must be a number, above 0 and at most 1"),
        ({"top_p": math.inf}, "out of range"),
        ({"min_p": 1}, "out of range: it must be a number, 0 or more and below 1"),
        ({"top_k": 1.5}, "wrong type"),
        ({"repetition_penalty": math.nan}, "out of range"),
        ({"logit_bias": {1: math.nan}}, "out of range: it must be token ids, each with a bias"),
        ({"logit_bias": {True: 1.0}}, "wrong type"),
        ({"logit_bias": [(1, 1.0)]}, "wrong type"),
        ({"seed": 2**63}, "out of range"),
        ({"stop": ["a", ""]}, "non-empty strings"),
        ({"stop": b"a"}, "wrong type"),
        ({"stop": [b"a"]}, "wrong type"),
        ({"stop_token_ids": [1.5]}, "wrong type: it must be token ids"),
        ({"stop_token_ids": 5}, "wrong type"),
        ({"logprobs": True}, "wrong type: it must be a whole number from 0 to 20, or None"),
        ({"logprobs": 21}, "out of range"),
    ],
    ids=str,
)
def test_parameters_are_held_to_their_rules(wrong: dict[str, Any], why: str) -> None:
    (name,) = wrong
    with pytest.raises(ParameterError, match=f"^{name}=.*{why}"):
        SamplingParams(**wrong)


def test_parameters_are_kept_in_their_types() -> None:
    ids = np.array([3, 4])
    params = SamplingParams(temperature=np.float32(0.5), stop="x", stop_token_ids=ids, logit_bias={np.int64(3): 2})
    assert (params.temperature, params.stop, params.stop_token_ids) == (0.5, ("x",), (3, 4))
    assert params.logit_bias == {3: 2.0} and type(params.stop_token_ids[0]) is int
    assert SamplingParams(stop=(text for text in "ab")).stop == ("a", "b")
    assert SamplingParams().logit_bias == {} and SamplingParams() == SamplingParams()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"priority": 1.5}, "wrong type"),
        ({"priority": 101}, "out of range: it must be a whole number from -100 to 100"),
        ({"priority": True}, "wrong type"),
        ({"owner": 5}, "wrong type"),
        ({"method": 5}, "wrong type"),
        ({"max_draft": 4097}, "out of range"),
        ({"max_draft": "3"}, "wrong type"),
        ({"exactness": "identcal"}, "unknown: .*did you mean 'identical'"),
        ({"exactness": True}, "wrong type"),
        ({"group": 3}, "wrong type"),
        ({"pooling": "max"}, "unknown: it must be one of mean, last, or None"),
    ],
    ids=str,
)
def test_options_of_a_request_are_held_to_their_rules(wrong: dict[str, Any], why: str) -> None:
    (name,) = wrong
    with pytest.raises(ParameterError, match=f"^{name}=.*{why}"):
        RequestOptions(**wrong)
