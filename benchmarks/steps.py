"""What a step costs by its rows, a prompt of 512, and the memory's bandwidth, in turns with a llama-bench of one's own.

    python benchmarks/steps.py --model qwen2.5-coder-1.5b --llama-bench llama.cpp/build/bin/llama-bench

Each round measures the memory, then every precision, then llama-bench (one sequence, and a prompt of 512) on the same
file and threads. Nothing is sampled and no token is verified: this is the arithmetic alone.
"""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import click
from common import note, public_name, save, show_spread, spread, table
from decode import prefill_speed, step_times

from outpace.bench.machine import read_bandwidth
from outpace.engine.llm import LLM
from outpace.models.source import resolve

QUESTION = "What does a step cost by its rows, how fast is a prompt read, how near is that to memory and llama.cpp?"
CONTEXT, PROMPT = 128, 512


@click.command(help=__doc__)
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--precision", "precisions", multiple=True, default=["file", "int8"], show_default=True)
@click.option("--llama-bench", "program", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--name", help="Of the result file.  [default: steps-MODEL]")
def main(**options: Any) -> None:
    threads, source = options["threads"], resolve(options["model"])
    if options["program"] and source.kind != "gguf":
        raise click.UsageError(f"{options['model']} is not a GGUF file, which is all that llama-bench reads")
    memory: list[float] = []
    rows: dict[str, dict[int, list[float]]] = {p: {} for p in options["precisions"]}
    prompts: dict[str, list[float]] = {p: [] for p in options["precisions"]}
    peer: dict[str, list[float]] = {"decoding": [], "prompt": []}
    with ExitStack() as stack:
        llms = {
            p: stack.enter_context(LLM(options["model"], method="plain", precision=p, threads=threads, kv_tokens=1024))
            for p in options["precisions"]
        }
        size = {p: llm.decoder.weight_bytes for p, llm in llms.items()}
        for turn in range(options["rounds"]):
            memory += read_bandwidth(threads, repeats=2)
            for p, llm in llms.items():
                note(f"round {turn + 1}/{options['rounds']}: {p}")
                for n, seconds in step_times(llm.decoder, CONTEXT, 4).items():
                    rows[p].setdefault(n, []).append(median(seconds))
                prompts[p] += prefill_speed(llm.decoder, PROMPT, 1)
            if options["program"]:
                note(f"round {turn + 1}/{options['rounds']}: llama-bench")
                by_llama(options["program"], source.path, threads, peer)
    results = {
        "memory_bytes_per_s": spread(memory),
        "steps_s": {p: {n: spread(values) for n, values in found.items()} for p, found in rows.items()},
        "prompt_tokens_per_s": {p: spread(values) for p, values in prompts.items()},
        "weight_bytes": size,
        "llama.cpp": {name: spread(values) for name, values in peer.items()},
    }
    config = {"model": public_name(options["model"]), "threads": threads, "rounds": options["rounds"]}
    config |= {"context": CONTEXT, "prompt": PROMPT}
    save(options["name"] or f"steps-{public_name(options['model'])}", QUESTION, config, results, page(results))


def by_llama(program: Path, model: Path, threads: int, peer: dict[str, list[float]]) -> None:
    """Tokens per second, added to `peer`."""
    command = [program, "-m", model, "-t", threads, "-p", PROMPT, "-n", 32, "-r", 1, "-o", "json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{program.name} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    for test in json.loads(done.stdout):
        peer["decoding" if test["n_gen"] else "prompt"].append(test["avg_ts"])


def page(results: dict[str, Any]) -> str:
    memory = results["memory_bytes_per_s"]["median"]
    head = ["ms a step", "weights, MB", "of bandwidth", *(f"{n} rows" for n in next(iter(results["steps_s"].values())))]
    lines = []
    for p, found in results["steps_s"].items():
        share = results["weight_bytes"][p] / memory / found[1]["median"]
        cells = [show_spread({k: 1e3 * v for k, v in s.items() if k != "trials"}, 1) for s in found.values()]
        lines.append([p, round(results["weight_bytes"][p] / 1e6), f"{100 * share:.0f} %", *cells])
    body = table(head, lines) + f"\n\nMemory: {memory / 1e9:.1f} GB/s, read by all threads in the same rounds.\n\n"
    speeds = [
        [p, f"{1 / found[1]['median']:.1f}", show_spread(results["prompt_tokens_per_s"][p])]
        for p, found in results["steps_s"].items()
    ]
    peer = results["llama.cpp"]
    if peer["decoding"]["median"] is not None:
        speeds.append(["llama.cpp", show_spread(peer["decoding"]), show_spread(peer["prompt"])])
    return body + table(["tokens per second", "one sequence", f"a prompt of {PROMPT}"], speeds)


if __name__ == "__main__":
    main()
