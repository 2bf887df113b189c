"""From measurements to figures: medians, confidence intervals, ratios to plain pair by pair, identity.

A ratio is made of two runs of one heat: the same prompts, seconds apart, each at the machine's usual pace as far as its
forwards show (see pace). A cell's ratio is the geometric mean over its
units of the median over the rounds. Its interval says how far noise of the machine could move it. With five rounds of
each unit or more they are drawn again with replacement, each unit's among themselves, and the middle 95 % of 1,000 such
draws are shown; with fewer it is Student's interval of the logarithms, which is wide where pairs are few; with
less than LEAST_PAIRS there is none. How much the figure depends on the prompt is another question: the lowest and
highest median of a unit are shown beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ceilings import Ceilings
from .pace import paces
from .plan import PLAIN, Cell
from .store import Line

DRAWS, SEED = 1000, 20
DRAWN_FROM = 5  # rounds of each unit, at least, that are drawn again
POSSIBLE = 1.1  # share of the memory's bandwidth, as exactly as that is measured
LEAST_PAIRS = 3  # of a figure that anything is concluded from
#: 97.5th percentile of Student's distribution by degrees of freedom; from the last one on nearly the normal one
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.96
Groups = dict[int, list[float]]  # figures of the rounds, by unit


@dataclass(frozen=True, slots=True)
class Figure:
    """A median with its 95 % interval (None: too few rounds) and the extremes over the units. `rounds`: of all
    units together; of a ratio, its pairs."""

    value: float
    low: float | None
    high: float | None
    least: float
    most: float
    rounds: int


def figure(groups: Groups, over_units: Callable[[Sequence[float]], float]) -> Figure | None:
    """The median of each unit, put together by `over_units`. None without any."""
    kept = [np.asarray(values) for values in groups.values() if values]
    if not kept:
        return None
    value = over_units([float(np.median(values)) for values in kept])
    low, high = _interval(kept, value, over_units)
    medians = [float(np.median(values)) for values in kept]
    return Figure(value, low, high, min(medians), max(medians), sum(map(len, kept)))


def _interval(
    units: list[NDArray[np.float64]], value: float, over_units: Callable[[Sequence[float]], float]
) -> tuple[float | None, float | None]:
    """95 %, see the module's docstring; None if there are too few rounds, or one of them stood still."""
    if min(map(len, units)) >= DRAWN_FROM:
        rng = np.random.default_rng(SEED)
        drawn = np.array([np.median(rng.choice(v, (DRAWS, len(v))), axis=1) for v in units])  # [units, DRAWS]
        low, high = np.percentile([over_units(column.tolist()) for column in drawn.T], (2.5, 97.5))
        return float(low), float(high)
    count = sum(map(len, units))
    free = count - len(units)
    if count < LEAST_PAIRS or free < 1 or min(map(np.min, units)) <= 0 or value <= 0:
        return None, None
    spread = np.sqrt(sum(float(((np.log(v) - np.log(v).mean()) ** 2).sum()) for v in units) / free)
    error = spread * np.sqrt(sum(1 / len(v) for v in units)) / len(units)
    half = float((_STUDENT[free - 1] if free <= len(_STUDENT) else _NORMAL) * error)
    return value * float(np.exp(-half)), value * float(np.exp(half))


def geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values)))) if min(values) > 0 else 0.0


def harmonic(values: Sequence[float]) -> float:
    """The speed over units of equal work."""
    return len(values) / sum(1 / v for v in values) if min(values) > 0 else 0.0


@dataclass(slots=True)
class Summary:
    """One contestant in one cell. Shares are of the decoding time; None: not known.

    `state`: "ok", "failed", or "not measured" because of the budget; of the latter two there is a `reason`.
    `differing`: answers, of `compared`, with tokens other than plain's. `holds` is False when identity was declared and
    something differs.
    """

    model: str
    cell: Cell
    method: str
    state: str = "ok"
    reason: str = ""
    declared: str | None = None
    notes: list[str] = field(default_factory=list)
    speed: Figure | None = None  # tokens a second
    ratio: Figure | None = None  # of speeds, to plain
    full: Figure | None = None  # the same ratio while all answers of the batch run
    whole: bool = False  # the ratio is of whole answers, prompts included: this engine reports no first token
    first_s: float | None = None  # until every answer has a first token, median
    tau: float | None = None  # tokens of a sequence per step in which it took part
    alpha: float | None = None  # accepted of drafted
    depth: list[float] = field(default_factory=list)  # share of turns that accepted at least 1, 2, ... drafted tokens
    per_token_ms: dict[str, float] = field(default_factory=dict)  # draft, verify, sample, other
    kv_bytes: int | None = None
    memory_bytes: int | None = None
    memory_share: float | None = None
    arithmetic_share: float | None = None
    limit: float | None = None  # tokens a second of plain decoding by bandwidth alone
    compared: int = 0
    differing: int = 0

    @property
    def holds(self) -> bool:
        return self.declared != "identical" or not self.differing


