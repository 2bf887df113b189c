"""What this machine makes of a model: memory bandwidth, step times, what drafters cost and bring. It is kept beside the
models, and read as the planner reads it.

Units: seconds, bytes, tokens. Shapes: `n` draft rows, `b` sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..decoding.planners.costs import StepCosts
from ..engine.busy import watched
from ..engine.kept import read_kept, say_damaged, write_kept
from ..engine.measure import costs_of, costs_to_json, machine_digest, step_costs
from ..errors import MethodError
from ..models.batch import PAGE_SIZE, Span, pack
from ..paths import cache_dir
from ..registry import methods
from ..types import SamplingParams
from .machine import read_bandwidth, usable_cores
from .workloads import Prompt

if TYPE_CHECKING:
    from ..engine.llm import LLM

BATCHES, DRAFTS = (1, 8, 16), (1, 3, 7, 15)
CONTEXT = 256  # cached tokens behind which steps are judged
_PREFILL_ROWS, _PREFILL_ROUNDS = 512, 4
_FORMAT = 2
_EXACT = 1.1  # how exact a measured bandwidth is

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class DrafterCost:
    """One drafter over the tuning prompts. `draft_s` of drafting and `step_s` of the whole step, both for one step of
    one sequence; `gained` accepted draft tokens a step; `rows` drafted."""

    method: str
    draft_s: float
    step_s: float
    rows: float
    gained: float

    def speedup(self, plain_s: float) -> float:
        """Over plain decoding, whose token takes `plain_s`."""
        return (1 + self.gained) * plain_s / self.step_s if self.step_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured. `bandwidth` bytes a second; `weight_bytes` read by a step; `kv_bytes` of one cached token;
    `operations` multiplications and additions for one row, weights alone; `prefill_s` of a step of `prefill_rows` rows
    of a prompt; `plain_s` a step of plain decoding as it ran beside the drafters, sampling and all; `skipped` (method,
    why it was not measured). `busy`: what else the machine did meanwhile, if that was too much for the figures to be
    believed or kept."""

    model: str
    precision: str
    threads: int
    bandwidth: float
    weight_bytes: int
    kv_bytes: int
    operations: int
    prefill_rows: int
    prefill_s: float
    plain_s: float
    costs: StepCosts
    drafters: tuple[DrafterCost, ...]
    skipped: tuple[tuple[str, str], ...] = field(default=())
    busy: str = ""

    @property
    def possible(self) -> bool:
        """Whether the steps are no faster than memory was measured to allow. Else the weights lie in the processor's
        cache, or memory was measured while somebody else used it."""
        return self.floor() <= _EXACT * self.costs.step(1, CONTEXT)

    def floor(self, context: float = CONTEXT) -> float:
        """Seconds that reading the weights and the cache once takes at least."""
        return (self.weight_bytes + context * self.kv_bytes) / self.bandwidth

    @property
    def peak(self) -> float:
        """Operations a second that the kernels reach in a prompt: the ceiling of steps of many rows."""
        return self.operations * self.prefill_rows / self.prefill_s

    def to_json(self) -> dict[str, Any]:
        costs = costs_to_json(self.costs)
        drafters = [asdict(drafter) for drafter in self.drafters]
        plain = {name: getattr(self, name) for name in _PLAIN}
        skipped = [list(pair) for pair in self.skipped]
        return {**plain, "costs": costs, "drafters": drafters, "skipped": skipped, "busy": self.busy}


_PLAIN: dict[str, type] = {
    "model": str, "precision": str, "threads": int, "bandwidth": float, "weight_bytes": int, "kv_bytes": int,
    "operations": int, "prefill_rows": int, "prefill_s": float, "plain_s": float,
}  # fmt: skip


def of_json(stored: Any) -> Tuning:
    """Raises ValueError, with the reason, for anything but `to_json`."""
    if not isinstance(stored, dict) or stored.keys() != {*_PLAIN, "costs", "drafters", "skipped", "busy"}:
        raise ValueError("other fields than a tuning has")
    for name, kind in _PLAIN.items():
        value = stored[name]
        if kind is str:
            right = isinstance(value, str)
        elif kind is int:
            right = type(value) is int and 0 <= value < 1e18
        else:
            right = _is_number(value)
        if not right:
            raise ValueError(f"{name} is {value!r}")
    drafters = [_drafter_of(one) for one in _list(stored["drafters"])]
    skipped = [(str(a), str(b)) for a, b in map(_list, _list(stored["skipped"]))]
    plain = {name: stored[name] for name in _PLAIN}
    return Tuning(**plain, costs=costs_of(stored["costs"]), drafters=tuple(drafters), skipped=tuple(skipped))


