"""`outpace methods`: the registry as a table, or one method of it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from ..errors import MethodError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from ..registry import Method

OUTPUT = {
    "identical": "the same tokens as plain decoding with the same seed",
    "distribution": "tokens of the same distribution",
    "approximate": "another text than plain decoding's",
}


@click.command(short_help="List the decoding methods.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="A JSON list on stdout.")
def methods(name: str | None, as_json: bool) -> None:
    """List the decoding methods: what drafts tokens (--method) and what accepts them (--verifier); or show the method
    NAME with its options.

    \b
    identical      the same tokens as plain decoding with the same seed
    distribution   tokens of the same distribution
    approximate    anything else
    """
    from ..registry import methods as registered

    found = registered()
    if name is not None:
        known = [m.name for m in found]
        found = [m for m in found if m.name == name]
        if not found:
            raise MethodError(f"no method {name!r}; {did_you_mean(name, known)}there are: {', '.join(known)}")
    if as_json:
        records = [
            {
                "name": m.name,
                "family": m.family,
                "title": m.title,
                "paper": m.paper,
                "exactness": m.exactness,
                "needs": list(m.needs),
                "claim": m.claim,
                "kind": m.kind,
                "lossless": m.exactness != "approximate",
            }
            for m in found
        ]
        click.echo(json.dumps(records, indent=2, ensure_ascii=False))
        return
    if name is not None:
        for m in found:
            _describe(m)
        return
    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=280)
    titles = {
        "drafter": "Drafters (--method NAME; a+b merges two, a:option=value sets an option)",
        "verifier": "Verifiers (--verifier NAME)",
        "planner": "Planners (--planner NAME)",
        "policy": "What is kept of keys and values (--kv NAME; NAME:budget=25% sets an option)",
        "mode": "Other ways to generate (outpace suggest)",
    }
    for kind, title in titles.items():
        if of_kind := [m for m in found if m.kind == kind]:
            console.print(title, style="bold", markup=False)
            _table(console, of_kind)
            console.print()
    console.print(
        "identical: the same tokens as plain decoding; distribution: the same probabilities; approximate: neither"
    )
    console.print("outpace methods NAME shows the paper and the options of one")


def _table(console: Console, found: list[Method]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("name", "output"):
        table.add_column(column, no_wrap=True)
    for column in ("what it is", "needs"):
        table.add_column(column)
    for m in found:
        table.add_row(m.name, m.exactness, m.title, ", ".join(m.needs))
    console.print(table)


def _describe(m: Method) -> None:
    """One method, a line for each thing that is known of it."""
    from ..decoding.methods import options_of

    options = {} if m.kind == "mode" else options_of(m.name, m.kind)
    lines = {
        "": f"{m.title} ({m.kind})",
        "output": f"{m.exactness}: {OUTPUT[m.exactness]}",
        "needs": ", ".join(m.needs),
        "options": ", ".join(f"{name}={default}" for name, default in options.items()),
        "paper": m.paper,
        "reported": m.claim,
    }
    for label, text in lines.items():
        if text:
            click.echo(f"{label or m.name:<12} {text}")
