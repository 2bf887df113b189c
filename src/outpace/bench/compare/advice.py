"""What a comparison says to do: a sentence, and the command to type."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from .findings import Report, combined, ratio_text, too_few
from .plan import AUTO, PLAIN
from .store import Line
from .summary import Figure, Summary

MORE = 5  # times the budget, where it was too short


@dataclass(frozen=True, slots=True)
class Advice:
    """For one model. `command` is a line for a shell."""

    model: str
    text: str
    command: str


def advice(report: Report) -> list[Advice]:
    """For each model, by its smallest batch and first temperature, which are those of one person at a terminal."""
    return [_of_model(report, line) for line in report.models]


def _of_model(report: Report, line: Line) -> Advice:
    rows = report.of_model(line["model"])
    cells = [r.cell for r in rows]
    batch = min((c.batch for c in cells), default=1)
    first = cells[0].temperature if cells else 0.0
    here = [r for r in rows if r.cell.batch == batch and r.cell.temperature == first]
    figures = combined(here)
    if not figures:
        return Advice(line["model"], "Nothing was measured that could answer this.", _again(report))
    ours = {name: f for name, f in figures.items() if name in line["methods"] and _same_text(here, name)}
    if any(figure.low is None for figure in figures.values()):
        return Advice(line["model"], f"This cannot be said yet: {too_few(figures.values())}.", _again(report))
    best = max(ours, key=lambda name: ours[name].value, default=None)
    method, text = _choice(best, ours)
    faster = [name for name in line["peers"] if name in figures and _beats(figures[name], ours.get(best or ""))]
    if faster:
        listed = ", ".join(f"{name} ({ratio_text(figures[name])} times our plain decoding)" for name in faster)
        text += f" Faster than that: {listed}."
    return Advice(line["model"], text, _run(report, line, method))


def _choice(best: str | None, ours: dict[str, Figure]) -> tuple[str, str]:
    """The method to use, and why."""
    auto = ours.get(AUTO)
    if best is None or not _sure(ours[best]):
        own = f"; the default method was {ratio_text(auto)} times as fast" if auto is not None else ""
        return AUTO if auto is not None else PLAIN, f"No method is surely faster than plain decoding here{own}."
    figure = ours[best]
    if auto is not None and _sure(auto) and not (best != AUTO and _beats(figure, auto)):
        return AUTO, f"Use the default method: {ratio_text(auto)} times as fast as plain decoding, with the same text."
    beside = f" The default method: {ratio_text(auto)} times." if auto is not None else ""
    return best, f"Use {best}: {ratio_text(figure)} times as fast as plain decoding, with the same text.{beside}"


def _sure(figure: Figure) -> bool:
    return figure.low is not None and figure.low > 1


def _beats(figure: Figure, other: Figure | None) -> bool:
    """Whether their intervals lie apart."""
    if other is None:
        return _sure(figure)
    return figure.low is not None and other.high is not None and figure.low > other.high


def _same_text(rows: list[Summary], name: str) -> bool:
    mine = [r for r in rows if r.method == name]
    return all(r.holds and r.declared == "identical" for r in mine)


def _run(report: Report, line: Line, method: str) -> str:
    options = report.header["identity"].get("options", {})
    words = ["outpace", "run", "-m", line["model"]]
    for name in ("draft_model", "precision", "threads", "device"):
        value = options.get(name)
        if value not in (None, "auto"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if method != AUTO:
        words += ["--method", method]
    return shlex.join([*words, "Name three rivers."])


def _again(report: Report) -> str:
    """The same comparison, with more time."""
    words = shlex.split(report.header["command"])
    kept, skip = [], False
    for word in words:
        if skip or word in ("--budget", "--fresh") or word.startswith("--budget="):
            skip = word == "--budget" and not skip
            continue
        kept.append(word)
    budget = max((line["budget_s"] for line in report.models if "budget_s" in line), default=60.0)
    return shlex.join([*kept, "--budget", f"{MORE * budget:g}s", "--fresh"])
