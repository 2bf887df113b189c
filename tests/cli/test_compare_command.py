"""`outpace compare` from end to end on a model without weights: files, tables, exit codes, going on."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import Result

from outpace.bench.compare import ceilings
from outpace.bench.compare.store import read
from outpace.cli.compare import Budget
from outpace.decoding.verify import coupled
from outpace.types import Accepted

Run = Callable[..., Result]
ADDRESSES = ("href", "src", "action", "data", "xlink:href")
ARGS = ("compare", "--batch", "1", "--batch", "2", "-n", "6", "--rounds", "2", "--prompts", "2", "--budget", "2m")


class Page(HTMLParser):
    """Tags must close in their order; every address that a browser would follow is noted."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("href", "src", "action", "data", "xlink:href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda *a, **k: [1e10])


def test_a_comparison_writes_its_measurements_a_table_and_a_page(outpace: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = {"bad.jsonl": "{", "empty.jsonl": "", "mine.txt": "One line.\nAnother <b>line</b>.\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    names = ["writing", *(str(tmp_path / name) for name in files), str(tmp_path / "gone.jsonl")]
    args = [part for name in names for part in ("--workload", name)]
    methods = ("ngram", "suffix+recycling", "suffix/rejection")
    done = outpace(*ARGS, *args, *(p for m in methods for p in ("--method", m)), "--out", str(out))
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert "times plain decoding" in text and "promised to be identical to plain decoding's are" in text
    for name, why in (("bad.jsonl", "not JSON"), ("empty.jsonl", "is empty"), ("gone.jsonl", "cannot read")):
        assert f"{name}: " in text and why in text

    lines = read(out)
    assert [line["kind"] for line in lines[:1]] == ["comparison"] and lines[-1]["kind"] == "end"
    made = [line for line in lines if line["kind"] == "measurement"]
    for method in ("plain", *methods):
        for workload in ("writing", "mine"):
            for batch in (1, 2):
                own = [x for x in made if (x["method"], x["workload"], x["batch"]) == (method, workload, batch)]
                assert [x["round"] for x in own] == [0, 1] and all(x["tokens"] == 6 * batch for x in own)
    assert {x["exactness"] for x in made if x["method"] == "suffix/rejection"} == {"distribution"}

    page = (out / "report.html").read_text("utf-8")
    parsed = Page(page)
    assert set(parsed.addresses) <= {"#lost"} and "http" not in page and "@import" not in page and "url(" not in page
    assert "script" not in parsed.tags and "svg" in parsed.tags
    said = " ".join(parsed.words)
    assert all(name in said for name in ("plain", *methods, "writing", "mine", "How it was measured", "empty.jsonl"))
    assert str(tmp_path) not in page and "{{" not in page


def test_a_finished_comparison_is_not_measured_again(outpace: Run, tmp_path: Path) -> None:
    args = (*ARGS, "--method", "ngram", "--workload", "code", "--out", str(tmp_path))
    assert outpace(*args).exit_code == 0
    results = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "report.html").unlink()
    assert outpace(*args).exit_code == 0
    assert (tmp_path / "results.jsonl").read_bytes() == results and (tmp_path / "report.html").exists()
    other = outpace(*ARGS, "--method", "suffix", "--workload", "code", "--out", str(tmp_path))
    assert other.exit_code == 2 and "another comparison" in other.output and "methods" in other.output
    assert outpace(*args, "--fresh").exit_code == 0
    assert (tmp_path / "results.jsonl").read_bytes() != results


def test_a_broken_promise_is_flagged_and_gives_exit_code_1(
    outpace: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verifier that now and then accepts what the target would not have said."""
    right = coupled.CoupledVerifier.verify

    def verify(self, sequence, draft, outputs):  # type: ignore[no-untyped-def]
        accepted = right(self, sequence, draft, outputs)
        if len(draft) and len(sequence.output) == 3:
            return Accepted([], [(accepted.tokens[0] + 1) % 90])
        return accepted

    monkeypatch.setattr(coupled.CoupledVerifier, "verify", verify)
    done = outpace(*ARGS, "--method", "recycling", "--workload", "code-edit", "--out", str(tmp_path))
    assert done.exit_code == 1, done.output
    assert "NOT IDENTICAL" in done.stdout
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "NOT IDENTICAL" in page and "DIFFER" in page
    Page(page)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--budget", "soon"], 2, "'soon' is no time; write 90s, 10m or 1.5h"),
        (["--budget", "0s"], 2, "no time"),
        (["--method", "nothing"], 2, "no decoding method 'nothing'"),
        (["--method", "suffix/nothing"], 2, "no verifier 'nothing'"),
        (["--method", "draft"], 2, "needs a draft model"),
        (["--peer", "nothing"], 2, "no peer 'nothing'"),
        (["--temperature", "-1"], 2, "temperature=-1.0 is out of range"),
        (["-m", "missing"], 3, "no model 'missing'"),
    ],
)
def test_mistakes_are_told_in_one_line(outpace: Run, tmp_path: Path, args: list[str], code: int, says: str) -> None:
    done = outpace("compare", *args, "--out", str(tmp_path))
    assert done.exit_code == code and says in done.output and "Traceback" not in done.output


def test_a_model_that_is_missing_does_not_stop_the_other(outpace: Run, tmp_path: Path) -> None:
    done = outpace(
        *ARGS, "-m", "missing", "-m", "toy", "--method", "ngram", "--workload", "code", "--out", str(tmp_path)
    )
    assert done.exit_code == 0 and "no model 'missing'" in " ".join(done.output.split())
    assert {x["model"] for x in read(tmp_path) if x["kind"] == "measurement"} == {"toy"}


def test_nothing_measured_is_an_error(outpace: Run, tmp_path: Path) -> None:
    done = outpace(*ARGS, "--method", "ngram", "--workload", "poems", "--out", str(tmp_path))
    assert done.exit_code == 1 and "nothing could be measured" in done.output and "no workload 'poems'" in done.output
    Page((tmp_path / "report.html").read_text("utf-8"))


def test_the_peers_of_a_server_that_is_not_there_fail_and_the_rest_goes_on(outpace: Run, tmp_path: Path) -> None:
    done = outpace(
        *ARGS, "--method", "ngram", "--workload", "code", "--peer", "http://127.0.0.1:9", "--out", str(tmp_path)
    )
    assert done.exit_code == 0, done.output
    failures = [line for line in read(tmp_path) if line["kind"] == "failure"]
    assert [line["method"] for line in failures] == ["http://127.0.0.1:9"]
    assert "failed" in done.stdout and json.dumps(failures[0]["reason"])


def test_times_are_read() -> None:
    for text, seconds in (("90s", 90), ("10m", 600), ("1.5h", 5400), ("30", 30)):
        assert Budget().convert(text, None, None) == seconds
