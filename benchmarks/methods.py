"""Every method side by side: tokens a second by category, against plain decoding, all from one run.

    python benchmarks/methods.py --model qwen2.5-coder-1.5b --draft-model qwen2.5-coder-0.5b \
        --other-draft-model smollm2-135m --prompts spec_bench.jsonl --category coding --category summarization \
        --category writing --edits humaneval.jsonl --per-category 4 --max-tokens 96

One sequence at a time. Every contestant answers a prompt before any of them goes on to the next one, so that slow
drifts of the machine hit all of them, and they take turns in going first. Drafters are fresh at the start; what they
learn comes from earlier prompts, never from an earlier answer to the same prompt. A method that fails is reported as
failing. The text to be edited is given as the prediction, to all methods. `random` are prompts of random tokens,
continued at temperature 1.2: nothing can be drafted there, so plain decoding and auto alone run on them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import RESULTS, note, public_name, save, table, write_page

from outpace.bench.audit import ask, first_difference, split_by_room
from outpace.bench.workloads import Prompt, code_edits, load_prompts, own_prompts, select
from outpace.engine.llm import LLM
from outpace.engine.load import LoadedModel, load_draft_model, load_model
from outpace.engine.needs import ANY_DRAFT_MODEL, DRAFT_MODEL
from outpace.errors import OutpaceError
from outpace.registry import method, methods
from outpace.types import Result, SamplingParams

QUESTION = (
    "What does each method gain over plain decoding on this machine, by kind of text, and does the planner find the "
    "best of them?"
)
AUTO = "auto"
RANDOM = "random"
#: Other settings of a method that stand beside it
VARIANTS = ("recycling:tree=published", "recycling:tree=fitted", "suffix+recycling")
#: Verifiers are shown with drafts that suit them, where the target samples
SAMPLED = (
    ("draft", "rejection"), ("rsd-c", "rejection"), ("rsd-s", "rejection"), ("sjd", "rejection"), ("draft", "block"),
    ("suffix+recycling", "typical"), ("suffix+recycling", "topk"), ("suffix+recycling", "tolerance"),
)  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    spec: str
    verifier: str = "coupled"

    @property
    def name(self) -> str:
        return self.spec if self.verifier == "coupled" else f"{self.spec} / {self.verifier}"


@dataclass
class Cell:
    """One contestant on one category: sums over prompts, and the ratio to plain of each prompt."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    speedups: list[float] = field(default_factory=list)
    differing: int = 0

    def add(self, result: Result, plain: Result, compare: bool) -> None:
        s = result.stats
        self.tokens += max(s.tokens - 1, 0)
        self.seconds += s.decode_s
        self.steps += s.steps
        self.drafted += s.drafted
        self.accepted += s.accepted
        self.draft_s += s.draft_s
        if s.tokens_per_s and plain.stats.tokens_per_s:
            self.speedups.append(s.tokens_per_s / plain.stats.tokens_per_s)
        self.differing += compare and first_difference(plain.token_ids, result.token_ids) is not None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens_per_s": round(self.tokens_per_s, 2),
            "mean_accepted": round(self.tokens / self.steps, 3) if self.steps else None,
            "alpha": round(self.accepted / self.drafted, 4) if self.drafted else None,
            "draft_share": round(self.draft_s / self.seconds, 4) if self.seconds else None,
            "speedup_of_prompts": [round(x, 3) for x in self.speedups],
            "tokens": self.tokens,
            "differing": self.differing,
        }