def _drafter_of(stored: Any) -> DrafterCost:
    if not isinstance(stored, dict) or stored.keys() != {f.name for f in fields(DrafterCost)}:
        raise ValueError("a drafter has other fields")
    if not isinstance(stored["method"], str) or not all(_is_number(x, 0) for n, x in stored.items() if n != "method"):
        raise ValueError("a drafter's figures are numbers")
    return DrafterCost(**stored)


def _is_number(value: Any, least: float = 1e-12) -> bool:
    return type(value) in (int, float) and least <= value < 1e18


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:40]!r} is no list")
    return value


# -- measuring ------------------------------------------------------------------------------------------------------


def tune(
    llm: LLM, prompts: Sequence[Prompt], names: Iterable[str] | None = None, max_tokens: int = 48, *,
    again: bool = False, progress: Progress = lambda what, done, total: None,
) -> Tuning:  # fmt: skip
    """What was kept of this machine, model and number of threads, or everything anew (`again`, or if nothing was kept):
    memory and steps in the same seconds, so that one can be held against the other. What was measured while something
    else kept the machine busy is not kept, and `busy` says so.

    `names`: drafters to measure, by default all that need nothing but the model at hand; those that were kept are not
    measured again. Takes a minute with a small model."""
    path, kept = tuning_path(llm), None
    if not again:
        kept = _read(path, llm.name)
    chosen = list(names) if names is not None else [m.name for m in methods("drafter") if m.exactness != "approximate"]
    chosen = [name for name in dict.fromkeys(chosen) if name != "plain"]
    have = {d.method for d in kept.drafters} | {name for name, _ in kept.skipped} if kept is not None else set()
    missing = [name for name in chosen if name not in have]
    total = len(missing) + (3 if kept is None else 0)
    with watched(_threads(llm)) as load:
        kept = _measured(llm, kept, missing, prompts, max_tokens, total, progress)
    progress("", total, total)
    if load.busy:
        kept = replace(kept, busy=str(load))
    elif total:
        write_kept(path, kept.to_json())
    return replace(
        kept,
        drafters=tuple(d for d in kept.drafters if d.method in chosen),
        skipped=tuple(pair for pair in kept.skipped if pair[0] in chosen),
    )


def _measured(
    llm: LLM, kept: Tuning | None, missing: Sequence[str], prompts: Sequence[Prompt], max_tokens: int, total: int,
    progress: Progress,
) -> Tuning:  # fmt: skip
    """What was kept, and what is missing of it."""
    if kept is None:
        kept = _measure(llm, total, progress)
    done = total - len(missing)
    if missing:
        plain = _drafter(llm, "plain", prompts, max_tokens)
        drafters, skipped = list(kept.drafters), list(kept.skipped)
        for name in missing:
            progress(name, done, total)
            try:
                drafters.append(_drafter(llm, name, prompts, max_tokens))
            except MethodError as error:
                skipped.append((name, str(error)))
            done += 1
        kept = replace(kept, plain_s=plain.step_s, drafters=tuple(drafters), skipped=tuple(skipped))
    return kept


def _threads(llm: LLM) -> int:
    return int(getattr(llm.decoder, "threads", usable_cores()))


