"""`outpace audit` on the real default model: what claims to be identical is, and the command says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from outpace.cli import main


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("audit") / "audit.json"
    # The model drafts for itself, so that the drafters with a draft model take part and long drafts are accepted.
    # One thread: as exact as two, and it does not wait for a core that something else uses
    args = [
        "audit",
        "--precision",
        "int8",
        "--threads",
        "1",
        "--n",
        "4",
        "--max-tokens",
        "16",
        "--batch",
        "1",
        "--batch",
        "4",
        "--temperature",
        "0",
        "--temperature",
        "0.8",
        "--check",
        "tokens",
        "--json",
        str(path),
    ]
    args += ["--draft-model", "smollm2-135m"]
    for category in ("chat", "code", "code-edit", "reasoning"):
        args += ["--category", category]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    assert "passed:" in done.output and "identical is promised" in done.output
    return json.loads(path.read_text("utf-8"))


def test_every_method_gives_the_tokens_of_plain_decoding(record: dict) -> None:
    (section,) = record["sections"]
    assert record["holds"] and section["holds"] and section["row_invariant"]
    seen = {(row["method"], row["batch"], row["temperature"]) for row in section["rows"]}
    for method in ("plain", "ngram", "suffix", "recycling", "draft", "draft-tree", "suffix+recycling+draft"):
        assert {(method, b, t) for b in (1, 4) for t in (0.0, 0.8)} <= seen
    for row in section["rows"]:
        assert row["exactness"] == "identical" and row["differing"] == 0 and row["sequences"] == 4, row
        assert row["tokens"] > 4 and row["tokens_per_s"] > 0


def test_something_was_accepted(record: dict) -> None:
    """Else the comparison would compare plain decoding with itself."""
    rows = record["sections"][0]["rows"]
    assert all(row["mean_accepted"] == 1 for row in rows if row["method"] == "plain")
    assert all(row["mean_accepted"] > 1.05 for row in rows if row["method"] in ("ngram", "suffix", "recycling"))
    assert all(row["mean_accepted"] > 2 for row in rows if "draft" in row["method"])


def test_result_file_says_where_it_was_measured(record: dict) -> None:
    assert record["environment"].keys() >= {"cpu", "cores", "versions", "commit", "date"}
    assert record["config"]["max_tokens"] == 16 and len(record["config"]["prompts"]) == 4


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--method", "nothing"], "no decoding method 'nothing'"),
        (["--prompts", "missing.jsonl"], "cannot read prompt file"),
        (["--category", "poems"], "no prompt category poems"),
        (["--json", "no-such-folder/a.json"], "no folder"),
        (["--temperature", "-1"], "temperature=-1.0 is out of range"),
    ],
)
def test_mistakes_are_told_in_one_line(
    args: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["audit", *args])
    assert done.exit_code in (1, 2) and says in done.output and "Traceback" not in done.output
