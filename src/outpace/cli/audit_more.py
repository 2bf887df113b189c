"""The parts of `outpace audit` that compare no tokens of a loaded model's methods: files, servers, quality; and how
what was found is shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bench.evidence import Check
from ..errors import MethodError, ParameterError
from .common import say

if TYPE_CHECKING:
    from ..bench.audit import AuditSection
    from ..bench.quality.run import Score, Suite
    from ..bench.workloads import Prompt
    from ..engine.llm import LLM

Progress = Callable[[str, int, int], None]
SHOWN = 12  # checks of one kind that are printed although they hold
APPROXIMATE = ("typical", "topk", "tolerance")
TEXT_CHARACTERS = 30_000  # of the text whose perplexity is measured


def check_files(options: dict[str, Any]) -> list[Check]:
    """`--check-file`, with `--requests` for a batch's output."""
    from ..bench.audit_files import check_file

    paths: Sequence[Path] = options["files"]
    if options["requests"] is not None and len(paths) > 1:
        raise ParameterError("--requests belongs to one --check-file: check the others without it")
    return [check for path in paths for check in check_file(path, options["requests"])]


def check_servers(options: dict[str, Any], prompts: Sequence[Prompt], progress: Progress) -> list[Check]:
    """`--url` against `--against-url`."""
    from ..bench.audit_urls import Endpoint, check_urls

    if options["url"] is None or options["against_url"] is None:
        raise ParameterError("--url (with speculation) and --against-url (without) go together: give both")
    key = os.environ.get("OPENAI_API_KEY")
    other, plain = (Endpoint(options[name], options["url_model"], key) for name in ("url", "against_url"))
    tokens = options["max_tokens"] or 64
    return check_urls(plain, other, prompts, max_tokens=tokens, at_once=max(options["batches"]), progress=progress)


def suites(options: dict[str, Any], prompts: Sequence[Prompt], notes: list[str]) -> list[Suite]:
    """What quality is measured on. Raises ParameterError for HumanEval without --run-code."""
    from ..bench.quality.gsm8k import load_problems
    from ..bench.quality.humaneval import load_tasks
    from ..bench.quality.run import Suite, gsm8k_suite, humaneval_suite
    from ..bench.quality.sandbox import Limits

    found = []
    most, count = options["max_tokens"] or 256, options["count"]
    if options["humaneval"] is not None:
        if not options["run_code"]:
            raise ParameterError(
                "--humaneval runs code that the model writes, as you and on your files, with limits on time, memory "
                "and processes and, where possible, without a network. It is no protection from malice: say "
                "--run-code if that will do, or run this in a container"
            )
        found.append(humaneval_suite(load_tasks(options["humaneval"])[:count], Limits(), notes, most))
    if options["gsm8k"] is not None:
        found.append(gsm8k_suite(load_problems(options["gsm8k"])[:count], most))
    if options["perplexity"]:
        texts = tuple(p.text for p in prompts)
        found.append(Suite("own prompts", texts, texts, options["max_tokens"] or 64, None))
    return found


class Quality:
    """Plain decoding of the first precision is what everything else is compared with, and it reads the answers."""

    def __init__(self, options: dict[str, Any], suites: Sequence[Suite], notes: list[str]) -> None:
        self.options, self.suites, self.notes = options, suites, notes
        self.scores: list[Score] = []
        self.perplexities: dict[str, float] = {}
        self._plain: dict[str, Any] = {}

    def measure(self, llm: LLM, reader: LLM, progress: Progress) -> None:
        """One precision. `reader` is the LLM of the first."""
        from ..bench.quality.likelihood import build_text, of_text
        from ..bench.quality.run import PLAIN, answer, score

        if self.options["perplexity"]:
            progress(f"{llm.precision} perplexity", 0, 1)
            self.perplexities[llm.precision] = of_text(llm, build_text(TEXT_CHARACTERS)).value
        temperature = self.options["quality_temperature"]
        for suite in self.suites:
            ways = [(PLAIN, "auto")]
            if llm is reader:
                ways += [(self._method(llm), verifier) for verifier in self.options["quality_verifiers"]]
            for method, verifier in ways:
                found = answer(llm, suite, method, verifier, temperature, progress)
                plain = self._plain.setdefault(suite.name, found)
                self.scores.append(score(llm, reader, suite, method, verifier, found, plain))

    def _method(self, llm: LLM) -> str:
        """The first that was named; else what drafts most."""
        if self.options["methods"]:
            return str(self.options["methods"][0])
        with llm.with_method("auto") as best:
            return best.method if best.method != "plain" else "suffix+recycling"

    def show(self) -> None:
        from rich.box import SIMPLE
        from rich.table import Table

        if self.scores:
            temperature = self.options["quality_temperature"]
            table = Table(title=f"quality at temperature {temperature:g}", title_justify="left", box=SIMPLE)
            for name in ("suite", "precision", "method", "verifier", "claims"):
                table.add_column(name, overflow="fold")
            for name in ("right", "95 %", "lost", "won", "p", "same text", "perplexity", "mean_accepted"):
                table.add_column(name, justify="right")
            for s in self.scores:
                low_high = "-" if s.interval is None else f"{100 * s.interval[0]:.0f}-{100 * s.interval[1]:.0f} %"
                right = "-" if s.right is None else f"{s.right}/{s.questions}"
                pairs = ("-", "-", "-") if s.right is None else (str(s.lost), str(s.won), f"{s.p:.2g}")
                table.add_row(
                    *(s.suite, s.precision, s.method, s.verifier, s.exactness, right, low_high, *pairs),
                    *(f"{s.same_text}/{s.questions}", f"{s.perplexity:.3f}", f"{s.mean_accepted:.2f}"),
                )
            console().print(table)
            click.echo(
                "right: answers that are right; lost, won: questions that plain decoding got right and this did not, "
                "and the other way round; p: that this comes by chance; perplexity: of the answers, as the target "
                "reads them"
            )
        for s in self.scores:
            if s.right is not None and s.cut:
                way = f"{s.suite}, {s.precision}, {s.method}, {s.verifier}"
                say(f"note: {way}: {s.cut} of {s.questions} answers were cut at --max-tokens; that may be why")
        for precision, value in self.perplexities.items():
            first = next(iter(self.perplexities.values()))
            click.echo(f"perplexity of a fixed text in {precision}: {value:.4f} ({100 * (value / first - 1):+.2f} %)")
        for note in self.notes:
            say(f"note: {note}")

    def to_json(self) -> dict[str, Any]:
        return {
            "scores": [s.to_json() for s in self.scores],
            "perplexity": self.perplexities,
            "notes": self.notes,
            "temperature": self.options["quality_temperature"],
        }


