"""Does drafting in the background pay on this machine? `draft` in turn with the target against `branch` beside it.

    python benchmarks/overlap.py --model qwen2.5-coder-1.5b --draft-model qwen2.5-coder-0.5b

Greedy, one sequence, a fixed draft length for all. Contestants differ in the threads of target and draft model: taking
turns, both may use every core; side by side they share the cores, or fight for them. All of them decode a prompt before
any of them goes on to the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from common import Tally, in_turns, note, public_name, ratios, save, show_spread, table

from outpace.bench.audit import as_prompt, first_difference, split_by_length
from outpace.bench.machine import usable_cores
from outpace.bench.workloads import Prompt, load_prompts, own_prompts, select
from outpace.decoding.drafters.branch import BranchDraft, Overlap
from outpace.engine.llm import LLM
from outpace.engine.load import LoadedModel, load_model
from outpace.types import SamplingParams

QUESTION = (
    "While the target verifies, a draft model could go on with the next draft. How often is that draft the right one, "
    "how much of the drafting is hidden behind the verification, and is the text ready sooner than with all cores for "
    "one model after the other?"
)


@dataclass
class Contestant:
    """One method with its own share of the cores. Times and counts are over all trials."""

    llm: LLM
    threads: str  # target / draft model in the foreground / in the background
    tally: Tally = field(default_factory=Tally)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    decode_s: float = 0.0

    def run(self, trial: int, prompt: Prompt, params: SamplingParams) -> None:
        result = self.llm.generate([as_prompt(self.llm, prompt)], params)[0]
        self.tally.add_result(trial, result)
        self.outputs[prompt.id] = result.token_ids
        self.drafted += result.stats.drafted
        self.accepted += result.stats.accepted
        self.draft_s += result.stats.draft_s
        self.decode_s += result.stats.decode_s

    @property
    def overlap(self) -> Overlap | None:
        drafters = getattr(self.llm._drafter, "drafters", [self.llm._drafter])
        return next((drafter.overlap for drafter in drafters if isinstance(drafter, BranchDraft)), None)

    def to_json(self, plain: Contestant) -> dict[str, Any]:
        record = {
            "threads": self.threads,
            **self.tally.to_json(),
            "speedup": ratios(self.tally, plain.tally),
            "acceptance_rate": round(self.accepted / self.drafted, 4) if self.drafted else None,
            "draft_share": round(self.draft_s / self.decode_s, 4) if self.decode_s else None,
            "differing_sequences": sum(
                first_difference(plain.outputs[i], tokens) is not None for i, tokens in self.outputs.items()
            ),
        }
        o = self.overlap
        if o is not None and o.drafts:
            hidden = max(o.busy_s - o.waited_s, 0.0)
            record["overlap"] = {
                "hit_rate": round(o.hits / o.drafts, 4),
                "ready_tokens": round(o.ready / o.tokens, 4) if o.tokens else 0.0,
                "background_s": round(o.busy_s, 3),
                "waited_s": round(o.waited_s, 3),
                "hidden_share": round(hidden / o.busy_s, 4) if o.busy_s else 0.0,
                "hidden_share_of_verify": round(hidden / max(self.decode_s - self.draft_s, 1e-9), 4),
            }
        return record


def with_threads(loaded: LoadedModel, threads: int) -> LoadedModel:
    """The same weights on so many threads."""
    decoder = loaded.decoder
    if getattr(decoder, "threads", None) == threads:
        return loaded
    return replace(loaded, decoder=decoder.view(threads))  # type: ignore[attr-defined]


def enter(target: LoadedModel, draft: LoadedModel, cores: int, length: int, reach: float) -> dict[str, Contestant]:
    """Plain, in turn and side by side, with the cores shared out in different ways."""
    options = f"max_tokens={length},min_reach={reach}"

    def one(method: str, of_target: int, of_draft: int = 0, background: int = 0) -> Contestant:
        shares = "/".join(str(n) for n in (of_target, of_draft, background) if n)
        second = with_threads(draft, of_draft) if of_draft else None
        llm = LLM(
            with_threads(target, of_target),
            draft_model=second,
            method=method,
            planner="fixed",
            max_batch=1,
            kv_tokens=4096,
        )
        return Contestant(llm, shares)

    fewer = max(cores - 1, 1)
    return {
        "plain": one("plain", cores),
        "in turn": one(f"draft:{options}", cores, cores),
        "in turn, fewer threads": one(f"draft:{options}", fewer, fewer),
        "side by side": one(f"branch:{options},threads=1", fewer, fewer, 1),
        "side by side, no hedge": one(f"branch:{options},threads=1,hedges=0", fewer, fewer, 1),
        "side by side, all for the target": one(f"branch:{options},threads=1", cores, cores, 1),
    }


def body(results: dict[str, Any]) -> str:
    head = [
        "drafting",
        "threads",
        "tokens/s",
        "speed-up",
        "mean_accepted",
        "alpha",
        "draft share",
        "hits",
        "ready",
        "hidden",
    ]
    rows = []
    for name, m in results.items():
        o = m.get("overlap")
        rows.append(
            [
                name,
                m["threads"],
                show_spread(m["tokens_per_s"]),
                show_spread(m["speedup"], 2),
                f"{m['mean_accepted']:.2f}",
                "-" if m["acceptance_rate"] is None else f"{m['acceptance_rate']:.2f}",
                f"{100 * m['draft_share']:.0f} %",
                *(
                    [f"{100 * o[key]:.0f} %" for key in ("hit_rate", "ready_tokens", "hidden_share")]
                    if o
                    else ["-"] * 3
                ),
            ]
        )
    return "\n\n".join(
        [
            table(head, rows),
            "Threads: target / draft model in the foreground / in the background. Draft share: of the decoding time "
            "that the engine waited for drafts. Hits: drafts begun in the background, of all drafts; ready: their "
            "share of all draft tokens; hidden: background time that nobody waited for.",
        ]
    )


@click.command()
@click.option("--model", default="qwen2.5-coder-1.5b", show_default=True)
@click.option("--draft-model", default="qwen2.5-coder-0.5b", show_default=True)
@click.option("--precision", default="int8", show_default=True)
@click.option("--cores", type=int, help="Threads to share out.  [default: the cores of this process]")
@click.option("--length", type=int, default=5, show_default=True, help="Longest draft, and longest branch.")
@click.option("--min-reach", type=float, default=0.1, show_default=True, help="A draft ends below this probability.")
@click.option("--prompts", "path", type=click.Path(exists=True, path_type=Path), help="[default: our own sets]")
@click.option("--category", "categories", multiple=True, help="Repeatable.  [default: all]")
@click.option("--n", "per_category", type=int, default=2, show_default=True, help="Prompts of each category.")
@click.option("--max-tokens", type=int, default=96, show_default=True)
@click.option("--trials", type=int, default=3, show_default=True)
@click.option("--name", help="Of the result file.  [default: overlap-MODEL-PRECISION]")
def main(**options: Any) -> None:
    cores = options["cores"] or usable_cores()
    params = SamplingParams(max_tokens=options["max_tokens"])
    target, draft = (
        load_model(options[key], precision=options["precision"], threads=cores, device="cpu")
        for key in ("model", "draft_model")
    )
    contestants = enter(target, draft, cores, options["length"], options["min_reach"])
    plain = contestants["plain"]
    source = own_prompts() if options["path"] is None else load_prompts(options["path"])
    chosen = select(source, categories=options["categories"] or None, per_category=options["per_category"])
    prompts, too_long = split_by_length(plain.llm, chosen, params.max_tokens)
    note("warming up")
    for one in contestants.values():
        one.llm.generate([as_prompt(one.llm, prompts[0])], SamplingParams(max_tokens=16))
        if (overlap := one.overlap) is not None:
            overlap.clear()

    def runner(one: Contestant) -> Callable[[int, Prompt], None]:
        return lambda trial, prompt: one.run(trial, prompt, params)

    in_turns(options["trials"], prompts, {name: runner(one) for name, one in contestants.items()})
    results = {name: one.to_json(plain) for name, one in contestants.items()}
    config = {
        "model": public_name(options["model"]),
        "draft_model": public_name(options["draft_model"]),
        "precision": options["precision"],
        "cores": cores,
        "length": options["length"],
        "min_reach": options["min_reach"],
        "prompts": options["path"].name if options["path"] else "own",
        "categories": sorted({p.category for p in prompts}),
        "prompts_run": len(prompts),
        "left_out_too_long": [p.id for p in too_long],
        "max_tokens": params.max_tokens,
        "trials": options["trials"],
    }
    name = options["name"] or f"overlap-{public_name(options['model'])}-{options['precision']}"
    save(name, QUESTION, config, results, body(results))


if __name__ == "__main__":
    main()