def _measure(llm: LLM, total: int, progress: Progress) -> Tuning:
    """Memory before and after the steps, whose times are measured again wherever the engine has some."""
    decoder, threads = llm.decoder, _threads(llm)
    progress("memory bandwidth", 0, total)
    before = read_bandwidth(threads, decoder.device, size=1 << 28)
    progress("step times", 1, total)
    costs = step_costs(decoder, llm.name, again=True)
    progress("prompts", 2, total)
    rows, prefill_s = _prefill(llm)
    bandwidth = max(*before, *read_bandwidth(threads, decoder.device, size=1 << 28))
    storage = decoder.new_storage(1)
    config = decoder.config
    layer = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    weights = config.num_layers * (layer + 3 * config.hidden_size * config.intermediate_size)
    return Tuning(
        model=llm.name,
        precision=llm.precision,
        threads=threads,
        bandwidth=bandwidth,
        weight_bytes=decoder.weight_bytes,
        kv_bytes=storage.bytes_per_page // PAGE_SIZE,
        operations=2 * weights,
        prefill_rows=rows,
        prefill_s=prefill_s,
        plain_s=costs.step(1, CONTEXT),
        costs=costs,
        drafters=(),
    )


def _prefill(llm: LLM) -> tuple[int, float]:
    """(rows, the least seconds) of reading a prompt of that many tokens in one step."""
    decoder = llm.decoder
    rows = min(_PREFILL_ROWS, decoder.config.max_position // 2)
    pages = -(-rows // PAGE_SIZE)
    storage, table = decoder.new_storage(pages), np.arange(pages, dtype=np.int32)[None]
    batch = pack([Span(np.arange(rows) % decoder.config.vocab_size, 0, logits="last")], table)
    times = []
    for _ in range(_PREFILL_ROUNDS):
        began = perf_counter()
        decoder.forward(batch, storage).logits[-1, 0].item()  # waits for the device
        times.append(perf_counter() - began)
    return rows, min(times[1:])


def _drafter(llm: LLM, name: str, prompts: Sequence[Prompt], max_tokens: int) -> DrafterCost:
    """Over all prompts, one at a time, with the rows that the method is given by itself. Raises MethodError."""
    from .audit_engine import as_prompt

    steps = tokens = drafted = accepted = 0
    draft_s = spent = 0.0
    with llm.with_method(name, planner="auto" if name == "plain" else "fixed", max_batch=1) as runner:
        for i, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=max_tokens, seed=i, ignore_eos=True)
            (result,) = runner.generate(as_prompt(runner, prompt), params)
            s = result.stats
            if i == 0 and len(prompts) > 1:
                continue  # it warms up
            steps, tokens, drafted, accepted = (
                steps + s.steps,
                tokens + s.tokens,
                drafted + s.drafted,
                accepted + s.accepted,
            )
            draft_s, spent = draft_s + s.draft_s, spent + s.decode_s
    each = max(steps, 1)
    return DrafterCost(name, draft_s / each, spent / each, drafted / each, accepted / each)


# -- keeping --------------------------------------------------------------------------------------------------------


def tuning_path(llm: LLM) -> Path:
    draft = "" if llm.draft_loaded is None else f"{llm.draft_loaded.name}/{llm.draft_loaded.decoder.precision}"
    return cache_dir() / "tuning" / f"{machine_digest(llm.decoder, llm.name, _FORMAT, draft)}.json"


def _read(path: Path, model: str) -> Tuning | None:
    stored = read_kept(path, f"figures of {model}")
    try:
        return None if stored is None else of_json(stored)
    except ValueError as error:
        say_damaged(f"figures of {model}", str(error))
        return None


# -- what the planner makes of it -----------------------------------------------------------------------------------


def expected_tokens(acceptance: float, n: int) -> float:
    """Of a step with a chain of `n` rows, each accepted with that probability if those before it are."""
    return float(sum(acceptance**i for i in range(n + 1)))


def break_even(costs: StepCosts, batch: int, n: int, context: float = CONTEXT, draft_s: float = 0.0) -> float | None:
    """The acceptance from which chains of `n` rows for each of `batch` sequences are no slower than plain decoding;
    None if even full acceptance is not enough. `draft_s` of drafting a step."""
    needed = (costs.step(batch * (1 + n), context) + draft_s) / costs.step(batch, context)
    if needed > expected_tokens(1.0, n):
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, n) < needed else (low, middle)
    return high


def best_length(costs: StepCosts, acceptance: float, batch: int, context: float = CONTEXT, most: int = 31) -> int:
    """The chain that gives the most tokens a second at that acceptance; 0 is plain decoding."""
    speed = [expected_tokens(acceptance, n) / costs.step(batch * (1 + n), context) for n in range(most + 1)]
    return int(np.argmax(speed))
