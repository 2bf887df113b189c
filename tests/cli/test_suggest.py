"""`outpace suggest` over a toy model with real arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from toy import toy_checkpoint

from outpace.cli import main
from outpace.engine import llm as llm_module
from outpace.engine.load import LoadedModel
from outpace.models.tokenizer import Tokenizer
from outpace.models.torch_decoder import TorchDecoder

Run = Callable[..., Result]


@pytest.fixture
def suggest(monkeypatch: pytest.MonkeyPatch) -> Run:
    checkpoint, _ = toy_checkpoint("llama")
    loaded = LoadedModel(
        "toy", TorchDecoder.from_checkpoint(checkpoint, "float32", "cpu"), Tokenizer(checkpoint.tokenizer_files())
    )
    monkeypatch.setattr(llm_module, "load_model", lambda name, **how: loaded)

    def run(*args: str, input: str | None = None) -> Result:
        return CliRunner().invoke(main, ["suggest", *args], input=input)

    return run


def test_numbered_suggestions_and_a_line_of_figures(suggest: Run) -> None:
    result = suggest("-k", "4", "-n", "5", "the tide")
    assert result.exit_code == 0
    assert [line[:3] for line in result.stdout.splitlines() if line[:1].isdigit()] == [f"{i}  " for i in range(1, 5)]
    assert "4 suggestions" in result.stderr and "approximate (superposed, float32)" in result.stderr


def test_json_and_the_piped_prompt(suggest: Run) -> None:
    result = suggest("-k", "2", "-n", "6", "--json", input="the tide")
    record = json.loads(result.stdout)
    assert len(record["drafts"]) == 2 and record["prompt_tokens"] == len("the tide") and record["forwards"] <= 5
    assert record["exactness"] == "approximate" and record["method"] == "superposed"
    assert all({"text", "score", "mean_score", "finished"} <= draft.keys() for draft in record["drafts"])


def test_a_text_of_the_same_kind(suggest: Run, tmp_path: Path) -> None:
    text = tmp_path / "sea.txt"
    text.write_text("the tide went out. " * 9, "utf-8")
    result = suggest("-k", "2", "-n", "9", "--like", str(text), "--ngram-weight", "0.95", "the tide")
    assert result.stdout.startswith("1   went out")
    text.write_bytes(b"\xff\xfe\x00")
    result = suggest("--like", str(text), "the tide")
    assert result.exit_code == 2 and "not text in UTF-8" in result.stderr


@pytest.mark.parametrize("args", [("-k", "0"), ("-k", "99"), ("-n", "0"), ("--ngram-weight", "2")])
def test_mistakes_are_one_line(suggest: Run, args: tuple[str, ...]) -> None:
    result = suggest(*args, "the tide")
    assert result.exit_code == 2 and result.stderr.startswith("outpace: error: ") and "must be" in result.stderr
