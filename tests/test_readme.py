"""README.md says what is there: commands, snippet, generated tables, pins. Its links and options: test_docs.py."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hashing import toy_loaded
from packaging.requirements import Requirement

import outpace
from outpace.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def two_commands() -> tuple[str, str]:
    run, test = (block.strip() for block in blocks("sh"))
    return run, test


def test_the_two_commands_are_one_line_each() -> None:
    run, test = two_commands()
    assert run.startswith("python -m pip install -c constraints.txt . && outpace run ")
    assert test == 'python -m pip install -c constraints.txt -e ".[dev]" && python -m pytest'


def test_commands_in_the_table_are_all_there_are() -> None:
    assert set(re.findall(r"^\| `outpace ([\w-]+)", README, flags=re.M)) == set(COMMANDS)


def test_snippet_is_six_lines_of_names_that_exist() -> None:
    (snippet,) = blocks("python")
    tree = ast.parse(snippet)
    assert len([line for line in snippet.splitlines() if line.strip()]) == 6
    imported = [a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names]
    assert set(imported) <= set(outpace.__all__)


def test_snippet_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the toy model: the real one is run by the tests of the commands."""
    from outpace.engine import llm, load

    monkeypatch.setattr(llm, "load_model", lambda name, **how: toy_loaded(name))
    monkeypatch.setattr(load, "load_model", lambda name, **how: toy_loaded(name))
    (snippet,) = blocks("python")
    exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    method, exactness, accepted = printed[-1].split()
    assert method == "suffix+recycling" and exactness == "identical" and float(accepted) >= 1


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("readme")


def test_generated_parts_are_up_to_date(maker: ModuleType) -> None:
    for page in maker.PAGES:
        text = (ROOT / page).read_text("utf-8")
        assert maker.fill(page, text) == text, f"{page}: run  python benchmarks/readme.py"


ENVIRONMENT = {
    "cpu": "X", "cores": 2, "cpu_features": ["avx2"], "memory_gb": 8.0, "gpu": None, "versions": {"torch": "2"}
}  # fmt: skip


