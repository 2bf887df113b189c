"""`outpace audit`: prove what decoding methods do to the output."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ..bench.evidence import SURE, looks_for
from ..bench.workloads import Prompt, load_prompts, own_prompts, select
from ..errors import ParameterError
from ..types import Precision
from .audit_more import (
    APPROXIMATE,
    Quality,
    check_files,
    check_quality_options,
    check_servers,
    compare_reference,
    outputs_of,
    show_checks,
    suites,
)
from .common import DEFAULT_MODEL, engine_options, open_llm, progress_bar, say

if TYPE_CHECKING:
    from ..bench.audit import AuditConfig, AuditSection
    from ..bench.evidence import Check
    from ..engine.llm import LLM

QUICK_PROMPTS, QUICK_TOKENS = 8, 24
FILE = click.Path(path_type=Path, dir_okay=False)
WANTED = 500  # one wrong token in so many is to be seen; what shows less is noted
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
    help="Repeatable.  [default: 0 and 0.8]",
)
@click.option(
    "--sampler",
    "samplers",
    multiple=True,
    metavar="NAME",
    help="A sampler setting: top-k, top-p, min-p, penalties, bias or mixed.  Repeatable.  [default: mixed]",
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
@click.option(
    "--check",
    "checks",
    multiple=True,
    type=click.Choice(["tokens", "samplers", "verifiers", "ragged", "seeds", "owners", "frequencies"]),
    help="Beside the comparison of tokens only these.  Repeatable.  [default: all]",
)
@click.option("--texts", type=click.IntRange(50), help="Seeds of a check of frequencies.  [default: 600]")
@engine_options("threads", "device")
@click.option(
    "--quick",
    is_flag=True,
    help=f"{QUICK_PROMPTS} prompts of {QUICK_TOKENS} tokens, two settings, and verifiers, unless given otherwise.",
)
@click.option("--save-reference", type=FILE, metavar="FILE", help="Keep the outputs of plain decoding.")
@click.option("--reference", type=FILE, metavar="FILE", help="Compare plain decoding with what was kept.")
@click.option("--check-file", "files", type=FILE, multiple=True, help="Only see whether result files are whole.")
@click.option("--requests", type=FILE, metavar="FILE", help="The input of the batch whose output is --check-file.")
@click.option("--url", metavar="URL", help="Only compare a server's greedy text (URL ends in /v1) ...")
@click.option("--against-url", metavar="URL", help="... with that of another, without speculation.")
@click.option("--url-model", metavar="NAME", help="The model to ask these for.  [default: the first that they list]")
@click.option("--humaneval", type=FILE, metavar="FILE", help="Quality: functions with tests. Needs --run-code.")
@click.option("--run-code", is_flag=True, help="Run what the model writes, with limits but as you, on your files.")
@click.option("--gsm8k", type=FILE, metavar="FILE", help="Quality: word problems, exact match.")
@click.option("--perplexity", is_flag=True, help="Quality: perplexity by precision, and of the answers by verifier.")
@click.option(
    "--quality-verifier",
    "quality_verifiers",
    multiple=True,
    default=APPROXIMATE,
    show_default=True,
    help="Whose loss is measured.  Repeatable.",
)
@click.option("--quality-temperature", type=float, default=0.0, show_default=True)
@click.option("--quality-only", is_flag=True, help="Measure quality and nothing else.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result here.")
def audit(**options: Any) -> None:
    """Prove what every method does to the output.

    \b
      outpace audit --quick
      outpace audit --method ngram --precision int8 --precision bfloat16
      outpace audit --prompts questions.jsonl --n 120 --max-tokens 128 --json audit.json
      outpace audit --quality-only --gsm8k gsm8k.jsonl --precision int8 --precision int4
      outpace audit --url http://localhost:8000/v1 --against-url http://localhost:8001/v1
      outpace audit --check-file answers.jsonl --requests questions.jsonl

    Tokens are compared with plain decoding, one sequence at a time; a table then shows how rare a fault this would have
    seen. The sampler is held against its definition and verifiers are enumerated on a small vocabulary; ragged batches,
    streams, seeds and owners are tried out; texts of many seeds are counted against the model's own distribution. For
    approximate methods --humaneval, --gsm8k and --perplexity show the quality lost. docs/audit.md explains how to read
    it.

    Exit code 0: everything is what it claims to be. 1: something is not. 2: the audit could not be made.
    """
    path: Path | None = options["json_path"]
    for file in (path, options["save_reference"]):
        if file is not None and not file.absolute().parent.is_dir():
            raise ParameterError(f"cannot write {file}: there is no folder {file.absolute().parent}")
    if options["files"]:
        finish_alone(options, check_files(options))
        return
    if options["requests"] is not None:
        raise ParameterError("--requests is the input of the batch that --check-file names: give both")
    if options["url"] is not None or options["against_url"] is not None:
        with progress_bar() as progress:
            checks = check_servers(options, choose(options), progress)
        finish_alone(options, checks)
        return
    audit_model(options)


def audit_model(options: dict[str, Any]) -> None:
    """All that needs a model of our own."""
    from ..bench.audit import AuditConfig
    from ..engine.needs import check_needs, needs_draft_model

    given = options["temperatures"] or options["samplers"]
    config = AuditConfig(
        methods=tuple(options["methods"]) or None,
        batch_sizes=tuple(options["batches"]),
        temperatures=tuple(options["temperatures"] if given else (0.0, 0.8)),
        samplers=tuple(options["samplers"] if given or options["quick"] else ("mixed",)),
        max_tokens=options["max_tokens"] or (QUICK_TOKENS if options["quick"] else 64),
        seed=options["seed"],
    )
    for method in config.methods or ():  # before anything is loaded
        if method != "auto" and needs_draft_model(method):
            check_needs(method, options["draft_model"] is not None)
    chosen = choose(options)
    if (options["reference"] or options["save_reference"]) and len({*options["precisions"]}) > 1:
        raise ParameterError("a reference is of one precision: name one with --precision")
    notes: list[str] = []
    quality = Quality(options, suites(options, chosen, notes), notes)
    check_quality_options(options, quality)
    sections: list[AuditSection] = []
    with ExitStack() as stack:
        reader: LLM | None = None
        for precision in dict.fromkeys(options["precisions"]):
            opening = {**options, "method": "auto", "methods": (), "precision": precision}
            llm = stack.enter_context(open_llm(opening, max_batch=max(config.batch_sizes)))
            reader = reader or llm  # of quality: it stays open
            if not options["quality_only"]:
                sections.append(audit_section(llm, options, config, chosen))
                show(sections[-1], config)
                show_checks(sections[-1].checks)
            if quality.suites:
                with progress_bar() as progress:
                    quality.measure(llm, reader, progress)
    quality.show()
    holds = all(section.holds for section in sections)
    if options["json_path"] is not None:
        more = {name: options[name] for name in ("verifier", "threads", "categories")}
        for name in ("model", "draft_model"):
            named: str | None = options[name]
            more[name] = named and (Path(named).name if Path(named).exists() else named)
        more["prompt_file"] = options["path"].name if options["path"] else "own"
        config_json = {**asdict(config), **more, "prompts": [p.id for p in chosen]}
        record: dict[str, Any] = {"config": config_json, "sections": [section.to_json() for section in sections]}
        if quality.suites:
            record["quality"] = quality.to_json()
        write_json(options["json_path"], record, holds)
    if sections:
        click.echo(verdict(sections))
    if not holds:
        sys.exit(1)


def audit_section(llm: LLM, options: dict[str, Any], config: AuditConfig, chosen: list[Prompt]) -> AuditSection:
    """One precision: tokens, then the other checks, then the reference that was kept or is to be."""
    from ..bench.audit import audit, split_by_length
    from ..bench.audit_checks import KINDS, prove
    from ..bench.audit_files import Reference, save_reference

    prompts, too_long = split_by_length(llm, chosen, config.max_tokens)
    if too_long:
        names = ", ".join(p.id for p in too_long)
        say(f"left out, longer than the context of {llm.config.max_position} tokens: {names}")
    if not prompts:
        raise ParameterError(f"no prompt fits the context of {llm.config.max_position} tokens: use shorter ones")
    kinds = options["checks"] or (("samplers", "verifiers") if options["quick"] else KINDS)
    with progress_bar() as progress:
        section = audit(llm, prompts, config, progress)
        prove(llm, prompts, config, section, [k for k in kinds if k != "tokens"], texts=options["texts"] or 600,
              progress=progress)  # fmt: skip
    about: dict[str, Any] = {
        "model": llm.name,
        "precision": llm.precision,
        "max_tokens": config.max_tokens,
        "seed": config.seed,
        "prompts": [p.id for p in prompts],
    }
    if options["reference"] is not None:
        section.checks.append(compare_reference(section, about, options["reference"]))
    if options["save_reference"] is not None:
        save_reference(options["save_reference"], Reference(about, outputs_of(section, about["prompts"])))
        say(f"reference: {options['save_reference']}")
    return section


def finish_alone(options: dict[str, Any], checks: list[Check]) -> None:
    """Of checks that need no model."""
    show_checks(checks)
    holds = all(check.holds for check in checks)
    if options["json_path"] is not None:
        write_json(options["json_path"], {"checks": [check.to_json() for check in checks]}, holds)
    failed = sum(not check.holds for check in checks)
    click.echo("passed" if holds else f"FAILED: {failed} of {len(checks)} checks")
    if not holds:
        sys.exit(1)


def choose(options: dict[str, Any]) -> list[Prompt]:
    path: Path | None = options["path"]
    prompts = own_prompts() if path is None else load_prompts(path)
    count = options["count"] or (QUICK_PROMPTS if options["quick"] else 16 if path is None else None)
    return select(prompts, categories=options["categories"] or None, total=count, seed=options["seed"])


def show(section: AuditSection, config: AuditConfig) -> None:
    """The table of one precision, then the divergences."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(title=f"{section.model}, {section.precision}, {config.max_tokens} new tokens", title_justify="left")
    for name in ("method", "claims"):
        table.add_column(name)
    for name in ("batch", "sampler", "sequences", "differing", "mean_accepted", "tokens/s"):
        table.add_column(name, justify="right")
    for row in section.rows:
        style = None if row.holds else "bold red"
        table.add_row(
            row.method,
            "reference" if row.reference else row.exactness,
            str(row.batch),
            row.sampler,
            str(row.sequences),
            "-" if row.reference else str(row.differing),
            f"{row.mean_accepted:.2f}",
            f"{row.tokens_per_s:.1f}",
            style=style,
        )
    console.print(table)
    console.print(escape(promise(section)))
    show_coverage(section, console)
    if any(row.batch > row.sequences for row in section.rows):
        console.print(
            f"note: with {section.rows[0].sequences} prompts, larger batches hold no more sequences than that"
        )
    for name, reason in section.skipped:
        console.print(escape(f"not audited: {name}: {reason}"))
    for row in section.rows:
        for d in row.divergences[:SHOWN]:
            head = f"{row.method}, batch {row.batch}, {row.sampler}, {d.prompt}, token {d.position}"
            console.print(escape(f"{head}: {d.expected_text!r} became {d.got_text!r}: {d.explanation}"))
        if len(row.divergences) > SHOWN:
            console.print(f"... and {len(row.divergences) - SHOWN} more of that row; --json lists all")


