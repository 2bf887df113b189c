"""Workloads by what a person writes: a category of the project's own sets, `random`, a file, a data set of the hub.

A file (.jsonl, .parquet, or .txt with one prompt a line) or data set becomes one workload for each of its categories.
`code-edits:FILE` makes requests for small edits of humaneval-style functions. What cannot be used stays in the list as
a workload with an `error`: it is reported, and the others go on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import OutpaceError, ParameterError
from ..workloads import CATEGORIES, Prompt, code_edits, load_prompts, own_prompts, select

RANDOM, EDITS = "random", "code-edits:"
RANDOM_TEMPERATURE = 1.2  # greedy decoding of noise falls into loops, which are easy to draft
RANDOM_PROMPTS, RANDOM_TOKENS = 16, 64
PROMPTS = 64  # of a set, at most
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(slots=True)
class Workload:
    """`temperature`: its own, instead of the configured ones. `error`: why nothing of it can be measured."""

    name: str
    prompts: list[Prompt] = field(default_factory=list)
    temperature: float | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """Prompts that are answered at once: token ids, the output that is expected (for methods that use it), and the
    number of each in its workload."""

    ids: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    predictions: tuple[str, ...]
    numbers: tuple[int, ...]


def load_workloads(specs: Sequence[str], categories: Sequence[str] = (), seed: int = 0) -> list[Workload]:
    """Each spec as one or more workloads, named apart."""
    found: list[Workload] = []
    for spec in specs:
        try:
            loaded = _load(spec, categories, seed)
        except OutpaceError as error:
            path = spec.removeprefix(EDITS)
            loaded = [Workload(shown(spec), error=str(error).replace(path, Path(path).name))]
        for workload in loaded:
            if any(workload.name == other.name for other in found):
                workload.name = f"{workload.name} ({shown(spec)})"
            if not any(workload.name == other.name for other in found):
                found.append(workload)
    return found


def shown(spec: str) -> str:
    """A workload's source without the folders of this machine."""
    return spec if HUB_ID.fullmatch(spec) and not Path(spec).exists() else Path(spec.removeprefix(EDITS)).name


def _load(spec: str, categories: Sequence[str], seed: int) -> list[Workload]:
    if spec == RANDOM:
        return [Workload(RANDOM, temperature=RANDOM_TEMPERATURE, notes=["random tokens, sampled at temperature 1.2"])]
    if spec in CATEGORIES:
        return [Workload(spec, own_prompts([spec]))]
    if spec.startswith(EDITS):
        prompts = code_edits(load_prompts(spec.removeprefix(EDITS)))
    elif Path(spec).suffix in (".jsonl", ".json", ".parquet", ".txt") or Path(spec).exists():
        prompts = read_prompts(Path(spec))
    elif HUB_ID.fullmatch(spec):
        prompts = [p for path in hub_files(spec) for p in read_prompts(path, default=spec.rpartition("/")[2])]
    else:
        raise ParameterError(
            f"no workload {spec!r}; there are: {', '.join(CATEGORIES)}, {RANDOM}; or give a .jsonl, .parquet or .txt "
            "file, code-edits:FILE, or the id of a data set, owner/name"
        )
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    if categories:
        groups = {name: group for name, group in groups.items() if name in categories}
        if not groups:
            there = ", ".join(dict.fromkeys(p.category for p in prompts))
            raise ParameterError(f"{shown(spec)} has none of the categories {', '.join(categories)}; it has: {there}")
    return [Workload(name, select(group, total=min(PROMPTS, len(group)), seed=seed)) for name, group in groups.items()]


def read_prompts(path: Path, default: str | None = None) -> list[Prompt]:
    """Prompts of a file. A row that has no format of `workloads` may have a `prompt`, `question`, `instruction` or
    `text`, and a `category`. Raises ParameterError naming what is wrong with the file."""
    default = path.stem if default is None else default
    if path.suffix == ".parquet":
        rows = _parquet(path)
        prompts = [_loose(row, i, default) for i, row in enumerate(rows)]
    elif path.suffix == ".txt":
        lines = [line for line in _text(path).splitlines() if line.strip()]
        prompts = [Prompt(f"{default}-{i}", default, (line,)) for i, line in enumerate(lines)]
    else:
        try:
            return load_prompts(path)
        except ParameterError as error:
            if "unknown format" not in str(error):
                raise
            rows = [json.loads(line) for line in _text(path).splitlines() if line.strip()]
            prompts = [_loose(row, i, default, error) for i, row in enumerate(rows)]
    if not prompts:
        raise ParameterError(f"prompt file {path.name} is empty: it needs at least one prompt")
    return prompts


def _loose(row: Any, number: int, default: str, error: Exception | None = None) -> Prompt:
    """A prompt of a row that has one under a usual name."""
    if isinstance(row, dict):
        turns = row.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else None
        names = ("prompt", "question", "instruction", "text")
        text = next((row[n] for n in names if isinstance(row.get(n), str) and row[n].strip()), text)
        if isinstance(text, str) and text.strip():
            category = row.get("category")
            return Prompt(
                f"{default}-{number}", category if isinstance(category, str) and category else default, (text,)
            )
    raise ParameterError(str(error) if error else f"row {number + 1} has no prompt, question, instruction or text")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path.name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ParameterError(f"cannot read {path.name}: {error.strerror}") from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ParameterError(f"{path.name} is a Parquet file; to read it: pip install pyarrow") from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise ParameterError(f"cannot read {path.name}: {str(error).splitlines()[0]}") from None
    return rows


def hub_files(repo: str) -> list[Path]:
    """The .jsonl and .parquet files of a data set in the hub's cache, its test files if it has any. Nothing is fetched.
    Raises ParameterError if there are none."""
    from huggingface_hub import snapshot_download

    patterns = ["*.jsonl", "*.parquet"]
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns, local_files_only=True))
    except Exception:  # not in the cache, in one of several ways
        raise ParameterError(
            f"the data set {repo} is not in the hub's cache; fetch it with: hf download --repo-type dataset {repo}; or "
            "give one of its files"
        ) from None
    files = sorted(p for pattern in patterns for p in folder.rglob(pattern))
    if not files:
        raise ParameterError(f"the data set {repo} has no .jsonl or .parquet file: give a file in one of these formats")
    return [p for p in files if "test" in p.name] or files


def code_in(prompt: Prompt) -> str:
    """What the answer is expected to repeat: the code that a code edit gives; else nothing."""
    found = re.search(r"```\w*\n(.*?)```", prompt.text, re.DOTALL) if prompt.category == "code-edit" else None
    return found[1] if found else ""


def random_prompts(vocab_size: int, count: int = RANDOM_PROMPTS) -> list[tuple[int, ...]]:
    """Of random tokens, control tokens (at the vocabulary's ends) left out."""
    rng = np.random.default_rng(0)
    low = min(1000, vocab_size // 4)
    high = max(low + 1, vocab_size // 2)
    return [tuple(rng.integers(low, high, RANDOM_TOKENS).tolist()) for _ in range(count)]


def units(ids: Sequence[str], tokens: Sequence[tuple[int, ...]], texts: Sequence[str], batch: int) -> list[Unit]:
    """As many whole units as there are prompts for, in their order."""
    return [
        Unit(
            tuple(ids[i : i + batch]),
            tuple(tokens[i : i + batch]),
            tuple(texts[i : i + batch]),
            tuple(range(i, i + batch)),
        )
        for i in range(0, len(ids) - batch + 1, batch)
    ]
