"""What a step takes beside its kernels: CPU time of the thread that steps the engine, outside the team's compiled jobs.

    python benchmarks/step_python.py --model smollm2-135m

All sequences decode at once, end of text ignored. Both times are CPU time of the one thread that steps (the thread
takes part in the kernels), so that other programs on the machine change them little; of each number of sequences the
median over steps is given, and of the kernel the quickest tenth too, which is what an idle machine shows. What chooses
sampled tokens is a compiled job of the team as well, and has a column of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import thread_time
from typing import Any

import click
from common import note, public_name, save, table

from outpace.bench.workloads import own_prompts
from outpace.engine.llm import LLM
from outpace.ops.cpu import team
from outpace.ops.cpu.compiled import address_of
from outpace.types import SamplingParams

QUESTION = "How much of a step is Python: admission, plan, packing, choice of tokens, text, events, statistics?"
SAMPLERS = {
    "greedy": SamplingParams(ignore_eos=True),
    "temperature 0.8": SamplingParams(ignore_eos=True, temperature=0.8, seed=1),
    "temperature 0.8, top-p 0.95": SamplingParams(ignore_eos=True, temperature=0.8, top_p=0.95, seed=1),
}
PROMPT_TOKENS, WARM = 32, 8  # steps before the first that counts


@dataclass
class Steps:
    """CPU seconds of each measured step."""

    python: list[float] = field(default_factory=list)
    kernel: list[float] = field(default_factory=list)
    choosing: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, float]:
        quick = quantiles(self.kernel, n=10)[0]
        ms = {f"{name}_ms": 1e3 * median(getattr(self, name)) for name in ("python", "kernel", "choosing")}
        ms |= {"quick_python_ms": 1e3 * quantiles(self.python, n=10)[0], "quick_kernel_ms": 1e3 * quick}
        share = {"percent_of_kernel": 100 * ms["python_ms"] / ms["kernel_ms"]}
        share["percent_of_quick_kernel"] = 100 * ms["python_ms"] / ms["quick_kernel_ms"]
        return {name: float(f"{value:.4g}") for name, value in (ms | share).items()}


class Jobs:
    """CPU seconds of this thread in the team's jobs, by kind, since `clear`."""

    def __init__(self, work: Callable[[int, int, int], None]) -> None:
        self._work = work
        self.clear()

    def __call__(self, job: int, control: int, me: int) -> None:
        began = thread_time()
        self._work(job, control, me)
        self.seconds[job] += thread_time() - began

    def clear(self) -> None:
        self.seconds = dict.fromkeys(map(address_of, (team.STEP, team.SAMPLE, team.TOP)), 0.0)


@contextmanager
def watched() -> Iterator[Jobs]:
    """Times the caller's part of each job."""
    before = team.work
    jobs = Jobs(before)
    team.work = jobs
    try:
        yield jobs
    finally:
        team.work = before


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """As many texts of PROMPT_TOKENS tokens, no two alike."""
    text = [id for prompt in own_prompts() for id in llm.tokens(prompt.text)]
    return [text[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(count)]


def measure(llm: LLM, texts: list[list[int]], params: SamplingParams, steps: int) -> Steps:
    """Steps in which all of them decode."""
    ids = [llm.submit(text, params) for text in texts]
    reading, found = set(ids), Steps()
    with watched() as jobs:
        while reading:
            reading -= {event.id for event in llm.step()}
        for i in range(WARM + steps):
            jobs.clear()
            began = thread_time()
            events = llm.step()
            spent = thread_time() - began
            assert len(events) == len(ids), "a sequence has ended: raise max_tokens"
            if i >= WARM:
                found.kernel.append(jobs.seconds[address_of(team.STEP)])
                found.choosing.append(jobs.seconds[address_of(team.SAMPLE)])
                found.python.append(spent - sum(jobs.seconds.values()))
    for id in ids:
        llm.cancel(id)
    return found


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--method", "methods", multiple=True, default=["plain", "auto"], show_default=True)
@click.option("--threads", type=int, help="[default: one per core]")
@click.option("--sequences", "sizes", type=int, multiple=True, default=[1, 8, 32, 64], show_default=True)
@click.option("--steps", type=int, default=100, show_default=True)
@click.option("--name", help="Of the result file.  [default: step-python-MODEL]")
@click.option("--only-print", is_flag=True, help="Write no result file.")
def main(**options: Any) -> None:
    sizes, most = options["sizes"], max(options["sizes"])
    rows: list[list[Any]] = []
    results: dict[str, Any] = {}
    first: LLM | None = None
    longest = PROMPT_TOKENS + 32 * (WARM + options["steps"])
    for method in options["methods"]:
        given = {"method": method, "max_batch": most, "kv_tokens": most * longest, "prefix_cache": False}
        if first is None:
            first = llm = LLM(options["model"], precision=options["precision"], threads=options["threads"], **given)
        else:
            llm = LLM(first.loaded, **given)
        for name, params in SAMPLERS.items():
            for n in sizes:
                limited = SamplingParams(**{**_given(params), "max_tokens": longest - PROMPT_TOKENS})
                got = measure(llm, prompts(llm, n), limited, options["steps"]).to_json()
                results.setdefault(method, {}).setdefault(name, {})[str(n)] = got
                rows.append([method, name, n, *(f"{got[k]:.3g}" for k in _COLUMNS)])
                note(f"{method}, {name}, {n} sequences: {got['python_ms']:.2f} ms")
        llm.close()
    assert first is not None
    config = {
        "model": public_name(options["model"]),
        "precision": first.precision,
        "threads": first.decoder.threads if hasattr(first.decoder, "threads") else 1,
        "prompt_tokens": PROMPT_TOKENS,
        "steps": options["steps"],
    }
    body = table(["method", "sampling", "sequences", *_COLUMNS.values()], rows)
    if options["only_print"]:
        print(body)
    else:
        save(options["name"] or f"step-python-{config['model']}", QUESTION, config, results, body)


_COLUMNS = {
    "python_ms": "Python, ms",
    "kernel_ms": "kernel, ms",
    "choosing_ms": "compiled choice, ms",
    "percent_of_kernel": "Python, % of kernel",
    "percent_of_quick_kernel": "% of a quick one",
}


def _given(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in ("ignore_eos", "temperature", "top_p", "seed")}


if __name__ == "__main__":
    main()
