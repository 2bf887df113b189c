"""GSM8K: word problems whose answer is a number, exact match (Cobbe et al., arXiv 2110.14168)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from ...errors import ParameterError
from .lines import numbered_lines

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_SAID = re.compile(r"(?:####|\\boxed\{|answer is:?|answer:)\s*\**\s*(-?\$?[\d,]*\.?\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Problem:
    id: str
    text: str
    answer: Decimal

    @property
    def question(self) -> str:
        return f"{self.text}\n\nThink step by step, then write the result as a number behind '####'."


def load_problems(path: Path) -> list[Problem]:
    """Lines with "question" and "answer", the number behind ####. Raises ParameterError naming what is wrong."""
    problems = []
    for number, line in numbered_lines(path):
        try:
            item = json.loads(line)
            text, answer = item["question"], _decimal(item["answer"].rpartition("####")[2])
        except (ValueError, KeyError, TypeError, AttributeError):
            text, answer = None, None
        if not isinstance(text, str) or answer is None:
            raise ParameterError(
                f"{path}, line {number}: a line has question and answer, with '#### number' at its end"
            )
        problems.append(Problem(f"gsm8k/{number}", text, answer))
    if not problems:
        raise ParameterError(f"{path} has no problems")
    return problems


def number_in(text: str) -> Decimal | None:
    """The number that an answer ends with: behind a word that announces it (the last such), else the last of all."""
    said = _SAID.findall(text)
    found = said or _NUMBER.findall(text)
    return _decimal(found[-1]) if found else None


def right(problem: Problem, text: str) -> bool:
    return number_in(text) == problem.answer


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.strip().rstrip(".").replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None
