"""A result file of what `outpace compare` found, and, of two runs of the same command, how far they agree.

    outpace compare --out first && outpace compare --out second
    python benchmarks/compared.py --name compare-smollm2-135m first second

A ratio is a method's speed over plain decoding's in one cell (kind of text, batch, temperature). Two runs agree on it
within x % if the larger one is at most that much larger.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import click
from common import RESULTS, table, write_page

from outpace.bench.compare.findings import Report
from outpace.bench.compare.plan import PLAIN
from outpace.bench.compare.store import read
from outpace.bench.compare.summary import Summary

QUESTION = "What does `outpace compare` find, in how much time, and do two runs of it find the same?"
LIMIT = 0.10


def key(row: Summary) -> str:
    return f"{row.model}, {row.cell}"


def figures(report: Report) -> dict[str, dict[str, Any]]:
    """By cell and contestant."""
    found: dict[str, dict[str, Any]] = {}
    for row in report.rows:
        one = {
            "state": row.state,
            "reason": row.reason or None,
            "x_plain": rounded(row.ratio.value if row.ratio else None),
            "low": rounded(row.ratio.low if row.ratio else None),
            "high": rounded(row.ratio.high if row.ratio else None),
            "tokens_per_s": rounded(row.speed.value if row.speed else None),
            "rounds": row.speed.rounds if row.speed else 0,
            "tokens_per_step": rounded(row.tau),
            "whole_answers": row.whole,
            "declared": row.declared,
            "compared": row.compared,
            "differing": row.differing,
        }
        found.setdefault(key(row), {})[row.method] = one
    return found


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def agreement(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How far two runs are apart, ratio by ratio."""
    apart = []
    for cell, methods in first.items():
        for name, one in methods.items():
            a, b = one["x_plain"], second.get(cell, {}).get(name, {}).get("x_plain")
            if name != PLAIN and a and b:
                apart.append((max(a, b) / min(a, b) - 1, cell, name, a, b))
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


def seconds(report: Report) -> float:
    """That the command ran, as it wrote down itself."""
    return max((line["t"] for line in report.lines if line["kind"] == "end"), default=0.0)


def cell_of(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["state"] != "ok":
        return found["state"]
    if found["x_plain"] is None:
        return "1"
    interval = f" ({found['low']:.2f}-{found['high']:.2f})" if found["low"] is not None else ""
    return f"{found['x_plain']:.2f}{interval}"


def body(results: dict[str, Any]) -> str:
    parts = []
    if together := results.get("agreement"):
        times = " and ".join(f"{s:.0f}" for s in results["seconds"])
        parts.append(
            f"Two runs of {times} s: {together['ratios']} ratios, apart by "
            f"{100 * together['median']:.1f} % in the median and {100 * together['largest']:.1f} % at most; "
            f"{together['beyond_limit']} of them by more than {100 * together['limit']:.0f} %."
        )
        rows = [
            [f["cell"], f"`{f['method']}`", *(f"{x:.2f}" for x in f["x_plain"]), f"{100 * f['apart']:.1f} %"]
            for f in together["furthest"][:10]
        ]
        parts.append(table(["furthest apart", "method", "first", "second", "apart"], rows))
    first = results["runs"][0]
    for cell, methods in first.items():
        rows = [
            [
                f"`{name}`",
                f"{f['tokens_per_s']:.1f}" if f["tokens_per_s"] else "-",
                *(cell_of(run.get(cell, {}).get(name)) for run in results["runs"]),
                f"{f['tokens_per_step']:.2f}" if f["tokens_per_step"] else "-",
                f"{f['differing']} of {f['compared']}" if f["declared"] == "identical" or f["differing"] else "0",
                (f["reason"] or "") + (" (whole answers)" if f["whole_answers"] else ""),
            ]
            for name, f in sorted(methods.items(), key=lambda item: -(item[1]["x_plain"] or 1.0))
        ]
        runs = ["x plain"] if len(results["runs"]) == 1 else ["x plain", "again"]
        parts.append(f"## {cell}\n\n{table(['method', 'tokens/s', *runs, 'tokens/step', 'differing', ''], rows)}")
    for name, about in results["peers"].items():
        parts.append(f"- peer {name}: {', '.join(f'{k}: {v}' for k, v in about.items())}")
    return "\n\n".join(parts)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", required=True, help="Of the result file: compare-...")
def main(folders: tuple[Path, ...], name: str) -> None:
    reports = [Report.of(read(folder)) for folder in folders[:2]]
    header = reports[0].header
    if any(report.header["identity"] != header["identity"] for report in reports):
        raise click.UsageError("these are runs of different comparisons")
    found = [figures(report) for report in reports]
    results: dict[str, Any] = {
        "seconds": [round(seconds(report), 1) for report in reports],
        "runs": found,
        "peers": {peer: about for line in reports[0].models for peer, about in line.get("peers_about", {}).items()},
        "broken": sum(len(report.broken) for report in reports),
    }
    if len(found) == 2:
        results["agreement"] = agreement(*found)
    config = {k: v for k, v in header["identity"].items() if k != "options"} | header["identity"]["options"]
    record = {"name": name, "question": QUESTION, "command": header["command"], "environment": header["environment"],
              "config": config, "results": results}  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    write_page(record, body(results))
    click.echo(body(results).split("\n\n")[0])
    click.echo(f"written: results/{name}.json")


if __name__ == "__main__":
    main()
