"""A result file, its page and a plot of what `outpace compare` found; of two runs also how far they agree.

    outpace compare --out first && outpace compare --out second
    python benchmarks/compared.py --name compare-smollm2-135m first second
    python benchmarks/compared.py --name compare-smollm2-135m --rewrite        page and plot from the result file

A ratio is a method's speed over plain decoding's in one cell (kind of text, batch, temperature). Two runs agree on it
within x % if the larger one is at most that much larger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any

import click
from common import RESULTS, table, write_page

from outpace.bench.compare.findings import Report
from outpace.bench.compare.plan import AUTO, PLAIN
from outpace.bench.compare.sets import RANDOM
from outpace.bench.compare.store import Line, read
from outpace.bench.compare.summary import Summary, geometric
from outpace.registry import method

QUESTION = (
    "What does each method gain over plain decoding, by kind of text; does the planner find the best of them; and do "
    "two runs of the same comparison find the same?"
)
LIMIT = 0.10
PROMISES = ("identical", "distribution")
Row = dict[str, Any]
Group = tuple[str, float, int]  # model, temperature, batch; random text counts with each of them


def row_of(row: Summary) -> Row:
    parts = row.per_token_ms
    return {
        "model": row.model,
        "workload": row.cell.workload,
        "batch": row.cell.batch,
        "temperature": row.cell.temperature,
        "method": row.method,
        "state": row.state,
        "reason": re.sub(r"(?<![\w.:/])(?:/[\w.+-]+)+/(?=[\w.+-])", "", row.reason) or None,  # folders of this machine
        "x_plain": rounded(row.ratio.value if row.ratio else None),
        "low": rounded(row.ratio.low if row.ratio else None),
        "high": rounded(row.ratio.high if row.ratio else None),
        "x_plain_full": rounded(row.full.value if row.full and row.cell.batch > 1 else None),
        "tokens_per_s": rounded(row.speed.value if row.speed else None),
        "rounds": row.speed.rounds if row.speed else 0,
        "tokens_per_step": rounded(row.tau),
        "alpha": rounded(row.alpha),
        "draft_share": rounded(parts["draft"] / sum(parts.values()) if sum(parts.values()) else None),
        "whole_answers": row.whole,
        "declared": row.declared,
        "compared": row.compared,
        "differing": row.differing,
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def place(row: Row) -> tuple[Any, ...]:
    return row["model"], row["workload"], row["batch"], row["temperature"], row["method"]


def cell_words(row: Row) -> str:
    return f"{row['model']}, {row['workload']}, batch {row['batch']}, temperature {row['temperature']:g}"


def agreement(first: list[Row], second: list[Row]) -> dict[str, Any]:
    """How far two runs are apart, ratio by ratio."""
    again = {place(row): row["x_plain"] for row in second}
    apart = []
    for row in first:
        a, b = row["x_plain"], again.get(place(row))
        if row["method"] != PLAIN and a and b:
            apart.append((max(a, b) / min(a, b) - 1, cell_words(row), row["method"], a, b))
    apart.sort(reverse=True)
    gaps = [gap for gap, *_ in apart]
    return {
        "ratios": len(gaps),
        "median": rounded(median(gaps)) if gaps else None,
        "largest": rounded(max(gaps)) if gaps else None,
        "beyond_limit": sum(gap > LIMIT for gap in gaps),
        "limit": LIMIT,
        "furthest": [
            {"cell": cell, "method": name, "apart": rounded(gap), "x_plain": [a, b]}
            for gap, cell, name, a, b in apart[:20]
        ],
    }


# -- what all kinds of text together say -----------------------------------------------------------------------------


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Rows by model, temperature and batch. Random text has a temperature of its own and stands in each of them."""
    found: dict[Group, list[Row]] = {}
    noise = []
    for row in rows:
        if row["workload"] == RANDOM:
            noise.append(row)
        else:
            found.setdefault((row["model"], row["temperature"], row["batch"]), []).append(row)
    for row in noise:
        for (model, _, batch), members in found.items():
            if (row["model"], row["batch"]) == (model, batch):
                members.append(row)
    return found


