"""What a comparison found, in words: for the terminal and for the report alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .plan import AUTO, PLAIN
from .store import Line
from .summary import Figure, Summary, ceilings_of, geometric, summarise, wanted_of


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
            elif line["kind"] == "measurement" and line["error"]:
                where = f"{line['workload']}, batch {line['batch']}, temperature {line['temperature']:g}"
                found[f"{line['model']}, {line['method']}, {where}", line["error"]] = None
            elif line["kind"] == "model":
                alike: dict[str, list[str]] = {}
                for name, why in line["skipped"]:
                    alike.setdefault(why.removeprefix(f"method {name!r} "), []).append(name)
                for why, names in alike.items():
                    found[f"{line['model']}, {', '.join(names)}", f"left out: {why}"] = None
        missing = [row for row in self.rows if row.state == "not reached"]
        for model, cell in dict.fromkeys((row.model, row.cell) for row in missing):
            names = [row.method for row in missing if (row.model, row.cell) == (model, cell)]
            found[f"{model}, {cell}", f"not reached within the budget: {', '.join(names)}"] = None
        return list(found)

    def of_model(self, model: str) -> list[Summary]:
        return [row for row in self.rows if row.model == model]


def headline(report: Report) -> list[str]:
    """The findings in sentences."""
    told = []
    for line in report.models:
        mine = report.of_model(line["model"])
        for temperature, batch in dict.fromkeys((r.cell.temperature, r.cell.batch) for r in mine):
            here = [r for r in mine if (r.cell.temperature, r.cell.batch) == (temperature, batch)]
            best = sorted(overall(here).items(), key=lambda item: -item[1])
            if not best:
                continue
            name, ratio = best[0]
            each = ", ".join(
                f"{r.cell.workload} {r.ratio.value:.2f}" for r in here if r.method == name and r.ratio is not None
            )
            how = f"{line['model']}, {batch} at once" + (f", temperature {temperature:g}" if temperature else "")
            auto = dict(best).get(AUTO)
            own = "" if auto is None or name == AUTO else f" {AUTO}, which chooses for itself: {auto:.2f} times."
            if batch > 1 and (while_full := overall(here, full=True)):
                name_, full = max(while_full.items(), key=lambda item: item[1])
                own += f" While all {batch} run, {name_} is the fastest, {full:.2f} times."
                own += f" {AUTO}: {while_full[AUTO]:.2f}." if AUTO in while_full and name_ != AUTO else ""
            if ratio > 1:
                told.append(f"{how}: {name} is the fastest, {ratio:.2f} times plain decoding ({each}).{own}")
            else:
                told.append(f"{how}: nothing is faster than plain decoding; {name} comes nearest ({ratio:.2f}).{own}")
    return told


def overall(rows: Iterable[Summary], full: bool = False) -> dict[str, float]:
    """Geometric mean of the ratios over workloads, of methods that have as many of them as any. `full`: of those while
    all answers run."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratio = row.full if full else row.ratio
        if ratio is not None and row.state == "ok":
            ratios.setdefault(row.method, []).append(ratio.value)
    most = max(map(len, ratios.values()), default=0)
    return {name: geometric(values) for name, values in ratios.items() if len(values) == most}


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
