"""What KV policies keep of a long prompt: right answers, bytes, and the speed of the answer, beside the whole cache.

    python benchmarks/kv_policies.py --model qwen2.5-coder-1.5b --tokens 1500

Each prompt hides facts about cities between sentences that say nothing, at a depth, and asks for one of them. All
contestants answer the same prompts, one after the other on each, greedy. The first fact of a prompt is new to all.
"""

from __future__ import annotations

import random
from statistics import fmean
from typing import Any

import click
from common import note, public_name, save, table

from outpace.engine.llm import LLM
from outpace.types import SamplingParams

QUESTION = "How much memory does a KV policy free behind a long prompt, how much faster is the answer, and is it right?"
CITIES = (
    *("Amsterdam", "Boston", "Cairo", "Delhi", "Essen", "Florence", "Ghent", "Hanoi"),
    *("Izmir", "Jena", "Kyoto", "Lima", "Milan", "Nairobi", "Oslo", "Porto"),
)
FILLER = (
    "The weather was mild and the streets were quiet in the early morning.",
    "Several people were reading newspapers on the benches near the river.",
    "A small boat moved slowly past the old warehouses.",
    "The market opened at eight and closed long before sunset.",
    "Nobody remembered who had painted the door of the library green.",
)
POLICIES = ("snapkv", "keydiff", "knorm", "streaming")


def ask(rng: random.Random, sentences: int, depth: float, facts: int) -> tuple[str, str]:
    """A prompt and the number that its answer must have."""
    cities = rng.sample(CITIES, facts)
    numbers = [str(rng.randint(1000, 9999)) for _ in cities]
    text = [rng.choice(FILLER) for _ in range(sentences)]
    for i, (city, number) in enumerate(zip(cities, numbers, strict=True)):
        place = depth if i == 0 else rng.random()
        text.insert(int(place * len(text)), f"The special number of {city} is {number}.")
    return f"{' '.join(text)}\n\nWhat is the special number of {cities[0]}? Answer with the number.", numbers[0]


@click.command(help=__doc__)
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--tokens", type=int, default=3000, show_default=True, help="Of a prompt, about.")
@click.option("--depth", "depths", multiple=True, type=float, default=[0.1, 0.35, 0.6, 0.85], show_default=True)
@click.option("--budget", "budgets", multiple=True, type=float, default=[0.25, 0.5], show_default=True)
@click.option("--n", type=int, default=2, show_default=True, help="Prompts at each depth.")
@click.option("--facts", type=int, default=3, show_default=True, help="In a prompt; one of them is asked for.")
@click.option("--max-tokens", type=int, default=24, show_default=True)
@click.option("--name", help="Of the result file.  [default: kv-MODEL]")
def main(**options: Any) -> None:
    rng = random.Random(1)
    asks = [
        (depth, *ask(rng, options["tokens"] // 13, depth, options["facts"]))
        for _ in range(options["n"])
        for depth in options["depths"]
    ]
    whole = LLM(options["model"], method="plain", max_batch=1, kv_tokens=2 * options["tokens"], prefix_cache=False)
    specs = [f"{name}:budget={budget:g}" for budget in options["budgets"] for name in POLICIES]
    contestants = {"all": whole, **{spec: whole.with_method("plain", kv=spec) for spec in specs}}
    params = SamplingParams(options["max_tokens"], ignore_eos=True)
    rows: list[dict[str, Any]] = []
    for i, (depth, prompt, number) in enumerate(asks):
        for name, llm in contestants.items():
            result = llm.chat(prompt, params)
            stats = result.stats
            rows.append(
                {
                    "kept": name,
                    "depth": depth,
                    "prompt_tokens": stats.prompt_tokens,
                    "right": number in result.text,
                    "freed": stats.kv_freed,
                    "token_s": round(stats.decode_s / (stats.tokens - 1), 6),
                    "first_s": round(stats.time_to_first_token_s, 4),
                }
            )
        note(f"{i + 1}/{len(asks)}")
    config = {key: options[key] for key in ("tokens", "depths", "budgets", "n", "facts", "max_tokens")}
    config |= {"model": public_name(options["model"]), "precision": whole.arithmetic}
    config["bytes_per_token"] = whole._engine.cache.storage.bytes_per_page // 16
    save(
        options["name"] or f"kv-{public_name(options['model'])}",
        QUESTION,
        config,
        {"answers": rows},
        page(rows, config),
    )


def page(rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    base = [row["token_s"] for row in rows if row["kept"] == "all"]
    first = fmean(row["first_s"] for row in rows if row["kept"] == "all")
    lines = []
    for name in dict.fromkeys(row["kept"] for row in rows):
        mine = [row for row in rows if row["kept"] == name]
        ratio = fmean(b / row["token_s"] for b, row in zip(base, mine, strict=True))
        held = fmean(1 - row["freed"] / (config["bytes_per_token"] * row["prompt_tokens"]) for row in mine)
        right = f"{sum(row['right'] for row in mine)} of {len(mine)}"
        extra = f"{fmean(row['first_s'] for row in mine) / first:.2f}"
        lines.append([name, right, f"{100 * held:.0f} %", f"{ratio:.2f}", extra])
    return table(["kept", "right", "memory of the prompt", "times as fast a token", "time to the first token"], lines)


if __name__ == "__main__":
    main()
