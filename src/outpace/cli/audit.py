"""`outpace audit`: prove what decoding methods do to the output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ..bench.workloads import Prompt, load_prompts, own_prompts, select
from ..errors import ParameterError
from ..types import Precision
from .common import DEFAULT_MODEL, open_llm, say

if TYPE_CHECKING:
    from ..bench.audit import AuditConfig, AuditSection

QUICK_PROMPTS, QUICK_TOKENS = 8, 24
SHOWN = 10  # divergences printed for one row; --json has all of them


@click.command(short_help="Prove what a method does to the output.")
@click.option("-m", "--model", default=DEFAULT_MODEL, show_default=True, help="As for `outpace run`.")
@click.option("--draft-model", metavar="MODEL", help="A small model of the same vocabulary, for methods that need one.")
@click.option("--method", "methods", multiple=True, help="Repeatable.  [default: every lossless method that can run]")
@click.option("--verifier", default="auto", show_default=True, help="How drafts are accepted.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["auto", *get_args(Precision)]),
    default=["auto"],
    show_default=True,
    help="Repeatable.",
)
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1), default=[1, 8], show_default=True, help="Repeatable."
)
@click.option(
    "--temperature",
    "temperatures",
    multiple=True,
    type=float,
    default=[0.0, 0.8],
    show_default=True,
    help="Repeatable.",
)
@click.option("--prompts", "path", type=click.Path(path_type=Path), help="A .jsonl file.  [default: our own sets]")
@click.option("--category", "categories", multiple=True, help="Only prompts of this category.  Repeatable.")
@click.option(
    "--n",
    "count",
    type=click.IntRange(1),
    help="Prompts, spread over the categories.  [default: 16, or all of --prompts]",
)
@click.option("-t", "--max-tokens", type=click.IntRange(1), help="New tokens for each prompt.  [default: 64]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one per core]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@click.option("--quick", is_flag=True, help=f"{QUICK_PROMPTS} prompts of {QUICK_TOKENS} tokens, unless told otherwise.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result here.")
def audit(**options: Any) -> None:
    """Compare every method with plain decoding, token for token.

    \b
      outpace audit --quick
      outpace audit --method ngram --precision int8 --precision bfloat16
      outpace audit --prompts questions.jsonl --n 120 --max-tokens 128 --json audit.json

    Exit code 0: everything that claims to be identical is. 1: something is not.
    """
    from ..bench.audit import AuditConfig, audit, split_by_room
    from ..engine.needs import check_needs, needs_draft_model

    path: Path | None = options["json_path"]
    if path is not None and not path.absolute().parent.is_dir():
        raise ParameterError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    config = AuditConfig(
        methods=tuple(options["methods"]) or None,
        batch_sizes=tuple(options["batches"]),
        temperatures=tuple(options["temperatures"]),
        max_tokens=options["max_tokens"] or (QUICK_TOKENS if options["quick"] else 64),
        seed=options["seed"],
    )
    for method in config.methods or ():  # before anything is loaded
        if method != "auto" and needs_draft_model(method):
            check_needs(method, options["draft_model"] is not None)
    chosen = choose(options)
    sections = []
    for precision in dict.fromkeys(options["precisions"]):
        opening = {**options, "method": "auto", "precision": precision}
        with open_llm(opening, max_batch=max(config.batch_sizes)) as llm:
            prompts, too_long = split_by_room(llm, chosen, config.max_tokens)
            if too_long:
                names = ", ".join(p.id for p in too_long)
                say(f"left out, longer than the context of {llm.config.max_position} tokens: {names}")
            if not prompts:
                raise ParameterError(
                    f"no prompt fits the context of {llm.config.max_position} tokens: use shorter ones"
                )
            with progress_bar() as progress:
                sections.append(audit(llm, prompts, config, progress))
        show(sections[-1], config)
    holds = all(section.holds for section in sections)
    if path is not None:
        draft: str | None = options["draft_model"]
        more = {name: options[name] for name in ("verifier", "threads", "categories")}
        more["draft_model"] = draft and (Path(draft).name if Path(draft).exists() else draft)
        more["prompt_file"] = options["path"].name if options["path"] else "own"
        write_json(path, sections, {**asdict(config), **more, "prompts": [p.id for p in chosen]}, holds)
    click.echo(verdict(sections))
    if not holds:
        sys.exit(1)


def choose(options: dict[str, Any]) -> list[Prompt]:
    path: Path | None = options["path"]
    prompts = own_prompts() if path is None else load_prompts(path)
    count = options["count"] or (QUICK_PROMPTS if options["quick"] else 16 if path is None else None)
    return select(prompts, categories=options["categories"] or None, total=count, seed=options["seed"])


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """On stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("audit", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def show(section: AuditSection, config: AuditConfig) -> None:
    """The table of one precision, then the divergences."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(title=f"{section.model}, {section.precision}, {config.max_tokens} new tokens", title_justify="left")
    for name in ("method", "claims"):
        table.add_column(name)
    for name in ("batch", "temperature", "sequences", "differing", "mean_accepted", "tokens/s"):
        table.add_column(name, justify="right")
    for row in section.rows:
        style = None if row.holds else "bold red"
        table.add_row(
            row.method,
            "reference" if row.reference else row.exactness,
            str(row.batch),
            f"{row.temperature:g}",
            str(row.sequences),
            "-" if row.reference else str(row.differing),
            f"{row.mean_accepted:.2f}",
            f"{row.tokens_per_s:.1f}",
            style=style,
        )
    console.print(table)
    console.print(escape(promise(section)))
    if any(row.batch > row.sequences for row in section.rows):
        console.print(
            f"note: with {section.rows[0].sequences} prompts, larger batches hold no more sequences than that"
        )
    for name, reason in section.skipped:
        console.print(escape(f"not audited: {name}: {reason}"))
    for row in section.rows:
        for d in row.divergences[:SHOWN]:
            head = f"{row.method}, batch {row.batch}, temperature {row.temperature:g}, {d.prompt}, token {d.position}"
            console.print(escape(f"{head}: {d.expected_text!r} became {d.got_text!r}: {d.explanation}"))
        if len(row.divergences) > SHOWN:
            console.print(f"... and {len(row.divergences) - SHOWN} more of that row; --json lists all")


def promise(section: AuditSection) -> str:
    if section.row_invariant:
        return f"{section.precision}: a row's result does not depend on its neighbours; identical is promised."
    return (
        f"{section.precision}: a row's rounding depends on the rows that share its step; identical is NOT promised "
        "to drafts and batches in this precision."
    )


def verdict(sections: list[AuditSection]) -> str:
    """The last line."""
    claims = [row for s in sections for row in s.rows if row.exactness == "identical" and not row.reference]
    compared = sum(row.sequences for row in claims)
    broken = sum(row.differing for row in claims)
    if not claims:
        return "nothing here claims to be identical"
    if broken:
        return f"FAILED: {broken} of {compared} sequences that were promised identical differ"
    return f"passed: {compared} sequences that were promised identical are identical"


def write_json(path: Path, sections: list[AuditSection], config: dict[str, Any], holds: bool) -> None:
    from ..bench.machine import environment

    record = {
        "holds": holds,
        "environment": environment(),
        "config": config,
        "sections": [section.to_json() for section in sections],
    }
    try:
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise ParameterError(f"cannot write {path}: {error.strerror}") from None
