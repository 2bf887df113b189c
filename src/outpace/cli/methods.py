"""`outpace methods`: the registry as a table."""

from __future__ import annotations

import json
import sys

import click

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
                "kind": m.kind,
                "lossless": m.exactness != "approximate",
            }
            for m in found
        ]
        click.echo(json.dumps(records, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    titles = {"drafter": "Drafters (--method; a+b merges two)", "verifier": "Verifiers (--verifier)"}
    for kind, title in titles.items():
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
        table.add_column("name", no_wrap=True)
        for column in ("family", "title", "exactness", "lossless", "needs"):
            table.add_column(column)
        table.add_column("paper", overflow="fold")
        for m in (m for m in found if m.kind == kind):
            needs = ", ".join(m.needs) or "nothing"
            table.add_row(m.name, m.family, m.title, m.exactness, LOSSLESS[m.exactness], needs, m.paper)
        console.print(table)
        console.print()
