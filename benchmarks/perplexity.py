"""Perplexity of one model in several precisions on the same text.

    python benchmarks/perplexity.py --model smollm2-135m --precision float32 --precision bfloat16 --precision int8

The text is put together at run time from what every installation has: this project's prompts, and documentation and
source of modules of Python's standard library, in turns, up to 200 KB. It depends on the Python version, which the
result file names together with the text's digest.
"""

from __future__ import annotations

import hashlib
from time import perf_counter
from typing import Any

import click
from common import note, public_name, save, table

from outpace.bench.quality.likelihood import build_text
from outpace.bench.teacher import perplexity
from outpace.engine.llm import LLM

QUESTION = "What does the precision of the arithmetic cost in quality, measured as perplexity on mixed text and code?"


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--precision", "precisions", multiple=True, default=["float32", "bfloat16", "int8"], show_default=True)
@click.option("--size", type=int, default=200_000, show_default=True, help="Characters of text.")
@click.option("--window", type=int, default=2048, show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--name", help="Of the result file.  [default: perplexity-MODEL]")
def main(**options: Any) -> None:
    text = build_text(options["size"])
    rows: dict[str, dict[str, Any]] = {}
    for precision in options["precisions"]:
        with LLM(
            options["model"],
            method="plain",
            precision=precision,
            threads=options["threads"],
            device=options["device"],
            max_batch=1,
        ) as llm:
            tokens = llm.tokenizer.encode(text)
            began = perf_counter()
            for so_far in perplexity(llm.decoder, tokens, window=options["window"], bos=llm.config.bos_id):
                note(f"{precision}: {so_far.tokens}/{len(tokens)} tokens, perplexity {so_far.value:.4f}")
            rows[precision] = {
                "perplexity": round(so_far.value, 5),
                "nll_per_token": round(so_far.nll / so_far.tokens, 7),
                "predictions": so_far.tokens,
                "seconds": round(perf_counter() - began, 2),
                "weight_bytes": llm.decoder.weight_bytes,
            }
    base_name = "bfloat16" if "bfloat16" in rows else next(iter(rows))
    base = rows[base_name]["perplexity"]
    for row in rows.values():
        row[f"against_{base_name}"] = round(row["perplexity"] / base - 1, 6)
    config = {
        "model": public_name(options["model"]),
        "window": options["window"],
        "characters": len(text),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "threads": options["threads"],
    }
    cells = [
        [p, f"{r['perplexity']:.4f}", f"{100 * r[f'against_{base_name}']:+.2f} %", r["predictions"], r["seconds"]]
        for p, r in rows.items()
    ]
    body = table(["precision", "perplexity", f"against {base_name}", "predictions", "seconds"], cells)
    save(options["name"] or f"perplexity-{public_name(options['model'])}", QUESTION, config, rows, body)


if __name__ == "__main__":
    main()
