"""Whether a method is ever slower than plain decoding: many prompts, each decoded once by each, in alternating order.

    python benchmarks/unseen.py --model qwen2.5-coder-1.5b --prompts spec_bench.jsonl --prompts humaneval.jsonl --n 8

No prompt comes twice and nothing runs before the first one, so that what a method learns comes from other prompts, and
its first requests count as a new process has them. Answers take turns at the lengths of `--max-tokens`. A ratio is
plain decoding's seconds over the method's, behind the first token, of one prompt; means are geometric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click
from common import note, public_name, save, table

from outpace.bench.audit import as_prompt, first_difference
from outpace.bench.workloads import Prompt, load_prompts, own_prompts, select
from outpace.engine.llm import LLM
from outpace.types import SamplingParams

QUESTION = (
    "On prompts never seen, each decoded once: how much faster is it than plain decoding, and where is it slower?"
)


@click.command(help=__doc__)
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--draft-model")
@click.option("--head", help="A trained head's file.")
@click.option("--method", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--threads", type=int)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--prompts", "paths", multiple=True, type=click.Path(exists=True, path_type=Path), help="[default: ours]")
@click.option("--n", "per_category", type=int, default=8, show_default=True, help="Prompts of each kind.")
@click.option("--longest", type=int, default=400, show_default=True, help="Tokens of a prompt; longer are left out.")
@click.option("--max-tokens", "lengths", multiple=True, type=int, default=[8, 16, 32, 64, 128], show_default=True)
@click.option("--name", help="Of the result file.  [default: unseen-MODEL]")
def main(**options: Any) -> None:
    prompts = [p for path in options["paths"] for p in load_prompts(path)] if options["paths"] else own_prompts()
    llm = LLM(
        options["model"],
        draft_model=options["draft_model"],
        head=options["head"],
        precision=options["precision"],
        threads=options["threads"],
        method=options["method"],
        max_batch=1,
    )
    contestants = {"plain": llm.with_method("plain"), llm.method: llm}
    short = [p for p in prompts if len(llm.tokens(as_prompt(llm, p))) <= options["longest"]]
    chosen = mixed(select(short, per_category=options["per_category"]))
    lengths, rows = options["lengths"], []
    for i, prompt in enumerate(chosen):
        params = SamplingParams(lengths[i % len(lengths)], temperature=options["temperature"], seed=i)
        order = list(contestants) if i % 2 else [*reversed(contestants)]
        found = {name: contestants[name].generate([as_prompt(llm, prompt)], params)[0] for name in order}
        plain, other = found["plain"], found[llm.method]
        if len(plain.token_ids) < 2:
            continue
        rows.append(
            {
                "prompt": prompt.id,
                "kind": prompt.category,
                "tokens": len(plain.token_ids),
                "asked": params.max_tokens,
                "plain_s": round(plain.stats.decode_s, 5),
                "seconds": round(other.stats.decode_s, 5),
                "ratio": round(plain.stats.decode_s / other.stats.decode_s, 4),
                "tokens_per_step": round(other.stats.mean_accepted, 3),
                "differs": first_difference(plain.token_ids, other.token_ids) is not None,
            }
        )
        so_far = mean([r["ratio"] for r in rows])
        note(f"{i + 1}/{len(chosen)} {prompt.category}: {rows[-1]['ratio']:.2f}, so far {so_far:.3f}")
    keys = ("method", "temperature", "per_category", "longest", "lengths", "threads")
    config = {key: options[key] for key in keys}
    config |= {"model": public_name(options["model"]), "draft_model": options["draft_model"]}
    config |= {"head": options["head"] and Path(options["head"]).name}
    config |= {"precision": llm.arithmetic, "prompts": [path.name for path in options["paths"]]}
    save(options["name"] or f"unseen-{public_name(options['model'])}", QUESTION, config, {"answers": rows}, page(rows))


def mixed(prompts: Sequence[Prompt]) -> list[Prompt]:
    """One of each kind in turns, as requests come."""
    kinds: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.category, []).append(prompt)
    most = max(map(len, kinds.values()))
    return [of[i] for i in range(most) for of in kinds.values() if i < len(of)]


def mean(ratios: Sequence[float]) -> float:
    return math.exp(fmean(map(math.log, ratios)))


def line(name: str, rows: Sequence[dict[str, Any]]) -> list[Any]:
    ratios = [row["ratio"] for row in rows]
    wide = 1.96 * stdev(map(math.log, ratios)) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.inf
    middle = mean(ratios)
    low, high = middle * math.exp(-wide), middle * math.exp(wide) if wide < 10 else math.inf
    whole = sum(row["plain_s"] for row in rows) / sum(row["seconds"] for row in rows)
    below = sum(ratio < 0.98 for ratio in ratios)
    spread = f"{low:.2f}-{high:.2f}"
    return [name, len(rows), f"{middle:.2f}", spread, f"{whole:.2f}", f"{min(ratios):.2f}", below]


def page(rows: list[dict[str, Any]]) -> str:
    head = ["answers", "number", "times plain", "95 %", "of all seconds", "worst answer", "below 0.98"]
    kinds, lengths = sorted({r["kind"] for r in rows}), sorted({r["asked"] for r in rows})
    lines = [line("all", rows), *(line(kind, [r for r in rows if r["kind"] == kind]) for kind in kinds)]
    lines += [line(f"up to {n} tokens", [r for r in rows if r["asked"] == n]) for n in lengths]
    lines.append(line("the first eight", rows[:8]))
    differing = sum(r["differs"] for r in rows)
    return table(head, lines) + f"\n\nAnswers with other tokens than plain decoding's: {differing} of {len(rows)}."


if __name__ == "__main__":
    main()
