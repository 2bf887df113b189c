"""Many sequences at once beside llama.cpp: total tokens a second, in one run, taking turns.

    python -m venv peer && peer/bin/pip install llama-cpp-python==0.3.36     # builds for this machine
    python benchmarks/batches.py --model qwen2.5-coder-1.5b --peer-python peer/bin/python --prompts spec_bench.jsonl

Every contestant decodes the same prompts (the same token ids), as many sequences at once as there are prompts, and the
same number of tokens of each, end of text ignored; then the next one has its turn. No prompt comes twice in a run, so
nothing can be drafted or read from an earlier answer. Tokens a second are those while all sequences decode: from the
step in which the last one got its first token to the step in which the first one has all of its tokens. With drafts
some sequences end long before others, and the rest then decode in a smaller batch, where a server would have let the
next ones in; the speed until the last one has all of its tokens is given beside it. Prompts are read in a measurement
of their own. llama.cpp decodes in lock-step by its C functions; it computes with the file's own quantisation, Outpace
with int8 made from it. Without --peer-python Outpace runs alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
from common import RESULTS, note, public_name, save, show_spread, spread, table
from peers import PEER, Peer

from outpace.bench.audit import as_prompt, first_difference
from outpace.bench.workloads import Prompt, load_prompts, own_prompts, select
from outpace.engine.llm import LLM
from outpace.models.source import resolve
from outpace.types import SamplingParams

QUESTION = (
    "How many tokens a second do many sequences get together, beside llama.cpp on the same file, prompts and threads, "
    "and does speculation cost or gain throughput in a batch?"
)
PLAIN, AUTO = "Outpace, plain", "Outpace, auto"
SHORT = ("writing", "reasoning", "coding", "stem", "qa", "humanities", "math", "math_reasoning", "roleplay", "code",
         "chat", "translation", "extraction")  # fmt: skip
#: How wide a batch of prompts is read, and how long a single one is
PROMPT_TOKENS, PROMPTS = 512, 8


@dataclass
class Run:
    """What one contestant did with one batch."""

    tokens_per_s: float  # while all sequences decode
    whole_tokens_per_s: float  # until the last one ends
    outputs: list[list[int]]
    steps: float = 0.0  # of one sequence, on average; 0: not reported


Decode = Callable[[list[list[int]], int], Run]
Read = Callable[[list[list[int]]], float]  # seconds to the first token of the last prompt


def _speed(first: tuple[int, float], last: tuple[int, float]) -> float:
    return (last[0] - first[0]) / (last[1] - first[1])


def ours(llm: LLM) -> tuple[Decode, Read]:
    def decode(prompts: list[list[int]], max_tokens: int) -> Run:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        ids = [llm.submit(prompt, params) for prompt in prompts]
        outputs: dict[int, list[int]] = {id: [] for id in ids}
        count, steps, ended = 0, 0, False
        marks: list[tuple[int, float]] = []  # tokens so far and the time, after each step of all sequences
        while not llm.idle:
            for event in llm.step():
                outputs[event.id] += event.token_ids
                count += len(event.token_ids)
                if event.error is not None:
                    raise event.error
                steps += event.result.stats.steps if event.result is not None else 0
            if not ended and all(outputs.values()):
                marks.append((count, perf_counter()))
                ended = max(map(len, outputs.values())) >= max_tokens
        last = (count, perf_counter())
        return Run(_speed(marks[0], marks[-1]), _speed(marks[0], last), [outputs[id] for id in ids], steps / len(ids))

    def read(prompts: list[list[int]]) -> float:
        began = perf_counter()
        for prompt in prompts:
            llm.submit(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
        while not llm.idle:
            llm.step()
        return perf_counter() - began

    return decode, read


def theirs(peer: Peer) -> tuple[Decode, Read]:
    def decode(prompts: list[list[int]], max_tokens: int) -> Run:
        got = peer.batch(prompts, max_tokens)
        speed = len(prompts) * (max_tokens - 1) / got["decode_s"]  # in lock-step all end together
        return Run(speed, speed, got["outputs"], max_tokens - 1)

    def read(prompts: list[list[int]]) -> float:
        seconds: float = peer.batch(prompts, 1)["prefill_s"]
        return seconds

    return decode, read


@dataclass
class Contest:
    """Contestants taking turns. Figures per number of sequences, one for each trial."""

    contestants: dict[str, tuple[Decode, Read]]
    max_tokens: int
    speeds: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    whole: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    accepted: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    prefill: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    differing: dict[int, int] = field(default_factory=dict)
    compared: int = 0
    _turn: int = 0

    def order(self) -> list[str]:
        names, first = list(self.contestants), self._turn % len(self.contestants)
        self._turn += 1
        return names[first:] + names[:first]

    def decode(self, prompts: list[list[int]]) -> None:
        n, outputs = len(prompts), {}
        for name in self.order():
            run = self.contestants[name][0](prompts, self.max_tokens)
            self.speeds.setdefault(n, {}).setdefault(name, []).append(run.tokens_per_s)
            self.whole.setdefault(n, {}).setdefault(name, []).append(run.whole_tokens_per_s)
            tau = (self.max_tokens - 1) / run.steps if run.steps else 1.0
            self.accepted.setdefault(n, {}).setdefault(name, []).append(tau)
            outputs[name] = run.outputs
        pairs = list(zip(outputs[PLAIN], outputs[AUTO], strict=True))
        self.compared += n
        differing = sum(first_difference(a, b) is not None for a, b in pairs)
        self.differing[n] = self.differing.get(n, 0) + differing

    def read(self, what: str, prompts: list[list[int]]) -> None:
        size = sum(map(len, prompts))
        for name in self.order():
            seconds = self.contestants[name][1](prompts)
            self.prefill.setdefault(what, {}).setdefault(name, []).append(size / seconds)

    def to_json(self) -> dict[str, Any]:
        decode = {}
        for n, speeds in self.speeds.items():
            decode[str(n)] = {
                name: {
                    "tokens_per_s": spread(speeds[name]),
                    **against(speeds, name),
                    "to_the_last_token": {"tokens_per_s": spread(self.whole[n][name]), **against(self.whole[n], name)},
                    "mean_accepted": round(median(self.accepted[n][name]), 3),
                }
                for name in self.contestants
            }
        prefill = {
            what: {name: {"tokens_per_s": spread(speeds[name]), **against(speeds, name)} for name in self.contestants}
            for what, speeds in self.prefill.items()
        }
        differing = {"compared": self.compared, "by_sequences": {str(n): k for n, k in self.differing.items()}}
        return {"decode": decode, "prefill": prefill, "auto_differs_from_plain": differing}


def against(speeds: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Ratios trial by trial: contestants of a trial ran in turns."""
    found = {}
    for key, other in (("against_llamacpp", PEER), ("against_plain", PLAIN)):
        if other in speeds:
            found[key] = spread([a / b for a, b in zip(speeds[name], speeds[other], strict=True)])
    return found