def test_tables_show_what_the_result_files_hold(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = importlib.import_module("common")
    plain, fast = common.Tally(), common.Tally()
    for trial, (slow_s, fast_s) in enumerate([(10.0, 4.0), (8.0, 4.0), (9.0, 4.5)]):
        plain.add(trial, 100, slow_s, prompt_tokens=50, prefill_s=0.5, steps=100)
        fast.add(trial, 100, fast_s, prompt_tokens=50, prefill_s=0.5, steps=40)
    race = {
        name: {**t.to_json(), "speedup": common.ratios(t, plain), "differing_sequences": 0}
        for name, t in {"plain": plain, "a+b": fast}.items()
    }
    record = {
        "environment": ENVIRONMENT,
        "config": {"model": "m", "precision": "int8", "threads": 2},
        "results": {
            "race": {"prompts": 3, "methods": race},
            "ceiling": {"fraction": 0.755, "weight_bytes": 1},
        },
    }
    (tmp_path / "decode-m.json").write_text(json.dumps(record))
    row = {"method": "ngram", "batch": 8, "temperature": 0.8, "exactness": "identical", "sequences": 7, "differing": 2}
    rows = [{**row, "reference": True}, {**row, "reference": False}]
    audit = {"environment": ENVIRONMENT, "sections": [{"model": "m", "precision": "int8", "rows": rows}]}
    (tmp_path / "audit-m.json").write_text(json.dumps(audit))
    monkeypatch.setattr(sys.modules["tables"], "RESULTS", tmp_path)
    text = maker.fill("docs/results.md", (ROOT / "docs" / "results.md").read_text("utf-8"))
    shown = "| 11.1 (10.0-12.5) | 76 % | `a+b` | 25.0 (22.2-25.0) | 2.00 (2.00-2.50) |  | 0 of 3 |"
    assert f"| [m, int8](../benchmarks/results/decode-m.json) {shown}" in text
    assert "| [m](../benchmarks/results/audit-m.json) | int8 | ngram | 8 | 0.8 | 7 | 2 |" in text
    assert "Measured on: X, 2 cores (avx2), 8.0 GB; torch 2." in text


def engine_row(kind: str, method: str, speed: float | None, x: float | None) -> dict[str, Any]:
    return {
        "model": "qwen2.5-coder-1.5b", "workload": kind, "batch": 1, "temperature": 0.0, "method": method,
        "tokens_per_s": speed, "x_plain": x, "declared": "identical" if method in ("auto", "plain") else None,
        "compared": 5, "differing": 0 if method != "llama.cpp" else 5, "tokens_per_step": 1.0, "draft_share": 0.0,
        "state": "ok" if speed else "failed", "reason": None if speed else "RuntimeError: no file",
        "x_plain_full": None,
    }  # fmt: skip


def test_the_first_table_says_where_another_engine_is_faster(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [engine_row(kind, method, speed, x) for kind, method, speed, x in (
        ("code", "plain", 20.0, None), ("code", "auto", 40.0, 2.0), ("code", "llama.cpp", 30.0, 1.6),
        ("prose", "plain", 20.0, None), ("prose", "auto", 24.0, 1.2), ("prose", "llama.cpp", 30.0, 1.5),
        ("prose", "openvino:draft", None, None),
    )]  # fmt: skip
    model = {"precision": "int8", "threads": 2, "draft_model": "small", "device": "cpu", "skipped": []}
    results = {"runs": [rows], "peers": {"llama.cpp": {}, "openvino:draft": {}}, "models": {maker.MODEL: model}}
    record = {"environment": ENVIRONMENT, "config": {"max_tokens": 48}, "results": results}
    (tmp_path / "compare-x.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys.modules["tables"], "RESULTS", tmp_path)
    text = maker.fill("README.md", README)
    assert "[code, 48 tokens](benchmarks/results/compare-x.json) | [prose, 48 tokens]" in text
    assert "| **Outpace**, `auto` | **40.0** | 24.0 |" in text and "| llama.cpp | 30.0 | **30.0** |" in text
    assert "Against llama.cpp: **0.80 to 1.25 times** its tokens per second for one answer at a time" in text
    assert "faster in 1 of 2 comparisons" in text
    assert "One answer of prose (48 tokens): `auto` is 1.20 times our plain decoding, llama.cpp 1.50 times" in text
    assert "**0 of 20** answers of lossless methods differ" in text
    assert "RuntimeError" not in text and "OpenVINO" not in text.split("<!-- engines -->")[1].split("<!--")[0]


def test_no_error_text_is_in_a_table() -> None:
    for page in ("README.md", "docs/results.md"):
        tables = [line for line in (ROOT / page).read_text("utf-8").splitlines() if line.startswith("|")]
        assert tables and not [line for line in tables if re.search(r"Error|Traceback|does not start", line)]


def test_figures_stand_in_generated_parts_only() -> None:
    """A measured figure outside them could not be checked against its result file."""
    outside = re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", "", README, flags=re.S)
    assert not re.search(r"\d\s*(tokens/s|times|x plain|% of)", outside)


def test_first_screen_is_about_the_thing() -> None:
    lines = README.splitlines()
    top = lines[:40]
    assert len(lines) < 150 and top[0] == "# Outpace" and not any("badge" in line for line in top)
    (picture,) = re.findall(r"^!\[[^]]+\]\(([^)]+)\)$", "\n".join(top), re.M)
    drawn = (ROOT / picture).read_text("utf-8")
    assert "outpace&#160;run&#160;" in drawn and "plain&#160;decoding" in drawn, "a recorded run: see tools/record.py"
    assert README.index("python -m pip") < README.index("<!-- engines -->") < README.index("### When it does not help")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in found.items()}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_that_is_installed_is_pinned() -> None:
    """The whole tree of requirements, development tools included, as the installed packages declare it."""
    pinned, seen, open_ = pins(), set(), [("outpace", frozenset({"", "dev"}))]
    while open_:
        name, extras = open_.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras | {""}):
                key = canonical(need.name)
                assert key in pinned, f"{key}, needed by {name}, is not in constraints.txt"
                assert need.specifier.contains(pinned[key]), f"{key}=={pinned[key]} is not what {name} needs: {need}"
                open_.append((key, frozenset(need.extras)))
    assert pinned["torch"] == "2.13.0"


@pytest.mark.skipif(sys.platform == "win32", reason="platform: a bash script")
def test_ci_runs_the_test_command_as_printed() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    pattern = re.search(r"grep -m1 -E '([^']+)' README.md", script)
    assert pattern is not None and "set -euo pipefail" in script
    matching = [line for line in README.splitlines() if re.search(pattern[1], line)]
    assert matching == [two_commands()[1]]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
