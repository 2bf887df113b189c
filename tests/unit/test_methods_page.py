"""docs/methods.md shows what its table, the registry and the result files hold; the check notices when it does not."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from outpace.registry import methods as registered_methods

ROOT = Path(__file__).parent.parent.parent
FILE = "compare-smollm2-135m"


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("methods_page")


def check(maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `--check` ends with: "" if all is well."""
    monkeypatch.setattr(sys, "argv", ["methods_page.py", "--check"])
    try:
        maker.main()
    except SystemExit as end:
        return str(end)
    return ""


def own_results(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """A copy of the result files that the page is then made from."""
    shutil.copytree(ROOT / "benchmarks" / "results", folder)
    monkeypatch.setattr(sys.modules["tables"], "RESULTS", folder)
    return folder


def change(path: Path, **changes: Any) -> dict[str, Any]:
    record = json.loads(path.read_text("utf-8"))
    record |= changes
    path.write_text(json.dumps(record), "utf-8")
    return record


def faster(path: Path, method: str, times: float) -> dict[str, Any]:
    """Say of a method in a result file that it was so many times plain decoding."""
    record = json.loads(path.read_text("utf-8"))
    for row in record["results"]["runs"][0]:
        if row["method"] == method:
            row["x_plain"] = times
    return change(path, results=record["results"])


def table_rows(page: str) -> list[list[str]]:
    """Cells of the rows below the first section that has methods."""
    lines = page[page.index("## Draft and verify") :].splitlines()
    cells = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] not in ("method", "---")]


