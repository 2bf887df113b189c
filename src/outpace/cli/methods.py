"""`outpace methods`: the registry as a table."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from ..registry import Method

LOSSLESS = {
    "identical": "yes, the same tokens",
    "distribution": "yes, the same distribution",
    "approximate": "no",
}


@click.command(short_help="List the decoding methods.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list on stdout.")
def methods(as_json: bool) -> None:
    """List the decoding methods: what drafts tokens (--method) and what accepts them (--verifier).

    \b
    identical      the same tokens as plain decoding with the same seed
    distribution   tokens of the same distribution
    approximate    anything else
    """
    from ..registry import methods as registered

    found = registered()
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
    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=280)
    titles = {
        "drafter": "Drafters (--method; a+b merges two, a:option=value sets an option)",
        "verifier": "Verifiers (--verifier)",
        "planner": "Planners (--planner)",
        "mode": "Other ways to generate",
    }
    for kind, title in titles.items():
        of_kind = [m for m in found if m.kind == kind]
        if not of_kind:
            continue
        console.print(title, style="bold", markup=False)
        _table(console, of_kind) if console.width >= 150 else _list(console, of_kind)
        console.print()


def _table(console: Console, found: list[Method]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("name", "family", "title", "exactness", "lossless", "needs", "paper"):
        table.add_column(column, no_wrap=True)
    for m in found:
        table.add_row(m.name, m.family, m.title, m.exactness, LOSSLESS[m.exactness], _needs(m), m.paper)
    console.print(table)


def _list(console: Console, found: list[Method]) -> None:
    """For narrow terminals: the same, a few lines for each."""
    indent = " " * (max(len(m.name) for m in found) + 2)
    for m in found:
        lines = (
            f"{m.title} ({m.family})",
            f"{m.exactness}; lossless: {LOSSLESS[m.exactness]}; needs {_needs(m)}",
            m.paper,
        )
        text = f"\n{indent}".join(line for line in lines if line)
        console.print(f"{m.name:<{len(indent)}}{text}", markup=False, soft_wrap=True)


def _needs(m: Method) -> str:
    return ", ".join(m.needs) or "nothing"
