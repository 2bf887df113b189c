"""JSON from outside: how much is in it is counted before anything is made of it, without holding the interpreter."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ParameterError

_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_OPEN, _CLOSE = 0x7B, 0x7D  # braces; brackets differ from them in one bit
_CASE = 0x20
_BACKSLASHES = re.compile(rb"\\*")
_SLICE = 1 << 18  # bytes that are looked at at once: what is made of them stays in the processor's cache
SMALL = 1 << 13  # bytes of a body in which there cannot be too much, but for its depth


@dataclass(frozen=True, slots=True)
class Shape:
    """What stands in a JSON text: strings (names of fields included), values, and levels of nesting, at most."""

    strings: int
    values: int
    depth: int


def shape_of(data: bytes) -> Shape:
    """Of a text that is JSON in UTF-8; of one that is not, something. Numpy lets other threads run meanwhile."""
    whole = np.frombuffer(data, np.uint8)
    at = quotes = depth = deepest = 0
    values = 1
    while at < len(data):
        end = min(at + _SLICE, len(data))
        if data[end - 1] == _BACKSLASH:  # what it escapes belongs to the same slice
            run = _BACKSLASHES.match(data, end)
            end = min((run.end() if run else end) + 1, len(data))
        found = whole[at:end]
        quoted = found == _QUOTE
        if _BACKSLASH in found:
            quoted[_escaped(found, np.flatnonzero(quoted))] = False
        outside = (np.cumsum(quoted, dtype=np.uint8) & 1) == quotes & 1  # the sum wraps, its parity does not
        bare = found | _CASE
        steps = ((bare == _OPEN) & outside).astype(np.int8)
        values += int(np.count_nonzero((found == _COMMA) & outside)) + int(np.count_nonzero(steps))
        steps -= (bare == _CLOSE) & outside
        levels = np.cumsum(steps, dtype=np.int32)
        deepest = max(deepest, depth + int(levels.max()))
        depth += int(levels[-1])
        quotes += int(np.count_nonzero(quoted))
        at = end
    return Shape(quotes // 2, values, deepest)


def _escaped(found: NDArray[np.uint8], quotes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of the quotes have an odd number of backslashes before them."""
    slashes = found == _BACKSLASH
    begins = slashes.copy()
    begins[1:] &= ~slashes[:-1]
    runs = np.flatnonzero(begins)
    behind = quotes[quotes > 0]
    behind = behind[slashes[behind - 1]]
    lengths = behind - runs[np.searchsorted(runs, behind) - 1]
    return behind[lengths % 2 == 1]


def check_shape(data: bytes, most: Shape) -> None:
    """ParameterError if there is more in it than `most`."""
    if len(data) <= SMALL and data.count(b"[") + data.count(b"{") <= most.depth:
        return
    found = shape_of(data)
    for name in ("strings", "values", "depth"):
        if getattr(found, name) > getattr(most, name):
            what = {"depth": "levels of nesting", "strings": "texts, names of fields included,"}.get(name, name)
            raise ParameterError(
                f"the body has {getattr(found, name)} {what}: at most {getattr(most, name)} are taken here"
            )


def parse(data: bytes) -> Any:
    """The value. Raises json.JSONDecodeError, also for what JSON does not have: NaN, a name given twice, another
    encoding than UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"not UTF-8: {error.reason}", "", error.start) from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)  # linear: there may be a million
            raise json.JSONDecodeError(f"the field {twice[:80]!r} is given twice", "", 0)
        return made

    def no_number(name: str) -> Any:
        raise json.JSONDecodeError(f"{name} is no number of JSON", "", 0)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        most = f"a number has more than {sys.get_int_max_str_digits()} digits"
        what = most if isinstance(error, ValueError) else "it is nested too deeply"
        raise json.JSONDecodeError(what, "", 0) from None