def overall(rows: Iterable[Row]) -> dict[str, Row]:
    """Each method over all kinds of text but random, if it has a figure for each: the geometric mean of its ratios,
    tokens over time and over steps (all answers are equally long), the mean share of drafting."""
    drafted = [row for row in rows if row["workload"] != RANDOM]
    kinds = {row["workload"] for row in drafted}
    found = {}
    for name in dict.fromkeys(row["method"] for row in drafted):
        mine = [row for row in drafted if row["method"] == name and row["state"] == "ok" and row["tokens_per_s"]]
        ratios = [1.0 if name == PLAIN else row["x_plain"] for row in mine]
        if len(mine) < len(kinds) or not all(ratios):
            continue
        full: list[float] = [1.0 if name == PLAIN else row.get("x_plain_full") or 0.0 for row in mine]
        steps = [row["tokens_per_step"] for row in mine]
        shares = [row["draft_share"] or 0.0 for row in mine]
        found[name] = {
            "x_plain": rounded(geometric(ratios)),
            "x_plain_full": rounded(geometric(full)) if all(full) else None,
            "tokens_per_s": rounded(harmonic_mean([row["tokens_per_s"] for row in mine])),
            "tokens_per_step": rounded(harmonic_mean(steps)) if all(steps) else None,
            "draft_share": rounded(sum(shares) / len(shares)),
            "declared": next((row["declared"] for row in mine), None),
            "compared": sum(row["compared"] for row in mine),
            "differing": sum(row["differing"] for row in mine),
        }
    return found


def why_slower(figures: Row) -> str:
    """Why a method is no faster than plain decoding: where its time goes."""
    if figures["x_plain"] >= 1.03 or not figures["tokens_per_step"]:
        return ""
    more = figures["tokens_per_step"] - 1
    if figures["draft_share"] > 0.35:
        return f"drafting takes {figures['draft_share']:.0%} of the time for {more:.1f} extra tokens per step"
    if more < 0.25:
        return f"hardly any draft is accepted ({more + 1:.2f} tokens per step)"
    return f"its rows cost more time than {more:.1f} extra tokens per step save"


def against_best(rows: Iterable[Row]) -> list[Row]:
    """For each cell, `auto` beside the fastest of our other methods that promise as much (plain decoding is one)."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["state"] == "ok" and row["declared"] in PROMISES:
            cells.setdefault(place(row)[:-1], {})[row["method"]] = row
    found = []
    for of_cell in cells.values():
        auto = of_cell.pop(AUTO, None)
        if auto is None or not auto["x_plain"] or len(of_cell) < 2:
            continue
        equals = [r for r in of_cell.values() if PROMISES.index(r["declared"]) <= PROMISES.index(auto["declared"])]
        best = max(equals, key=lambda row: 1.0 if row["method"] == PLAIN else row["x_plain"] or 0.0)
        ratio = 1.0 if best["method"] == PLAIN else best["x_plain"]
        where = {name: auto[name] for name in ("model", "workload", "batch", "temperature")}
        found.append(
            {
                **where,
                "x_plain": auto["x_plain"],
                "x_plain_full": auto.get("x_plain_full"),
                "best": best["method"],
                "of_best": rounded(auto["x_plain"] / ratio),
            }
        )
    return found


def claim_of(name: str) -> str:
    """What the authors report of the methods in a contestant's name."""
    spec, _, verifier = name.partition("/")
    if spec in (AUTO, PLAIN):
        return ""
    if verifier:
        return method(verifier, "verifier").claim or "-"
    parts = [method(part.split(":")[0], "drafter") for part in spec.split("+")]
    return (parts[0].claim or "-") if len(parts) == 1 else "-"


# -- the page --------------------------------------------------------------------------------------------------------