def show_coverage(section: AuditSection, console: Any) -> None:
    """What equality over so many tokens shows."""
    from rich.table import Table

    covered = section.coverage
    if not covered:
        return
    table = Table(title=f"the rarest fault that this would have found ({100 * SURE:.0f} %)", title_justify="left")
    table.add_column("method")
    for name in (
        "tokens compared",
        "one wrong token in",
        "drafts accepted",
        "drafts rejected",
        "one wrongly accepted in",
    ):
        table.add_column(name, justify="right")
    for c in covered:
        figures = (c.tokens, c.wrong_token_in, c.accepted, c.declined, c.wrong_draft_in)
        table.add_row(c.method, *(f"{n:,}" if n else "-" for n in figures))
    console.print(table)
    idle = [c.method for c in covered if c.method != "plain" and not c.accepted and not c.declined]
    if idle:
        console.print(f"note: nothing was drafted by {', '.join(idle)}: equal tokens prove nothing about it there")
    blunt = [c.method for c in covered if c.wrong_token_in < WANTED]
    if blunt:
        console.print(
            f"note: one wrong token in {WANTED} may have gone unseen with {', '.join(blunt)}: it takes "
            f"{looks_for(WANTED):,} tokens; raise --n or --max-tokens"
        )


def promise(section: AuditSection) -> str:
    if section.row_invariant:
        return f"{section.precision}: a row's result does not depend on its neighbours; identical is promised."
    return (
        f"{section.precision}: a row's rounding depends on the rows that share its step; identical is NOT promised "
        "to drafts and batches in this precision."
    )


def verdict(sections: list[AuditSection]) -> str:
    """The last line."""
    claims = [row for s in sections for row in s.rows if row.promised and not row.reference]
    compared = sum(row.sequences for row in claims)
    broken = sum(row.differing for row in claims)
    checks = [check for s in sections for check in s.checks]
    failed = sum(not check.holds for check in checks)
    if broken or failed:
        said = [f"{broken} of {compared} sequences that were promised identical differ"] if broken else []
        said += [f"{failed} of {len(checks)} checks failed"] if failed else []
        return f"FAILED: {', and '.join(said)}"
    said = [f"{compared} sequences that were promised identical are identical"] if claims else []
    said += [f"{len(checks)} checks hold"] if checks else []
    return f"passed: {', and '.join(said)}" if said else "nothing here claims to be identical"


def write_json(path: Path, found: dict[str, Any], holds: bool) -> None:
    from ..bench.machine import environment

    record = {"holds": holds, "environment": environment(), **found}
    try:
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise ParameterError(f"cannot write {path}: {error.strerror}") from None
