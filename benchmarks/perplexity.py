"""Perplexity of one model in several precisions on the same text, and the positions where they differ most from the
first one.

    python benchmarks/perplexity.py --model smollm2-135m --precision float32 --precision bfloat16 --precision int8

The text is put together at run time from what every installation has: this project's prompts, and documentation and
source of modules of Python's standard library, in turns, up to 200 KB. It depends on the Python version, which the
result file names together with the text's digest.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import click
from common import note, public_name, save, table

from outpace.bench.divergence import diverge, openings
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
    with ExitStack() as stack:
        llms = {
            precision: stack.enter_context(
                LLM(
                    options["model"],
                    method="plain",
                    precision=precision,
                    threads=options["threads"],
                    device=options["device"],
                    max_batch=1,
                )
            )
            for precision in options["precisions"]
        }
        for precision, llm in llms.items():
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
        compare(llms, tokens, options["window"], rows)
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
    body += worst_positions(rows)
    save(options["name"] or f"perplexity-{public_name(options['model'])}", QUESTION, config, rows, body)


def compare(llms: dict[str, LLM], tokens: list[int], window: int, rows: dict[str, dict[str, Any]]) -> None:
    """Add to the rows how far each precision is from the first, on the text and on texts without a control token."""
    first = next(iter(llms.values()))
    bos = [] if first.config.bos_id is None else [first.config.bos_id]
    sets = {
        "divergence": [[*bos, *tokens[i : i + window]] for i in range(0, len(tokens), window)],
        "openings": [first.tokenizer.encode(t) for t in openings()],
    }
    for name, sequences in sets.items():
        note(f"{name}: position by position")
        found = diverge({p: llm.decoder for p, llm in llms.items()}, sequences)
        for precision, divergence in found.items():
            rows[precision][name] = divergence.summary(sequences, first.tokenizer.decode)


def worst_positions(rows: dict[str, dict[str, Any]]) -> str:
    """The page's tables of divergence from the first precision."""
    reference, *others = rows
    titles = {
        "divergence": f"## Divergence from {reference}, of the same text (KL in nats for a position)",
        "openings": f"## Divergence from {reference}, of short texts that begin without a control token",
    }
    body = ""
    for name, title in titles.items():
        head = ["precision", "positions", "mean", "median", "99.9 % below", "above 0.1", "worst"]
        keys = ("positions", "mean", "median", "quantile_99.9", "above_0.1")
        cells = [[p, *(rows[p][name][k] for k in keys), rows[p][name]["worst"][0]["kl"]] for p in others]
        body += f"\n\n{title}\n\n{table(head, cells)}"
        for p in others:
            lines = [
                [w["kl"], code(w["context"]), code(w["token"]), w["reference"], w["probability"]]
                for w in rows[p][name]["worst"]
            ]
            body += f"\n\nThe worst of {p}:\n\n"
            body += table(["KL", "behind", "likeliest token", f"by {reference}", f"by {p}"], lines)
    return body


def code(text: str) -> str:
    """A text in a cell of a table."""
    return f"`{json.dumps(text, ensure_ascii=False)[1:-1].replace('`', chr(39)).replace('|', '¦')}`"


if __name__ == "__main__":
    main()
