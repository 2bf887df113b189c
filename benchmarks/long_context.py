"""Which method pays behind a long prompt? Every one over the same document, in turns.

    python benchmarks/long_context.py --tokens 4000

Greedy, one sequence at a time. The document is made of our own long prompts. Each engine reads it once, then it comes
from the prefix cache, and every question about it is decoded by all methods before any of them goes on to the next.
Methods named by hand draft always; those that use the draft model have an engine of their own, and so has `auto`.
A second table has the time of one draft step of `quantspec` by context and by what it reads of the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import RESULTS, Tally, in_turns, note, public_name, ratios, save, show_spread, spread, table

from outpace.bench.audit import first_difference
from outpace.bench.workloads import own_prompts
from outpace.cache.pages import PagedKVCache
from outpace.cache.quantized import QuantizedPages
from outpace.engine.llm import LLM
from outpace.engine.load import LoadedModel, load_draft_model, load_model
from outpace.models.batch import PAGE_SIZE, Span, pack
from outpace.types import RequestOptions, Result, SamplingParams

QUESTION = (
    "Behind a prompt of thousands of tokens a step reads keys and values beside the weights. Which way of drafting "
    "gains by that, and what does a draft save that reads the cache in four or eight bits?"
)
ASKED = (
    "Summarise the texts above in ten sentences.",
    "Quote the opening hours and the rules of the first text, word by word.",
    "List every number of the texts above with what it stands for.",
    "Write a short letter to a newcomer who has read none of this.",
    "Which of the rules above are about safety? Quote each of them.",
)
WITHOUT_DRAFT_MODEL = ("quantspec:kv=bf16", "quantspec:kv=int8", "quantspec:kv=int4", "magicdec", "triforce")
KV = {"bf16": 16, "int8": 8, "int4": 4}


@dataclass
class Contestant:
    """One method, in an engine that others may share."""

    llm: LLM
    method: str | None  # None: the engine's own
    tally: Tally = field(default_factory=Tally)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    decode_s: float = 0.0

    def ask(self, text: str, max_tokens: int) -> Result:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        prompt = [{"role": "user", "content": text}]
        self.llm.submit(prompt, params, options=RequestOptions(method=self.method))
        while True:
            for event in self.llm.step():
                if event.result is not None:
                    return event.result

    def run(self, trial: int, text: str, max_tokens: int) -> None:
        result = self.ask(text, max_tokens)
        self.tally.add_result(trial, result)
        self.outputs[text] = result.token_ids
        self.drafted += result.stats.drafted
        self.accepted += result.stats.accepted
        self.draft_s += result.stats.draft_s
        self.decode_s += result.stats.decode_s

    def to_json(self, plain: Contestant) -> dict[str, Any]:
        return {
            **self.tally.to_json(),
            "speedup": ratios(self.tally, plain.tally),
            "acceptance_rate": round(self.accepted / self.drafted, 4) if self.drafted else None,
            "draft_share": round(self.draft_s / self.decode_s, 4) if self.decode_s else None,
            "differing_sequences": sum(
                first_difference(plain.outputs[text], tokens) is not None for text, tokens in self.outputs.items()
            ),
        }


def document(llm: LLM, tokens: int) -> str:
    """Long prompts of our own, one after the other, cut at the end of a line to about so many tokens."""
    lines = "\n\n".join(prompt.text for prompt in own_prompts(["long-context"])).splitlines()
    while len(llm.tokenizer.encode("\n".join(lines))) > tokens:
        lines = lines[: int(len(lines) * 0.98) - 1]
    return "\n".join(lines)


def enter(
    target: LoadedModel, draft: LoadedModel | None, wanted: tuple[str, ...], kv_tokens: int
) -> dict[str, Contestant]:
    common: dict[str, Any] = {"max_batch": 1, "kv_tokens": kv_tokens}
    alone = [method for method in WITHOUT_DRAFT_MODEL if not wanted or method in wanted]
    base = LLM(target, method="plain", methods=alone, **common)
    found = {"plain": Contestant(base, None), **{method: Contestant(base, method) for method in alone}}
    if draft is not None and (not wanted or "rapid" in wanted):
        found["rapid"] = Contestant(LLM(target, draft_model=draft, method="rapid", **common), None)
    if not wanted or "auto" in wanted:
        found["auto"] = Contestant(LLM(target, method="auto", **common), None)
    return found


def step_times(target: LoadedModel, contexts: list[int], rounds: int) -> dict[str, Any]:
    """Milliseconds of a draft step of one row, {context: {kv: spread}}, cells in turns; the cache holds noise."""
    decoder: Any = target.in_precision("int4")
    cache = PagedKVCache(decoder.new_storage(max(contexts) // PAGE_SIZE + 2))
    storage: Any = cache.storage
    noise = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32).view(np.uint32) >> 16
    storage.keys.reshape(-1)[:] = np.resize(noise.astype(np.uint16), storage.keys.size)
    storage.values.reshape(-1)[:] = np.resize(noise.astype(np.uint16), storage.values.size)
    stores = {kv: QuantizedPages(cache, bits) for kv, bits in KV.items() if bits < 16}
    times: dict[int, dict[str, list[float]]] = {n: {kv: [] for kv in KV} for n in contexts}
    for _ in range(rounds):
        for n in contexts:
            seq = cache.new()
            cache.reserve(seq, n)
            cache.commit(seq, range(n))
            cache.reserve(seq, 1)
            batch = pack([Span([100], n)], cache.page_tables([seq]))
            for kv in KV:
                store = stores.get(kv)
                read = batch if store is None else replace(batch, compact=store.compact([seq], 4))
                decoder.forward(read, storage)
                for _ in range(4):
                    start = time.perf_counter()
                    decoder.forward(read, storage)
                    times[n][kv].append(1e3 * (time.perf_counter() - start))
            cache.free(seq)
    return {str(n): {kv: spread(cell) for kv, cell in row.items()} for n, row in times.items()}


def body(results: dict[str, Any], name: str) -> str:
    rows = [
        [
            f"`{method}`",
            show_spread(m["tokens_per_s"]),
            show_spread(m["speedup"], 2),
            f"{m['mean_accepted']:.2f}",
            "-" if m["acceptance_rate"] is None else f"{m['acceptance_rate']:.2f}",
            f"{100 * (m['draft_share'] or 0):.0f} %",
            m["differing_sequences"],
        ]
        for method, m in results["methods"].items()
    ]
    head = ["method", "tokens/s", "times plain", "mean_accepted", "alpha", "draft share", "differing sequences"]
    steps = [[n, *(show_spread(row[kv]) for kv in KV)] for n, row in results["draft_step_ms"].items()]
    return "\n\n".join(
        [
            f"![times plain decoding, and milliseconds of a draft step]({name}.svg)",
            table(head, rows),
            "A trial is one question. Draft share: of the decoding time. One draft step of `quantspec` (int4 weights, "
            "one row), in milliseconds, by cached tokens and by what it reads of them:",
            table(["context", *(f"kv={kv}" for kv in KV)], steps),
        ]
    )


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    names = sorted(results["methods"], key=lambda n: results["methods"][n]["speedup"]["median"])
    left.barh(names, [results["methods"][n]["speedup"]["median"] for n in names], color="tab:blue", alpha=0.75)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("times plain decoding")
    for kv in KV:
        contexts = [int(n) for n in results["draft_step_ms"]]
        medians = [row[kv]["median"] for row in results["draft_step_ms"].values()]
        right.plot(contexts, medians, "o-", label=f"kv={kv}")
    right.set(xlabel="cached tokens", ylabel="ms of a draft step", ylim=(0, None))
    right.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


@click.command()
@click.option("--model", default="qwen2.5-coder-1.5b", show_default=True)
@click.option("--draft-model", default="qwen2.5-coder-0.5b", show_default=True, help='"none": leave out its methods.')
@click.option("--method", "wanted", multiple=True, help="Repeatable; plain is always in.  [default: all]")
@click.option("--precision", default="int8", show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--tokens", type=int, default=4000, show_default=True, help="Of the document, about.")
@click.option("--questions", type=click.IntRange(1, len(ASKED) - 1), default=len(ASKED) - 1, show_default=True)
@click.option("--max-tokens", type=int, default=64, show_default=True)
@click.option("--context", "contexts", multiple=True, type=int, default=[256, 1024, 4096, 8192], show_default=True)
@click.option("--rounds", type=int, default=6, show_default=True, help="Of the step times.")
@click.option("--name", help="Of the result file.  [default: long-context-MODEL-PRECISION]")
def main(**options: Any) -> None:
    target = load_model(options["model"], precision=options["precision"], threads=options["threads"], device="cpu")
    draft = None
    if options["draft_model"] != "none":
        draft = load_draft_model(options["draft_model"], target, threads=options["threads"])
    note("step times")
    steps = step_times(target, sorted(options["contexts"]), options["rounds"])
    found = enter(target, draft, options["wanted"], 2 * options["tokens"] + 1024)
    text = document(found["plain"].llm, options["tokens"])
    for name, one in found.items():
        note(f"reading the document: {name}")
        one.ask(f"{text}\n\n{ASKED[-1]}", 8)

    def runner(one: Contestant) -> Callable[[int, str], None]:
        # each question is a trial of its own, so the spread is that over questions
        return lambda _, asked: one.run(ASKED.index(asked), f"{text}\n\n{asked}", options["max_tokens"])

    in_turns(1, ASKED[: options["questions"]], {name: runner(one) for name, one in found.items()})
    plain = found["plain"]
    results = {"methods": {name: one.to_json(plain) for name, one in found.items()}, "draft_step_ms": steps}
    config = {
        "model": public_name(options["model"]),
        "draft_model": public_name(options["draft_model"]),
        "precision": options["precision"],
        "threads": options["threads"],
        "prompt_tokens": plain.tally.prompt_tokens // options["questions"],
        "questions": options["questions"],
        "max_tokens": options["max_tokens"],
    }
    name = options["name"] or f"long-context-{public_name(options['model'])}-{options['precision']}"
    save(name, QUESTION, config, results, body(results, name))
    plot(results, RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