def figure_words(row: Row | None) -> str:
    if row is None:
        return ""
    if row["state"] != "ok":
        return row["state"]
    if row["method"] == PLAIN:
        return f"{row['tokens_per_s']:.1f} tokens/s"
    if row["x_plain"] is None:
        return "-"
    interval = f" ({row['low']:.2f}-{row['high']:.2f})" if row["low"] is not None else ""
    return f"{row['x_plain']:.2f}{interval}" + (" whole answers" if row["whole_answers"] else "")


def full_words(figures: Row | None) -> str:
    return f"{figures['x_plain_full']:.2f}" if figures and figures.get("x_plain_full") else "-"


def section(group: Group, rows: list[Row], peers: dict[str, Any]) -> str:
    """Methods and engines by kind of text."""
    model, temperature, batch = group
    kinds = list(dict.fromkeys(row["workload"] for row in rows))
    sums = overall(rows)
    at = {(row["method"], row["workload"]): row for row in rows}
    names = sorted({row["method"] for row in rows}, key=lambda n: (-(sums[n]["x_plain"] if n in sums else 0.0), n))
    lines = []
    for name in names:
        mine = [at[name, kind] for kind in kinds if (name, kind) in at]
        checked = [row for row in mine if row["compared"] and (row["declared"] == "identical" or row["differing"])]
        differing = (
            f"{sum(r['differing'] for r in checked)} of {sum(r['compared'] for r in checked)}" if checked else "-"
        )
        figures = sums.get(name)
        why = next((row["reason"] for row in mine if row["reason"]), "")
        if figures and not why and name not in (PLAIN, AUTO, *peers):
            why = why_slower(figures)
        lines.append([
            f"`{name}`",
            f"{figures['x_plain']:.2f}" if figures else "-",
            *([full_words(figures)] if batch > 1 else []),
            *(figure_words(at.get((name, kind))) for kind in kinds),
            f"{figures['tokens_per_s']:.1f}" if figures else "-",
            f"{figures['tokens_per_step']:.2f}" if figures and figures["tokens_per_step"] else "-",
            f"{figures['draft_share']:.0%}" if figures and name not in peers else "-",
            differing,
            "" if name in peers else claim_of(name),
            why,
        ])  # fmt: skip
    head = [
        "method, x plain",
        "all",
        *(["all, while all run"] if batch > 1 else []),
        *kinds,
        "tokens/s",
        "tokens/step",
        "drafting",
        "differing",
        "its authors report",
        "note",
    ]
    return f"## {model}, batch {batch}, temperature {temperature:g}\n\n{table(head, lines)}"


def body(name: str, results: dict[str, Any]) -> str:
    rows = results["runs"][0]
    parts = [f"![times plain decoding, by method and kind of text]({name}.svg)"]
    if together := results.get("agreement"):
        times = " and ".join(f"{s:.0f}" for s in results["seconds"])
        parts.append(
            f"Two runs of {times} s: {together['ratios']} ratios, apart by "
            f"{100 * together['median']:.1f} % in the median and {100 * together['largest']:.1f} % at most; "
            f"{together['beyond_limit']} of them by more than {100 * together['limit']:.0f} %. The figures below "
            "are of the first one."
        )
        furthest = [
            [f["cell"], f"`{f['method']}`", *(f"{x:.2f}" for x in f["x_plain"]), f"{100 * f['apart']:.1f} %"]
            for f in together["furthest"][:10]
        ]
        parts.append(table(["furthest apart", "method", "first", "second", "apart"], furthest))
    parts.append(
        "`all`: geometric mean over the kinds of text but random. `while all run`: until the first answer of a batch "
        "ends. In brackets: 95 % interval of the machine's noise. "
        "`drafting`: its share of the time. `differing`: answers with other tokens than plain decoding's."
    )
    parts += [section(group, members, results["peers"]) for group, members in groups(rows).items()]
    if found := against_best(rows):
        lines = [
            [cell_words(f), f"{f['x_plain']:.2f}", full_words(f), f"`{f['best']}`", f"{f['of_best']:.2f}"]
            for f in found
        ]  # fmt: skip
        head = ["`auto`", "x plain", "while all run", "fastest other method with the same guarantee", "auto / that"]
        parts.append(f"## The planner\n\n{table(head, lines)}")
    for model, about in results["models"].items():
        if about["skipped"]:
            left = "; ".join(f"`{one}`: {why}" for one, why in about["skipped"])
            parts.append(f"Left out for {model}: {left}.")
    for peer, about in results["peers"].items():
        parts.append(f"- peer {peer}: {', '.join(f'{k}: {v}' for k, v in about.items())}")
    return "\n\n".join(parts)


