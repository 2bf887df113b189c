"""What the benchmark scripts share: reading prompts, runs that take turns, spread over trials, result files."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outpace.bench.machine import environment
from outpace.types import Result

RESULTS = Path(__file__).parent / "results"


@dataclass
class Tally:
    """Decoding speed of one contestant: per trial, tokens after the first and the seconds they took."""

    tokens: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    decoded: int = 0
    prompt_tokens: int = 0
    prefill_s: float = 0.0

    def add(self, trial: int, tokens: int, seconds: float, prompt_tokens: int, prefill_s: float, steps: int) -> None:
        """`tokens` and `seconds` of decoding alone, prefill apart."""
        self.tokens[trial] = self.tokens.get(trial, 0) + tokens
        self.seconds[trial] = self.seconds.get(trial, 0.0) + seconds
        self.steps += steps
        self.decoded += tokens
        self.prompt_tokens += prompt_tokens
        self.prefill_s += prefill_s

    def add_result(self, trial: int, result: Result) -> None:
        s = result.stats
        self.add(trial, max(s.tokens - 1, 0), s.decode_s, s.prompt_tokens, s.prefill_s, s.steps)

    @property
    def per_trial(self) -> list[float]:
        return [self.tokens[t] / self.seconds[t] for t in sorted(self.tokens) if self.seconds[t] > 0]

    @property
    def prefill(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def mean_accepted(self) -> float:
        return self.decoded / self.steps if self.steps else 1.0

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens_per_s": spread(self.per_trial),
            "prefill_tokens_per_s": round(self.prefill, 2),
            "mean_accepted": round(self.mean_accepted, 3),
            "decoded_tokens": self.decoded,
            "prompt_tokens": self.prompt_tokens,
        }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all values of the trials."""
    if not values:
        return {"median": None, "min": None, "max": None, "trials": []}
    rounded = [float(f"{v:.5g}") for v in values]
    return {
        "median": float(f"{statistics.median(values):.5g}"),
        "min": min(rounded),
        "max": max(rounded),
        "trials": rounded,
    }


def show_spread(value: dict[str, Any], digits: int = 1) -> str:
    """`median (min-max)`."""
    if value["median"] is None:
        return "-"
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f}-{value['max']:.{digits}f})"


def ratios(method: Tally, base: Tally) -> dict[str, Any]:
    """Speed of one over the other, trial by trial: both ran in turns, prompt after prompt."""
    return spread([a / b for a, b in zip(method.per_trial, base.per_trial, strict=True)])


def in_turns(trials: int, items: Sequence[Any], contestants: dict[str, Callable[[int, Any], None]]) -> None:
    """Call every contestant on each item before the next item; who goes first changes from item to item."""
    names = list(contestants)
    for trial in range(trials):
        for i, item in enumerate(items):
            first = (i + trial) % len(names)
            for name in names[first:] + names[:first]:
                contestants[name](trial, item)
            note(f"trial {trial + 1}/{trials}, prompt {i + 1}/{len(items)}")


def note(text: str) -> None:
    """Progress, on stderr."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(" --- " for _ in head) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def save(name: str, question: str, config: dict[str, Any], results: dict[str, Any], body: str) -> None:
    """Write `results/NAME.json` and its page `results/NAME.md`, and print the JSON's place last."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "name": name,
        "question": question,
        "command": _command(),
        "environment": environment(),
        "config": config,
        "results": results,
    }
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    write_page(record, body)
    note("")
    print(body)
    print(f"written: {target.parent.name}/{target.name}")


def write_page(record: dict[str, Any], body: str) -> None:
    """The Markdown page of a result file."""
    name, where, config = record["name"], record["environment"], record["config"]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    hardware = f"{where['cpu']}, {where['cores']} cores ({', '.join(where['cpu_features'])}), {where['memory_gb']} GB"
    page = [
        f"# {name}",
        record["question"],
        f"- Hardware: {hardware}{'; ' + where['gpu'] if where['gpu'] else ''}",
        f"- Software: {where['system']}, Python {where['python']}, {versions}",
        f"- Commit {where['commit']}, {where['date']}",
        f"- Command: `{record['command']}`",
        "- Configuration: " + ", ".join(f"{k} = {v}" for k, v in config.items()),
        f"- All figures: [{name}.json]({name}.json). Spread is median (minimum-maximum) over the trials.",
        body,
    ]
    parts = [*page[:2], "\n".join(page[2:8]), page[8]]
    (RESULTS / f"{name}.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def _command() -> str:
    """The command as typed, with files outside the project by their names alone."""
    here = Path.cwd()

    def shown(arg: str) -> str:
        path = Path(arg)
        return path.name if path.is_absolute() and not path.is_relative_to(here) else arg

    script = Path(sys.argv[0])
    script = script.resolve().relative_to(here) if script.resolve().is_relative_to(here) else Path(script.name)
    return shlex.join(["python", str(script), *(shown(a) for a in sys.argv[1:])])


def public_name(model: str | None) -> str | None:
    """A model as a result file names it: a path outside the project is shortened to its last part."""
    return None if model is None else Path(model).name if "/" in model and Path(model).exists() else model
