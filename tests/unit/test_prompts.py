"""The prompt sets that ship with the package, and the reader of prompt files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from outpace.bench.workloads import CATEGORIES, Prompt, code_edits, load_prompts, own_prompts, select
from outpace.errors import ParameterError


def words(prompt: Prompt) -> int:
    return len(prompt.text.split())


def test_own_sets_are_complete() -> None:
    prompts = own_prompts()
    counts = Counter(p.category for p in prompts)
    assert set(counts) == set(CATEGORIES) and min(counts.values()) >= 8
    assert len({p.id for p in prompts}) == len({p.text for p in prompts}) == len(prompts)
    assert all(p.id.startswith(p.category) and all(t.strip() for t in p.turns) for p in prompts)


def test_own_sets_are_as_long_as_their_category_says() -> None:
    assert all(1000 <= words(p) <= 1500 for p in own_prompts(["long-context"]))
    assert all(300 <= words(p) <= 600 for p in own_prompts(["summarization"]))
    for prompt in own_prompts(["code-edit"]):
        code = prompt.text.split("```")[1]
        assert 25 <= len(code.strip().splitlines()) <= 60, prompt.id


def test_own_python_code_to_edit_is_valid() -> None:
    for prompt in own_prompts(["code-edit"]):
        language, code = prompt.text.split("```")[1].split("\n", 1)
        if language == "python":
            compile(code, prompt.id, "exec")


def write(path: Path, *items: object) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n\n", "utf-8")
    return path


def test_reads_all_three_formats(tmp_path: Path) -> None:
    own = {"id": "a-1", "category": "a", "turns": ["one", "two"]}
    bench = {"question_id": 81, "category": "writing", "turns": ["three"], "reference": ["x"]}
    human = {"task_id": "T/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "..."}
    got = load_prompts(write(tmp_path / "p.jsonl", own, bench, human))
    assert got == [
        Prompt("a-1", "a", ("one", "two")),
        Prompt("81", "writing", ("three",)),
        Prompt("T/0", "code", ("def f():\n",), "    return 1\n"),
    ]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ([1], "JSON object is needed, not list"),
        ({"id": "x"}, "unknown format"),
        ({"id": "x", "category": "a", "turns": []}, "turns must be"),
        ({"id": "x", "category": "a", "turns": ["  "]}, "turns must be"),
        ({"id": "x", "category": "", "turns": ["y"]}, "category must be"),
        ({"id": None, "category": "a", "turns": ["y"]}, "id must be"),
        ({"task_id": "x", "prompt": ""}, "prompt must be"),
        ({"task_id": "x", "prompt": "y", "canonical_solution": 3}, "canonical_solution must be"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, item: object, says: str) -> None:
    good = {"id": "ok", "category": "a", "turns": ["y"]}
    path = write(tmp_path / "p.jsonl", good, item)
    with pytest.raises(ParameterError, match=says) as caught:
        load_prompts(path)
    assert f"{path}, line 2" in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="cannot read prompt file"):
        load_prompts(tmp_path / "none.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"id": ', "utf-8")
    with pytest.raises(ParameterError, match="line 1: not JSON"):
        load_prompts(tmp_path / "broken.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n", "utf-8")
    with pytest.raises(ParameterError, match="is empty"):
        load_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ParameterError, match="not UTF-8"):
        load_prompts(tmp_path / "latin.jsonl")
    twice = write(tmp_path / "twice.jsonl", *[{"id": "x", "category": "a", "turns": ["y"]}] * 2)
    with pytest.raises(ParameterError, match="line 2: id 'x' was used in line 1"):
        load_prompts(twice)


def test_samples_are_stable_and_fair() -> None:
    prompts = own_prompts()
    chosen = select(prompts, total=12)
    assert chosen == select(prompts, total=12) != select(prompts, total=12, seed=1)
    assert max(Counter(p.category for p in chosen).values()) == 2
    assert [p.id for p in chosen] == [p.id for p in prompts if p in chosen]
    three = select(prompts, per_category=3)
    assert set(Counter(p.category for p in three).values()) == {3}
    # a category's sample does not depend on what else is in the file
    assert select(own_prompts(["chat"]), per_category=3) == [p for p in three if p.category == "chat"]
    assert select(prompts) == prompts
    assert {p.category for p in select(prompts, categories=["code", "chat"])} == {"code", "chat"}


def test_refuses_what_cannot_be_sampled() -> None:
    with pytest.raises(ParameterError, match="no prompt category poems; there are: chat"):
        own_prompts(["poems"])
    with pytest.raises(ParameterError, match="no prompt category poems"):
        select(own_prompts(), categories=["poems"])
    with pytest.raises(ParameterError, match="total=0"):
        select(own_prompts(), total=0)


def test_edits_hold_the_solved_function() -> None:
    solved = [Prompt(str(i), "code", (f"def f{i}(x):\n",), "    return x\n") for i in range(4)]
    edits = code_edits(solved)
    assert [e.category for e in edits] == ["code-edit"] * 4
    assert all(f"def f{i}(x):\n    return x\n```" in e.text for i, e in enumerate(edits))
    assert edits[0].text.split(".")[0] == edits[3].text.split(".")[0] != edits[1].text.split(".")[0]
    with pytest.raises(ParameterError, match="no canonical_solution"):
        code_edits([Prompt("x", "code", ("def f():",))])