def test_page_is_up_to_date(maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(maker, monkeypatch) == ""


def test_check_notices_a_changed_row(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = maker.ROWS.read_text("utf-8")
    assert text.count("\tNear positions that are sure") == 1
    changed = tmp_path / "methods.tsv"
    changed.write_text(text.replace("\tNear positions that are sure", "\tBy positions that are sure"), "utf-8")
    monkeypatch.setattr(maker, "ROWS", changed)
    assert "out of date" in check(maker, monkeypatch)


@pytest.mark.parametrize("missing", [True, False])
def test_check_notices_a_changed_page(
    maker: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: bool
) -> None:
    if not missing:
        (tmp_path / "methods.md").write_text(maker.PAGE.read_text("utf-8") + "more\n", "utf-8")
    monkeypatch.setattr(maker, "PAGE", tmp_path / "methods.md")
    assert "out of date" in check(maker, monkeypatch)


def test_check_notices_a_changed_result(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = own_results(maker, monkeypatch, tmp_path / "results")
    assert check(maker, monkeypatch) == ""
    faster(results / f"{FILE}.json", "swift", 9.87)
    assert "out of date" in check(maker, monkeypatch)


def test_check_notices_a_method_without_a_row(
    maker: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = maker.ROWS.read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("SWIFT\t")]
    assert len(kept) == len(lines) - 1
    (tmp_path / "methods.tsv").write_text("".join(kept), "utf-8")
    monkeypatch.setattr(maker, "ROWS", tmp_path / "methods.tsv")
    assert "'swift' is in no row" in check(maker, monkeypatch)


def test_the_newest_result_counts(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = own_results(maker, monkeypatch, tmp_path / "results")
    key = ("swift", "smollm2-135m", "int8", "0")
    before = maker.figures()[key]
    old = results / f"{before.record['file']}.json"
    for name, date in (("compare-a", "2020-01-01 00:00 UTC"), ("compare-z", "2020-01-01 00:00 UTC")):
        shutil.copy(old, results / f"{name}.json")
        record = faster(results / f"{name}.json", "swift", 9.87)
        record = change(results / f"{name}.json", environment={**record["environment"], "date": date})
    assert maker.figures()[key].speedup == before.speedup != 9.87
    change(results / "compare-a.json", environment={**record["environment"], "date": "2999-01-01 00:00 UTC"})
    assert maker.figures()[key].speedup == 9.87
    assert maker.figures()[key].record["file"] == "compare-a"


def test_every_row_and_every_registered_method_is_shown_once(maker: ModuleType) -> None:
    rows, shown = maker.read_rows(maker.ROWS), table_rows(maker.PAGE.read_text("utf-8"))
    assert len(rows) == len(shown) >= 205
    linked = [re.sub(r"^\[(.*?)\]\(.*$", r"\1", cells[0]) for cells in shown]
    assert sorted(linked) == sorted(r.name for r in rows)
    assert all(len(cells) == 5 and all(cells) for cells in shown)
    here = " ".join(cells[3] for cells in shown)
    for m in registered_methods():
        assert f"{m.kind} `{m.name}` (" in here, m.name


def test_required_cells_are_filled_and_links_lead_somewhere(maker: ModuleType) -> None:
    rows = maker.read_rows(maker.ROWS)
    for r in rows:
        assert r.name and r.family and r.title and r.mechanism and r.status, r
        assert r.mechanism.endswith(".") and r.mechanism[0].isupper(), r.mechanism
    addresses = [r.paper for r in rows if r.paper and "arxiv" in r.paper]
    assert all(re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", a) for a in addresses)
    assert len(set(addresses)) == len(addresses), "two rows with one paper"
    for target in re.findall(r"\]\((\.\./[^)]+)\)", maker.PAGE.read_text("utf-8")):
        assert (maker.PAGE.parent / target).resolve().is_file(), target


def test_what_is_here_comes_first_in_each_family(maker: ModuleType) -> None:
    page = maker.PAGE.read_text("utf-8")
    order = list(maker.STATUSES)
    for family in {r.family for r in maker.read_rows(maker.ROWS)}:
        body = page.split(f"## {maker.FAMILIES[family]}\n")[1].split("\n## ")[0]
        places = [order.index(s) for s in re.findall(r"\| \*\*(.+?)\*\*", body) if s in order]
        assert places and places == sorted(places), family


def test_figures_are_those_of_the_result_file(maker: ModuleType) -> None:
    """Worked out here from the rows of one sequence at a time."""
    found = maker.figures()
    assert len(found) > 40
    for name, temperature in (("swift", 0.0), ("lookahead", 0.0), ("suffix+recycling/typical", 0.8)):
        figure = found[name, "smollm2-135m", "int8", f"{temperature:g}"]
        rows = [
            row
            for row in figure.record["results"]["runs"][0]
            if (row["method"], row["batch"], row["temperature"]) == (name, 1, temperature)
        ]
        assert len(rows) == 4
        assert figure.speedup == pytest.approx(math.prod(row["x_plain"] for row in rows) ** 0.25, rel=1e-3)
        assert figure.tokens_per_s == pytest.approx(4 / sum(1 / row["tokens_per_s"] for row in rows), rel=1e-3)
        assert figure.mean_accepted == pytest.approx(4 / sum(1 / row["tokens_per_step"] for row in rows), rel=1e-3)
        assert ("loses" in figure.words()) == (figure.speedup < 1)
        assert f"{figure.speedup:.2f} x" in figure.words()


def test_losing_and_differing_are_said(maker: ModuleType) -> None:
    figure = maker.Figure({}, "0", 0.5, 10.0, 1.2, 3, "hardly any draft is accepted")
    assert figure.words() == (
        "greedy **loses: 0.50 x** (10.0 tokens/s, 1.20 a step; hardly any draft is accepted), **3 differ**"
    )
    page = maker.PAGE.read_text("utf-8")
    (swift,) = (cells for cells in table_rows(page) if cells[0].startswith("[SWIFT]"))
    assert "loses" in swift[4] and "lossless, the same tokens" in swift[3]


def test_verifiers_stand_with_the_drafters_of_their_row(maker: ModuleType) -> None:
    by_name = {m.name: m for m in registered_methods()}
    rows = {r.name: r for r in maker.read_rows(maker.ROWS)}
    names = {"draft", "sjd", "draft/rejection", "sjd/rejection", "draft/block", "auto"}
    assert maker.contestants(rows["SJD"], by_name, names) == ["sjd", "sjd/rejection"]
    assert maker.contestants(rows["Speculative sampling"], by_name, names) == ["draft/rejection", "sjd/rejection"]
    assert maker.contestants(rows["Block verification"], by_name, names) == ["draft/block"]
    assert maker.contestants(rows["SmartSpec"], by_name, names) == ["auto"]
    assert maker.contestants(rows["TETRIS"], by_name, names) == []


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("SWIFT", {"methods": "swyft"}, "no registered method 'swyft'"),
        ("SWIFT", {"methods": ""}, "neither `methods` nor `where`"),
        ("SWIFT", {"claim": "1.3x"}, "the registry has a claim"),
        ("SWIFT", {"paper": "https://arxiv.org/abs/2000.00000"}, "its rows another"),
        ("SWIFT", {"status": "not yet"}, "`methods` or `where` names something"),
        ("SWIFT", {"status": "soon"}, "unknown status 'soon'"),
        ("SWIFT", {"family": "X"}, "unknown family 'X'"),
        ("SWIFT", {"mechanism": ""}, "no mechanism"),
        ("SWIFT", {"name": "S3D"}, "S3D: 2 rows"),
        ("SWIFT", {"year": "24"}, "no year"),
        ("SWIFT", {"paper": "arxiv.org"}, "no address"),
        ("Medusa", {"note": ""}, "no note says which part"),
        ("FastSwitch", {"where": "src/outpace/cache/nowhere.py"}, "no file src/outpace/cache/nowhere.py"),
        ("FastSwitch", {"where": ""}, "neither `methods` nor `where`"),
        ("LServe", {"status": "implemented"}, "neither `methods` nor `where`"),
    ],
)
def test_problems_are_found(maker: ModuleType, name: str, changes: dict[str, str], problem: str) -> None:
    rows, registered = maker.read_rows(maker.ROWS), registered_methods()
    assert maker.problems(rows, registered) == []
    changed = [replace(r, **changes) if r.name == name else r for r in rows]
    assert any(problem in found for found in maker.problems(changed, registered))


def test_a_method_in_no_row_is_a_problem(maker: ModuleType) -> None:
    rows, registered = maker.read_rows(maker.ROWS), registered_methods()
    new = replace(registered[0], name="brand-new")
    assert any("'brand-new' is in no row" in found for found in maker.problems(rows, [*registered, new]))


@pytest.mark.parametrize(("line", "what"), [("a\tb", "line 2: 2 cells"), ("\t" * 11, "line 2: 12 cells")])
def test_rows_of_another_shape_are_refused(maker: ModuleType, tmp_path: Path, line: str, what: str) -> None:
    head = maker.ROWS.read_text("utf-8").splitlines()[0]
    path = tmp_path / "methods.tsv"
    path.write_text(f"{head}\n{line}\n", "utf-8")
    with pytest.raises(ValueError, match=what):
        maker.read_rows(path)
    path.write_text("name\n", "utf-8")
    with pytest.raises(ValueError, match="the columns are"):
        maker.read_rows(path)
