"""What does a decoding step of many sequences behind the same prompt cost: pages shared, or each sequence its own?

    python benchmarks/shared_prefix.py --model qwen2.5-coder-1.5b --model smollm2-135m

One row for each sequence, as in decoding without drafts. Shared: all page tables name the same pages of the prompt.
Private: each sequence has its own copy. No prompt: the same rows behind one token, which is what the step costs apart
from attention to the prompt. The three take turns, step by step.
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import numpy as np
from common import note, public_name, save, table

from outpace.bench.machine import read_bandwidth
from outpace.cache.pages import PAGE_SIZE, PagedKVCache
from outpace.engine.load import load_model
from outpace.models.batch import Span, pack
from outpace.models.decoder import Decoder

QUESTION = (
    "Sequences that share a prompt attend to the same keys and values. Are these read from memory once per step for "
    "the whole group, so that a decoding step is cheaper with shared pages than with private ones, and how much of the "
    "step is attention to the prompt?"
)


class Group:
    """Sequences of one kind in one cache, all of them ready for their next row."""

    def __init__(self, decoder: Decoder, cache: PagedKVCache, seqs: list[int]) -> None:
        self.decoder, self.cache, self.seqs = decoder, cache, seqs

    def step(self, n: int) -> float:
        """Seconds of a step of the first `n` sequences; nothing is kept."""
        spans = []
        for i, seq in enumerate(self.seqs[:n]):
            self.cache.reserve(seq, 1)
            spans.append(Span([100 + i], self.cache.length(seq)))
        batch = pack(spans, self.cache.page_tables(self.seqs[:n]))
        began = perf_counter()
        float(self.decoder.forward(batch, self.cache.storage).logits[-1, 0])
        seconds = perf_counter() - began
        for seq in self.seqs[:n]:
            self.cache.rollback(seq)
        return seconds


def groups_of(decoder: Decoder, prompt: int, most: int) -> dict[str, Group]:
    """The prompt is read once; private sequences get copies of its pages, shared ones the pages."""
    pages = -(-prompt // PAGE_SIZE)
    cache = PagedKVCache(decoder.new_storage((most + 1) * (pages + 1) + 2 * most))
    tokens = np.random.default_rng(0).integers(10, decoder.config.vocab_size, prompt)
    first = cache.new()
    for start in range(0, prompt, 512):
        part = tokens[start : start + 512]
        cache.reserve(first, len(part))
        decoder.forward(pack([Span(part, start, logits="last")], cache.page_tables([first])), cache.storage)
        cache.commit(first, range(len(part)))
    shared, private, alone = [], [], []
    for _ in range(most):
        shared.append(cache.fork(first))
        seq = cache.new()
        cache.reserve(seq, prompt)
        source, target = cache.page_table(first).astype(np.int64), cache.page_table(seq).astype(np.int64)
        cache.storage.copy_pages(source, target)
        cache.commit(seq, range(prompt))
        private.append(seq)
        alone.append(cache.new())
    return {
        name: Group(decoder, cache, seqs)
        for name, seqs in (("shared", shared), ("private", private), ("no prompt", alone))
    }


def measure(decoder: Decoder, prompt: int, sizes: list[int], repeats: int) -> dict[str, Any]:
    groups = groups_of(decoder, prompt, max(sizes))
    times: dict[str, dict[str, list[float]]] = {name: {str(n): [] for n in sizes} for name in groups}
    order = [(name, n) for name in groups for n in sizes]
    rng = random.Random(0)
    for trial in range(repeats + 1):
        rng.shuffle(order)  # what a step finds in the processor's caches does not depend on who came before
        for name, n in order:
            seconds = groups[name].step(n)
            if trial:
                times[name][str(n)].append(round(seconds, 6))
    kv_bytes = decoder.new_storage(1).bytes_per_page / PAGE_SIZE * prompt
    return {"kv_bytes_of_prompt": round(kv_bytes), "layers": decoder.config.num_layers, "step_s": times}


def body(results: dict[str, Any]) -> str:
    rows = []
    for model, found in results["models"].items():
        times = found["step_s"]
        for n in times["shared"]:
            shared, private, alone = (median(times[name][n]) for name in ("shared", "private", "no prompt"))
            extra = (int(n) - 1) * found["kv_bytes_of_prompt"]
            rows.append(
                [
                    model,
                    n,
                    *(f"{1e3 * t:.1f} ({1e3 * min(times[name][n]):.1f})" for t, name in (
                        (shared, "shared"), (private, "private"), (alone, "no prompt"))),
                    f"{private / shared:.2f}",
                    f"{100 * (shared - alone) / shared:.0f} %",
                    f"{extra / results['bandwidth_bytes_per_s'] * 1e3:.1f}",
                ]
            )  # fmt: skip
    head = ["model", "sequences", "shared, ms", "private, ms", "no prompt, ms", "private / shared", "attention",
            "reading the copies, ms"]  # fmt: skip
    return (
        f"{table(head, rows)}\n\n"
        "Medians of step times (least in brackets). Attention: part of a step with shared pages that is spent on the "
        "prompt. Reading the copies: bytes of all copies of the prompt's keys and values but one, divided by the "
        f"{results['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s at which this machine reads memory: what private pages "
        "would cost more if the shared ones were read once and all else were equal."
    )


@click.command()
@click.option("--model", "models", multiple=True, default=["qwen2.5-coder-1.5b", "smollm2-135m"], show_default=True)
@click.option("--precision", default="int8", show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--prompt", type=int, default=1000, show_default=True, help="Tokens that all sequences share.")
@click.option("--sequences", "sizes", type=int, multiple=True, default=[8, 16, 32], show_default=True)
@click.option("--repeats", type=int, default=7, show_default=True)
@click.option("--name", default="shared-prefix-int8", show_default=True, help="Of the result file.")
def main(**options: Any) -> None:
    found = {}
    for model in options["models"]:
        note(model)
        decoder = load_model(model, precision=options["precision"], threads=options["threads"], device="cpu").decoder
        found[public_name(Path(model).name)] = measure(
            decoder, options["prompt"], list(options["sizes"]), options["repeats"]
        )
    bandwidth = max(read_bandwidth(options["threads"], decoder.device))
    results = {"models": found, "bandwidth_bytes_per_s": round(bandwidth)}
    config = {name: options[name] for name in ("precision", "threads", "prompt", "repeats")}
    config |= {"models": list(found), "sequences": list(options["sizes"])}
    save(options["name"], QUESTION, config, results, body(results))


if __name__ == "__main__":
    main()
