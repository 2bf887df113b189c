"""How much sooner a request answers behind a prefix that is cached: the first token of a hit against that of a miss.

    python benchmarks/prefix_hit.py --model smollm2-135m --model qwen2.5-coder-1.5b

A miss has a prefix of 1,000 tokens that nobody has sent before; a hit has the same prefix as the miss before it and
another question of a few tokens behind it, which neither has had. A second turn sends a whole conversation again, the
answer included, with a new question; its miss is the same conversation on an engine that has never seen it. Misses and
hits take turns. Both by the Python API and over HTTP with streaming.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import click
from common import note, public_name, save, show_spread, spread, table
from servers import Server, free_port, outpace_serve, send

from outpace.bench.workloads import own_prompts
from outpace.engine.llm import LLM
from outpace.errors import OutpaceError
from outpace.types import SamplingParams

QUESTION = "How much sooner does the first token of a request come when its prefix of 1,000 tokens is cached?"
ANSWER = 32  # tokens of the answer in a conversation

#: Prompt ids and tokens wanted -> seconds to the first token, prompt tokens found in the cache, the answer's ids
Ask = Callable[[list[int], int], tuple[float, int, list[int]]]


class Texts:
    """Token ids that no one has seen: words of our own prompts in a new order each time."""

    def __init__(self, llm: LLM) -> None:
        self.rng = random.Random(0)
        self.words = sorted({word for p in own_prompts() for word in p.text.split()})
        self.encode = llm.tokenizer.encode

    def new(self, size: int) -> list[int]:
        found: list[int] = []
        while len(found) < size:
            found += self.encode(" " + " ".join(self.rng.choices(self.words, k=size)))
        return found[:size]


def by_api(llm: LLM) -> Ask:
    def ask(prompt: list[int], tokens: int) -> tuple[float, int, list[int]]:
        began = perf_counter()
        id, first, ids = llm.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True)), 0.0, []
        while not llm.idle:
            for event in llm.step():
                if event.id == id and event.error is None:
                    first = first or perf_counter() - began
                    ids += event.token_ids
                    cached = event.result.stats.cached_tokens if event.result is not None else 0
        return first, cached, ids

    return ask


def by_http(port: int) -> Ask:
    def ask(prompt: list[int], tokens: int) -> tuple[float, int, list[int]]:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        (answer,) = send(port, [(0.0, body)])
        if answer.error is not None:
            raise OutpaceError(answer.error)
        return answer.ttft_s, answer.cached_tokens, []

    return ask


def measure(ask: Ask, texts: Texts, prefix: int, question: int, trials: int, answer: Ask) -> dict[str, Any]:
    """`answer` gives the ids that a conversation goes on with, apart from what is timed."""
    found: dict[str, list[float]] = {"miss": [], "hit": [], "second turn, miss": [], "second turn, hit": []}
    cached: dict[str, list[int]] = {name: [] for name in found}

    def timed(what: str, prompt: list[int]) -> None:
        seconds, hit, _ = ask(prompt, 1)
        found[what].append(seconds)
        cached[what].append(hit)

    for _ in range(2):
        ask(texts.new(prefix), 4)  # warm
    for trial in range(trials):
        shared = texts.new(prefix)
        timed("miss", shared + texts.new(question))
        timed("hit", shared + texts.new(question))
        known = texts.new(prefix - ANSWER)
        known += answer(known, ANSWER)[2]
        timed("second turn, miss", known + texts.new(question))
        first = texts.new(prefix - ANSWER)
        ask(first, ANSWER)
        timed("second turn, hit", first + answer(first, ANSWER)[2] + texts.new(question))
        note(f"trial {trial + 1}/{trials}")
    pairs = {"hit": "miss", "second turn, hit": "second turn, miss"}
    return {
        name: {
            "first_token_s": spread(seconds),
            "cached_tokens": round(median(cached[name])),
            **(
                {"sooner": spread([a / b for a, b in zip(found[pairs[name]], seconds, strict=True)])}
                if name in pairs
                else {}
            ),
        }
        for name, seconds in found.items()
    }


def body(results: dict[str, Any]) -> str:
    rows = [
        [
            model,
            way,
            name,
            show_spread({k: 1e3 * v for k, v in f["first_token_s"].items() if k != "trials"}),
            f["cached_tokens"],
            show_spread(f["sooner"]) if "sooner" in f else "",
        ]
        for model, ways in results["models"].items()
        for way, found in ways.items()
        for name, f in found.items()
    ]
    return table(["model", "by", "request", "first token, ms", "cached tokens", "x sooner"], rows)


@click.command()
@click.option("--model", "models", multiple=True, default=["smollm2-135m", "qwen2.5-coder-1.5b"], show_default=True)
@click.option("--method", default="auto", show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--prefix", type=int, default=1000, show_default=True, help="Shared tokens.")
@click.option("--question", type=int, default=12, show_default=True, help="Tokens behind them.")
@click.option("--trials", type=int, default=5, show_default=True)
@click.option("--name", default="prefix-hit", show_default=True, help="Of the result file.")
def main(**options: Any) -> None:
    size = {name: options[name] for name in ("prefix", "question", "trials")}
    kv_tokens = 4 * (options["prefix"] + options["question"] + 4 * ANSWER)
    found: dict[str, Any] = {}
    for model in options["models"]:
        how: dict[str, Any] = {"method": options["method"], "threads": options["threads"], "kv_tokens": kv_tokens}
        llm = LLM(model, **how)
        texts, unseen = Texts(llm), by_api(LLM(llm.loaded, method="plain", prefix_cache=False, kv_tokens=kv_tokens))
        note(f"{model}, Python")
        ways = {"Python": measure(by_api(llm), texts, **size, answer=unseen)}
        llm.close()
        port = free_port()
        options_of = (
            "--method",
            options["method"],
            "--threads",
            str(options["threads"]),
            "--kv-tokens",
            str(kv_tokens),
        )
        with Server(outpace_serve(model, port, *options_of), port):
            note(f"{model}, HTTP")
            ways["HTTP"] = measure(by_http(port), texts, **size, answer=unseen)
        found[str(public_name(model))] = ways
    config = {name: options[name] for name in ("method", "threads", "prefix", "question", "trials")}
    config |= {"models": list(found), "kv_tokens": kv_tokens, "answer": ANSWER}
    results = {"models": found}
    save(options["name"], QUESTION, config, results, body(results))


if __name__ == "__main__":
    main()
