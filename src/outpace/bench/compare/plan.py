"""What is compared and in which order. No torch, no clock.

    cell    a workload at one batch size and temperature; every contestant has its figures for each cell
    unit    as many prompts of a workload as the batch holds; they are answered at once
    heat    plain decoding and a few contestants in turn on one unit: the pairs that ratios are made of
    round   one unit of a cell, in heats, by all contestants
    pass    a round of every cell; cells whose runs are short get several
    sweep   as many rounds as a cell has units: after it every unit has been measured once more

Contestants of a heat run within seconds of each other, so that what drifts (clocks, other users) hits all of them;
their order, and which share a heat, changes from round to round. Each heat has a plain run of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import ParameterError
from ...types import SamplingParams

PLAIN, AUTO = "plain", "auto"
HEAT = 4  # contestants beside plain in one heat
MOST_ROUNDS = 4  # of a cell in one pass
LEAST_ROUNDS = 3  # a plan leaves time for: fewer pairs show nothing
SHORTEST = 16  # tokens of an answer that is made shorter to fit the budget
#: Of methods that were not named: those that stay when the budget has no time for all; then the others
ORDER = (AUTO, "suffix+recycling", "suffix", "recycling", "ngram", "draft-tree", "draft", "branch")
#: Of the project's own sets: text made up, code written, text shortened, code repeated with small changes
WORKLOADS = ("writing", "code", "summarization", "code-edit")


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """`methods` None: every lossless one whose needs are met. `prompts`: units of each cell, at most; fewer if two
    sweeps over them would not fit the budget. `rounds`: of each cell; None as many as the budget allows, more of
    those that are short. `budget_s`: seconds of comparing; loading models and starting other engines is not in it.

    Raises ParameterError for an empty list or a value out of range.
    """

    models: tuple[str, ...] = ("smollm2-135m",)
    methods: tuple[str, ...] | None = None
    workloads: tuple[str, ...] = WORKLOADS
    categories: tuple[str, ...] = ()  # of files and data sets, all if empty
    batch_sizes: tuple[int, ...] = (1, 8)
    temperatures: tuple[float, ...] = (0.0,)
    peers: tuple[str, ...] = ()
    max_tokens: int = 64
    prompts: int = 2
    rounds: int | None = None
    budget_s: float = 900.0
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # of the models: precision, threads, draft model, ...

    def __post_init__(self) -> None:
        for name in ("models", "workloads", "batch_sizes", "temperatures"):
            values = getattr(self, name)
            if not values:
                raise ParameterError(f"{name} is empty: give at least one")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        if self.methods is not None and not self.methods:
            raise ParameterError("methods is empty: name at least one, or leave it to the default")
        least = {
            "batch_sizes": min(self.batch_sizes),
            "prompts": self.prompts,
            "rounds": 1 if self.rounds is None else self.rounds,
        }
        for name, value in least.items():
            if value < 1:
                raise ParameterError(f"{name}={value} is out of range: it must be at least 1")
        if self.max_tokens < 2:
            raise ParameterError(f"max_tokens={self.max_tokens} is out of range: a speed needs at least 2")
        if not self.budget_s > 0:
            raise ParameterError(f"a budget of {self.budget_s:g} s is out of range: it must be above 0")
        for temperature in self.temperatures:
            SamplingParams(temperature=temperature, seed=self.seed)

    def identity(self) -> dict[str, Any]:
        """What must be the same for measurements to belong to one comparison: all but how long it runs. Files by
        their names alone."""
        identity = asdict(self)
        for name in ("rounds", "budget_s"):
            del identity[name]
        identity["options"] = {name: shown(value) for name, value in self.options.items()}
        return identity | {name: tuple(map(shown, identity[name])) for name in ("models", "workloads")}

    def params(self, temperature: float, number: int) -> SamplingParams:
        """Of prompt number `number` of its workload. Every answer has `max_tokens` tokens: all have the same work."""
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=temperature, seed=self.seed + number, ignore_eos=True
        )


def shown(name: Any) -> Any:
    """A file or folder without those that lead to it; anything else as it is."""
    return Path(name).name if isinstance(name, str) and Path(name).is_absolute() else name


def names_of(models: Sequence[str]) -> dict[str, str]:
    """What each model is called: its name, or that of its file where no other has the same.

    >>> names_of(["smollm2-135m", "/a/m.gguf"])
    {'smollm2-135m': 'smollm2-135m', '/a/m.gguf': 'm.gguf'}
    """
    names = [shown(model) for model in models]
    return {m: name if names.count(name) == 1 else m for m, name in zip(models, names, strict=True)}


def peer_names(specs: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """What each engine is called: as it was named, but a server or a program by the name that it was given.

    >>> peer_names(["llama.cpp,kv=f16", "vllm=http://localhost:8000"])
    {'llama.cpp,kv=f16': 'llama.cpp,kv=f16', 'vllm=http://localhost:8000': 'vllm'}
    """
    heads = [spec.partition("=")[0] for spec in specs]
    names = [spec if "," in head or "://" in head else head for spec, head in zip(specs, heads, strict=True)]
    alone = {name for name in names if names.count(name) == 1 and name not in taken}
    return {spec: name if name in alone else spec for spec, name in zip(specs, names, strict=True)}


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    workload: str
    batch: int
    temperature: float

    def __str__(self) -> str:
        return f"{self.workload}, batch {self.batch}, temperature {self.temperature:g}"


def cells(config: CompareConfig, fixed: dict[str, float | None]) -> list[Cell]:
    """Every cell, workloads innermost. `fixed`: the workloads, and the temperature of those that have one of their
    own."""
    found = [
        Cell(name, batch, temperature if own is None else own)
        for temperature in config.temperatures
        for batch in config.batch_sizes
        for name, own in fixed.items()
    ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run of what was requested. `others`: contestants beside plain; `max_tokens` of an answer."""

    others: tuple[str, ...]
    cells: tuple[Cell, ...]
    max_tokens: int


