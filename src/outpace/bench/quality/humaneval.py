"""HumanEval: functions that a model completes, run against their tests (Chen et al., arXiv 2107.03374). pass@1 from one
answer each. Nothing is run here but through the sandbox."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import ParameterError
from .lines import numbered_lines
from .sandbox import Limits, Verdict, run_program

_FENCE = re.compile(r"```(?:[Pp]ython\d?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_FIELDS = ("task_id", "prompt", "entry_point", "test")


@dataclass(frozen=True, slots=True)
class Task:
    """`prompt` is the head of a function, `test` defines check(candidate)."""

    id: str
    prompt: str
    entry_point: str
    test: str
    solution: str = ""

    @property
    def question(self) -> str:
        """As a chat asks it."""
        ask = "Complete this Python function. Answer with the whole function in one code block."
        return f"{ask}\n\n```python\n{self.prompt.rstrip()}\n```"


def load_tasks(path: Path) -> list[Task]:
    """Raises ParameterError naming the line of what is wrong."""
    tasks = []
    for number, line in numbered_lines(path):
        try:
            item = json.loads(line)
            values = [item[name] for name in _FIELDS]
        except (ValueError, KeyError, TypeError):
            raise ParameterError(f"{path}, line {number}: a line has {', '.join(_FIELDS)}") from None
        if not all(isinstance(value, str) for value in values) or not values[2].isidentifier():
            raise ParameterError(f"{path}, line {number}: {', '.join(_FIELDS)} must be text, entry_point a name")
        name, prompt, entry, test = values
        tasks.append(Task(name, prompt, entry, test, str(item.get("canonical_solution", ""))))
    if not tasks:
        raise ParameterError(f"{path} has no tasks")
    return tasks


def program(task: Task, answer: str, chat: bool) -> str:
    """The answer as a program that runs the task's tests.

    An answer to the question is looked through for a code block that defines the function; a continuation of the prompt
    (`chat` False) ends where the next statement at the margin begins.
    """
    if chat:
        blocks = [block for block in _FENCE.findall(answer) if f"def {task.entry_point}" in block]
        body = blocks[0] if blocks else answer if f"def {task.entry_point}" in answer else task.prompt + answer
    else:
        body = task.prompt + _first_block(answer)
    # what the prompt imports and defines stays, whether or not the answer repeats it
    head = task.prompt[: task.prompt.find(f"def {task.entry_point}")] if chat else ""
    return f"{head}\n{body}\n\n{task.test}\n\ncheck({task.entry_point})\n"


def _first_block(text: str) -> str:
    lines = text.split("\n")
    for i, line in enumerate(lines[1:], 1):
        if line and not line[0].isspace() and not line.startswith(("#", ")", "]", "}")):
            return "\n".join(lines[:i])
    return text


def grade(task: Task, answer: str, chat: bool, limits: Limits | None = None) -> Verdict:
    """Run one answer. Raises ParameterError where there is no sandbox."""
    return run_program(program(task, answer, chat), limits)