def short_prompts(llm: LLM, prompts: list[Prompt], longest: int) -> list[list[int]]:
    """Token ids of those that are no longer than that."""
    return [ids for p in prompts if len(ids := llm.tokens(as_prompt(llm, p))) <= longest]


def one_of(pool: list[list[int]], size: int, start: int) -> list[int]:
    """A text of exactly `size` tokens: prompts one after the other."""
    found: list[int] = []
    while len(found) < size:
        found += pool[start % len(pool)]
        start += 1
    return found[:size]


def body(results: dict[str, Any], name: str) -> str:
    with_peer = PEER in next(iter(results["decode"].values()))
    head = ["sequences", "engine", "tokens/s", *(["x llama.cpp"] if with_peer else []), "x plain"]
    parts = [f"![tokens a second by number of sequences]({name}.svg)"]

    def row(first: str, contestant: str, c: dict[str, Any], digits: int = 1) -> list[str]:
        ratios = [show_spread(c["against_llamacpp"], 2)] if with_peer else []
        own = "" if contestant == PEER else show_spread(c["against_plain"], 2)
        return [first, contestant, show_spread(c["tokens_per_s"], digits), *ratios, own]

    rows = [
        [*row(n, k, c), *row(n, k, c["to_the_last_token"])[2:], f"{c['mean_accepted']:.2f}"]
        for n, found in results["decode"].items()
        for k, c in found.items()
    ]
    last = [f"to the last token: {head[2]}", *head[3:], "mean_accepted"]
    parts.append(f"## Decoding, all sequences together\n\n{table([*head, *last], rows)}")
    rows = [row(what, k, c, 0) for what, found in results["prefill"].items() for k, c in found.items()]
    parts.append(f"## Reading prompts\n\n{table(['prompts', *head[1:]], rows)}")
    found = results["auto_differs_from_plain"]
    parts.append(
        f"Sequences whose tokens differ between plain and auto: {sum(found['by_sequences'].values())} of "
        f"{found['compared']}."
    )
    return "\n\n".join([*parts, *([results["peer"]] if results.get("peer") else [])])