def summarise(
    lines: Sequence[Line], wanted: Iterable[tuple[str, Cell, str]], ceilings: dict[str, Ceilings]
) -> list[Summary]:
    """A summary for each (model, cell, contestant) that is `wanted`, measured or not."""
    found: dict[tuple[str, Cell, str], list[Line]] = {}
    lines = steadied(lines)
    for line in lines:
        if line["kind"] == "measurement":
            found.setdefault((line["model"], cell_of(line), line["method"]), []).append(line)
    failures = [line for line in lines if line["kind"] == "failure"]
    pairs, answers = references(lines)
    rows = []
    for model, cell, method in wanted:
        row = Summary(model, cell, method)
        own = found.get((model, cell, method), [])
        good = [line for line in own if not line.get("error")]
        wrong = next((line["error"] for line in own if line.get("error") and not line.get("cut")), None)
        outside = why_not(failures, model, cell, method)
        if good:
            fill(row, good, pairs, answers, ceilings.get(model))
        if wrong is not None or (outside and not good):
            row.state, row.reason = "failed", wrong or outside
        elif outside:
            row.notes.append(f"out after {len(good)} measurements: {outside}")
        elif not good:
            row.state, row.reason = "not measured", "the budget had no time for it"
        rows.append(row)
    for model in {row.model for row in rows if (row.memory_share or 0.0) > POSSIBLE}:
        for row in rows:
            if row.model == model:  # the bandwidth is wrong, and with it whatever is held against it
                row.memory_share = row.limit = None
    return rows


def wanted_of(lines: Sequence[Line]) -> list[tuple[str, Cell, str]]:
    """Every figure that a comparison was to have."""
    return [
        (line["model"], Cell(**cell), method)
        for line in lines
        if line["kind"] == "model"
        for cell in line["cells"]
        for method in (*line["methods"], *line["peers"])
    ]


def ceilings_of(lines: Sequence[Line]) -> dict[str, Ceilings]:
    return {line["model"]: Ceilings(**line["ceilings"]) for line in lines if line["kind"] == "model"}


def why_not(failures: Sequence[Line], model: str, cell: Cell, method: str) -> str:
    """What keeps a contestant from a cell: a failure of the model, of the workload, or its own at large."""
    here = {"method": method, "workload": cell.workload, "batch": cell.batch}
    for line in failures:
        if line["model"] == model and all(line[name] in (None, value) for name, value in here.items()):
            return str(line["reason"])
    return ""


def cell_of(line: Line) -> Cell:
    return Cell(line["workload"], line["batch"], line["temperature"])


def references(lines: Sequence[Line]) -> tuple[dict[Any, Line], dict[Any, str]]:
    """Plain's run of each heat; and plain's tokens for each prompt, from the smallest batch, the first round."""
    plain = [x for x in lines if x["kind"] == "measurement" and x["method"] == PLAIN and not x.get("error")]
    answers: dict[Any, str] = {}
    for line in sorted(plain, key=lambda x: (x["batch"], x["round"])):
        for prompt, digest in zip(line["prompts"], line["digests"], strict=False):
            answers.setdefault((*where(line), prompt), digest)
    return {heat_of(line): line for line in plain}, answers


def where(line: Line) -> tuple[str, str, float]:
    return line["model"], line["workload"], line["temperature"]


def heat_of(line: Line) -> tuple[Any, ...]:
    return *where(line), line["batch"], line["round"], line["heat"]


def steadied(lines: Sequence[Line]) -> list[Line]:
    """The lines, with the `pace` of those measurements that have it."""
    good = [i for i, line in enumerate(lines) if line["kind"] == "measurement" and not line.get("error")]
    made = list(lines)
    for i, pace in zip(good, paces([lines[i] for i in good]), strict=True):
        if pace is not None:
            made[i] = {**lines[i], "pace": pace}
    return made


def raw_speed(line: Line) -> float | None:
    """Tokens a second of decoding."""
    return line["decode_tokens"] / line["decode_s"] if line.get("decode_s") and line.get("decode_tokens") else None


def speed_of(line: Line) -> float | None:
    """The same at the machine's usual pace, as far as that is known."""
    raw = raw_speed(line)
    return None if raw is None else raw * line.get("pace", 1.0)


def full_speed(line: Line, steady: bool) -> float | None:
    """Tokens a second while all answers of the batch run; at the machine's usual pace if `steady`."""
    if not line.get("full_s") or not line.get("full_tokens"):
        return None
    return float(line["full_tokens"] / line["full_s"] * (line.get("pace", 1.0) if steady else 1.0))


