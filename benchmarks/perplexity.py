"""Perplexity of one model in several precisions on the same text, and the positions where they differ most from the
first one.

    python benchmarks/perplexity.py --model smollm2-135m --precision float32 --precision bfloat16 --precision int8

With `--llama-perplexity PROGRAM`, llama.cpp's program of that name, built by whoever asks, reads the same text from the
same file. Then all are counted as it counts: windows of `--window` tokens, of each the second half.

The text is put together at run time from what every installation has: this project's prompts, and documentation and
source of modules of Python's standard library, in turns, up to 200 KB. It depends on the Python version, which the
result file names together with the text's digest.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click
from common import note, public_name, save, table

from outpace.bench.divergence import diverge, openings
from outpace.bench.quality.likelihood import build_text
from outpace.bench.teacher import of_windows
from outpace.engine.llm import LLM
from outpace.models.source import resolve

QUESTION = "What does the precision of the arithmetic cost in quality, measured as perplexity on mixed text and code?"


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--precision", "precisions", multiple=True, default=["float32", "bfloat16", "int8"], show_default=True)
@click.option("--size", type=int, default=200_000, show_default=True, help="Characters of text.")
@click.option("--window", type=int, default=2048, show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--divergence/--no-divergence", default=True, show_default=True, help="Compare position by position.")
@click.option("--llama-perplexity", "program", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Of the result file.  [default: perplexity-MODEL]")
def main(**options: Any) -> None:
    text, window, program = build_text(options["size"]), options["window"], options["program"]
    if program and resolve(options["model"]).kind != "gguf":
        raise click.UsageError(f"{options['model']} is not a GGUF file, which is all that {program.name} reads")
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
            windows, skip = split(llm, text, window, halves=program is not None)
            began = perf_counter()
            for so_far in of_windows(llm.decoder, windows, skip=skip):
                note(f"{precision}: {so_far.tokens} of {len(text)} characters' tokens, perplexity {so_far.value:.4f}")
            rows[precision] = {
                "perplexity": round(so_far.value, 5),
                "nll_per_token": round(so_far.nll / so_far.tokens, 7),
                "predictions": so_far.tokens,
                "seconds": round(perf_counter() - began, 2),
                "weight_bytes": llm.decoder.weight_bytes,
            }
        if options["divergence"]:
            compare(llms, windows, rows)
    if program:
        rows["llama.cpp"] = by_llama(program, resolve(options["model"]).path, text, window, options["threads"])
        if rows["llama.cpp"]["predictions"] != so_far.tokens:
            raise click.ClickException(
                f"llama.cpp counts {rows['llama.cpp']['predictions']} tokens, not {so_far.tokens}"
            )
    base_name = "bfloat16" if "bfloat16" in rows else next(iter(rows))
    base = rows[base_name]["perplexity"]
    for row in rows.values():
        row[f"against_{base_name}"] = round(row["perplexity"] / base - 1, 6)
    config = {
        "model": public_name(options["model"]),
        "window": window,
        "counted": "the second half of each window" if program else "all",
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


def split(llm: LLM, text: str, window: int, halves: bool) -> tuple[list[list[int]], int]:
    """Windows of a text, and how many predictions of each do not count. With `halves` as llama.cpp's program does it:
    the token that a prompt begins with, if any, stands before the text and takes the place of each window's first one;
    what is left at the end is left out."""
    tokens, bos = llm.tokenizer.encode(text), llm.config.bos_id
    if not halves:
        start = [] if bos is None else [bos]
        return [[*start, *tokens[i : i + window]] for i in range(0, len(tokens), window)], 0
    start = llm.tokenizer.prompt("")
    tokens = [*start, *tokens]
    whole = range(0, len(tokens) - window + 1, window)
    return [[*start, *tokens[i + len(start) : i + window]] for i in whole], window // 2


def by_llama(program: Path, model: Path, text: str, window: int, threads: int) -> dict[str, Any]:
    began = perf_counter()
    with TemporaryDirectory() as folder:
        file = Path(folder, "text")
        file.write_text(text, "utf-8")
        command = [program, "-m", model, "-f", file, "-c", window, "-t", threads]
        note(f"{program.name} reads")
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said = done.stdout + done.stderr
    chunks, final = re.search(r"over (\d+) chunks", said), re.search(r"Final estimate: PPL = ([\d.]+)", said)
    if done.returncode or not chunks or not final:
        raise click.ClickException(f"{program.name} ended with {done.returncode}: {said.strip().splitlines()[-1:]}")
    return {
        "perplexity": float(final[1]),
        "predictions": int(chunks[1]) * (window - 1 - window // 2),
        "seconds": round(perf_counter() - began, 2),
    }


def compare(llms: dict[str, LLM], windows: list[list[int]], rows: dict[str, dict[str, Any]]) -> None:
    """Add to the rows how far each precision is from the first, on the text and on texts without a control token."""
    first = next(iter(llms.values()))
    sets = {
        "divergence": windows,
        "openings": [first.tokenizer.encode(t) for t in openings()],
    }
    for name, sequences in sets.items():
        note(f"{name}: position by position")
        found = diverge({p: llm.decoder for p, llm in llms.items()}, sequences)
        for precision, divergence in found.items():
            rows[precision][name] = divergence.summary(sequences, first.tokenizer.decode)


def worst_positions(rows: dict[str, dict[str, Any]]) -> str:
    """The page's tables of divergence from the first precision."""
    compared = [name for name, row in rows.items() if "divergence" in row]
    if not compared:
        return ""
    reference, *others = compared
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
