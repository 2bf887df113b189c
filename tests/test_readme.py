"""README.md says what is there: commands, snippet, generated tables, links, pins."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from hashing import toy_loaded
from packaging.requirements import Requirement

import outpace
from outpace.cli import COMMANDS, main

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


def test_options_of_every_outpace_line_exist() -> None:
    lines = [two_commands()[0].split("&& ")[1], *re.findall(r"^\$ (outpace .*)$", README, flags=re.M)]
    assert len(lines) >= 2
    for line in lines:
        _, name, *args = shlex.split(line)
        shown = CliRunner().invoke(main, [name, "--help"]).stdout
        assert all(arg.split("=")[0] in shown for arg in args if arg.startswith("-")), line


def test_commands_in_the_table_are_all_there_are() -> None:
    assert set(re.findall(r"^\| `outpace (\w+)", README, flags=re.M)) == set(COMMANDS)


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


def test_generated_parts_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    readme = importlib.import_module("readme")
    assert readme.fill(README) == README, "run  python benchmarks/readme.py"


def test_tables_show_what_the_result_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    common, readme = importlib.import_module("common"), importlib.import_module("readme")
    plain, fast = common.Tally(), common.Tally()
    for trial, (slow_s, fast_s) in enumerate([(10.0, 4.0), (8.0, 4.0), (9.0, 4.5)]):
        plain.add(trial, 100, slow_s, prompt_tokens=50, prefill_s=0.5, steps=100)
        fast.add(trial, 100, fast_s, prompt_tokens=50, prefill_s=0.5, steps=40)
    race = {
        name: {**t.to_json(), "speedup": common.ratios(t, plain), "differing_sequences": 0}
        for name, t in {"plain": plain, "a+b": fast}.items()
    }
    environment = {
        "cpu": "X", "cores": 2, "cpu_features": ["avx2"], "memory_gb": 8.0, "gpu": None, "versions": {"torch": "2"}
    }  # fmt: skip
    record = {
        "environment": environment,
        "config": {"model": "m", "precision": "int8", "threads": 2},
        "results": {
            "race": {"prompts": 3, "methods": race},
            "ceiling": {"fraction": 0.755, "weight_bytes": 1},
        },
    }
    (tmp_path / "decode-m.json").write_text(json.dumps(record))
    row = {"method": "ngram", "batch": 8, "temperature": 0.8, "exactness": "identical", "sequences": 7, "differing": 2}
    rows = [{**row, "reference": True}, {**row, "reference": False}]
    audit = {"environment": environment, "sections": [{"model": "m", "precision": "int8", "rows": rows}]}
    (tmp_path / "audit-m.json").write_text(json.dumps(audit))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = readme.fill(README)
    assert "- **2.00 times** the tokens a second of plain decoding (m, int8, 2 threads, `a+b`)" in text
    assert "- **2 of 7** sequences differ" in text
    shown = "| 11.1 (10.0-12.5) | 76 % | `a+b` | 25.0 (22.2-25.0) | 2.00 (2.00-2.50) |  | 0 of 3 |"
    assert f"| [m, int8](benchmarks/results/decode-m.json) {shown}" in text
    assert "| [m](benchmarks/results/audit-m.json) | int8 | ngram | 8 | 0.8 | 7 | 2 |" in text
    assert "Measured on: X, 2 cores (avx2), 8.0 GB; torch 2." in text


def test_figures_stand_in_generated_parts_only() -> None:
    """A measured figure outside them could not be checked against its result file."""
    outside = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", README, flags=re.S)
    assert not re.search(r"\d\s*(tokens/s|times|x plain|% of)", outside)


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_first_screen_is_about_the_thing() -> None:
    top = README.splitlines()[:40]
    assert top[0] == "# Outpace" and not any("badge" in line or "![" in line for line in top)


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
