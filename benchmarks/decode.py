"""Decoding speed of one model: plain against other methods, its memory ceiling, the cost of rows, and prefill.

    python benchmarks/decode.py --model qwen2.5-coder-1.5b --draft-model qwen2.5-coder-0.5b \
        --prompts spec_bench.jsonl --category coding --category summarization --category writing \
        --edits humaneval.jsonl --name decode-qwen2.5-coder-1.5b-int8

Greedy, one sequence. Every trial starts with fresh drafters: what they learn within a trial comes from its earlier
prompts, never from an earlier answer to the same prompt. All contestants decode a prompt before any of them goes on to
the next one, so that slow drifts of the machine hit all of them. `--edits` adds a second set: each solved function with
a request for a small change.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import numpy as np
from common import Tally, in_turns, note, public_name, ratios, save, show_spread, spread, table

from outpace.bench.audit import as_prompt, first_difference, split_by_length
from outpace.bench.machine import read_bandwidth
from outpace.bench.workloads import Prompt, code_edits, load_prompts, own_prompts, select
from outpace.cache.pages import PAGE_SIZE, PagedKVCache
from outpace.engine.llm import LLM
from outpace.models.batch import Span, pack
from outpace.models.decoder import Decoder
from outpace.types import Result, SamplingParams

QUESTION = (
    "How many tokens a second does greedy decoding of one sequence give, plain and with each method, how near is plain "
    "decoding to the ceiling that memory bandwidth sets, and what does a step cost as a function of its rows?"
)
ROWS = (1, 2, 4, 8, 16, 32)


def step_times(decoder: Decoder, context: int, repeats: int) -> dict[int, list[float]]:
    """Seconds of one target step of n rows, all with logits, after `context` tokens; n takes turns."""
    cache = PagedKVCache(decoder.new_storage(-(-(context + max(ROWS)) // PAGE_SIZE)))
    sequence = cache.new()
    rng = np.random.default_rng(0)

    def forward(tokens: np.ndarray, keep: bool) -> float:
        cache.reserve(sequence, len(tokens))
        batch = pack([Span(tokens, cache.length(sequence))], cache.page_tables([sequence]))
        began = perf_counter()
        float(decoder.forward(batch, cache.storage).logits[-1, 0])  # reading a number waits for the device
        seconds = perf_counter() - began
        if keep:
            cache.commit(sequence, range(len(tokens)))
        else:
            cache.rollback(sequence)
        return seconds

    tokens = rng.integers(10, decoder.config.vocab_size, context + max(ROWS))
    for start in range(0, context, 512):
        forward(tokens[start : min(start + 512, context)], keep=True)
    times: dict[int, list[float]] = {n: [] for n in ROWS}
    for trial in range(repeats + 2):
        for n in ROWS:
            seconds = forward(tokens[context : context + n], keep=False)
            if trial >= 2:
                times[n].append(seconds)
    return times


def prefill_speed(decoder: Decoder, size: int, repeats: int) -> list[float]:
    """Prompt tokens a second of one prompt of `size` tokens in one step, logits of the last row."""
    cache = PagedKVCache(decoder.new_storage(-(-size // PAGE_SIZE)))
    tokens = np.random.default_rng(1).integers(10, decoder.config.vocab_size, size)
    speeds = []
    for trial in range(repeats + 1):
        sequence = cache.new()
        cache.reserve(sequence, size)
        batch = pack([Span(tokens, 0, logits="last")], cache.page_tables([sequence]))
        began = perf_counter()
        float(decoder.forward(batch, cache.storage).logits[-1, 0])
        if trial:
            speeds.append(size / (perf_counter() - began))
        cache.free(sequence)
    return speeds


class Race:
    """Plain and the methods on one set of prompts, with the tokens of all of them kept for comparison."""

    def __init__(self, enter: Callable[[], dict[str, LLM]], params: SamplingParams) -> None:
        self.enter, self.params = enter, params
        self.contestants = enter()
        self.trial = 0
        self.tallies = {name: Tally() for name in self.contestants}
        self.by_category: dict[str, dict[str, Tally]] = {}
        self.outputs: dict[str, dict[str, list[int]]] = {name: {} for name in self.contestants}
        self.context: list[float] = []

    def run(self, prompts: list[Prompt], trials: int) -> None:
        in_turns(trials, prompts, {name: self._runner(name) for name in self.contestants})

    def _runner(self, name: str) -> Any:
        def once(trial: int, prompt: Prompt) -> None:
            if trial != self.trial:
                self.contestants, self.trial = self.enter(), trial
            llm = self.contestants[name]
            result: Result = llm.generate([as_prompt(llm, prompt)], self.params)[0]
            self.tallies[name].add_result(trial, result)
            categories = self.by_category.setdefault(prompt.category, {n: Tally() for n in self.contestants})
            categories[name].add_result(trial, result)
            self.outputs[name][prompt.id] = result.token_ids
            if name == "plain":
                self.context.append(result.stats.prompt_tokens + result.stats.tokens / 2)

        return once

    def differing(self, name: str) -> int:
        """Sequences whose tokens are not those of plain decoding."""
        plain = self.outputs["plain"]
        return sum(first_difference(plain[i], got) is not None for i, got in self.outputs[name].items())

    def to_json(self) -> dict[str, Any]:
        methods = {}
        for name, tally in self.tallies.items():
            methods[name] = {
                **tally.to_json(),
                "speedup": ratios(tally, self.tallies["plain"]),
                "differing_sequences": self.differing(name),
                "by_category": {
                    c: {"tokens_per_s": spread(t[name].per_trial), "speedup": ratios(t[name], t["plain"])}
                    for c, t in self.by_category.items()
                },
            }
        return {"prompts": len(self.outputs["plain"]), "methods": methods}


def race_table(title: str, record: dict[str, Any]) -> str:
    categories = list(record["methods"]["plain"]["by_category"])
    head = ["method", "tokens/s", "speed-up", "mean_accepted", "differing", *(f"{c} x" for c in categories)]
    rows = []
    for name, m in record["methods"].items():
        each = [show_spread(m["by_category"][c]["speedup"], 2) for c in categories]
        rows.append(
            [
                name,
                show_spread(m["tokens_per_s"]),
                show_spread(m["speedup"], 2),
                f"{m['mean_accepted']:.2f}",
                f"{m['differing_sequences']} of {record['prompts']}",
                *each,
            ]
        )
    return f"## {title}, {record['prompts']} prompts\n\n{table(head, rows)}"


def ceiling(decoder: Decoder, context: float, bandwidth: float, plain: float) -> dict[str, Any]:
    """What memory bandwidth allows one sequence at the mean context of the race, and what plain decoding made of it."""
    kv_token = decoder.new_storage(1).bytes_per_page / PAGE_SIZE
    window = decoder.config.sliding_window
    layers = decoder.config.layer_types
    seen = sum(min(context, window) if t == "sliding" and window else context for t in layers) / len(layers)
    size = decoder.weight_bytes + kv_token * seen
    return {
        "weight_bytes": decoder.weight_bytes,
        "kv_bytes": round(kv_token * seen),
        "mean_context": round(context, 1),
        "bandwidth_bytes_per_s": bandwidth,
        "ceiling_tokens_per_s": bandwidth / size,
        "plain_tokens_per_s": plain,
        "fraction": plain * size / bandwidth,
    }


def body(results: dict[str, Any]) -> str:
    c, one = results["ceiling"], median(results["step_s"]["1"])
    parts = [
        race_table("Decoding", results["race"]),
        *([race_table("Edits of given code", results["edits"])] if results.get("edits") else []),
        "## Ceiling\n\n"
        f"A plain step reads {c['weight_bytes'] / 1e6:.0f} MB of weights and {c['kv_bytes'] / 1e6:.1f} MB of KV (mean "
        f"context {c['mean_context']:.0f}); memory reads {c['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s (best of "
        f"{len(results['bandwidth_bytes_per_s'])} probes, {min(results['bandwidth_bytes_per_s']) / 1e9:.1f} to "
        f"{max(results['bandwidth_bytes_per_s']) / 1e9:.1f}). That allows {c['ceiling_tokens_per_s']:.1f} tokens/s; "
        f"plain decoding reaches {c['plain_tokens_per_s']:.1f}, which is {100 * c['fraction']:.0f} %.",
        "## Step time by rows\n\n"
        + table(
            ["rows", "ms", "x one row"],
            [
                [n, f"{1e3 * median(t):.2f} ({1e3 * min(t):.2f}-{1e3 * max(t):.2f})", f"{median(t) / one:.2f}"]
                for n, t in results["step_s"].items()
            ],
        ),
        f"## Prefill\n\n{show_spread(results['prefill_512_tokens_per_s'], 0)} tokens/s for a prompt of 512 tokens; "
        f"{results['race']['methods']['plain']['prefill_tokens_per_s']:.0f} tokens/s over the prompts above.",
    ]
    return "\n\n".join(parts)


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--draft-model")
@click.option("--method", "methods", multiple=True, default=["auto"], show_default=True, help="Repeatable.")
@click.option("--precision", default="int8", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--prompts", "path", type=click.Path(exists=True, path_type=Path), help="[default: our own sets]")
@click.option("--category", "categories", multiple=True, help="Repeatable.  [default: all]")
@click.option("--n", "per_category", type=int, help="Prompts of each category.  [default: all]")
@click.option("--edits", type=click.Path(exists=True, path_type=Path), help="Solved functions, humaneval-style.")
@click.option("--edits-n", type=int, default=12, show_default=True)
@click.option("--max-tokens", type=int, default=128, show_default=True)
@click.option("--trials", type=int, default=3, show_default=True)
@click.option("--step-context", type=int, default=256, show_default=True, help="Cached tokens in the step timing.")
@click.option("--name", help="Of the result file.  [default: decode-MODEL-PRECISION]")
def main(**options: Any) -> None:
    params = SamplingParams(max_tokens=options["max_tokens"], temperature=0.0)
    threads = options["threads"]
    loaded = LLM(
        options["model"],
        draft_model=options["draft_model"],
        precision=options["precision"],
        threads=threads,
        device=options["device"],
        max_batch=1,
    )
    llm = loaded.with_method("plain")
    source = own_prompts() if options["path"] is None else load_prompts(options["path"])
    chosen = select(source, categories=options["categories"] or None, per_category=options["per_category"])
    prompts, too_long = split_by_length(llm, chosen, params.max_tokens)
    device = llm.decoder.device
    probes = read_bandwidth(threads, device)

    def enter() -> dict[str, LLM]:
        others = [loaded.with_method(method) for method in options["methods"]]
        return {"plain": loaded.with_method("plain"), **{other.method: other for other in others}}

    note("warming up")
    for contestant in enter().values():
        contestant.generate([as_prompt(contestant, prompts[0])], SamplingParams(max_tokens=16))
    race = Race(enter, params)
    race.run(prompts, options["trials"])
    results: dict[str, Any] = {"race": race.to_json()}
    if options["edits"]:
        edits = select(code_edits(load_prompts(options["edits"])), total=options["edits_n"])
        second = Race(enter, params)
        second.run(edits, options["trials"])
        results["edits"] = second.to_json()
    note("step times")
    times = step_times(llm.decoder, options["step_context"], 12)
    results["step_s"] = {str(n): [round(s, 7) for s in t] for n, t in times.items()}
    results["prefill_512_tokens_per_s"] = spread(prefill_speed(llm.decoder, 512, options["trials"]))
    probes += read_bandwidth(threads, device)
    results["bandwidth_bytes_per_s"] = [round(p) for p in probes]
    plain = results["race"]["methods"]["plain"]["tokens_per_s"]["median"]
    results["ceiling"] = ceiling(llm.decoder, float(np.mean(race.context)), max(probes), plain)
    config = {
        "model": public_name(llm.name),
        "draft_model": public_name(options["draft_model"]),
        "methods": list(race.contestants),
        "precision": llm.precision,
        "device": device.type,
        "threads": threads,
        "prompts": options["path"].name if options["path"] else "own",
        "categories": sorted({p.category for p in prompts}),
        "left_out_too_long": [p.id for p in too_long],
        "max_tokens": params.max_tokens,
        "trials": options["trials"],
        "step_context": options["step_context"],
    }
    name = options["name"] or f"decode-{public_name(options['model'])}-{llm.precision}"
    save(name, QUESTION, config, results, body(results))


if __name__ == "__main__":
    main()
