"""Calls of tools, read out of what a model writes while it writes it.

`ToolReader` reads an output in which calls may stand among text: between `<tool_call>` tags, whatever the name, and as
bare or fenced JSON at the beginning of a line, where it names a given tool. `ForcedReader` reads one that a grammar
keeps to calls, and passes their arguments on as they come. However the text is cut into pieces, the items are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

OPEN, CLOSE = "<tool_call>", "</tool_call>"
ARGUMENTS = ("arguments", "parameters")  # two names of one thing
_KEYS = frozenset({"name", "type", "id", "function", *ARGUMENTS})  # what a call may hold


@dataclass(frozen=True, slots=True)
class Call:
    """A whole call. `complete`: whether the output went on to its end."""

    name: str
    arguments: str  # a JSON object, as text
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Begun:
    """A call begins whose arguments follow in pieces (`Piece`), until `Ended`."""

    name: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the arguments of the call that began last."""

    arguments: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The call that began last is complete."""


Item = str | Call | Begun | Piece | Ended


class Reader(Protocol):
    """Takes text as it comes and gives the items that have become certain."""

    def push(self, text: str) -> list[Item]: ...

    def flush(self, cut: bool) -> list[Item]:
        """The output is over: what was held back. `cut`: it reached its limit of tokens."""


def new_id() -> str:
    return f"call_{uuid4().hex[:24]}"


def read(reader: Reader, text: str, cut: bool) -> tuple[str, list[Call]]:
    """Text and calls of a whole output."""
    plain: list[str] = []
    calls: list[Call] = []
    pieces: list[str] = []
    for item in [*reader.push(text), *reader.flush(cut)]:
        match item:
            case str():
                plain.append(item)
            case Call():
                calls.append(item)
            case Begun(name):
                pieces = []
                calls.append(Call(name, "", complete=False))
            case Piece(arguments):
                pieces.append(arguments)
                calls[-1] = Call(calls[-1].name, "".join(pieces), complete=False)
            case Ended():
                calls[-1] = Call(calls[-1].name, calls[-1].arguments)
    return "".join(plain), calls


def parse_call(text: str, names: frozenset[str] | None = None) -> Call | None:
    """The call that a text is; None if it is none, or of none of the `names`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and isinstance(found.get("function"), dict):  # as it stands in OpenAI's responses
        found = found["function"]
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    if names is not None and (found["name"] not in names or not any(key in found for key in ARGUMENTS)):
        return None
    arguments: Any = next((found[key] for key in ARGUMENTS if key in found), {})
    try:
        if isinstance(arguments, str):  # written as text, as clients get it
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return Call(found["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


class ObjectScan:
    """Follows one JSON object as it is written, from its `{`. Each character is looked at once.

    names   where they are given, it ends (`failed`) at the first character with which the object can no longer be a
            call of one of them
    """

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self.text = ""
        self.over = self.failed = False
        self._names = names
        self._values: dict[str, tuple[int, int]] = {}  # key of the outermost object -> where its value stands
        self._depth = 0
        self._string = self._escaped = self._wrong = False
        self._start: int | None = None  # of the key or value that is being written
        self._key: str | None = None  # whose value is expected or being written

    def push(self, text: str) -> int:
        """Takes characters, none behind the object's end. Returns how many."""
        begin, used = len(self.text), len(text)
        self.text += text
        for at, c in enumerate(text, begin):
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._string = False
                    if self._depth == 1:
                        self._end(at + 1)
            elif c == '"':
                self._string = True
                self._begin(at, c)
            elif c in "{[":
                self._begin(at, c)
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._end(at)
                    self.over, used = True, at + 1 - begin
                    break
                if self._depth == 1:
                    self._end(at + 1)
            elif c == ",":
                if self._depth == 1:
                    self._end(at)
            elif c not in " \t\r\n:":
                self._begin(at, c)
            if self._names is not None and (self._wrong or (self._depth == 1 and not self._may_be_call(at + 1))):
                self.failed, used = True, at + 1 - begin
                break
        self.text = self.text[: begin + used]
        return used

    def _begin(self, at: int, c: str) -> None:
        if self._depth != 1 or self._start is not None:
            return
        self._start = at
        allowed = '"' if self._key in (None, "name") else '{"' if self._key in ARGUMENTS else None
        self._wrong |= allowed is not None and c not in allowed

    def _end(self, at: int) -> None:
        """Of a key or value at the outermost level, if one is being written."""
        if self._start is None:
            return
        if self._key is None:
            self._key = self.text[self._start + 1 : at - 1]
            self._wrong |= self._key not in _KEYS
        else:
            self._values[self._key] = self._start, at
            self._key = None
        self._start = None

    def written(self, *keys: str) -> str | None:
        """The value of the first of the keys that has begun, as far as it is written."""
        for key in keys:
            if key in self._values:
                return self.text[slice(*self._values[key])].rstrip()
            if key == self._key and self._start is not None:
                return self.text[self._start :]
        return None

    @property
    def name(self) -> str | None:
        """Of the call, once it is complete."""
        if "name" not in self._values:
            return None
        try:
            found = json.loads(self.written("name") or "")
        except ValueError:
            return None
        return found if isinstance(found, str) else None

    def _may_be_call(self, end: int) -> bool:
        """Whether what is written up to there, at the outermost level, may go on to be a call of one of the names."""
        assert self._names is not None
        if "name" in self._values and self.name not in self._names:
            return False
        if self._start is None or self._key not in (None, "name"):
            return True
        begun, allowed = self.text[self._start + 1 : end], _KEYS if self._key is None else self._names
        return any(whole.startswith(begun) for whole in allowed)


class ToolReader:
    """What may be the beginning of a call is held back, and so is white space, which belongs to the call behind it if
    there is one. What is no call comes out as plain text.

    names   of the tools that may be called; between tags any other is taken too, for the client to answer
    single  one call at most: what follows it is left out
    """

    def __init__(self, names: Iterable[str] = (), single: bool = False) -> None:
        self._names, self._single = frozenset(names), single
        self._held = ""
        self._last = "\n"  # the character before what is held: a line begins at the beginning
        self._opening = ""  # what led to the tag or the object: white space, a fence, a bracket
        self._scan = ObjectScan()
        self._state = self._in_text
        self._called = False
        self._found: list[Item] = []

    def push(self, text: str) -> list[Item]:
        self._held += text
        while self._state():
            pass
        return self._taken()

    def flush(self, cut: bool = False) -> list[Item]:
        """The last call may lack its closing tag. A call that was cut is no text: if its name is known, it comes as a
        call that is not complete."""
        if self._state == self._in_tag:
            self._flush_tag(cut)
        elif self._state == self._in_object:
            arguments = self._scan.written(*ARGUMENTS)
            if cut and self._scan.name in self._names and arguments is not None:
                self._call(Call(self._scan.name or "", arguments, complete=False))
            else:
                self._say(self._opening + self._scan.text)
        else:
            if self._state == self._behind_object:
                self._close()
            if self._held.strip() or not self._called:
                self._say(self._held)
        self._held, self._state = "", self._in_text
        return self._taken()

    def _flush_tag(self, cut: bool) -> None:
        scan = ObjectScan()
        scan.push(self._held.lstrip())
        call = parse_call(self._held)
        if call is None and cut and scan.name is not None:
            call = Call(scan.name, scan.written(*ARGUMENTS) or "", complete=False)
        if call is not None:
            self._call(call)
        elif not (cut and scan.text[:1] in ("", "{") and not scan.over):
            self._say(self._opening + self._held)

    # -- states: each looks at what is held, and says whether the next is to look at the rest ----------------------

    def _in_text(self) -> bool:
        shown = self._last + self._held
        found = _BEGIN.search(shown, 1)
        if found is None:
            maybe = _MAYBE.search(shown, 1)
            self._take(len(shown[: maybe.start() if maybe else None].rstrip()) - 1)
            return False
        self._take(len(shown[: found.start()].rstrip()) - 1)
        end = len(self._held) - (len(shown) - found.end())
        self._opening, self._held = self._held[:end], self._held[end:]
        self._state = self._in_tag if self._opening.endswith(OPEN) else self._in_object
        self._scan = ObjectScan(self._names)
        return True

    def _in_tag(self) -> bool:
        before, tag, behind = self._held.partition(CLOSE)
        if not tag:
            return False
        call = parse_call(before)
        if call is not None:
            self._call(call)
        else:
            self._say(self._opening + before + CLOSE)
        self._held, self._last, self._state = behind, "\n", self._in_text
        return True

    def _in_object(self) -> bool:
        self._held = self._held[self._scan.push(self._held) :]
        if not (self._scan.over or self._scan.failed):
            return False
        call = parse_call(self._scan.text, self._names) if self._scan.over else None
        if call is not None:
            self._call(call)
            self._state = self._behind_object
        else:
            self._say(self._opening + self._scan.text)
            self._state = self._in_text
        return True

    def _behind_object(self) -> bool:
        """Another object, or what closes the list and the fence in which the last one stood."""
        more = _MORE.match(self._held)
        if more is not None:
            self._opening += more[0]  # still within the same fence
            self._held, self._scan, self._state = self._held[more.end() :], ObjectScan(self._names), self._in_object
            return True
        if self._waits():
            return False
        self._close()
        return True

    def _waits(self) -> bool:
        """Whether what is held behind an object may go on to be another, or what closes the list and the fence."""
        listed, fenced = "[" in self._opening, "`" in self._opening
        closing = (r"(?:\]\s*)?" if listed and fenced else "") + ("`{0,2}" if fenced else "")
        return re.fullmatch(rf"\s*[,;]?\s*|\s*{closing}", self._held) is not None

    def _close(self) -> None:
        listed, fenced = "[" in self._opening, "`" in self._opening
        end = re.match((r"(?:\s*\])?" if listed else "") + (r"(?:\s*```)?" if fenced else ""), self._held)
        assert end is not None
        self._held, self._last, self._state = self._held[end.end() :], "\n", self._in_text

    # -- what has become certain ------------------------------------------------------------------------------------

    def _take(self, size: int) -> None:
        """The first characters of what is held are text."""
        text, self._held = self._held[: max(size, 0)], self._held[max(size, 0) :]
        self._say(text)

    def _say(self, text: str) -> None:
        if text and not (self._single and self._called):
            self._found.append(text)
            self._last = text[-1]

    def _call(self, call: Call) -> None:
        if not (self._single and self._called):
            self._found.append(call)
        self._called = True

    def _taken(self) -> list[Item]:
        found, self._found = self._found, []
        return found


_LINE = r"(?<=\n)[ \t]*"  # where bare JSON may stand
_BEGIN = re.compile(OPEN + "|" + _LINE + r"(?:```\w*[ \t]*\n\s*)?(?:\[\s*)?(?=\{)")
_PART_OF_TAG = "|".join(re.escape(OPEN[:n]) for n in range(len(OPEN) - 1, 0, -1))
_MAYBE = re.compile(f"(?:{_PART_OF_TAG}|{_LINE}" + r"(?:`{1,2}|```\w*[ \t]*(?:\n\s*(?:\[\s*)?)?|\[\s*))\Z")
_MORE = re.compile(r"\s*[,;]?\s*(?=\{)")


class ForcedReader:
    """Reads an output that a grammar keeps to calls. Whatever stands between two of them belongs to the form."""

    def __init__(self) -> None:
        self._scan = ObjectScan()
        self._begun = False
        self._sent = 0  # characters of the arguments

    def push(self, text: str) -> list[Item]:
        found: list[Item] = []
        while text:
            if not self._scan.text:
                text = text[text.find("{") :] if "{" in text else ""
            text = text[self._scan.push(text) :]
            if not self._begun and self._scan.name is not None:
                self._begun = True
                found.append(Begun(self._scan.name))
            arguments = self._scan.written(*ARGUMENTS) or ""
            if self._begun and len(arguments) > self._sent:
                found.append(Piece(arguments[self._sent :]))
                self._sent = len(arguments)
            if self._scan.over:
                found += [Ended()] if self._begun else []
                self._scan, self._begun, self._sent = ObjectScan(), False, 0
        return found

    def flush(self, cut: bool = False) -> list[Item]:
        return []  # of a call that was cut all that there is has been passed on
