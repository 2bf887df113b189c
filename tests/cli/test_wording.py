"""The closing line and --explain, in words that need no knowledge of the engine."""

from __future__ import annotations

import json
from collections.abc import Callable

import click.testing
import pytest

from outpace.cli.wording import closing_line, ending
from outpace.types import DecodingStats, Exactness, FinishReason, Result


def result(
    tokens: int = 128,
    steps: int = 53,
    first_s: float = 0.04,
    decode_s: float = 2.06,
    method: str = "suffix+recycling",
    exactness: Exactness = "identical",
    ended: FinishReason = "stop",
) -> Result:
    stats = DecodingStats(tokens=tokens, steps=steps, time_to_first_token_s=first_s, decode_s=decode_s)
    return Result("text", [0] * tokens, ended, method, exactness, stats, ["target"] * tokens)


def test_closing_line() -> None:
    line = "128 tokens in 2.1 s (62 tokens/s), 2.4 tokens per step, int8, same text as plain decoding"
    assert closing_line(result(), "int8") == line
    assert (
        closing_line(result(method="plain", steps=127), "int8")
        == "128 tokens in 2.1 s (62 tokens/s), int8, plain decoding"
    )
    slow = closing_line(result(first_s=8.0), "int8")
    assert slow.startswith("128 tokens in 10.1 s (first after 8.00 s, then 62 tokens/s), ")
    assert closing_line(result(), "int8", "1.9 times as fast as plain decoding").count("1.9 times") == 1
    assert closing_line(result(tokens=1, steps=0, decode_s=0.0), "int8").startswith(
        "1 token in 0.04 s (first after 0.04 s), int8, same"
    )
    assert (
        closing_line(result(tokens=0, steps=0, decode_s=0.0), "int8") == "0 tokens, int8, same text as plain decoding"
    )


@pytest.mark.parametrize(
    ("exactness", "says"),
    [("distribution", "equally likely"), ("approximate", "the text may differ from plain decoding's")],
)
def test_what_is_not_promised_is_not_said(exactness: Exactness, says: str) -> None:
    line = closing_line(result(exactness=exactness), "int8")
    assert says in line and "same text" not in line


def test_why_an_answer_is_not_whole() -> None:
    assert ending(result(), "x") == ""
    assert ending(result(ended="length"), "say: go on") == "cut after 128 tokens; say: go on"
    assert ending(result(tokens=1, ended="length"), "more") == "cut after 1 token; more"
    assert ending(result(ended="cancelled"), "x") == "stopped"


def test_explained_in_sentences(outpace: Callable[..., click.testing.Result]) -> None:
    done = outpace("run", "abababababab", "-n", "30", "--explain")
    lines = done.stderr.splitlines()[1:]
    odd = [line for line in lines if not line.endswith(".")]
    assert len(lines) > 5 and not odd
    text = " ".join(lines)
    assert "The prompt has 13 tokens" in text and "Plain decoding takes 29 steps, one for each token." in text
    assert "suffix (Suffix automaton" in text and "recycling (Token Recycling)" in text
    for word in ("mean_accepted", "rows", "planner", "drafter", "verif", "goodput"):
        assert word not in text.lower(), word
    record = json.loads(outpace("run", "abababababab", "-n", "30", "--explain", "--json").stdout)
    assert record["explanation"][0] == lines[0]
