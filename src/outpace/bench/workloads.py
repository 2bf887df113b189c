"""Prompt sets: the project's own (`bench/prompts/*.jsonl`) and files given by path. No torch.

Three line formats are read, recognised by their keys:
    own          {"id", "category", "turns": [...]}
    spec_bench   {"question_id", "category", "turns": [...]}
    humaneval    {"task_id", "prompt", "canonical_solution", ...}: one turn, category "code"
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ParameterError

CATEGORIES = (
    "chat",
    "code",
    "code-edit",
    "extraction",
    "long-context",
    "reasoning",
    "summarization",
    "writing",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A workload item. `solution` is the reference completion of a humaneval-style line, else None."""

    id: str
    category: str
    turns: tuple[str, ...]
    solution: str | None = None

    @property
    def text(self) -> str:
        """The first turn."""
        return self.turns[0]


def own_prompts(categories: Iterable[str] | None = None) -> list[Prompt]:
    """The project's own sets, all of them or the categories named. Raises ParameterError for an unknown one."""
    wanted = CATEGORIES if categories is None else tuple(categories)
    check_categories(wanted, CATEGORIES)
    folder = resources.files("outpace.bench") / "prompts"
    return [
        prompt
        for category in wanted
        for prompt in _parse((folder / f"{category}.jsonl").read_text("utf-8"), f"{category}.jsonl")
    ]


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read a .jsonl file in one of the formats above. Raises ParameterError naming the file and line."""
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise ParameterError(f"prompt file {path} is not UTF-8 text: {e.reason} at byte {e.start}") from None
    except OSError as e:
        raise ParameterError(f"cannot read prompt file {path}: {e.strerror}") from None
    prompts = _parse(text, str(path))
    if not prompts:
        raise ParameterError(f"prompt file {path} is empty: it needs one JSON object a line")
    return prompts


def check_categories(wanted: Iterable[str], known: Iterable[str]) -> None:
    """Raises ParameterError when a wanted category is not among the known ones."""
    known = sorted(set(known))
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ParameterError(f"no prompt category {', '.join(unknown)}; there are: {', '.join(known)}")


def select(
    prompts: Sequence[Prompt],
    *,
    categories: Iterable[str] | None = None,
    per_category: int | None = None,
    total: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """A deterministic sample, in the file's order.

    `per_category` prompts of each category, then `total` in all, dealt round over the categories so that every
    category is represented. The sample depends on the seed and on each category's own prompts only: other
    categories in the file do not change it. Raises ParameterError for an unknown category or a count below 1.
    """
    for name, count in (("per_category", per_category), ("total", total)):
        if count is not None and count < 1:
            raise ParameterError(f"{name}={count} is out of range: it must be at least 1")
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.category, []).append(i)
    if categories is not None:
        wanted = list(categories)
        check_categories(wanted, groups)
        groups = {c: groups[c] for c in groups if c in wanted}
    if per_category is not None or total is not None:
        for category, members in groups.items():
            random.Random(f"{seed}/{category}").shuffle(members)
    if per_category is not None:
        groups = {c: members[:per_category] for c, members in groups.items()}
    chosen = _deal(list(groups.values()), total)
    return [prompts[i] for i in sorted(chosen)]


def _deal(groups: list[list[int]], total: int | None) -> list[int]:
    """Take from the groups in turn until `total` are taken, or all."""
    size = sum(map(len, groups)) if total is None else total
    rounds = max(map(len, groups), default=0)
    dealt = [members[r] for r in range(rounds) for members in groups if r < len(members)]
    return dealt[:size]


def _parse(text: str, where: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        prompt = _parse_line(line, f"{where}, line {number}")
        if prompt.id in seen:
            raise ParameterError(f"{where}, line {number}: id {prompt.id!r} was used in line {seen[prompt.id]}")
        seen[prompt.id] = number
        prompts.append(prompt)
    return prompts


def _parse_line(line: str, where: str) -> Prompt:
    try:
        item: Any = json.loads(line)
    except json.JSONDecodeError as e:
        raise ParameterError(f"{where}: not JSON: {e.msg} at column {e.colno}") from None
    if not isinstance(item, dict):
        raise ParameterError(f"{where}: a JSON object is needed, not {type(item).__name__}")
    if "task_id" in item and "prompt" in item:
        return _humaneval(item, where)
    key = next((k for k in ("id", "question_id") if k in item), None)
    if key is None or "turns" not in item:
        raise ParameterError(
            f"{where}: unknown format, with the keys {', '.join(sorted(item)) or '(none)'}; a line has "
            "id (or question_id), category and turns, or task_id and prompt"
        )
    turns = item["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise ParameterError(f"{where}: turns must be a list of one or more non-empty strings")
    category = item.get("category")
    if not isinstance(category, str) or not category:
        raise ParameterError(f"{where}: category must be a non-empty string")
    if not isinstance(item[key], str | int):
        raise ParameterError(f"{where}: {key} must be a string or an integer")
    return Prompt(str(item[key]), category, tuple(turns))


def _humaneval(item: dict[str, Any], where: str) -> Prompt:
    prompt, solution = item["prompt"], item.get("canonical_solution")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ParameterError(f"{where}: prompt must be a non-empty string")
    if solution is not None and not isinstance(solution, str):
        raise ParameterError(f"{where}: canonical_solution must be a string")
    return Prompt(str(item["task_id"]), "code", (prompt,), solution)


def code_edits(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Turn solved functions (humaneval-style lines with a solution) into requests for a small edit.

    The three kinds of edit take turns, so that a set holds them in equal parts. Raises ParameterError for a prompt
    without a solution.
    """
    edits = (
        "Add a line to the docstring that says what the function returns.",
        "Rename the first parameter of the last function to `value`, everywhere it is used.",
        "Add a check at the start of the last function that raises TypeError when its first argument is None.",
    )
    made: list[Prompt] = []
    for i, prompt in enumerate(prompts):
        if prompt.solution is None:
            raise ParameterError(f"prompt {prompt.id} has no canonical_solution, so there is no code to edit")
        code = (prompt.text + prompt.solution).strip("\n")
        request = f"{edits[i % len(edits)]} Return the whole code and change nothing else.\n\n```python\n{code}\n```"
        made.append(Prompt(prompt.id, "code-edit", (request,)))
    return made
