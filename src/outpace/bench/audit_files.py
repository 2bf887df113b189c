"""Result files: whole, and about the requests that they say. A file that was cut short never passes for one that is
shorter, nor a text that is the beginning of another for equal.

Three kinds are known, recognised by what they hold:
    batch       lines of `outpace batch` or OpenAI's batches, each with the answer to one custom_id; whether answers are
                missing behind the last line is known only beside the requests
    comparison  `results.jsonl` of `outpace compare`: heats are whole, and each model has come to its end
    reference   outputs that `outpace audit --save-reference` keeps: a head, one line a prompt, an end with a digest
    JSON        one object (a report), or lines of objects
No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ParameterError
from .evidence import Check

REFERENCE = "outpace reference 1"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Reference:
    """Outputs of plain decoding. `about`: model, precision and all that they depend on; `outputs`: token ids by
    (prompt id, setting)."""

    about: dict[str, Any]
    outputs: dict[tuple[str, str], list[int]]


def save_reference(path: Path, reference: Reference) -> None:
    """Whole or not at all. Raises ParameterError if it cannot be written."""
    lines = [json.dumps({"format": REFERENCE, **reference.about}, ensure_ascii=False)]
    for (prompt, setting), tokens in reference.outputs.items():
        lines.append(json.dumps({"prompt": prompt, "setting": setting, "token_ids": tokens}, ensure_ascii=False))
    body = "".join(line + "\n" for line in lines)
    end = {"end": True, "outputs": len(reference.outputs), "sha256": _digest(body.encode())}
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(body + json.dumps(end) + "\n", "utf-8")
        part.replace(path)
    except OSError as error:
        raise ParameterError(f"cannot write {path}: {error.strerror}") from None


def load_reference(path: Path) -> Reference:
    """Raises ParameterError for a file that is damaged, cut short or no reference."""
    if fault := _reference_fault(raw := _read(path)):
        raise ParameterError(f"the reference {path} cannot be used: {fault}")
    head, *lines, _ = [json.loads(line) for line in raw.splitlines()]
    head.pop("format")
    return Reference(head, {(one["prompt"], one["setting"]): one["token_ids"] for one in lines})


def check_file(path: Path, requests: Path | None = None) -> list[Check]:
    """What is wrong with a file, or that nothing is. `requests`: the input of a batch file, each line of which must
    have its answer. Raises ParameterError if a file cannot be read at all."""
    raw = _read(path)
    wanted = None if requests is None else _custom_ids(requests)
    faults: list[str] = []
    if not raw.strip():
        faults, said = ["it is empty"], ""
    elif raw.startswith(b'{"format": "' + REFERENCE.encode()):
        fault = _reference_fault(raw)
        faults, said = [fault] if fault else [], "a whole reference: its digest is right"
    elif (found := _whole_object(raw)) is not None:
        said = f"one JSON object with {', '.join(sorted(found)[:8])}"
    elif raw.startswith(b'{"kind": "comparison"'):
        faults, said = _comparison_faults(raw)
    else:
        faults, said = _line_faults(raw, wanted)
    shown = "; ".join(faults[:_SHOWN]) + (f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else "")
    return [Check("file", path.name, not faults, shown or said, {"faults": len(faults), "bytes": len(raw)})]


def text_difference(expected: str, got: str) -> str | None:
    """How `got` differs from `expected`, for a person; None if it does not. A beginning is not the whole."""
    if expected == got:
        return None
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    if at == len(got):
        return f"cut short: the first {len(got)} of {len(expected)} characters"
    if at == len(expected):
        return f"it goes on where the other ends, after {at} characters"
    return f"from character {at} on: {expected[at : at + 24]!r} became {got[at : at + 24]!r}"


def _line_faults(raw: bytes, wanted: Sequence[str] | None) -> tuple[list[str], str]:
    """Faults of a file of lines, and what it is if it has none."""
    faults, seen, errors = [], list[str](), 0
    lines = raw.split(b"\n")
    if lines[-1]:
        faults.append(f"the last line has no end ({len(lines[-1])} bytes): it was cut short")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError:
            faults.append(f"line {number} is no JSON: it was cut short or damaged")
            continue
        if not isinstance(item, dict):
            faults.append(f"line {number} is no JSON object")
        elif "custom_id" in item:
            if str(item["custom_id"]) in seen:
                faults.append(f"line {number} answers {item['custom_id']!r} again")
            seen.append(str(item["custom_id"]))
            errors += item.get("error") is not None
            if fault := _answer_fault(item):
                faults.append(f"line {number}, {item['custom_id']!r}: {fault}")
    if wanted is not None:
        missing = [name for name in wanted if name not in set(seen)]
        strange = [name for name in seen if name not in set(wanted)]
        if missing:
            faults.append(f"{len(missing)} of {len(wanted)} requests have no answer, the first is {missing[0]!r}")
        if strange:
            faults.append(f"{len(strange)} answers are to nobody's request, the first is {strange[0]!r}")
    whole = f"{len(seen)} answers, {errors} of them errors" if seen else f"{len([x for x in lines if x])} lines"
    if wanted is not None:
        return faults, f"{whole}, one for each request"
    unseen = "; lines that are missing at its end cannot be seen" + " without --requests" * bool(seen)
    return faults, whole + unseen


def _comparison_faults(raw: bytes) -> tuple[list[str], str]:
    """The same of what `outpace compare` writes."""
    from .compare.store import whole_lines

    lines, length = whole_lines(raw)
    faults = [] if length == len(raw) else [f"from byte {length} on it is torn: a line or a heat was cut short"]
    ended = {line.get("model") for line in lines if line["kind"] == "end"}
    models = [str(line.get("model")) for line in lines if line["kind"] == "model"]
    faults += [
        f"the rounds of {name} have no end: it was cut short, or still runs" for name in models if name not in ended
    ]
    if not models:
        faults.append("no model was measured")
    return faults, f"a whole comparison of {', '.join(models)} in {len(lines)} lines"


def _answer_fault(item: dict[str, Any]) -> str | None:
    """What is wrong with one line of a batch file."""
    if item.get("error") is not None:
        return None
    response = item.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    if not isinstance(body, dict):
        return "there is neither an answer nor an error"
    choices, usage = body.get("choices"), body.get("usage")
    if not isinstance(choices, list) or not choices:
        return "the answer has no choices"
    written = 0
    for choice in choices:
        message = choice.get("message") or {}
        text = choice.get("text") if "text" in choice else message.get("content")
        if choice.get("finish_reason") is None:
            return "no finish_reason: the answer did not come to its end"
        if text is None and not message.get("tool_calls"):
            return "the answer has no text"
        written += len(text or "") + len(json.dumps(message.get("tool_calls") or ""))
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if isinstance(counted, int) and counted > 8 and written == 2 * len(choices):
        return f"{counted} tokens were counted, and there is no text"
    return None


def _custom_ids(path: Path) -> list[str]:
    names = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                names.append(str(json.loads(line)["custom_id"]))
            except (ValueError, KeyError, TypeError):
                raise ParameterError(f"{path}, line {number}: no request with a custom_id") from None
    return names


def _reference_fault(raw: bytes) -> str | None:
    lines = raw.split(b"\n")
    if lines[-1]:
        return "its last line has no end: it was cut short"
    try:
        head, end = json.loads(lines[0]), json.loads(lines[-2])
    except (ValueError, IndexError):
        return "its last line is no JSON: it was cut short"
    if not isinstance(head, dict) or head.get("format") != REFERENCE:
        return f"it does not begin as a reference ({REFERENCE!r})"
    if not isinstance(end, dict) or not end.get("end"):
        return "its end is missing: it was cut short"
    body = b"\n".join(lines[:-2]) + b"\n"
    if end.get("outputs") != len(lines) - 3:
        return f"it holds {len(lines) - 3} of {end.get('outputs')} outputs"
    return None if end.get("sha256") == _digest(body) else "its digest is wrong: something in it was changed"


def _whole_object(raw: bytes) -> dict[str, Any] | None:
    """The file as one object over several lines; a single line counts as a file of lines."""
    if raw.strip().count(b"\n") == 0:
        return None
    try:
        found = json.loads(raw)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ParameterError(f"cannot read {path}: {error.strerror}") from None