def plot(results: dict[str, Any], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4))
    sizes = list(results["decode"])
    for name in results["decode"][sizes[0]]:
        found = [results["decode"][n][name]["tokens_per_s"] for n in sizes]
        middle = [f["median"] for f in found]
        errors = [[m - f["min"] for m, f in zip(middle, found, strict=True)],
                  [f["max"] - m for m, f in zip(middle, found, strict=True)]]  # fmt: skip
        axis.errorbar([int(n) for n in sizes], middle, errors, marker="o", capsize=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks([int(n) for n in sizes], sizes)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("sequences at once")
    axis.set_ylabel("tokens/s, all together")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="A known name or a GGUF file.")
@click.option("--draft-model", help="For auto.")
@click.option("--peer-python", type=click.Path(exists=True, path_type=Path), help="Python with llama-cpp-python.")
@click.option(
    "--peer-setting", "settings", multiple=True, help="Of llamacpp_peer.py: --unified, --no-flash. Repeatable."
)
@click.option("--precision", default="int8", show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--sequences", "sizes", type=int, multiple=True, default=[1, 8, 16, 32], show_default=True)
@click.option("--prompts", "path", type=click.Path(exists=True, path_type=Path), help="[default: our own sets]")
@click.option("--category", "categories", multiple=True, help="Repeatable.  [default: those with short prompts]")
@click.option("--longest", type=int, default=200, show_default=True, help="Tokens of a prompt that is decoded.")
@click.option("--max-tokens", type=int, default=64, show_default=True)
@click.option("--trials", type=int, default=3, show_default=True)
@click.option("--name", help="Of the result file.  [default: batches-MODEL]")
def main(**options: Any) -> None:
    source = resolve(options["model"])
    if options["peer_python"] and source.kind != "gguf":
        raise click.UsageError(f"{options['model']} is not a GGUF file, which is all that llama.cpp reads")
    sizes, max_tokens = list(options["sizes"]), options["max_tokens"]
    most = max(*sizes, PROMPTS)
    kv_tokens = most * (max(options["longest"] + max_tokens, PROMPT_TOKENS) // 256 * 256 + 256)
    auto = LLM(
        options["model"], draft_model=options["draft_model"], precision=options["precision"],
        threads=options["threads"], max_batch=most, kv_tokens=kv_tokens, prefix_cache=False,
    )  # fmt: skip
    plain = auto.with_method("plain")
    everything = own_prompts() if options["path"] is None else load_prompts(options["path"])
    wanted = options["categories"] or [c for c in SHORT if any(p.category == c for p in everything)]
    pool = short_prompts(auto, select(everything, categories=wanted, total=len(everything)), options["longest"])
    needed = options["trials"] * sum(sizes) + 2
    if len(pool) < needed:
        raise click.UsageError(
            f"{needed} prompts of at most {options['longest']} tokens are needed, there are {len(pool)}: give more "
            "--prompts or --category, or fewer --trials or --sequences"
        )
    random.Random(0).shuffle(pool)  # each batch is a mixture of the categories
    contestants = {PLAIN: ours(plain), AUTO: ours(auto)}
    peer = None
    if options["peer_python"]:
        peer = Peer(options["peer_python"], source.path, options["threads"], kv_tokens, most, options["settings"])
        contestants = {PEER: theirs(peer), **contestants}
    contest = Contest(contestants, max_tokens)
    note("warming up")
    for decode, read in contestants.values():
        read([one_of(pool, 64, 0)])
        decode(pool[:2], 16)
    at = 2
    for trial in range(options["trials"]):
        contest.read(f"one of {PROMPT_TOKENS} tokens", [one_of(pool, PROMPT_TOKENS, 7 * trial)])
        eight = [one_of(pool, PROMPT_TOKENS // 2, 7 * trial + 3 * i) for i in range(PROMPTS)]
        contest.read(f"{PROMPTS} of {PROMPT_TOKENS // 2} tokens", eight)
        for n in sizes:
            contest.decode(pool[at : at + n])
            at += n
            note(f"trial {trial + 1}/{options['trials']}, {n} sequences")
    results = contest.to_json() | {"peer": peer.words if peer else None, "explained": auto.explain()}
    if peer:
        peer.close()
    config = {
        "model": public_name(options["model"]),
        "draft_model": public_name(options["draft_model"]),
        "method": auto.method,
        "precision": auto.precision,
        "threads": options["threads"],
        "prompts": options["path"].name if options["path"] else "own",
        "categories": wanted,
        "mean_prompt_tokens": round(sum(map(len, pool[2:at])) / (at - 2), 1),
        "max_tokens": max_tokens,
        "trials": options["trials"],
    }
    name = options["name"] or f"batches-{public_name(options['model'])}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    plot(results, RESULTS / f"{name}.svg", f"{config['model']}, {config['threads']} threads")
    save(name, QUESTION, config, results, body(results, name))


if __name__ == "__main__":
    main()
