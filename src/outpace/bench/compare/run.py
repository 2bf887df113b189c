"""The run: for each model a plan that fits the budget, warm-up, then rounds of heats until the budget or the rounds are
over.

The budget is that of comparing: loading a model, compiling, and starting other engines is not in it and is said apart.
How long plain decoding's warm-up took says what the budget has time for (`plan.fit`); what it has none for is left out
and said. Warming up may take a third of the budget: contestants that are not ready by then are left out as well.

A contestant that fails in a cell has failed there, with its reason, and is not run again; the others go on. One that
hangs, or another engine that dies, twice is out. One that is cut off by the end of the budget has not failed: it is not
measured. A heat starts only if it should end within the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ...errors import OutpaceError
from ...types import SamplingParams
from ..audit import as_prompt
from ..workloads import own_prompts
from .contestant import Clock, Engine, Failed, Run
from .entry import Entry, OpenPeer
from .plan import (
    LEAST_ROUNDS,
    PLAIN,
    Cell,
    CompareConfig,
    Plan,
    cells_of_a_pass,
    fit,
    heats,
    names_of,
    rounds_in_a_pass,
    units_that_fit,
)
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
PROBES, WARMING = 0.05, 1 / 3  # shares of the time left that measuring the machine and warming up may take
MARGIN = 1.2  # of a plan: what a few steps of warming up said is not exact
OVERTIME_S, OVERTIME = 1.0, 0.05  # an answer is cut off so long after the end: seconds, and a share of the budget
CUT = "cut off at the end of the budget"


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
        self._apart = 0.0  # seconds since then that do not count: loading models, starting engines

    @property
    def elapsed(self) -> float:
        """Seconds of the budget that are gone."""
        return self._spent if self._began is None else self._spent + self.clock() - self._began - self._apart

    @contextmanager
    def _not_counted(self) -> Iterator[Callable[[], float]]:
        """What runs here takes nothing off the budget; the call that is given says how long it took so far."""
        began = self.clock()
        try:
            yield lambda: self.clock() - began
        finally:
            if self._began is not None:
                self._apart += self.clock() - began

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
                with self._not_counted() as took:
                    llm = self._open_model(source, max(self.config.batch_sizes))
                    loading_s = took()
                with llm:
                    entry = Entry(name, source, llm, self.config, until, known)
                    entry.described["loading_s"] = round(loading_s, 3)
                    self._compare(entry)
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
            if entry.known is not None:
                entry.narrow(_stored_plan(entry.known))
            else:
                self._tell(f"{entry.name}, measuring the machine")
                entry.describe(PROBES * self._left(entry), self.clock)
            warm = self._warm_up(entry, [PLAIN], entry.until)
            if entry.known is None:
                entry.narrow(self._what_fits(entry, warm))
            limit = float("inf") if entry.known is not None else self.elapsed + WARMING * self._left(entry)
            warm |= self._warm_up(entry, entry.others, limit)
            if entry.known is None:
                entry.narrow(self._what_fits(entry, warm))
            self._estimate(entry, warm)
            count = self._units(entry) if entry.known is None else entry.known["units"]
            for key in entry.units:
                entry.units[key] = entry.units[key][:count]
            self._remember(entry)
            if entry.known is None:
                self.store.append([self._described(entry, count)])
            if self._began is None:
                self._began, self._apart = self.clock(), 0.0
            self._rounds(entry)
        finally:
            entry.close()

    def _left(self, entry: Entry) -> float:
        return max(entry.until - self.elapsed, 0.0)

    def _described(self, entry: Entry, count: int) -> Line:
        """The line of the model: what is run, and what of the budget is gone."""
        plan = {"others": entry.others, "cells": [asdict(c) for c in entry.cells], "max_tokens": entry.max_tokens}
        wanted = min(self.config.prompts, max((len(made) for made in entry.units.values()), default=0))
        if count < wanted:
            entry.left_out.append(
                f"{count} instead of {self.config.prompts} prompts of each kind of text (no time for two)"
            )
        return {
            **entry.described,
            "plan": plan,
            "left_out": entry.left_out,
            "units": count,
            "until": entry.until,
            "budget_s": self.config.budget_s,
            "rounds_in_a_pass": {str(cell): rounds for cell, rounds in entry.rounds.items()},
            "peers_about": entry.about_peers(),
            "t": self.elapsed,
        }

    def _warm_up(self, entry: Entry, names: Sequence[str], until: float) -> Warm:
        """Compile, fill caches, start peers. Seconds for each prompt token and each further step, by contestant and
        batch. Who is not ready at `until` is left out."""
        llm, found = entry.llm, {}
        most = llm.config.max_position - WARM_TOKENS
        tokens = [tuple(llm.tokens(as_prompt(llm, prompt)))[:most] for prompt in own_prompts(["chat"])]
        params = replace(self.config.params(self.config.temperatures[0], 0), max_tokens=WARM_TOKENS)
        late: list[str] = []
        for name in names:
            for batch in sorted({cell.batch for cell in entry.cells}):
                if name != PLAIN and self.elapsed >= until:
                    late.append(name)
                    break
                self._tell(f"{entry.name}, warming up {name}, batch {batch}")
                chosen = tuple(tokens[i % len(tokens)] for i in range(batch))
                unit = Unit(("warm-up",) * batch, chosen, ("",) * batch, tuple(range(batch)))
                usual = max(PATIENCE_S, min(4 * PATIENCE_S, self._left(entry)))
                limit = min(usual, self._last_moment(entry))
                began = self.elapsed
                try:
                    contestant = entry.contestants[name]
                    if isinstance(contestant, Engine):
                        with self._not_counted():
                            contestant.begin()
                        began = self.elapsed
                    run = contestant.answer(unit, _seeds(params, batch), "warm-up", limit)
                except Failed as failed:
                    entry.failed |= {(name, cell) for cell in entry.cells if cell.batch == batch}
                    if limit < usual and self.elapsed - began >= limit:
                        late.append(name)
                        break
                    if self._strike(entry, name, str(failed), failed.fatal, batch):
                        break
                    continue
                first = run.first_s if run.first_s is not None else run.total_s / 2
                found[name, batch] = first / sum(map(len, chosen)), (run.total_s - first) / (WARM_TOKENS - 1)
        if PLAIN in late:
            self._failure(entry.name, "it was not warm when the budget ended: give a longer --budget", method=PLAIN)
        elif late and entry.known is None:
            kept = tuple(name for name in entry.others if name not in late)
            plan = Plan(kept, tuple(entry.cells), entry.max_tokens)
            entry.narrow(plan, "not warmed up within a third of the budget")
        return found

    def _what_fits(self, entry: Entry, warm: Warm) -> Plan:
        """By what the warm-up took; one that has not warmed up yet is taken to be as slow as plain decoding."""
        whole = Plan(tuple(entry.others), tuple(entry.cells), entry.max_tokens)
        rounds = LEAST_ROUNDS if self.config.rounds is None else min(LEAST_ROUNDS, self.config.rounds)

        def cost_s(plan: Plan) -> float:
            seconds = 0.0
            plains = [PLAIN] * len(heats(plan.others, 0))
            for name in (*plains, *plan.others):
                for cell in plan.cells:
                    reading, step = warm.get((name, cell.batch)) or warm.get((PLAIN, cell.batch), (0.0, 0.0))
                    unit_s = _prompt_tokens(entry, cell) * reading + (plan.max_tokens - 1) * step
                    seconds += rounds * unit_s
                for batch in {cell.batch for cell in plan.cells}:
                    seconds += 0.0 if (name, batch) in warm else WARM_TOKENS * warm.get((PLAIN, batch), (0.0, 0.0))[1]
            return MARGIN * seconds

        return fit(whole, cost_s, self._left(entry))

    def _estimate(self, entry: Entry, warm: Warm) -> None:
        """What a unit of each cell takes each contestant, from the warm-up, and the rounds of each cell in a pass."""
        for cell in entry.cells:
            for name in entry.contestants:
                if (name, cell.batch) in warm:
                    reading, step = warm[name, cell.batch]
                    entry.seconds[name, cell] = _prompt_tokens(entry, cell) * reading + (entry.max_tokens - 1) * step
        if self.config.rounds is None and entry.known is None:
            once = self._round_s(entry)
            more = rounds_in_a_pass(once)
            if LEAST_ROUNDS * sum(once[cell] * more.get(cell, 1) for cell in entry.cells) <= self._left(entry):
                entry.rounds |= more  # else each cell gets as many pairs as the others

    def _round_s(self, entry: Entry) -> dict[Cell, float]:
        """What a round of each cell takes."""
        plains = len(heats(entry.others, 0))
        once = dict.fromkeys(entry.cells, 0.0)
        for (name, cell), seconds in entry.seconds.items():
            once[cell] += seconds * (plains if name == PLAIN else 1)
        return once

    def _units(self, entry: Entry) -> int:
        """How many units of each cell the budget has time for."""
        return units_that_fit(self.config.prompts, sum(self._round_s(entry).values()), self._left(entry))

    def _remember(self, entry: Entry) -> None:
        """What earlier runs measured of this model: times and failures."""
        for line in self.store.of("measurement", entry.name):
            key = (line["method"], Cell(line["workload"], line["batch"], line["temperature"]))
            if line["error"]:
                entry.failed |= set() if line.get("cut") else {key}
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
                if not names or (names == [PLAIN] and heat) or not self._time_for(entry, cell, names):
                    continue
                self._heat(entry, cell, nth, heat, names)
                some = True
        return some

    def _time_for(self, entry: Entry, cell: Cell, names: Sequence[str]) -> bool:
        """Whether a heat should end within the budget. The very first one begins whatever it should take."""
        expected = sum(entry.seconds.get((name, cell), 0.0) for name in names)
        first = not self.store.of("measurement", entry.name)
        return self.elapsed + (0.0 if first else expected) < entry.until

    def _heat(self, entry: Entry, cell: Cell, nth: int, heat: int, names: Sequence[str]) -> None:
        """Each contestant in turn on one unit; then the lines are written, all together."""
        made = entry.units[cell.workload, cell.batch]
        which, sweep = nth % len(made), nth // len(made)
        params = [entry.answers(cell.temperature, n) for n in made[which].numbers]
        common = {"kind": "measurement", "model": entry.name, **asdict(cell), "round": nth, "unit": which}
        common |= {"heat": heat, "heat_size": len(names), "prompts": list(made[which].ids), "error": None}
        lines: list[Line] = []
        struck: list[tuple[str, Failed]] = []
        for place, name in enumerate(names):
            self._tell(
                f"{entry.name}, pass {nth // entry.rounds[cell] + 1}: {cell.workload}, batch {cell.batch}: {name}"
            )
            line = {**common, "place": place, "method": name}
            usual = PATIENCE_S + PATIENCE * entry.seconds.get((PLAIN, cell), 0.0)
            limit = min(usual, self._last_moment(entry))
            began = self.elapsed
            if began >= entry.until:  # nothing begins after the end
                lines.append(line | {"error": CUT, "cut": True, "t": round(began, 3)})
                continue
            try:
                run = entry.contestants[name].answer(made[which], params, f"{cell}, sweep {sweep}", limit)
                entry.seconds[name, cell] = run.total_s
                line |= _figures(run)
            except Failed as failed:
                if limit < usual and self.elapsed - began >= limit:
                    line |= {"error": CUT, "cut": True}
                else:
                    line["error"] = str(failed)
                    entry.failed.add((name, cell))
                    if isinstance(entry.contestants[name], Engine) or self.elapsed - began >= limit:
                        struck.append((name, failed))
            lines.append(line | {"t": round(self.elapsed, 3)})
        self.store.append(lines)
        for name, why in struck:
            self._strike(entry, name, str(why), why.fatal)

    def _last_moment(self, entry: Entry) -> float:
        """Seconds until an answer is cut off."""
        return max(entry.until - self.elapsed + OVERTIME_S + OVERTIME * self.config.budget_s, 0.1)

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


def _stored_plan(line: Line) -> Plan:
    """What an earlier run of the same comparison made up its mind to run."""
    plan = line["plan"]
    return Plan(tuple(plan["others"]), tuple(Cell(**cell) for cell in plan["cells"]), plan["max_tokens"])


def _prompt_tokens(entry: Entry, cell: Cell) -> float:
    """Of a unit, on average."""
    made = entry.units[cell.workload, cell.batch]
    return sum(len(t) for unit in made for t in unit.tokens) / len(made)


def _seeds(params: SamplingParams, batch: int) -> list[SamplingParams]:
    return [replace(params, seed=params.seed + i) for i in range(batch)]


def _heat_key(line: Line) -> tuple[Cell, int, int]:
    return Cell(line["workload"], line["batch"], line["temperature"]), line["round"], line["heat"]


def _figures(run: Run) -> Line:
    """As they are written: times to the microsecond."""
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(run).items()}