def fit(whole: Plan, cost_s: Callable[[Plan], float], left_s: float) -> Plan:
    """What the budget has time for, by `cost_s` of a plan: the first that fits of ever smaller ones, or the smallest.
    In this order: fewer contestants, from the end, down to one heat; answers of half the length, twice; without the
    larger batches; fewer contestants, down to one; fewer cells, from the end, down to one."""
    plan = whole
    for plan in _smaller(whole):
        if cost_s(plan) <= left_s:
            break
    return plan


def _smaller(plan: Plan) -> Iterator[Plan]:
    yield plan
    while len(plan.others) > HEAT:
        plan = replace(plan, others=plan.others[:-1])
        yield plan
    for _ in range(2):
        if plan.max_tokens // 2 >= SHORTEST:
            plan = replace(plan, max_tokens=plan.max_tokens // 2)
            yield plan
    while len(batches := sorted({cell.batch for cell in plan.cells})) > 1:
        plan = replace(plan, cells=tuple(cell for cell in plan.cells if cell.batch < batches[-1]))
        yield plan
    while len(plan.others) > 1:
        plan = replace(plan, others=plan.others[:-1])
        yield plan
    while len(plan.cells) > 1:
        plan = replace(plan, cells=plan.cells[:-1])
        yield plan


def by_standing(defaults: Sequence[str], peers: Sequence[str]) -> list[str]:
    """Contestants when no method was named, in the order in which they are kept if not all can be: the default method,
    other engines (somebody named those), then the methods that usually gain most.

    >>> by_standing(["draft", "jacobi", "suffix", "auto"], ["llama.cpp"])
    ['auto', 'llama.cpp', 'suffix', 'draft', 'jacobi']
    """
    ranked = sorted(defaults, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    first = [name for name in ranked if name == AUTO]
    return [*first, *peers, *(name for name in ranked if name != AUTO)]


def heats(others: Sequence[str], turn: int) -> list[list[str]]:
    """The contestants beside plain in parts of at most HEAT, each with plain; the order depends on the turn.

    >>> heats(["a", "b"], 0), heats(["a", "b"], 1)
    ([['plain', 'a', 'b']], [['b', 'a', 'plain']])
    """
    if not others:
        return [[PLAIN]]
    dealt = _rotated(list(others), turn)
    count = -(-len(dealt) // HEAT)
    parts = [dealt[i * len(dealt) // count : (i + 1) * len(dealt) // count] for i in range(count)]
    orders = [_rotated([PLAIN, *part], turn // 2 + i) for i, part in enumerate(parts)]
    return [order[::-1] if turn % 2 else order for order in orders]


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def rounds_in_a_pass(seconds: dict[Cell, float]) -> dict[Cell, int]:
    """By what a round of each cell takes. In a given time all figures together are surest if the rounds of a cell are
    as the inverse root of what one takes (Neyman's allocation, with equal noise; short runs are rather noisier).

    >>> list(rounds_in_a_pass({Cell("code", 1, 0.0): 10.0, Cell("code", 8, 0.0): 35.0}).values())
    [2, 1]
    """
    longest = max(seconds.values(), default=0.0)
    return {cell: min(max(round((longest / s) ** 0.5), 1), MOST_ROUNDS) if s > 0 else 1 for cell, s in seconds.items()}


def cells_of_a_pass(rounds: dict[Cell, int]) -> list[Cell]:
    """Each cell as often as it has rounds, which lie evenly in the pass.

    >>> a, b, c = (Cell(name, 1, 0.0) for name in "abc")
    >>> "".join(cell.workload for cell in cells_of_a_pass({a: 2, b: 2, c: 1}))
    'abcab'
    """
    places = [((k + 0.5) / rounds[cell], i, cell) for i, cell in enumerate(rounds) for k in range(rounds[cell])]
    return [cell for *_, cell in sorted(places)]


def units_that_fit(wanted: int, round_s: float, budget_s: float) -> int:
    """How many units each cell gets so that two sweeps over them fit the budget; at least one."""
    return max(1, min(wanted, int(budget_s / (2 * round_s)))) if round_s > 0 else wanted
