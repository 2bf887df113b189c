"""`outpace methods`."""

from __future__ import annotations

import json

from click.testing import CliRunner

from outpace.cli import main
from outpace.registry import methods


def test_json_is_the_registry() -> None:
    result = CliRunner().invoke(main, ["methods", "--json"])
    assert result.exit_code == 0
    records = json.loads(result.stdout)
    assert [(r["kind"], r["name"]) for r in records] == [(m.kind, m.name) for m in methods()]
    for record in records:
        assert {"name", "family", "title", "paper", "exactness", "needs"} <= record.keys()
        assert record["exactness"] in ("identical", "distribution", "approximate")
        assert isinstance(record["needs"], list)
    by_name = {r["name"]: r for r in records}
    assert by_name["plain"]["exactness"] == "identical" and by_name["plain"]["lossless"]
    assert by_name["draft"]["needs"] == ["draft model"]


def test_table_has_a_line_for_each() -> None:
    result = CliRunner().invoke(main, ["methods"])
    assert result.exit_code == 0
    for m in methods():
        line = next(line for line in result.stdout.splitlines() if line.startswith(m.name + " "))
        assert m.exactness in line and m.title in line


def test_one_method_with_its_options() -> None:
    result = CliRunner().invoke(main, ["methods", "draft"])
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["output"].startswith("identical") and lines["needs"] == "draft model"
    assert "max_tokens=" in lines["options"] and lines["paper"].startswith("https://")
    for m in methods():
        assert m.title in CliRunner().invoke(main, ["methods", m.name]).stdout
    assert len(json.loads(CliRunner().invoke(main, ["methods", "ngram", "--json"]).stdout)) == 1
