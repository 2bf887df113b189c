"""`outpace audit` on the real default model: what claims to be identical is, and the command says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from outpace.cli import main

# The model drafts for itself, so that the drafters with a draft model take part and long drafts are accepted.
# One thread: as exact as two, and it does not wait for a core that something else uses
ARGS = ("audit", "--precision", "int8", "--threads", "1", "--draft-model", "smollm2-135m", "--check", "tokens")
FEW = ("suffix+recycling", "draft-tree")


def run(path: Path, *args: str) -> dict:
    done = CliRunner().invoke(main, [*ARGS, "--temperature", "0", "--temperature", "0.8", "--json", str(path), *args])
    assert done.exit_code == 0, done.output
    assert "passed:" in done.output and "identical is promised" in done.output
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(
    scope="module",
    params=[
        ("few", "--n", "2", "-t", "12", "--batch", "2", *(x for m in FEW for x in ("--method", m))),
        pytest.param(("all", "--n", "4", "-t", "16", "--batch", "1", "--batch", "4"), marks=pytest.mark.slow),
    ],
    ids=lambda args: args[0],
)
def record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    _, *args = request.param
    for category in ("chat", "code", "code-edit", "reasoning")[:: 1 if "4" in args else 2]:
        args += ["--category", category]
    return run(tmp_path_factory.mktemp("audit") / "audit.json", *args)


def test_every_method_gives_the_tokens_of_plain_decoding(record: dict) -> None:
    (section,) = record["sections"]
    assert record["holds"] and section["holds"] and section["row_invariant"]
    seen = {(row["method"], row["batch"], row["temperature"]) for row in section["rows"]}
    every = ("plain", "ngram", "suffix", "recycling", "draft", "draft-tree", "suffix+recycling+draft")
    for method in record["config"]["methods"] or every:
        assert {(method, b, t) for b in record["config"]["batch_sizes"] for t in (0.0, 0.8)} <= seen
    prompts, most = len(record["config"]["prompts"]), record["config"]["max_tokens"]
    for row in section["rows"]:
        assert row["exactness"] == "identical" and row["differing"] == 0 and row["sequences"] == prompts, row
        assert prompts < row["tokens"] <= prompts * most and row["tokens_per_s"] > 0
    for covered in section["coverage"]:
        assert covered["tokens"] <= 2 * prompts * most and covered["wrong_token_in"] > 5


def test_something_was_accepted(record: dict) -> None:
    """Else the comparison would compare plain decoding with itself."""
    rows = record["sections"][0]["rows"]
    assert all(row["mean_accepted"] == 1 and not row["declined"] for row in rows if row["method"] == "plain")
    assert all(row["mean_accepted"] > 1.05 for row in rows if row["method"] in ("ngram", "suffix", "recycling"))
    assert all(row["mean_accepted"] > 2 and row["accepted"] for row in rows if "draft" in row["method"])
    assert any(row["declined"] for row in rows if "recycling" in row["method"])


def test_result_file_says_where_it_was_measured(record: dict) -> None:
    assert record["environment"].keys() >= {"cpu", "cores", "versions", "commit", "date"}
    assert record["config"]["seed"] == 0 and record["config"]["prompt_file"] == "own"


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
