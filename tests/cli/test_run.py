"""`outpace run` over a decoder whose logits are a hash."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable

import pytest
from click.testing import Result

from outpace.engine.engine import Engine

STATS = {
    "prompt_tokens",
    "tokens",
    "steps",
    "mean_accepted",
    "tokens_per_s",
    "prefill_tokens_per_s",
    "time_to_first_token_s",
}


def test_answer_on_stdout_figures_on_stderr(outpace: Callable[..., Result]) -> None:
    result = outpace("run", "hello", "--max-tokens", "20", "-m", "toy")
    assert result.exit_code == 0
    assert len(result.stdout) == 21 and result.stdout.endswith("\n")
    line = result.stderr.strip()
    assert re.fullmatch(
        r"20 tokens in [\d.]+ s \(.*\), [\d.]+ tokens per step, float32, same text as plain decoding, "
        r"cut after 20 tokens; -n 80 allows more",
        line,
    )
    assert outpace("run", "hello", "--max-tokens", "20", "--no-stream").stdout == result.stdout
    assert outpace("run", "hello", "--max-tokens", "20", "--method", "plain").stdout == result.stdout
    sampled = outpace("run", "hello", "--max-tokens", "20", "--temperature", "1", "--seed", "5")
    assert sampled.exit_code == 0 and sampled.stdout != result.stdout


def test_json_is_one_object(outpace: Callable[..., Result]) -> None:
    result = outpace("run", "hello", "--max-tokens", "20", "--json")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert {"text", "token_ids", "finish_reason", "method", "exactness", "stats"} <= record.keys()
    assert record["stats"].keys() >= STATS
    assert record["stats"]["tokens"] == len(record["token_ids"]) == 20
    assert record["stats"]["prompt_tokens"] == len("hello:")
    assert record["finish_reason"] == "length" and record["exactness"] == "identical"
    assert record["text"] + "\n" == outpace("run", "hello", "--max-tokens", "20").stdout


def test_piped_text(outpace: Callable[..., Result]) -> None:
    args = ("--max-tokens", "9", "--json")

    def answer(*args: str, input: str | None = None) -> list[int]:
        tokens: list[int] = json.loads(outpace("run", *args, input=input).stdout)["token_ids"]
        return tokens

    assert answer(*args, input="a b\nc\n") == answer("a b\nc", *args)
    assert answer("Explain", *args, input="a b\nc\n") == answer("Explain\n\na b\nc", *args)
    assert answer("a", "--raw", *args) != answer("a", *args)
    assert answer("a:", "--raw", *args) == answer("a", *args)


@pytest.mark.parametrize("args", [("run",), ("run", ""), ("run", "  \n")])
def test_an_empty_prompt_is_refused_with_advice(outpace: Callable[..., Result], args: tuple[str, ...]) -> None:
    result = outpace(*args, input="")
    assert result.exit_code == 2
    assert result.stderr.startswith("outpace: error: ") and "outpace run Why is" in result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--temperature", "-1"), "temperature=-1.0 is out of range"),
        (("--top-p", "0"), "top_p=0.0"),
        (("--seed", "-3"), "seed=-3"),
        (("--max-tokens", "0"), "--max-tokens"),
        (("--temperature", "hot"), "--temperature"),
        (("--threads", "0"), "--threads"),
        (("--precision", "int3"), "--precision"),
        (("--raw", "--system", "x"), "--system needs the chat template"),
        (("--json", "--show-draft"), "--json and --show-draft"),
        (("-m", "base", "--system", "x"), "no chat template"),
        (("--colour",), "--colour"),
    ],
)
def test_bad_values_exit_with_2(outpace: Callable[..., Result], args: tuple[str, ...], says: str) -> None:
    result = outpace("run", "hello", *args)
    assert result.exit_code == 2 and says in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--method", "sufix"), 2, "'sufix'; did you mean 'suffix'? "),
        (("--method", "draft"), 2, "needs a draft model"),
        (("--method", "suffix:dept=3"), 2, "no option 'dept'"),
        (("--verifier", "typicl"), 2, "'typicl'; did you mean 'typical'? "),
        (("--planner", "godput"), 2, "'godput'; did you mean 'goodput'? "),
        (("-m", "missing"), 3, "no model 'missing'"),
        (("--max-tokens", "100000"), 4, "the model's context is 4096"),
    ],
)
def test_refusals_are_one_line(outpace: Callable[..., Result], args: tuple[str, ...], code: int, says: str) -> None:
    result = outpace("run", "hello", *args)
    assert result.exit_code == code
    assert result.stderr.startswith("outpace: error: ") and says in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_bug_is_one_line_unless_debugging(outpace: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "step", lambda self: 1 / 0)
    result = outpace("run", "hello")
    assert result.exit_code == 70 and "ZeroDivisionError" in result.stderr and "OUTPACE_DEBUG=1" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("OUTPACE_DEBUG", "1")
    assert isinstance(outpace("run", "hello").exception, ZeroDivisionError)


def test_max_tokens_defaults_to_the_room_left(outpace: Callable[..., Result]) -> None:
    record = json.loads(outpace("run", "x" * 4000, "--json").stdout)
    assert record["stats"]["tokens"] == 4096 - 4001
    assert outpace("run", "x" * 5000).exit_code == 4


def test_stop_strings(outpace: Callable[..., Result]) -> None:
    whole = outpace("run", "hello", "--max-tokens", "40").stdout.rstrip("\n")
    stop = whole[17:19]
    record = json.loads(outpace("run", "hello", "--max-tokens", "40", "--stop", stop, "--json").stdout)
    assert record["text"] == whole[: whole.index(stop)] and record["finish_reason"] == "stop"


def test_against_plain(outpace: Callable[..., Result]) -> None:
    result = outpace("run", "hello", "--max-tokens", "30", "--against-plain")
    assert (
        "times as fast as plain decoding" in result.stderr
        and "the same tokens" in result.stderr
        and "plain ran second" in result.stderr
    )
    record = json.loads(outpace("run", "hello", "--max-tokens", "30", "--against-plain", "--json").stdout)
    against = record["against_plain"]
    assert against["identical"] and against["first_difference"] is None and against["complete"]
    assert against["speedup"] == pytest.approx(record["stats"]["tokens_per_s"] / against["tokens_per_s"], rel=0.01)


def test_show_draft_keeps_the_text(outpace: Callable[..., Result]) -> None:
    args = ("run", "abababab", "--max-tokens", "40", "--draft-model", "small", "--method", "draft")
    plain, shown = outpace(*args), outpace(*args, "--show-draft")
    assert shown.stdout == plain.stdout  # no colours where stdout is no terminal
    assert "■ target  ■ draft" in shown.stderr


def test_show_draft_colours_by_source_on_a_terminal(
    outpace: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("run", "abababab", "--max-tokens", "40", "--draft-model", "small", "--method", "draft", "--show-draft")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = outpace(*args)
    assert "\x1b[32m" in coloured.output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in outpace(*args).output


def test_a_model_without_a_chat_template_continues_the_text(outpace: Callable[..., Result]) -> None:
    result = outpace("run", "hello", "-m", "base", "--max-tokens", "5")
    assert result.exit_code == 0 and "no chat template" in result.stderr
    assert result.stdout == outpace("run", "hello", "--raw", "--max-tokens", "5").stdout


def test_interrupt_ends_with_what_there_is(outpace: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    assert threading.current_thread() is threading.main_thread()
    step, steps = Engine.step, []

    def interrupted(self: Engine) -> object:
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = outpace("run", "hello", "--max-tokens", "500")
    assert result.exit_code == 130
    assert 5 <= len(result.stdout) < 100 and result.stdout.endswith("\n")
    assert ", stopped\n" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before
    steps.clear()
    result = outpace("run", "hello", "--max-tokens", "500", "--json")
    assert result.exit_code == 130 and json.loads(result.stdout)["finish_reason"] == "cancelled"
