"""`results.jsonl`: a line for each measurement, and lines that say what they are measurements of.

    {"kind": "comparison", ...}   the configuration, the machine, the versions: the first line
    {"kind": "model", ...}        a loaded model: its workloads, contestants, sizes and ceilings
    {"kind": "failure", ...}      a model or contestant that cannot take part at all
    {"kind": "measurement", ...}  one contestant on one unit in one round, or why it has no figure
    {"kind": "end", ...}          a model's rounds are over

The lines of a heat are written together. A file that ends within a line, or within a heat, is cut back to what is
whole before more is appended: a comparison that was killed goes on with the heat in which that happened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import ParameterError

NAME = "results.jsonl"
Line = dict[str, Any]


class Store:
    """The file of one comparison in the folder `out`, which is made if it is not there. `lines` holds what is in it."""

    def __init__(self, out: Path, header: Line) -> None:
        """`header["identity"]` identifies a comparison. Raises ParameterError when the folder holds the
        results of another one, or cannot be written."""
        self.path = out / NAME
        self.lines: list[Line] = []
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._read()
            if self.lines and self.lines[0].get("identity") != json.loads(json.dumps(header["identity"])):
                changed = differing(self.lines[0].get("identity"), header["identity"])
                raise ParameterError(
                    f"{out} holds another comparison (other: {changed}): name another --out, or remove that folder"
                )
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ParameterError(f"cannot write to {out}: {error.strerror}") from None
        if not self.lines:
            self.append([{"kind": "comparison", **header}])

    def _read(self) -> None:
        """Take what is whole and cut off the rest."""
        if not self.path.exists():
            return
        raw = self.path.read_bytes()
        self.lines, length = whole_lines(raw)
        if raw and not self.lines:
            first = raw.split(b"\n", 1)[0]
            if b"\n" in raw or not b'{"kind": "comparison"'.startswith(first[:21]):
                raise ParameterError(f"{self.path} is not a results file of a comparison: name another --out")
        if length < len(raw):
            os.truncate(self.path, length)

    def append(self, lines: Iterable[Line]) -> None:
        """All or, after a crash, a part that the next start cuts off."""
        new = list(lines)
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines += new

    def of(self, kind: str, model: str | None = None) -> list[Line]:
        return [x for x in self.lines if x["kind"] == kind and (model is None or x.get("model") == model)]

    def close(self) -> None:
        self._file.close()


def whole_lines(raw: bytes) -> tuple[list[Line], int]:
    """The lines before the first that is torn, without a heat that is not complete; and how many bytes they are."""
    lines: list[Line] = []
    kept = length = 0  # lines and bytes up to the last whole heat
    place = 0
    for text in raw.splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict) or "kind" not in line or (not lines and line["kind"] != "comparison"):
            break
        lines.append(line)
        place += len(text)
        if line["kind"] != "measurement" or line["place"] + 1 == line["heat_size"]:
            kept, length = len(lines), place
    return lines[:kept], length


def read(out: Path) -> list[Line]:
    """What a folder holds, unchanged. Raises ParameterError if it has no results."""
    try:
        lines, _ = whole_lines((out / NAME).read_bytes())
    except OSError as error:
        raise ParameterError(f"cannot read {out / NAME}: {error.strerror}") from None
    if not lines:
        raise ParameterError(f"{out / NAME} holds no results")
    return lines


def differing(a: Any, b: Any) -> str:
    """The names under which two comparisons differ."""
    if not isinstance(a, dict):
        return "not readable"
    b = json.loads(json.dumps(b))
    return ", ".join(sorted(k for k in {*a, *b} if a.get(k) != b.get(k))) or "nothing"
