"""`outpace compare`: what each decoding method gains on one's own model and machine."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ParameterError
from .common import DEFAULT_MODEL, engine_options, open_llm, progress_bar, say

if TYPE_CHECKING:
    from rich.table import Table

    from ..bench.compare.findings import Report
    from ..bench.compare.plan import CompareConfig
    from ..bench.compare.store import Store
    from ..bench.compare.summary import Summary
    from ..bench.peers.open import PeerSpec
    from ..bench.peers.peer import Peer
    from ..engine.llm import LLM

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
SMALL_KV = 256  # tokens: the model that the methods share answers nothing itself
CONTEXT = 4096  # tokens of a sequence in another engine, at most


class Budget(click.ParamType):
    """Seconds, from "90s", "10m" or "1.5h"."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", value.strip())
        if not found or not float(found[1]):
            self.fail(f"{value!r} is no time; write 90s, 10m or 1.5h", param, ctx)
        return float(found[1]) * UNITS[found[2]]


def many(*names: str, help: str, **more: Any) -> Callable[[Any], Any]:
    return click.option(*names, multiple=True, help=f"{help}  Repeatable.", **more)


@click.command(short_help="Compare what each method gains.")
@many("-m", "--model", "models", default=[DEFAULT_MODEL], show_default=True, help="As for `outpace run`.")
@click.option("--draft-model", metavar="MODEL", help="A small model of the same vocabulary, for methods that need one.")
@many("--method", "methods", help="As for `outpace run`; METHOD/VERIFIER too.  [default: all lossless that can run]")
@many(
    "--workload", "-w", "workloads", metavar="NAME|FILE|ID",
    help="One of our own sets, random, a .jsonl, .parquet or .txt file, code-edits:FILE, or a data set of the hub.  "
    "[default: writing, code, summarization, code-edit]",
)  # fmt: skip
@many("--category", "categories", help="Of files and data sets.")
@many("--batch", "batches", type=click.IntRange(1), default=[1, 8], show_default=True, help="Answers at once.")
@many("--temperature", "temperatures", type=float, default=[0.0], show_default=True, help="0 is greedy.")
@many(
    "--peer", "peers", metavar="ENGINE|URL|NAME=PATH",
    help="Another engine in the same run: llama.cpp, transformers or openvino, each also with :draft or :lookup; "
    "the URL of an OpenAI-compatible server; or NAME=\"PATH ARGUMENTS\" of a llama-server or llama-bench of your own.",
)  # fmt: skip
@many(
    "--peer-python", "pythons", metavar="[ENGINE=]PATH",
    help="The Python that has the peers, or that one.  [default: ours]",
)  # fmt: skip
@click.option("--budget", type=Budget(), default="14m", show_default=True, help="Time for everything but loading.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    help="At most so many of each kind of text and batch.  [default: what the budget allows]",
)
@click.option(
    "--prompts", type=click.IntRange(1), default=2, show_default=True, help="Of a workload, or batches of it."
)
@click.option("-n", "--max-tokens", type=click.IntRange(2), default=64, show_default=True, help="Of each answer.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("outpace-compare"),
              show_default=True, help="Folder for results.jsonl and report.html.")  # fmt: skip