class Contest:
    """Contestants on one set of prompts at one temperature."""

    def __init__(self, makers: dict[str, Any], params: SamplingParams) -> None:
        self.makers, self.params = makers, params
        self.llms: dict[str, LLM] = {}
        self.failed: dict[str, str] = {}
        self.cells: dict[str, dict[str, Cell]] = {}
        for name, make in makers.items():
            try:
                self.llms[name] = make()
            except OutpaceError as error:
                self.failed[name] = str(error)

    def warm_up(self, prompt: Prompt) -> None:
        for name in list(self.llms):
            self._answer(name, prompt, replace(self.params, max_tokens=12))

    def run(self, prompts: list[Prompt], what: str) -> None:
        for i, prompt in enumerate(prompts):
            names = [n for n in self.llms if n != "plain" and (n == AUTO or prompt.category != RANDOM)]
            order = ["plain", *names[i % max(len(names), 1) :], *names[: i % max(len(names), 1)]]
            if i % 2:
                order = [*order[1:], "plain"]
            answers = {}
            for name in order:
                answer = self._answer(name, prompt, self.params)
                if answer is not None:
                    answers[name] = answer
            for name, answer in answers.items():
                compare = self.llms[name].verifier == "coupled"
                cell = self.cells.setdefault(name, {}).setdefault(prompt.category, Cell())
                cell.add(answer, answers["plain"], compare)
            note(f"{what}: prompt {i + 1}/{len(prompts)}, {len(answers)} contestants")

    def _answer(self, name: str, prompt: Prompt, params: SamplingParams) -> Result | None:
        llm = self.llms[name]
        if prompt.category == RANDOM:
            params = replace(params, temperature=1.2, ignore_eos=True)
            question: Any = [int(t) for t in prompt.text.split()]
        else:
            question = ask(llm, prompt)
        code = re.search(r"```python\n(.*)```", prompt.text, re.DOTALL) if prompt.category == "code-edit" else None
        try:
            return llm.generate([question], params, prediction=code[1] if code else "")[0]
        except OutpaceError as error:
            self.failed[name] = str(error)
        except Exception as error:  # a method that breaks is a finding, and the others go on
            self.failed[name] = f"{type(error).__name__}: {error}"
        del self.llms[name]
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "methods": {n: {c: cell.to_json() for c, cell in cells.items()} for n, cells in self.cells.items()},
            "failed": self.failed,
            "explained": self.llms[AUTO].explain() if AUTO in self.llms else [],
        }


def contestants(has_draft: bool, has_other: bool, wanted: tuple[str, ...], sampled: bool) -> list[Contestant]:
    """Every registered drafter whose needs can be met, variants, and where the target samples the other verifiers."""
    if wanted:
        specs = list(wanted)
    else:
        found = [m for m in methods("drafter") if m.name != "plain"]
        specs = [m.name for m in found if met(m.needs, has_draft, has_other)] + list(VARIANTS)
    chosen = [Contestant("plain"), Contestant(AUTO), *(Contestant(s) for s in specs if s not in ("plain", AUTO))]
    if sampled and not wanted:
        names = {m.name for m in methods("drafter")}
        judges = {m.name for m in methods("verifier")}
        chosen += [
            Contestant(s, v)
            for s, v in SAMPLED
            if v in judges and all(n in names for n in s.split("+")) and (has_draft or "suffix" in s or s == "sjd")
        ]
    return chosen


def met(needs: tuple[str, ...], has_draft: bool, has_other: bool) -> bool:
    return (DRAFT_MODEL not in needs or has_draft) and (ANY_DRAFT_MODEL not in needs or has_other)


def maker(one: Contestant, loaded: LoadedModel, draft: LoadedModel | None, other: LoadedModel | None) -> Any:
    def make() -> LLM:
        mine = draft
        if one.spec not in ("plain", AUTO):
            needs = {need for part in one.spec.split("+") for need in method(part.split(":")[0], "drafter").needs}
            mine = other if ANY_DRAFT_MODEL in needs else draft if DRAFT_MODEL in needs else None
        elif one.spec == "plain":
            mine = None
        return LLM(
            loaded, draft_model=mine, method=one.spec, verifier=one.verifier, max_batch=1, kv_tokens=4096
        )  # fmt: skip

    return make