def whole_speed(line: Line) -> float | None:
    """Tokens a second of the whole answers, prompts included."""
    return line["tokens"] / line["total_s"] if line["total_s"] else None


def fill(
    row: Summary, lines: list[Line], pairs: dict[Any, Line], answers: dict[Any, str], ceilings: Ceilings | None
) -> None:
    row.whole = any(speed_of(line) is None for line in lines)
    steady = all("pace" in line for line in lines)  # else plain's runs are taken as they were, too
    speed = whole_speed if row.whole else speed_of if steady else raw_speed
    speeds: Groups = {}
    ratios: Groups = {}
    full: Groups = {}
    for line in lines:
        mine = speed(line)
        if mine is None:
            continue
        speeds.setdefault(line["unit"], []).append(mine)
        other = pairs.get(heat_of(line))
        theirs = speed(other) if other is not None else None
        if other is not None and theirs and row.method != PLAIN:
            ratios.setdefault(line["unit"], []).append(mine / theirs)
            if not row.whole and (a := full_speed(line, steady)) and (b := full_speed(other, steady)):
                full.setdefault(line["unit"], []).append(a / b)
    row.speed, row.ratio, row.full = figure(speeds, harmonic), figure(ratios, geometric), figure(full, geometric)
    _work(row, lines)
    _identity(row, lines, answers)
    if ceilings is not None and lines[0].get("draft_s") is not None:
        seconds, context = _sum(lines, "decode_s"), float(np.mean([x["context"] for x in lines]))
        row.memory_share = ceilings.memory_share(_sum(lines, "steps"), _sum(lines, "turns"), context, seconds)
        row.arithmetic_share = ceilings.arithmetic_share(_sum(lines, "rows"), seconds)
        row.limit = ceilings.plain_limit(row.cell.batch, context)


def _sum(lines: Iterable[Line], name: str) -> float:
    return sum(line.get(name) or 0 for line in lines)


def _work(row: Summary, lines: list[Line]) -> None:
    """Tokens a step, acceptance, where the time went, memory."""
    firsts = [x["first_s"] for x in lines if x.get("first_s") is not None]
    row.first_s = median(firsts) if firsts else None
    if turns := _sum(lines, "turns"):
        row.tau = _sum(lines, "decode_tokens") / turns
    if drafted := _sum(lines, "drafted"):
        row.alpha = _sum(lines, "accepted") / drafted
    deepest = max((len(x["right"]) for x in lines), default=0)
    counts = [sum(x["right"][d] for x in lines if d < len(x["right"])) for d in range(deepest)]
    turns = _sum(lines, "all_turns")
    row.depth = [count / turns for count in counts if count] if turns else []
    tokens = _sum(lines, "decode_tokens")
    if tokens and all(x.get("draft_s") is not None for x in lines):
        parts = {name: _sum(lines, f"{name}_s") for name in ("draft", "verify", "sample")}
        parts["other"] = max(_sum(lines, "decode_s") - sum(parts.values()), 0.0)
        row.per_token_ms = {name: 1000 * seconds / tokens for name, seconds in parts.items()}
    row.kv_bytes = max((x["kv_bytes"] for x in lines if x.get("kv_bytes") is not None), default=None)
    row.memory_bytes = max((x["memory_bytes"] for x in lines if x.get("memory_bytes") is not None), default=None)


def _identity(row: Summary, lines: list[Line], answers: dict[Any, str]) -> None:
    """Each answer's tokens beside plain's for the same prompt and seed."""
    promises = [x["exactness"] for x in lines if x.get("exactness")]
    order = ("identical", "distribution", "approximate")
    row.declared = max(promises, key=order.index) if promises else None
    row.notes = list(dict.fromkeys(note for x in lines for note in x.get("notes", ())))
    for line in lines:
        for prompt, digest in zip(line["prompts"], line["digests"], strict=False):
            expected = answers.get((*where(line), prompt))
            if expected is not None:
                row.compared += 1
                row.differing += digest != expected


def crossing(ratios: dict[int, float]) -> str:
    """Where a method stops to be faster than plain as the batch grows, in words. `ratios` by batch size; between two
    sizes the line on a logarithmic scale is drawn straight."""
    sizes = sorted(ratios)
    if not sizes:
        return "not known"
    above = [ratios[b] > 1 for b in sizes]
    if len(sizes) == 1 or all(above) or not any(above):
        return f"{'faster' if above[0] else 'not faster'} at every batch size that was run"
    changes = []
    for a, b in pairwise(sizes):
        if (ratios[a] > 1) != (ratios[b] > 1):
            low, high = np.log(ratios[a]), np.log(ratios[b])
            at = 2 ** (np.log2(a) + low / (low - high) * (np.log2(b) - np.log2(a)))
            changes.append(f"{'slower' if ratios[a] > 1 else 'faster'} from a batch of about {at:.1f}")
    return ", then ".join(changes)
