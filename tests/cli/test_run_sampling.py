"""Options of `outpace run` and `outpace chat` that shape the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("command", ["run", "chat"])
def test_answers_keep_to_what_is_asked(outpace: Callable[..., Result], tmp_path: Path, command: str) -> None:
    def answer(*args: str) -> str:
        if command == "chat":
            return outpace("chat", "--method", "ngram", *args, input="hi\n").stdout.strip()
        return outpace("run", "hi", "--method", "ngram", *args).stdout.strip()

    schema, grammar = tmp_path / "schema.json", tmp_path / "answer.gbnf"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('root ::= "red" | "green"')
    assert json.loads(answer("--json-schema", str(schema))).keys() == {"on"}
    assert answer("--json-schema", json.dumps(SCHEMA)) == answer("--json-schema", str(schema))
    assert answer("--grammar", str(grammar)) in ("red", "green")
    assert answer("--regex", "(ab){3}") == "ababab"


def test_penalties_and_bias_reach_the_sampler(outpace: Callable[..., Result]) -> None:
    def tokens(*args: str) -> list[int]:
        found: list[int] = json.loads(
            outpace("run", "hi", "--method", "ngram", "--json", "--max-tokens", "12", *args).stdout
        )["token_ids"]
        return found

    assert set(tokens("--logit-bias", "33=100")) == {33}
    assert 33 in tokens("--logit-bias", "33=100", "--logit-bias", "34=99", "--presence-penalty", "2")
    assert set(tokens("--logit-bias", "33=100", "--logit-bias", "34=99.5", "--presence-penalty", "2")) == {33, 34}
    assert len(set(tokens("--repetition-penalty", "50"))) == 12 > len(set(tokens("--frequency-penalty", "-2")))
    assert len(set(tokens("--frequency-penalty", "2"))) > 8


def test_logprobs_are_in_the_object(outpace: Callable[..., Result]) -> None:
    record = json.loads(
        outpace("run", "hi", "--method", "ngram", "--json", "--max-tokens", "5", "--logprobs", "2").stdout
    )
    assert len(record["logprobs"]) == len(record["top_logprobs"]) == 5
    for token, p, top in zip(record["token_ids"], record["logprobs"], record["top_logprobs"], strict=True):
        assert len(top) == 2 and top[0][0] == token and top[0][1] == pytest.approx(p) and p <= 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--json-schema", "nowhere.json"), "nowhere.json' cannot be read"),
        (("--json-schema", '{"type": '), "no JSON"),
        (("--json-schema", '{"type": "thing"}'), "unknown type 'thing'"),
        (("--grammar", "nowhere.lark"), "nowhere.lark' cannot be read"),
        (("--regex", "("), "unclosed group"),
        (("--regex", "a", "--json-schema", "{}"), "cannot go together"),
        (("--logit-bias", "a=b"), "as in 198=-5"),
        (("--logit-bias", "1=1000"), "from -100 to 100"),
        (("--logit-bias", "5000=1"), "which the model does not have"),
        (("--repetition-penalty", "0"), "repetition_penalty=0.0"),
        (("--presence-penalty", "3"), "presence_penalty=3.0"),
        (("--logprobs", "3"), "add it, or drop"),
        (("--json", "--logprobs", "30"), "logprobs=30"),
        (("--verifier", "typical:epsilon=2"), "typical:epsilon=2.0"),
    ],
)
def test_mistakes_are_refused(outpace: Callable[..., Result], args: tuple[str, ...], says: str) -> None:
    result = outpace("run", "hi", "--method", "ngram", *args)
    assert result.exit_code == 2 and result.stderr.startswith("outpace: error: ") and says in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_verifier_is_refused(outpace: Callable[..., Result]) -> None:
    result = outpace("run", "hi", "--verifier", "nobody")
    assert result.exit_code == 2 and "no verifier 'nobody'" in result.stderr and "typical" in result.stderr