def random_prompts(vocab_size: int, count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(f"random-{i}", RANDOM, (" ".join(map(str, rng.integers(1000, vocab_size // 2, 64))),))
        for i in range(count)
    ]


def best_single(record: dict[str, Any], category: str) -> tuple[str, float]:
    """The fastest lossless method but auto."""
    speeds = {
        n: c[category]["tokens_per_s"]
        for n, c in record["methods"].items()
        if n != AUTO and " / " not in n and category in c
    }
    return max(speeds.items(), key=lambda item: item[1])


def summarise(record: dict[str, Any], categories: list[str]) -> dict[str, Any]:
    """How auto compares with the best single method, and all with plain, category by category."""
    by_category = {}
    for c in categories:
        if c not in record["methods"].get(AUTO, {}):
            continue
        name, speed = best_single(record, c)
        mine, plain = record["methods"][AUTO][c]["tokens_per_s"], record["methods"]["plain"][c]["tokens_per_s"]
        by_category[c] = {"best": name, "auto_of_best": round(mine / speed, 4), "auto_speedup": round(mine / plain, 4)}
    drafted = [c for c in by_category if c != RANDOM]
    overall = {
        n: overall_speedup(record, n, drafted)
        for n, cells in record["methods"].items()
        if all(c in cells for c in drafted)
    }
    return {"by_category": by_category, "overall_speedup": overall}


def overall_speedup(record: dict[str, Any], name: str, categories: list[str]) -> float:
    """All tokens over all the time they took, against plain decoding's."""

    def speed(of: str) -> float:
        cells = [record["methods"][of][c] for c in categories]
        seconds = sum(c["tokens"] / c["tokens_per_s"] for c in cells if c["tokens_per_s"])
        return sum(c["tokens"] for c in cells) / seconds if seconds else 0.0

    return round(speed(name) / speed("plain"), 4)


def total(cells: dict[str, Any], categories: list[str]) -> dict[str, float]:
    """Sums over categories of one method."""
    kept = [cells[c] for c in categories if c in cells and cells[c]["tokens_per_s"]]
    tokens = sum(c["tokens"] for c in kept)
    seconds = sum(c["tokens"] / c["tokens_per_s"] for c in kept)
    steps = sum(c["tokens"] / c["mean_accepted"] for c in kept)
    drafting = sum(c["draft_share"] * c["tokens"] / c["tokens_per_s"] for c in kept)
    return {"tau": tokens / steps, "draft_share": drafting / seconds, "speed": tokens / seconds}


def why_slower(speedup: float, sums: dict[str, float]) -> str:
    """Where the time of a method goes that is no faster than plain decoding."""
    if speedup >= 1.03:
        return ""
    if sums["draft_share"] > 0.35:
        return f"drafting takes {sums['draft_share']:.0%} of the time for {sums['tau'] - 1:.1f} tokens more a step"
    if sums["tau"] < 1.25:
        return f"hardly a draft is accepted ({sums['tau']:.2f} tokens a step)"
    return f"its rows cost more than the {sums['tau'] - 1:.1f} tokens more a step are worth"


def claim_of(name: str) -> str:
    """What the authors report of the methods in a contestant's name."""
    spec, _, judge = name.partition(" / ")
    if spec == AUTO:
        return ""
    parts = [method(part.split(":")[0], "drafter") for part in spec.split("+")]
    found = [m.claim for m in parts] if len(parts) == 1 or judge else []
    return "; ".join(filter(None, [method(judge, "verifier").claim] if judge else found)) or "-"


def body_of(record: dict[str, Any], categories: list[str], title: str) -> str:
    """Table and findings of one temperature."""
    drafted = [c for c in categories if c != RANDOM]
    head = [
        "method", "x plain", *(f"{c}: tokens/s" for c in categories), "x plain, each", "tau, each", "alpha, each",
        "draft time, each", "its authors report", "why it loses here",
    ]  # fmt: skip
    rows = []
    overall = record["summary"]["overall_speedup"]
    for name, cells in sorted(record["methods"].items(), key=lambda item: -overall.get(item[0], 0)):
        each = [f"{cells[c]['tokens_per_s']:.1f}" if c in cells else "-" for c in categories]

        def joined(key: str, digits: int = 2, cells: dict[str, Any] = cells) -> str:
            values = [cells[c][key] for c in drafted if c in cells]
            return " · ".join("-" if v is None else f"{v:.{digits}f}" for v in values)

        plain = record["methods"]["plain"]
        ratio = " · ".join(f"{cells[c]['tokens_per_s'] / plain[c]['tokens_per_s']:.2f}" for c in drafted if c in cells)
        speedup = overall.get(name, 0.0)
        why = "" if name in ("plain", AUTO) else why_slower(speedup, total(cells, drafted))
        rows.append([f"`{name}`", f"{speedup:.2f}", *each, ratio, joined("mean_accepted"), joined("alpha"),
                     joined("draft_share"), claim_of(name), why])  # fmt: skip
    text = f"## {title}\n\n{table(head, rows)}\n\n`each`: of the categories in their order, {', '.join(drafted)}. "
    text += "tau: tokens a step; alpha: accepted share of drafted tokens; draft time: share of the decoding time."
    found = record["summary"]["by_category"]
    text += "\n\n" + table(
        ["category", "best single method", "auto / best", "auto / plain"],
        [[c, f"`{f['best']}`", f"{f['auto_of_best']:.3f}", f"{f['auto_speedup']:.2f}"] for c, f in found.items()],
    )
    if record["explained"]:
        text += "\n\nWhat auto did:\n\n" + "\n".join(f"- {line}" for line in record["explained"])
    if record["failed"]:
        text += "\n\nFailed: " + "; ".join(f"`{n}`: {why}" for n, why in record["failed"].items())
    differing = {n: sum(c["differing"] for c in cells.values()) for n, cells in record["methods"].items()}
    wrong = {n: k for n, k in differing.items() if k}
    text += f"\n\nAnswers that differ from plain decoding's where they must not: {wrong or 'none'}."
    return text


def page(results: dict[str, Any], categories: list[str], name: str) -> str:
    bodies = [body_of(record, categories, f"Temperature {t}") for t, record in results.items()]
    return f"![times plain decoding]({name}.svg)\n\n" + "\n\n".join(bodies)


def plot(results: dict[str, Any], categories: list[str], path: Path, model: str) -> None:
    """A dot for each method and category: times plain decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(6.5 * len(results), 9), squeeze=False)
    for axis, (temperature, record) in zip(axes[0], results.items(), strict=True):
        overall = record["summary"]["overall_speedup"]
        names = sorted(record["methods"], key=lambda n: overall.get(n, 0))
        for c, marker in zip(categories, "osD^vPX", strict=False):
            plain = record["methods"]["plain"].get(c)
            shown = [(i, record["methods"][n][c]) for i, n in enumerate(names) if c in record["methods"][n]]
            if plain:
                axis.plot(
                    [cell["tokens_per_s"] / plain["tokens_per_s"] for _, cell in shown], [i for i, _ in shown], marker,
                    label=c, alpha=0.75,
                )  # fmt: skip
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("times plain decoding")
        axis.set_title(f"{model}, temperature {temperature}")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--draft-model", help="Of the same vocabulary.")
@click.option("--other-draft-model", help="Of another vocabulary.")
@click.option("--method", "wanted", multiple=True, help="Repeatable.  [default: all that can run]")
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[0.0, 0.8], show_default=True)
@click.option("--precision", default="int8", show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--prompts", "path", type=click.Path(exists=True, path_type=Path), help="[default: our own sets]")
@click.option("--category", "categories", multiple=True, help="Repeatable.  [default: all]")
@click.option("--per-category", type=int, default=4, show_default=True)
@click.option("--edits", type=click.Path(exists=True, path_type=Path), help="Solved functions, humaneval-style.")
@click.option("--max-tokens", type=int, default=96, show_default=True)
@click.option("--name", help="Of the result file.  [default: methods-MODEL-PRECISION]")
@click.option("--rewrite", is_flag=True, help="Only write the page and plot of --name anew, from its result file.")
def main(**options: Any) -> None:
    if options["rewrite"]:
        stored = json.loads((RESULTS / f"{options['name']}.json").read_text("utf-8"))
        names = stored["config"]["categories"]
        plot(stored["results"], names, RESULTS / f"{stored['name']}.svg", stored["config"]["model"])
        write_page(stored, page(stored["results"], names, stored["name"]))
        return
    how = {"precision": options["precision"], "threads": options["threads"]}
    loaded = load_model(options["model"], **how)
    threads = options["threads"]
    draft, other = (
        load_draft_model(options[name], loaded, threads=threads) if options[name] else None
        for name in ("draft_model", "other_draft_model")
    )
    count = options["per_category"]
    source = own_prompts() if options["path"] is None else load_prompts(options["path"])
    chosen = select(source, categories=options["categories"] or None, per_category=count)
    if options["edits"]:
        chosen += select(code_edits(load_prompts(options["edits"])), total=count)
    probe = LLM(loaded, method="plain", max_batch=1, kv_tokens=4096)
    prompts, too_long = split_by_room(probe, chosen, options["max_tokens"])
    prompts += random_prompts(loaded.config.vocab_size, count)
    names = list(dict.fromkeys(p.category for p in prompts))
    results: dict[str, Any] = {}
    for temperature in options["temperatures"]:
        params = SamplingParams(max_tokens=options["max_tokens"], temperature=temperature, seed=1)
        entered = contestants(draft is not None, other is not None, options["wanted"], temperature > 0)
        contest = Contest({one.name: maker(one, loaded, draft, other) for one in entered}, params)
        note("warming up")
        contest.warm_up(prompts[0])
        contest.run(prompts, f"temperature {temperature:g}")
        record = contest.to_json()
        record["summary"] = summarise(record, names)
        results[f"{temperature:g}"] = record
        for llm in contest.llms.values():
            llm.close()
    config = {
        "model": public_name(options["model"]),
        "draft_model": public_name(options["draft_model"]),
        "other_draft_model": public_name(options["other_draft_model"]),
        "precision": options["precision"],
        "threads": options["threads"],
        "prompts": options["path"].name if options["path"] else "own",
        "categories": names,
        "per_category": count,
        "left_out_too_long": [p.id for p in too_long],
        "max_tokens": options["max_tokens"],
    }
    name = options["name"] or f"methods-{public_name(options['model'])}-{options['precision']}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    plot(results, names, RESULTS / f"{name}.svg", str(config["model"]))
    save(name, QUESTION, config, results, page(results, names, name))


if __name__ == "__main__":
    main()
