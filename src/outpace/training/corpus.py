"""Texts that a model wrote itself, one JSON object a line: what heads are trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ParameterError

_MISSING = "is no corpus of `outpace distil`: each line is an object with"


@dataclass(frozen=True)
class Text:
    """An answer with the prompt it answers, in tokens of the model that wrote it."""

    ask: int  #: number of the prompt in its order, by which a run goes on
    source: str  #: kind of prompt, for reports by kind
    prompt_tokens: list[int]
    tokens: list[int]
    temperature: float


def read(path: Path) -> Iterator[Text]:
    """The texts of a file; a last line that a kill cut short is left out. Raises ParameterError for another file."""
    fields = set(Text.__dataclass_fields__)
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise ParameterError(f"{path}, line {number}: not JSON; delete the line") from None
        if not isinstance(found, dict) or set(found) != fields or not _plausible(found):
            raise ParameterError(f"{path}, line {number} {_MISSING} {', '.join(sorted(fields))}")
        yield Text(**found)


def _plausible(found: dict[str, Any]) -> bool:
    ids = (*found["prompt_tokens"], *found["tokens"])
    return all(type(i) is int and i >= 0 for i in ids) and type(found["ask"]) is int


def mend(path: Path) -> None:
    """Cut off a last line that was not written whole."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def line(text: Text) -> str:
    return json.dumps(asdict(text), ensure_ascii=False) + "\n"
