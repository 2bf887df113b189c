"""`outpace tune`: measure this machine with a model, and say what the planner makes of it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from .common import open_llm, progress_bar, say, weights_options

if TYPE_CHECKING:
    from ..bench.tune import DrafterCost, Tuning

PROMPTS, TOKENS = 5, 48
IMPOSSIBLE = (
    "faster than the memory was measured to be, so that no share of it is shown: either the weights fit into the "
    "processor's cache, or other programs used the memory"
)


@click.command(short_help="Measure this machine, and say what the planner will do.")
@weights_options
@click.option(
    "--draft-model", metavar="MODEL", help="A small model of the same vocabulary, to measure its drafters too."
)
@click.option(
    "--method", "methods", multiple=True, help="Drafters to measure.  Repeatable.  [default: all that can run]"
)
@click.option("--n", "count", type=click.IntRange(2), default=PROMPTS, show_default=True, help="Prompts for drafters.")
@click.option("-t", "--max-tokens", type=click.IntRange(2), default=TOKENS, show_default=True, help="Of each answer.")
@click.option("--again", is_flag=True, help="Measure anew what was measured before.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tune(**options: Any) -> None:
    """Measure memory, steps and drafters of this machine with a model; what was measured is kept for later starts.

    \b
      outpace tune
      outpace tune -m qwen2.5-coder-1.5b --draft-model qwen2.5-coder-0.5b
      outpace tune --again --method suffix --method recycling

    The table says which drafters repay their time, from which acceptance a draft pays, and how far steps are from what
    memory and arithmetic allow. What was measured while other programs kept the machine busy is marked and not kept.
    """
    from ..bench.tune import tune as measure
    from ..bench.tune import tuning_path
    from ..bench.workloads import own_prompts, select
    from ..engine.needs import check_needs, needs_draft_model

    for method in options["methods"]:  # before anything is loaded
        check_needs(method, needs_draft_model(method) and options["draft_model"] is not None)
    prompts = select(own_prompts(), total=options["count"])
    with open_llm({**options, "method": "auto", "methods": (), "planner": "fixed"}, max_batch=1) as llm:
        known = tuning_path(llm).exists() and not options["again"]
        with progress_bar() as progress:
            found = measure(
                llm,
                prompts,
                options["methods"] or None,
                options["max_tokens"],
                again=options["again"],
                progress=progress,
            )
    if options["as_json"]:
        click.echo(json.dumps({**found.to_json(), **verdicts(found)}, ensure_ascii=False))
        return
    show(found)
    if found.busy:
        say(f"NOT KEPT, since the machine was busy ({found.busy}): run it again when nothing else does")
    else:
        say("measured before and kept; --again measures anew" if known else "kept; later starts plan with it")


def verdicts(found: Tuning) -> dict[str, Any]:
    """What follows from the figures, as plain data."""
    from ..bench.tune import BATCHES, CONTEXT, DRAFTS, best_length, break_even

    costs = found.costs
    return {
        "bandwidth_floor_s": found.floor(),
        "share_of_bandwidth": found.floor() / costs.step(1, CONTEXT) if found.possible else None,
        "peak_operations_per_s": found.peak,
        "share_of_peak": {b: found.operations * b / costs.step(b, CONTEXT) / found.peak for b in (1, 8, 16, 32)},
        "break_even_acceptance": {b: {n: break_even(costs, b, n) for n in DRAFTS} for b in BATCHES},
        "best_length": {b: {a: best_length(costs, a, b) for a in (0.3, 0.6, 0.9)} for b in BATCHES},
        "repay": {d.method: d.speedup(found.plain_s) > 1 for d in found.drafters},
    }


def show(found: Tuning) -> None:
    from ..bench.tune import BATCHES, CONTEXT, DRAFTS, best_length, break_even

    costs = found.costs
    title = f"{found.model}, {found.precision}, {found.threads} threads"
    one, floor = costs.step(1, CONTEXT), found.floor()

    def of_memory(seconds: float) -> str:
        return f"{100 * floor / seconds:.0f} %" if found.possible else "not shown"

    weights, cache, read_ms = found.weight_bytes / 1e6, CONTEXT * found.kv_bytes / 1e6, 1e3 * floor
    prompt, peak = found.prefill_rows / found.prefill_s, found.peak / 1e12
    lines = [
        f"memory reads {found.bandwidth / 1e9:.1f} GB/s",
        f"a step reads {weights:.0f} MB of weights and {cache:.1f} MB of cache ({CONTEXT} tokens): {read_ms:.2f} ms",
        f"a step of one row takes {1e3 * one:.2f} ms: "
        + (f"{of_memory(one)} of what the memory allows" if found.possible else IMPOSSIBLE),
        f"plain decoding takes {1e3 * found.plain_s:.2f} ms a token, {1 / found.plain_s:.1f} tokens/s",
        f"a prompt is read at {prompt:,.0f} tokens/s, {peak:.2f} T operations/s: the ceiling of steps of many rows",
    ]
    click.echo(title + (f", ON A BUSY MACHINE ({found.busy})" if found.busy else ""))
    for line in lines:
        click.echo(f"  {line}")
    table = _table("steps", ("rows", "ms", "beside one row", "of the memory's speed", "of the prompt's"))
    for rows in (1, 2, 4, 8, 16, 32):
        seconds = costs.step(rows, CONTEXT)
        table.add_row(
            str(rows),
            f"{1e3 * seconds:.2f}",
            f"{seconds / one:.2f}",
            of_memory(seconds),
            f"{100 * found.operations * rows / seconds / found.peak:.0f} %",
        )
    _print(table)
    names = [f"{n} row{'s' if n > 1 else ''}" for n in DRAFTS]
    table = _table("a draft for each sequence pays from this acceptance on", ("batch", *names, "best at 0.3, 0.6, 0.9"))
    for batch in BATCHES:
        least = [break_even(costs, batch, n) for n in DRAFTS]
        best = ", ".join(str(best_length(costs, a, batch)) for a in (0.3, 0.6, 0.9))
        table.add_row(str(batch), *("never" if x is None else f"{x:.2f}" for x in least), best)
    _print(table)
    if found.drafters:
        table = _table("drafters, alone", ("method", "ms a step", "rows", "accepted", "times plain", "verdict"), left=1)
        for drafter in sorted(found.drafters, key=lambda d: -d.speedup(found.plain_s)):
            table.add_row(*_drafter_row(drafter, found))
        _print(table)
    for reason, names_of in _by_reason(found).items():
        click.echo(f"not measured: {', '.join(names_of)}: {reason}")
    click.echo(
        "With method auto the planner starts from these step times and corrects them while it runs. It checks only\n"
        "drafted tokens that are expected to save more time than they cost, and does not call drafters that save less\n"
        "than they cost; where none saves time it decodes plainly. `outpace run --explain` shows what it did."
    )


def _drafter_row(drafter: DrafterCost, found: Tuning) -> tuple[str, ...]:
    speedup = drafter.speedup(found.plain_s)
    needed = drafter.draft_s / found.plain_s  # accepted tokens that would make up for its time
    verdict = "repays its time" if speedup > 1.02 else "about even" if speedup > 0.98 else "does not repay"
    if speedup <= 1.02 and drafter.gained < needed:
        verdict += f": {drafter.gained:.2f} tokens accepted, {needed:.2f} would repay it"
    cells = (1e3 * drafter.draft_s, drafter.rows, drafter.gained, speedup)
    return drafter.method, *(f"{x:.2f}" for x in cells), verdict


def _by_reason(found: Tuning) -> dict[str, list[str]]:
    """Names of drafters that were not measured; what differs in the reason by the name alone is one reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in found.skipped:
        reasons.setdefault(reason.removeprefix(f"method {name!r} "), []).append(name)
    return reasons


def _table(title: str, columns: tuple[str, ...], left: int = 0) -> Any:
    from rich.table import Table

    click.echo(f"\n{title}")  # a table's own title is broken to its width
    table = Table()
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left or name == "verdict" else "right")
    return table


def _print(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
