"""The run: for each model warm-up, then rounds of heats until the budget or the rounds are over.

A contestant that fails in a cell has failed there, with its reason, and is not asked again; the others go on. One that
hangs, or another engine that dies, twice is out. A heat starts only if it should end within the budget; in the first
round it starts as long as there is any left, so that every cell has a figure, or was not reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ...errors import OutpaceError
from ...types import SamplingParams
from ..audit import as_prompt
from ..workloads import own_prompts
from .contestant import Clock, Engine, Failed, Run
from .entry import Entry, OpenPeer
from .plan import PLAIN, Cell, CompareConfig, cells_of_a_pass, heats, names_of, rounds_in_a_pass, units_that_fit
from .sets import Unit
from .store import Line, Store

if TYPE_CHECKING:
    from ...engine.llm import LLM

Progress = Callable[[str, float, float], None]  # what runs, seconds spent, seconds of the budget
OpenModel = Callable[[str, int], "LLM"]  # (name, largest batch): a small KV cache and no prefix cache
Warm = dict[tuple[str, int], tuple[float, float]]
WARM_TOKENS = 8
STRIKES = 2
PATIENCE_S, PATIENCE = 30.0, 20.0  # an answer may take that many seconds, and so many times plain's


class Comparison:
    """Runs what `config` says and what `store` does not have yet."""

    def __init__(
        self,
        config: CompareConfig,
        store: Store,
        open_model: OpenModel,
        open_peer: OpenPeer,
        clock: Clock = perf_counter,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self.config, self.store, self.clock, self._progress = config, store, clock, progress
        self._open_model, self._open_peer = open_model, open_peer
        times = [line["t"] for line in store.lines if "t" in line]
        self._spent: float = times[-1] if times else 0.0  # by earlier runs
        # What a second start takes until it is where the first one was does not count
        self._began: float | None = None if times else clock()

    @property
    def elapsed(self) -> float:
        """Seconds of the budget that are gone."""
        return self._spent if self._began is None else self._spent + self.clock() - self._began

    def run(self) -> None:
        """Raises the model's own error when there is one model and it cannot be had."""
        models = self.config.models
        for i, (source, name) in enumerate(names_of(models).items()):
            if self._over(name):
                continue
            lines = self.store.of("model", name)
            known = lines[-1] if lines else None
            until = self.elapsed + (self.config.budget_s - self.elapsed) / (len(models) - i)
            if known is not None and known["budget_s"] == self.config.budget_s:
                until = known["until"]
            self._tell(f"loading {name}")
            try:
                with self._open_model(source, max(self.config.batch_sizes)) as llm:
                    self._compare(Entry(name, source, llm, self.config, until, known))
            except OutpaceError as error:
                if len(models) == 1:
                    raise
                self._failure(name, str(error))

    def _over(self, model: str) -> bool:
        """Whether earlier runs did all that is wanted of a model."""
        limit = self.config.rounds
        if any(x["method"] is None and x["workload"] is None for x in self.store.of("failure", model)):
            return True  # it could not be had
        return any(
            x["budget_s"] >= self.config.budget_s
            and (x["rounds"] is None or (limit is not None and x["rounds"] >= limit))
            for x in self.store.of("end", model)
        )

    # -- before the rounds ---------------------------------------------------------------------------------------

    def _compare(self, entry: Entry) -> None:
        try:
            entry.prepare(self._open_peer, self.clock)
            for reason, of in entry.failures:
                self._failure(entry.name, reason, **of)
            if entry.known is None:
                self._tell(f"{entry.name}, measuring the machine")
                entry.describe()
            warm = self._warm_up(entry)
            count = self._plan(entry, warm) if entry.known is None else entry.known["units"]
            for key in entry.units:
                entry.units[key] = entry.units[key][:count]
            self._remember(entry)
            if entry.known is None:
                more = {"units": count, "until": entry.until, "budget_s": self.config.budget_s, "t": self.elapsed}
                more["rounds_in_a_pass"] = {str(cell): count for cell, count in entry.rounds.items()}
                more["peers_about"] = entry.about_peers()
                self.store.append([{**entry.described, **more}])
            if self._began is None:
                self._began = self.clock()
            self._rounds(entry)
        finally:
            entry.close()

    def _warm_up(self, entry: Entry) -> Warm:
        """Compile, fill caches, start peers. Seconds for each prompt token and each further step, by contestant and
        batch."""
        llm, found = entry.llm, {}
        room = llm.config.max_position - WARM_TOKENS
        tokens = [tuple(llm.tokens(as_prompt(llm, prompt)))[:room] for prompt in own_prompts(["chat"])]
        params = replace(self.config.params(self.config.temperatures[0], 0), max_tokens=WARM_TOKENS)
        for name, contestant in entry.contestants.items():
            for batch in self.config.batch_sizes:
                self._tell(f"{entry.name}, warming up {name}, batch {batch}")
                chosen = tuple(tokens[i % len(tokens)] for i in range(batch))
                unit = Unit(("warm-up",) * batch, chosen, ("",) * batch, tuple(range(batch)))
                limit = max(PATIENCE_S, min(4 * PATIENCE_S, entry.until - self.elapsed))
                try:
                    run = contestant.answer(unit, _seeds(params, batch), "warm-up", limit)
                except Failed as failed:
                    entry.failed |= {(name, cell) for cell in entry.cells if cell.batch == batch}
                    if self._strike(entry, name, str(failed), failed.fatal, batch):
                        break
                    continue
                first = run.first_s if run.first_s is not None else run.total_s / 2
                found[name, batch] = first / sum(map(len, chosen)), (run.total_s - first) / (WARM_TOKENS - 1)
        return found

    def _plan(self, entry: Entry, warm: Warm) -> int:
        """Estimates from the warm-up: the rounds of each cell in a pass. Returns the number of units of each."""
        for cell in entry.cells:
            made = entry.units[cell.workload, cell.batch]
            size = sum(len(t) for unit in made for t in unit.tokens) / len(made)
            for name in entry.contestants:
                if (name, cell.batch) in warm:
                    reading, step = warm[name, cell.batch]
                    entry.seconds[name, cell] = size * reading + (self.config.max_tokens - 1) * step
        plains = len(heats(entry.others, 0))
        once = dict.fromkeys(entry.cells, 0.0)
        for (name, cell), seconds in entry.seconds.items():
            once[cell] += seconds * (plains if name == PLAIN else 1)
        if self.config.rounds is None:
            entry.rounds |= rounds_in_a_pass(once)
        return units_that_fit(self.config.prompts, sum(once.values()), entry.until - self.elapsed)

    def _remember(self, entry: Entry) -> None:
        """What earlier runs measured of this model: times and failures."""
        for line in self.store.of("measurement", entry.name):
            key = (line["method"], Cell(line["workload"], line["batch"], line["temperature"]))
            if line["error"]:
                entry.failed.add(key)
            else:
                entry.seconds[key] = line["total_s"]
        for line in self.store.of("failure", entry.name):
            if line["method"] is not None and line["batch"] is None:
                entry.drop(line["method"])

    # -- rounds --------------------------------------------------------------------------------------------------

    def _rounds(self, entry: Entry) -> None:
        done = {_heat_key(line) for line in self.store.of("measurement", entry.name)}
        number = 0
        while self.config.rounds is None or number < self.config.rounds:
            if not self._pass(entry, number, done):
                break
            number += 1
        limits = {"budget_s": self.config.budget_s, "rounds": self.config.rounds}
        self.store.append([{"kind": "end", "model": entry.name, **limits, "t": self.elapsed}])

    def _pass(self, entry: Entry, number: int, done: set[Any]) -> bool:
        """Whether anything was, or had been, measured in it."""
        some = False
        rounds = {cell: number * count for cell, count in entry.rounds.items()}
        for cell in cells_of_a_pass(entry.rounds):
            nth = rounds[cell]
            rounds[cell] += 1
            for heat, names in enumerate(heats(entry.others, nth + entry.cells.index(cell))):
                if (cell, nth, heat) in done:
                    some = True
                    continue
                names = [n for n in names if (n, cell) not in entry.failed]
                if not names or (names == [PLAIN] and heat) or not self._time_for(entry, cell, names, nth):
                    continue
                self._heat(entry, cell, nth, heat, names)
                some = True
        return some

    def _time_for(self, entry: Entry, cell: Cell, names: Sequence[str], nth: int) -> bool:
        expected = sum(entry.seconds.get((name, cell), 0.0) for name in names) if nth else 0.0
        return self.elapsed + expected < entry.until

    def _heat(self, entry: Entry, cell: Cell, nth: int, heat: int, names: Sequence[str]) -> None:
        """Everybody in turn on one unit; then the lines are written, all together."""
        made = entry.units[cell.workload, cell.batch]
        which, sweep = nth % len(made), nth // len(made)
        params = [self.config.params(cell.temperature, n) for n in made[which].numbers]
        common = {"kind": "measurement", "model": entry.name, **asdict(cell), "round": nth, "unit": which}
        common |= {"heat": heat, "heat_size": len(names), "prompts": list(made[which].ids), "error": None}
        lines: list[Line] = []
        struck: list[tuple[str, Failed]] = []
        for place, name in enumerate(names):
            self._tell(
                f"{entry.name}, pass {nth // entry.rounds[cell] + 1}: {cell.workload}, batch {cell.batch}: {name}"
            )
            line = {**common, "place": place, "method": name}
            limit = self._patience(entry, cell)
            began = self.elapsed
            try:
                run = entry.contestants[name].answer(made[which], params, f"{cell}, sweep {sweep}", limit)
                entry.seconds[name, cell] = run.total_s
                line |= _figures(run)
            except Failed as failed:
                line["error"] = str(failed)
                entry.failed.add((name, cell))
                if isinstance(entry.contestants[name], Engine) or self.elapsed - began >= limit:
                    struck.append((name, failed))
            lines.append(line | {"t": round(self.elapsed, 3)})
        self.store.append(lines)
        for name, why in struck:
            self._strike(entry, name, str(why), why.fatal)

    def _patience(self, entry: Entry, cell: Cell) -> float:
        """Seconds that one answer may take."""
        usual = PATIENCE_S + PATIENCE * entry.seconds.get((PLAIN, cell), 0.0)
        return min(usual, max(entry.until - self.elapsed, 0.0) + PATIENCE_S)

    # -- failures ------------------------------------------------------------------------------------------------

    def _strike(self, entry: Entry, name: str, reason: str, fatal: bool, batch: int | None = None) -> bool:
        """Count a contestant's failure. Out with it, True, at the second one, or when it cannot even start."""
        entry.strikes[name] = entry.strikes.get(name, 0) + 1
        out = fatal or entry.strikes[name] >= STRIKES
        if out:
            why = reason if fatal else f"given up after {entry.strikes[name]} failures, the last one: {reason}"
            self._failure(entry.name, why, method=name)
            entry.drop(name)
        elif batch is not None:
            self._failure(entry.name, f"in the warm-up: {reason}", method=name, batch=batch)
        return out

    def _failure(self, model: str, reason: str, **of: Any) -> None:
        """Once: a second start finds the same again."""
        where = {"method": None, "workload": None, "batch": None, **of}
        line = {"kind": "failure", "model": model, **where, "reason": reason}
        if not any(all(x[k] == v for k, v in where.items()) for x in self.store.of("failure", model)):
            self.store.append([line])

    def _tell(self, what: str) -> None:
        self._progress(what, self.elapsed, self.config.budget_s)


def _seeds(params: SamplingParams, batch: int) -> list[SamplingParams]:
    return [replace(params, seed=params.seed + i) for i in range(batch)]


def _heat_key(line: Line) -> tuple[Cell, int, int]:
    return Cell(line["workload"], line["batch"], line["temperature"]), line["round"], line["heat"]


def _figures(run: Run) -> Line:
    """As they are written: times to the microsecond."""
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(run).items()}
