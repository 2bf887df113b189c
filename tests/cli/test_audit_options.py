"""What `outpace audit` does beside comparing tokens: files, references, quality, and faults that end in exit code 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from outpace.cli import audit_more

QUICK = ("audit", "--n", "3", "--max-tokens", "8", "--batch", "1", "--batch", "3", "--prompts")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{i}", "category": "chat", "turns": [f"{i}abcabcab"]} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_sound_engine_passes_with_its_evidence(outpace: Callable[..., Result], prompts: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    args = ("--method", "recycling", "--check", "ragged", "--check", "owners", "--check", "seeds", "--json", str(path))
    done = outpace(*QUICK, prompts, *args)
    assert done.exit_code == 0, done.output
    assert "passed:" in done.output and "checks hold" in done.output and "mixed" in done.output
    (section,) = json.loads(path.read_text())["sections"]
    assert {c["kind"] for c in section["checks"]} == {"ragged", "streams", "owners", "seeds"}
    assert {row["sampler"] for row in section["rows"]} == {"greedy", "temperature 0.8", "mixed"}


def test_references_are_kept_and_compared(outpace: Callable[..., Result], prompts: str, tmp_path: Path) -> None:
    path = tmp_path / "ref.jsonl"
    args = (*QUICK, prompts, "--method", "ngram", "--check", "tokens", "--precision", "auto")
    assert outpace(*args, "--save-reference", str(path)).exit_code == 0
    done = outpace(*args, "--reference", str(path))
    assert done.exit_code == 0 and "0 of 9 outputs differ" in done.output
    other = outpace(*args, "--reference", str(path), "--seed", "5")
    assert other.exit_code == 2 and "seed" in other.output
    path.write_bytes(path.read_bytes()[:-30])
    cut = outpace(*args, "--reference", str(path))
    assert cut.exit_code == 2 and "cut short" in cut.output
    alone = outpace("audit", "--check-file", str(path))
    assert alone.exit_code == 1 and "cut short" in alone.output


def test_quality_of_approximate_verifiers(
    outpace: Callable[..., Result], prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_more, "TEXT_CHARACTERS", 3000)
    questions, report = tmp_path / "gsm8k.jsonl", tmp_path / "q.json"
    questions.write_text(
        "".join(json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(4))
    )
    args = ("--method", "suffix", "--check", "tokens", "--temperature", "0", "--perplexity", "--gsm8k", str(questions))
    done = outpace(*QUICK, prompts, *args, "--quality-verifier", "topk", "--json", str(report))
    assert done.exit_code == 0, done.output
    assert "perplexity of a fixed text" in done.output
    assert "answers were cut at --max-tokens" in " ".join(done.output.split())
    quality = json.loads(report.read_text())["quality"]
    ways = [(s["suite"], s["verifier"], s["exactness"]) for s in quality["scores"]]
    assert ways == [
        ("gsm8k", "auto", "identical"),
        ("gsm8k", "topk", "approximate"),
        ("own prompts", "auto", "identical"),
        ("own prompts", "topk", "approximate"),
    ]
    args = ("--method", "suffix", "--quality-only", "--perplexity", "--quality-verifier", "topk", "--json", str(report))
    alone = outpace(*QUICK, prompts, *args)
    assert alone.exit_code == 0 and "sequences that were promised" not in alone.output
    record = json.loads(report.read_text())
    assert record["sections"] == [] and record["quality"]["scores"] == quality["scores"][2:]


@pytest.mark.parametrize(
    "args, says",
    [
        (("--humaneval", "x.jsonl"), "--run-code"),
        (("--url", "http://localhost:1/v1"), "go together"),
        (("--requests", "x"), "--check-file"),
        (("--check-file", "no-such-file"), "cannot read"),
        (("--sampler", "warm"), "no sampler setting 'warm'"),
        (("--perplexity", "--quality-verifier", "rejection"), "loses nothing"),
        (("--quality-only",), "--gsm8k, --humaneval or --perplexity"),
        (("--quality-only", "--perplexity", "--check", "owners"), "leave one of them out"),
        (("--quality-only", "--perplexity", "--sampler", "mixed"), "leaves out what --sampler is for"),
        (("--reference", "x", "--precision", "int8", "--precision", "int4"), "one precision"),
    ],
)
def test_mistakes_in_one_line(
    outpace: Callable[..., Result], args: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = outpace("audit", *args)
    assert done.exit_code in (1, 2) and says in done.output and "Traceback" not in done.output
