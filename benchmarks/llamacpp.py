"""Beside llama.cpp: the same file, the same prompts, the same threads, in one run, taking turns prompt by prompt.

    python -m venv peer
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF \
        -DGGML_AMX_BF16=OFF" peer/bin/pip install llama-cpp-python==0.3.36
    python benchmarks/llamacpp.py --model smollm2-135m --peer-python peer/bin/python

llama.cpp runs in a process of its own and gets the prompts as token ids; it waits while Outpace decodes, and the other
way round. It computes with the file's own quantisation (Q4_K_M, Q4_1), Outpace with int8 made from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from common import Tally, in_turns, note, public_name, ratios, save, show_spread, table
from peers import PEER, Peer

from outpace.bench.audit import as_prompt, split_by_length
from outpace.bench.workloads import Prompt, load_prompts, own_prompts, select
from outpace.engine.llm import LLM
from outpace.models.source import resolve
from outpace.types import SamplingParams

QUESTION = "How fast is Outpace beside llama.cpp on the same file, prompts and threads, greedy, one sequence?"


@click.command()
@click.option("--peer-python", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--model", default="smollm2-135m", show_default=True, help="A known name or a GGUF file.")
@click.option("--draft-model")
@click.option("--method", "methods", multiple=True, default=["auto"], show_default=True, help="Repeatable.")
@click.option("--precision", default="int8", show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--prompts", "path", type=click.Path(exists=True, path_type=Path), help="[default: our own sets]")
@click.option("--category", "categories", multiple=True)
@click.option("--n", "per_category", type=int, help="Prompts of each category.  [default: all]")
@click.option("--max-tokens", type=int, default=128, show_default=True)
@click.option("--trials", type=int, default=3, show_default=True)
@click.option("--name", help="Of the result file.  [default: llamacpp-MODEL]")
def main(**options: Any) -> None:
    source = resolve(options["model"])
    if source.kind != "gguf":
        raise click.UsageError(f"{options['model']} is not a GGUF file, which is all that llama.cpp reads")
    params, threads = SamplingParams(max_tokens=options["max_tokens"]), options["threads"]
    loaded = LLM(
        options["model"],
        draft_model=options["draft_model"],
        precision=options["precision"],
        threads=threads,
        max_batch=1,
    )
    llm = loaded.with_method("plain")
    everything = own_prompts() if options["path"] is None else load_prompts(options["path"])
    chosen = select(everything, categories=options["categories"] or None, per_category=options["per_category"])
    prompts, too_long = split_by_length(llm, chosen, params.max_tokens)
    ids = {p.id: llm.tokens(as_prompt(llm, p)) for p in prompts}
    peer = Peer(options["peer_python"], source.path, threads, max(map(len, ids.values())) + params.max_tokens + 8)
    stop = sorted(llm.config.eos_ids)
    ours = {"plain": llm} | {other.method: other for other in map(loaded.with_method, options["methods"])}
    tallies = {name: Tally() for name in (PEER, *ours)}

    def run_ours(name: str) -> Any:
        def once(trial: int, prompt: Prompt) -> None:
            tallies[name].add_result(trial, ours[name].generate([as_prompt(llm, prompt)], params)[0])

        return once

    def run_peer(trial: int, prompt: Prompt) -> None:
        got = peer.generate(ids[prompt.id], params.max_tokens, stop)
        n = len(got["tokens"]) - 1
        tallies[PEER].add(trial, n, got["decode_s"], len(ids[prompt.id]), got["prefill_s"], n)

    note("warming up")
    peer.generate(ids[prompts[0].id], 8, stop)
    for contestant in ours.values():
        contestant.generate([as_prompt(llm, prompts[0])], SamplingParams(max_tokens=8))
    in_turns(options["trials"], prompts, {PEER: run_peer} | {name: run_ours(name) for name in ours})
    peer.close()
    base = tallies[PEER]
    results = {
        "peer": peer.about,
        "contestants": {
            name: {
                **tally.to_json(),
                "against_llamacpp": ratios(tally, base),
                "prefill_against_llamacpp": round(tally.prefill / base.prefill, 4),
            }
            for name, tally in tallies.items()
        },
    }
    rows = [
        [
            name if name == PEER else f"Outpace, {name}",
            show_spread(c["tokens_per_s"]),
            show_spread(c["against_llamacpp"], 2),
            f"{c['prefill_tokens_per_s']:.0f}",
            f"{c['prefill_against_llamacpp']:.2f}",
            f"{c['mean_accepted']:.2f}",
        ]
        for name, c in results["contestants"].items()
    ]
    head = ["engine", "tokens/s", "x llama.cpp", "prefill tokens/s", "x llama.cpp", "mean_accepted"]
    config = {
        "model": public_name(options["model"]),
        "draft_model": public_name(options["draft_model"]),
        "precision": llm.precision,
        "threads": threads,
        "prompts": options["path"].name if options["path"] else "own",
        "categories": sorted({p.category for p in prompts}),
        "prompt_count": len(prompts),
        "left_out_too_long": [p.id for p in too_long],
        "max_tokens": params.max_tokens,
        "trials": options["trials"],
    }
    name = options["name"] or f"llamacpp-{public_name(options['model'])}"
    save(name, QUESTION, config, results, f"{table(head, rows)}\n\n{peer.words}")


if __name__ == "__main__":
    main()