@click.option("--fresh", is_flag=True, help="Measure everything again instead of going on with what --out holds.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@engine_options("precision", "threads", "device")
@click.pass_context
def compare(ctx: click.Context, **options: Any) -> None:
    """Run methods side by side, in turns, and say what each gains over plain decoding.

    \b
      outpace compare
      outpace compare --method auto --method ngram --workload my-prompts.jsonl --budget 5m
      outpace compare -m qwen2.5-coder-1.5b --draft-model qwen2.5-coder-0.5b --peer llama.cpp --budget 30m

    The folder --out holds every measurement (results.jsonl) and a page for people (report.html). The same command goes
    on where it was stopped. Exit code 1: output that was declared identical is not, or nothing could be measured.
    """
    from ..bench.compare.report import html
    from ..bench.compare.run import Comparison
    from ..bench.compare.store import NAME, Store
    from ..bench.machine import environment

    config = configuration(options)
    out: Path = options["out"]
    if options["fresh"]:
        (out / NAME).unlink(missing_ok=True)
    header = {"identity": config.identity(), "environment": environment(), "command": command(ctx)}
    store = Store(out, header)
    try:
        with progress_bar(" s") as progress:
            Comparison(config, store, opener(options), peer_opener(options), progress=progress).run()
    except KeyboardInterrupt:
        finish(store, out, html)
        say(f"stopped; the same command goes on. So far: {out / 'report.html'}")
        raise
    finally:
        store.close()
    report = finish(store, out, html)
    show(report)
    click.echo(f"report: {out / 'report.html'}")
    measured = any(line["kind"] == "measurement" and not line["error"] for line in report.lines)
    if not measured:
        say("outpace: error: nothing could be measured; what failed or was left out is above")
    if report.broken or not measured:
        sys.exit(1)


def configuration(options: dict[str, Any]) -> CompareConfig:
    """From the options; what could never run is refused before anything is loaded."""
    from ..bench.compare.plan import WORKLOADS, CompareConfig
    from ..decoding.methods import make_verifier
    from ..engine.needs import check_needs, needs_draft_model

    for name in options["methods"]:
        spec, slash, verifier = name.partition("/")
        if spec != "auto":
            check_needs(spec, needs_draft_model(spec) and options["draft_model"] is not None)
        if slash:
            make_verifier(verifier)
    peers = peers_of(options["peers"])
    for peer in peers.values():
        python_of(peer.engine, options["pythons"])
    names = ("precision", "threads", "device")
    draft = options["draft_model"]
    return CompareConfig(
        models=options["models"],
        methods=options["methods"] or None,
        workloads=options["workloads"] or WORKLOADS,
        categories=options["categories"],
        batch_sizes=tuple(sorted(options["batches"])),
        temperatures=options["temperatures"],
        peers=tuple(peers),
        max_tokens=options["max_tokens"],
        prompts=options["prompts"],
        rounds=options["rounds"],
        budget_s=options["budget"],
        seed=options["seed"],
        options={**{name: options[name] for name in names}, "draft_model": draft},
    )


def opener(options: dict[str, Any]) -> Callable[[str, int], LLM]:
    def open_model(name: str, batch: int) -> LLM:
        chosen = {key: options[key] for key in ("draft_model", "precision", "threads", "device")}
        return open_llm({**chosen, "model": name}, max_batch=batch, kv_tokens=SMALL_KV, prefix_cache=False)

    return open_model


def peers_of(written: Sequence[str]) -> dict[str, PeerSpec]:
    """By how they are shown, without folders. Raises ParameterError for what is no peer, and for two of one name."""
    from ..bench.peers.open import PeerSpec

    peers = [PeerSpec.parse(peer) for peer in dict.fromkeys(written)]
    found = {peer.shown: peer for peer in peers}
    for peer in peers:
        if found[peer.shown] != peer:
            raise ParameterError(f"two peers are called {peer.shown}: give each a name of its own, NAME=PATH")
    return found


def peer_opener(options: dict[str, Any]) -> Callable[[str, str, LLM, int], Peer]:
    def open_one(shown: str, model: str, llm: LLM, batch: int) -> Peer:
        from ..bench.peers.open import open_peer
        from ..models.source import resolve

        peer = peers_of(options["peers"])[shown]
        server = bool(peer.url)
        draft = options["draft_model"]
        return open_peer(
            peer,
            llm.tokenizer,
            Path() if server else resolve(model).path,
            None if server or draft is None else resolve(draft).path,
            threads=getattr(llm.decoder, "threads", 0) or 1,
            context=min(llm.config.max_position, CONTEXT),
            max_batch=batch,
            python=None if peer.program else python_of(peer.engine, options["pythons"]),
            past_end=True,
        )

    return open_one


def python_of(engine: str, given: Sequence[str]) -> Path | None:
    """What `--peer-python` says of an engine, else of all. Raises ParameterError for an engine that does not exist."""
    from ..bench.peers.open import ENGINES

    found: dict[str, Path] = {}
    for value in given:
        head, equals, path = value.rpartition("=")
        if equals and head not in ENGINES and "/" not in head:
            raise ParameterError(f"--peer-python {value!r}: no engine {head!r}; there are: {', '.join(ENGINES)}")
        found |= {head: Path(path)} if head in ENGINES else {"": Path(value)}
    return found.get(engine) or found.get("")


def command(ctx: click.Context) -> str:
    """As typed, with files outside this folder by their names alone."""
    from ..bench.peers.open import PeerSpec

    words = sys.argv[1:] if sys.argv[1:2] == [ctx.info_name] else [str(ctx.info_name)]
    here = Path.cwd()

    def shown(before: str, word: str) -> str:
        if before == "--peer":
            return PeerSpec.parse(word).shown
        if word.startswith("--peer="):
            return "--peer=" + PeerSpec.parse(word.removeprefix("--peer=")).shown
        head, equals, last = word.rpartition("=") if "://" not in word else ("", "", word)
        path = Path(last)
        return head + equals + (path.name if path.is_absolute() and not path.is_relative_to(here) else last)

    return shlex.join(["outpace", *map(shown, ["", *words], words)])


def finish(store: Store, out: Path, html: Callable[[Report], str]) -> Report:
    """Write the page of what there is."""
    from ..bench.compare.findings import Report

    report = Report.of(store.lines)
    part = out / "report.html.part"
    try:
        part.write_text(html(report), "utf-8")
        part.replace(out / "report.html")
    except OSError as error:
        raise ParameterError(f"cannot write {out / 'report.html'}: {error.strerror}") from None
    return report


def show(report: Report) -> None:
    """Tables in the terminal, then the findings, then what to type."""
    from rich.console import Console
    from rich.markup import escape

    from ..bench.compare.advice import advice
    from ..bench.compare.findings import headline, identity, shown

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    keys = dict.fromkeys((r.model, r.cell.temperature, r.cell.batch) for r in report.rows)
    for model, temperature, batch in keys:
        rows = [r for r in report.rows if (r.model, r.cell.temperature, r.cell.batch) == (model, temperature, batch)]
        if some := shown(rows):
            title = f"{model}, temperature {temperature:g}, batch {batch}: times plain decoding (95 % interval)"
            console.print(_table(title, some))
    if report.lost:
        console.print("Not measured, or with less than was requested:")
    for what, why in report.lost:
        console.print(escape(f"  {what}: {why}"), soft_wrap=True)
    for line in headline(report):
        console.print(escape(line))
    console.print(escape(identity(report)), style="bold red" if report.broken else None)
    if report.loading_s:
        console.print(f"Loading took {report.loading_s:.1f} s more, which the budget does not count.")
    for found in advice(report):
        console.print(escape(f"What to use ({found.model}): {found.text}"), style="bold")
        console.print(escape(f"  {found.command}"), soft_wrap=True)


def _table(title: str, rows: Sequence[Summary]) -> Table:
    """One line for each method, one column for each workload."""
    from rich.markup import escape
    from rich.table import Table

    from ..bench.compare.findings import cell_text, number, output_text, overall, share

    groups, ranked = list(dict.fromkeys(r.cell.workload for r in rows)), overall(rows)
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in ("mean", *groups, "tokens/step", "draft", "KV MB"):
        table.add_column(name, justify="right")
    table.add_column("output")
    for name in sorted(dict.fromkeys(r.method for r in rows), key=lambda n: (n != "plain", -ranked.get(n, 0.0))):
        mine = {r.cell.workload: r for r in rows if r.method == name}
        taus = [r.tau for r in mine.values() if r.tau]
        parts = [r.per_token_ms for r in mine.values() if r.per_token_ms]
        total = sum(sum(p.values()) for p in parts)
        most = max((r.kv_bytes or 0 for r in mine.values()), default=0)
        table.add_row(
            escape(name),
            f"{ranked[name]:.2f}" if name in ranked else "1" if name == "plain" else "-",
            *(cell_text(mine.get(g)).replace(" to ", "-") for g in groups),
            number(sum(taus) / len(taus) if taus else None, 2),
            share(sum(p["draft"] for p in parts) / total if total else None),
            number(most / 1e6 if most else None),
            output_text(list(mine.values())),
            style="bold red" if any(r.state == "failed" or not r.holds for r in mine.values()) else None,
        )
    return table
