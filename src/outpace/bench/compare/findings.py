"""What a comparison found, in words: for the terminal and for the report alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import exp, log, sqrt

from .plan import AUTO, PLAIN
from .store import Line
from .summary import LEAST_PAIRS, Figure, Summary, ceilings_of, geometric, summarise, wanted_of


@dataclass(frozen=True, slots=True)
class Report:
    """A comparison's figures, ready to be shown. `lines` is what `store` holds."""

    lines: Sequence[Line]
    rows: list[Summary]

    @staticmethod
    def of(lines: Sequence[Line]) -> Report:
        return Report(lines, summarise(lines, wanted_of(lines), ceilings_of(lines)))

    @property
    def header(self) -> Line:
        return self.lines[0]

    @property
    def models(self) -> list[Line]:
        return [line for line in self.lines if line["kind"] == "model"]

    @property
    def broken(self) -> list[Summary]:
        """Declared identical, and not."""
        return [row for row in self.rows if not row.holds]

    @property
    def lost(self) -> list[tuple[str, str]]:
        """What has no figure, and why: each thing once, from the widest to the narrowest."""
        found: dict[tuple[str, str], None] = {}
        for line in self.lines:
            if line["kind"] == "failure":
                what = [line["model"], line["method"], line["workload"]]
                batch = [f"batch {line['batch']}"] if line["batch"] is not None else []
                found[", ".join([w for w in what if w] + batch), line["reason"]] = None
            elif line["kind"] == "measurement" and line["error"] and not line.get("cut"):
                where = f"{line['workload']}, batch {line['batch']}, temperature {line['temperature']:g}"
                found[f"{line['model']}, {line['method']}, {where}", line["error"]] = None
            elif line["kind"] == "model":
                alike: dict[str, list[str]] = {}
                for name, why in line["skipped"]:
                    alike.setdefault(why.removeprefix(f"method {name!r} "), []).append(name)
                for why, names in alike.items():
                    found[f"{line['model']}, {', '.join(names)}", f"left out: {why}"] = None
                found |= dict.fromkeys(
                    (line["model"], f"less than requested: {what}") for what in line.get("left_out", ())
                )
        missing = [row for row in self.rows if row.state == "not measured" and self._planned(row)]
        for model, cell in dict.fromkeys((row.model, row.cell) for row in missing):
            names = [row.method for row in missing if (row.model, row.cell) == (model, cell)]
            found[f"{model}, {cell}", f"not measured within the budget: {', '.join(names)}"] = None
        return list(found)

    def _planned(self, row: Summary) -> bool:
        """Whether it was to be measured; what the budget had no time for from the beginning is in `left_out`."""
        plan = next(line.get("plan") for line in self.models if line["model"] == row.model)
        return plan is None or (row.method in (PLAIN, *plan["others"]) and asdict(row.cell) in plan["cells"])

    def of_model(self, model: str) -> list[Summary]:
        return [row for row in self.rows if row.model == model]

    @property
    def loading_s(self) -> float:
        """Seconds that loading the models took, beside the budget."""
        return sum(line.get("loading_s", 0.0) for line in self.models)


def headline(report: Report) -> list[str]:
    """The findings in sentences. Nothing is concluded from fewer pairs than give an interval."""
    sentences = []
    for line in report.models:
        mine = report.of_model(line["model"])
        for temperature, batch in dict.fromkeys((r.cell.temperature, r.cell.batch) for r in mine):
            here = [r for r in mine if (r.cell.temperature, r.cell.batch) == (temperature, batch)]
            figures = combined(here)
            if not figures:
                continue
            how = f"{line['model']}, {batch} at once" + (f", temperature {temperature:g}" if temperature else "")
            best = max(figures, key=lambda name: figures[name].value)
            if figures[best].low is None:
                sentences.append(f"{how}: {too_few(figures.values())}.")
                continue
            each = ", ".join(
                f"{r.cell.workload} {r.ratio.value:.2f}" for r in here if r.method == best and r.ratio is not None
            )
            sentences.append(f"{how}: {verdict(best, figures[best], each)}{_beside(best, figures, here, batch)}")
    return sentences


def verdict(name: str, figure: Figure, each: str) -> str:
    """What can be said of the method with the highest figure."""
    assert figure.low is not None and figure.high is not None
    if figure.low > 1:
        return f"{name} is the fastest, {ratio_text(figure)} times plain decoding ({each})."
    if figure.high < 1:
        return f"nothing is faster than plain decoding; {name} comes nearest, {ratio_text(figure)} ({each})."
    return f"nothing is surely faster than plain decoding; the highest is {name}, {ratio_text(figure)} ({each})."