def check_quality_options(options: dict[str, Any], quality: Quality) -> None:
    """Refuse before anything is loaded. Raises MethodError for an unknown verifier, ParameterError for --quality-only
    without anything to measure or together with something else."""
    from ..decoding.methods import make_verifier

    if options["quality_only"]:
        if not quality.suites:
            raise ParameterError("--quality-only needs something to measure: --gsm8k, --humaneval or --perplexity")
        others = {
            "reference": "--reference",
            "save_reference": "--save-reference",
            "checks": "--check",
            "texts": "--texts",
        }
        others |= {"samplers": "--sampler", "temperatures": "--temperature", "quick": "--quick"}
        for option in (option for name, option in others.items() if options[name]):
            raise ParameterError(f"--quality-only leaves out what {option} is for: leave one of them out")
    if not quality.suites:
        return
    for spec in options["quality_verifiers"]:
        if make_verifier(spec).exactness != "approximate":
            raise MethodError(
                f"verifier {spec!r} loses nothing: --quality-verifier names approximate ones, such as topk"
            )


def compare_reference(section: AuditSection, about: dict[str, Any], path: Path) -> Check:
    """This run's plain decoding against that of a saved reference. Raises ParameterError if it is of something else."""
    from ..bench.audit_files import load_reference

    saved = load_reference(path)
    for name, value in about.items():
        if saved.about.get(name) != value:
            raise ParameterError(f"the reference {path} is of {name} {saved.about.get(name)!r}, this run of {value!r}")
    ours = outputs_of(section, about["prompts"])
    common = [key for key in ours if key in saved.outputs]
    if not common:
        raise ParameterError(f"the reference {path} has none of this run's prompts and settings")
    wrong = [key for key in common if saved.outputs[key] != ours[key]]
    said = f"{len(wrong)} of {len(common)} outputs differ" + (f", the first is {wrong[0]}" if wrong else "")
    return Check("file", f"{path.name} (reference)", not wrong, said, {"differing": len(wrong), "outputs": len(common)})


def outputs_of(section: AuditSection, prompts: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    return {
        (prompt, setting): result.token_ids
        for setting, results in section.references.items()
        for prompt, result in zip(prompts, results, strict=True)
    }


def show_checks(checks: Sequence[Check]) -> None:
    """What fails in full, what holds by kind."""
    from rich.markup import escape
    from rich.table import Table

    if not checks:
        return
    table = Table(title="checks", title_justify="left")
    for name in ("kind", "of", "found"):
        table.add_column(name, overflow="fold")
    for kind in dict.fromkeys(check.kind for check in checks):
        mine = [check for check in checks if check.kind == kind]
        failed = [check for check in mine if not check.holds]
        held = [check for check in mine if check.holds]
        for check in failed:
            table.add_row(kind, escape(check.subject), escape(f"FAILED: {check.evidence}"), style="bold red")
        if len(held) > SHOWN:
            worst = _worst(held)
            said = f"{len(held)} checks hold; such as {worst.subject}: {worst.evidence}"
            table.add_row(kind, f"{len(held)} others" if failed else "all", escape(said))
        else:
            for check in held:
                table.add_row(kind, escape(check.subject), escape(check.evidence))
    console().print(table)


def _worst(checks: Sequence[Check]) -> Check:
    """The one nearest to failing: the smallest p-value or the largest distance that was declared to be none."""

    def merit(check: Check) -> float:
        if check.numbers.get("declared") == "approximate":
            return 2.0
        return float(check.numbers.get("p", 1.0 - float(check.numbers.get("total_variation", 0.0))))

    return min(checks, key=merit)


def console() -> Any:
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)
