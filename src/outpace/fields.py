"""Fields of typed records: the default of each, what it may be and a line of help, all in one place.

    @dataclass(frozen=True, slots=True)
    class Options:
        max_batch: int = value(8, Whole(1, 4096), "Sequences that decode at once.")

        def __post_init__(self) -> None:
            check(self)

`check` refuses what a rule does not allow by the field's own name. None is allowed where it is the default, or with
`none=True`. Whoever makes options of a command line from such a record reads the same rules.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol, TypeVar

from .errors import ParameterError, did_you_mean

T = TypeVar("T", bound=type)
OUT_OF_RANGE, WRONG_TYPE, UNKNOWN = "is out of range", "is of the wrong type", "is unknown"


class Rule(Protocol):
    """What a value may be."""

    @property
    def allowed(self) -> str:
        """In words, behind "it must be"."""

    def fault(self, value: Any) -> str | None:
        """What is wrong with it, None if nothing."""

    def plain(self, value: Any) -> Any:
        """An allowed value in the type that the record declares."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number; neither True nor 2.0 is one. `high` None: no limit."""

    low: int = 0
    high: int | None = None
    words: str = ""  # instead of those made from the limits

    @property
    def allowed(self) -> str:
        if self.words:
            return self.words
        return f"a whole number, {self.low} or more" if self.high is None else _span("a whole number", self)

    def fault(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, Integral):
            return WRONG_TYPE
        given = int(value)
        return None if self.low <= given and (self.high is None or given <= self.high) else OUT_OF_RANGE

    def plain(self, value: Any) -> int:
        return int(value)


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number. `above`: `low` itself is not allowed, `below`: nor is `high`."""

    low: float = 0.0
    high: float = math.inf
    above: bool = False
    below: bool = False
    words: str = ""

    @property
    def allowed(self) -> str:
        if self.words:
            return self.words
        if not self.above and not self.below and self.high < math.inf:
            return _span("a number", self)
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        return f"a number, {low}" + (
            "" if self.high == math.inf else f" and {'below' if self.below else 'at most'} {self.high:g}"
        )

    def fault(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, Real):
            return WRONG_TYPE
        try:
            given = float(value)
        except OverflowError:
            return OUT_OF_RANGE
        low = given > self.low if self.above else given >= self.low
        high = given < self.high if self.below else given <= self.high
        return None if low and high and math.isfinite(given) else OUT_OF_RANGE

    def plain(self, value: Any) -> float:
        return float(value)


@dataclass(frozen=True, slots=True)
class Flag:
    """True or False, and nothing that merely counts as one."""

    allowed: str = "True or False"

    def fault(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else WRONG_TYPE

    def plain(self, value: Any) -> bool:
        return bool(value)


@dataclass(frozen=True, slots=True)
class Text:
    """A string. `empty`: "" too."""

    empty: bool = False
    words: str = ""

    @property
    def allowed(self) -> str:
        return self.words or ("text" if self.empty else "text that is not empty")

    def fault(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return WRONG_TYPE
        return None if value or self.empty else OUT_OF_RANGE

    def plain(self, value: Any) -> str:
        return str(value)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words."""

    values: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(self.values)}"

    def fault(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return WRONG_TYPE
        return None if value in self.values else UNKNOWN

    def plain(self, value: Any) -> str:
        return str(value)


@dataclass(frozen=True, slots=True)
class Each:
    """A list of values, kept as a tuple. One string is no list of strings, unless it is to stand for one: `single`."""

    rule: Rule
    words: str
    single: bool = False

    @property
    def allowed(self) -> str:
        return self.words

    def fault(self, value: Any) -> str | None:
        if isinstance(value, str) and self.single:
            return self.rule.fault(value)
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            return WRONG_TYPE
        return next((fault for fault in map(self.rule.fault, value) if fault), None)

    def plain(self, value: Any) -> tuple[Any, ...]:
        return tuple(self.rule.plain(item) for item in ([value] if isinstance(value, str) else value))


@dataclass(frozen=True, slots=True)
class Pairs:
    """A mapping of keys to values, kept as a dictionary."""

    keys: Rule
    values: Rule
    words: str

    @property
    def allowed(self) -> str:
        return self.words

    def fault(self, value: Any) -> str | None:
        if not isinstance(value, Mapping):
            return WRONG_TYPE
        faults = (self.keys.fault(key) or self.values.fault(item) for key, item in value.items())
        return next((fault for fault in faults if fault), None)

    def plain(self, value: Any) -> dict[Any, Any]:
        return {self.keys.plain(key): self.values.plain(item) for key, item in value.items()}


def value(default: Any, rule: Rule, help: str = "", **more: Any) -> Any:
    """A field of a record: its default (an empty dictionary is made anew for each), its rule, and its help. `more` is
    for whoever makes options of it."""
    metadata = {"rule": rule, "help": help, "none": default is None} | more
    if default == {}:
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def same(record: type, name: str, default: Any = dataclasses.MISSING) -> Any:
    """The field of that name of another record: its default (unless one is given), its rule and its help."""
    other = field_of(record, name)
    given = other.default if default is dataclasses.MISSING else default
    return dataclasses.field(default=given, metadata={**other.metadata, "none": given is None})


def documented(record: T) -> T:
    """A class decorator: the docstring lists the fields, each with its default and its help."""
    lines = [
        f"{field.name} ({field.metadata.get('unset', field.default)}): {field.metadata['help']}"
        for field in dataclasses.fields(record)  # type: ignore[arg-type]
    ]
    record.__doc__ = f"{record.__doc__}\n\n" + "\n".join(lines)
    return record


def field_of(record: Any, name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(record) if field.name == name)


def check(record: Any) -> None:
    """Hold every field to its rule, and keep it in its declared type. Raises ParameterError."""
    for field in dataclasses.fields(record):
        rule, given = field.metadata.get("rule"), getattr(record, field.name)
        if rule is not None:
            object.__setattr__(record, field.name, checked(field.name, given, rule, field.metadata["none"]))


def checked(name: str, given: Any, rule: Rule, none: bool = False) -> Any:
    """One value, by its rule, or None. Raises ParameterError."""
    if none and given is None:
        return None
    if isinstance(given, Iterator):  # which can be read once
        given = tuple(given)
    fault = rule.fault(given)
    if fault is None:
        return rule.plain(given)
    or_none = ", or None" if none else ""
    close = nearest(given, rule.values) if isinstance(rule, Choice) else ""
    raise ParameterError(f"{name}={shown(given)} {fault}: it must be {rule.allowed}{or_none}{close}")


def nearest(given: Any, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the name that is most like the given one, "" if none is."""
    hint = did_you_mean(given, names) if isinstance(given, str) else ""
    return f"; {hint.strip()}" if hint else ""


def shown(given: Any, most: int = 60) -> str:
    """A value for a message: its repr, cut."""
    text = repr(given)
    return text if len(text) <= most else text[: most - 3] + "..."


def _span(what: str, rule: Whole | Number) -> str:
    return (
        f"{what} from {rule.low:,} to {rule.high:,}"
        if isinstance(rule, Whole)
        else (f"{what} from {rule.low:g} to {rule.high:g}")
    )