def plot(results: dict[str, Any], path: Path) -> None:
    """A mark for each method and kind of text: times plain decoding."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    from matplotlib import pyplot

    parts = groups(results["runs"][0])
    most = max(len({row["method"] for row in rows}) for rows in parts.values())
    size = (6.5 * len(parts), 1.5 + 0.28 * most)
    figure, axes = pyplot.subplots(1, len(parts), figsize=size, squeeze=False)
    for axis, ((model, temperature, batch), rows) in zip(axes[0], parts.items(), strict=True):
        sums = overall(rows)
        names = sorted(
            {r["method"] for r in rows} - {PLAIN}, key=lambda n: (sums[n]["x_plain"] if n in sums else 0.0, n)
        )
        for kind, marker in zip(dict.fromkeys(row["workload"] for row in rows), "osD^vPX*<>", strict=False):
            shown = [row for row in rows if row["workload"] == kind and row["method"] != PLAIN and row["x_plain"]]
            where = [names.index(row["method"]) for row in shown]
            axis.plot([row["x_plain"] for row in shown], where, marker, label=kind, alpha=0.75)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("times plain decoding")
        axis.set_title(f"{model}, batch {batch}, temperature {temperature:g}", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


# -- from folders ----------------------------------------------------------------------------------------------------


def seconds(report: Report) -> float:
    """That the command ran, as it wrote down itself."""
    return max((line["t"] for line in report.lines if line["kind"] == "end"), default=0.0)


def about_model(line: Line) -> dict[str, Any]:
    names = ("precision", "threads", "device", "draft_model", "skipped")
    return {name: line[name] for name in names}


def gather(folders: Iterable[Path]) -> tuple[Line, dict[str, Any]]:
    """The first run's header, and the results. Raises UsageError for runs of different comparisons."""
    reports = [Report.of(read(folder)) for folder in folders]
    header = reports[0].header
    if any(report.header["identity"] != header["identity"] for report in reports):
        raise click.UsageError("these are runs of different comparisons")
    runs = [[row_of(row) for row in report.rows] for report in reports]
    results: dict[str, Any] = {
        "seconds": [round(seconds(report), 1) for report in reports],
        "models": {line["model"]: about_model(line) for line in reports[0].models},
        "peers": {peer: about for line in reports[0].models for peer, about in line.get("peers_about", {}).items()},
        "broken": sum(len(report.broken) for report in reports),
        "runs": runs,
    }
    if len(runs) == 2:
        results["agreement"] = agreement(*runs)
    return header, results


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", required=True, help="Of the result file: compare-...")
@click.option("--rewrite", is_flag=True, help="Only write page and plot anew, from the result file.")
def main(folders: tuple[Path, ...], name: str, rewrite: bool) -> None:
    target = RESULTS / f"{name}.json"
    if rewrite:
        record = json.loads(target.read_text("utf-8"))
    elif not 1 <= len(folders) <= 2:
        raise click.UsageError("one or two folders of `outpace compare` are needed")
    else:
        header, results = gather(folders)
        config = {k: v for k, v in header["identity"].items() if k != "options"} | header["identity"]["options"]
        record = {"name": name, "question": QUESTION, "command": header["command"],
                  "environment": header["environment"], "config": config, "results": results}  # fmt: skip
        target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    plot(record["results"], RESULTS / f"{name}.svg")
    write_page(record, body(name, record["results"]))
    click.echo(f"written: results/{name}.json")


if __name__ == "__main__":
    main()