def too_few(figures: Iterable[Figure]) -> str:
    pairs = sorted({figure.rounds for figure in figures})
    some = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    return f"not enough pairs for a conclusion ({some} of each kind of text, {LEAST_PAIRS} and more are needed)"


def _beside(best: str, figures: dict[str, Figure], rows: Sequence[Summary], batch: int) -> str:
    """What belongs to the finding: the default method, and what holds while a batch is full."""
    auto = figures.get(AUTO)
    own = "" if auto is None or best == AUTO else f" {AUTO}, which chooses for itself: {auto.value:.2f} times."
    if batch > 1 and (full := combined(rows, full=True)):
        name = max(full, key=lambda name: full[name].value)
        if full[name].low is not None:
            own += f" While all {batch} run, {name} is the fastest, {full[name].value:.2f} times."
            own += f" {AUTO}: {full[AUTO].value:.2f}." if AUTO in full and name != AUTO else ""
    return own


def combined(rows: Iterable[Summary], full: bool = False) -> dict[str, Figure]:
    """Geometric mean of the ratios over workloads, of methods that have as many of them as any. `full`: of those while
    all answers run. The interval takes the noise of the workloads to be independent; None if one of them has none.
    `rounds`: the least of a workload."""
    ratios: dict[str, list[Figure]] = {}
    for row in rows:
        ratio = row.full if full else row.ratio
        if ratio is not None and row.state == "ok":
            ratios.setdefault(row.method, []).append(ratio)
    most = max(map(len, ratios.values()), default=0)
    return {name: _mean(figures) for name, figures in ratios.items() if len(figures) == most}


def _mean(figures: Sequence[Figure]) -> Figure:
    values = [f.value for f in figures]
    value = geometric(values)
    low = high = None
    if all(f.low and f.high and f.value for f in figures):
        below = sqrt(sum(log(f.value / f.low) ** 2 for f in figures if f.low)) / len(figures)
        above = sqrt(sum(log(f.high / f.value) ** 2 for f in figures if f.high)) / len(figures)
        low, high = value * exp(-below), value * exp(above)
    return Figure(value, low, high, min(values), max(values), min(f.rounds for f in figures))


def overall(rows: Iterable[Summary], full: bool = False) -> dict[str, float]:
    """The values of `combined`."""
    return {name: figure.value for name, figure in combined(rows, full).items()}


def identity(report: Report) -> str:
    """What became of the promises, in a sentence."""
    promised = [r for r in report.rows if r.declared == "identical" and r.method != PLAIN]
    compared = sum(r.compared for r in promised)
    if report.broken:
        wrong = ", ".join(f"{r.method} ({r.cell}: {r.differing} of {r.compared})" for r in report.broken)
        return f"NOT IDENTICAL, though declared so: {wrong}."
    if not compared:
        return "Nothing here promised identical output."
    return f"All {compared} answers that were promised to be identical to plain decoding's are."


def shown(rows: Sequence[Summary]) -> list[Summary]:
    """What a table is made of: without contestants that the budget had no time for."""
    some = {r.method for r in rows if r.state != "not measured"}
    return [r for r in rows if r.method in some]


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def ratio_text(ratio: Figure | None) -> str:
    """ "1.52 (1.49 to 1.55)"."""
    if ratio is None:
        return "-"
    return f"{ratio.value:.2f}" + ("" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})")


def cell_text(row: Summary | None) -> str:
    """What a table says of one method on one workload."""
    if row is None:
        return "-"
    if row.state != "ok":
        return row.state
    if row.method == PLAIN:
        return f"{number(row.speed.value if row.speed else None)} tokens/s"
    return ratio_text(row.ratio) + ("" if row.holds else " NOT IDENTICAL")


def output_text(rows: Sequence[Summary]) -> str:
    """What is declared of the output, and what was found."""
    declared = [r.declared for r in rows if r.declared is not None]
    if not declared:
        return "-"
    compared, differing = sum(r.compared for r in rows), sum(r.differing for r in rows)
    if not all(r.holds for r in rows):
        return f"declared identical, {differing} of {compared} answers DIFFER"
    worst = max(declared, key=("identical", "distribution", "approximate").index)
    return worst if worst == "identical" or not compared else f"{worst}, {differing} of {compared} differ"
