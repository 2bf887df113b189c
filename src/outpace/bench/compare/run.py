"""The run: for each model warm-up, then rounds of heats until the budget or the rounds are over.

A contestant that fails in a cell has failed there, with its reason, and is not asked again; the others go on. One that
hangs, or another engine that dies, twice is out. A heat starts only if it should end within the budget; in the first
round it starts as long as there is any left, so that every cell has a figure, or was not reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ...errors import OutpaceError
from ...types import SamplingParams
from ..audit import ask, default_methods
from ..peers.peer import Peer
from ..workloads import own_prompts
from . import ceilings
from .contestant import Clock, Contestant, Engine, Failed, Method, Run
from .plan import PLAIN, Cell, CompareConfig, cells, heats, units_that_fit
from .sets import RANDOM, Unit, Workload, code_in, load_workloads, random_prompts, units
from .store import Line, Store

if TYPE_CHECKING:
    from ...engine.llm import LLM

Progress = Callable[[str, float, float], None]  # what runs, seconds spent, seconds of the budget
OpenModel = Callable[[str, int], "LLM"]  # (name, largest batch): a small KV cache and no prefix cache
OpenPeer = Callable[[str, "LLM", int], Peer]  # (what was asked for, the model, largest batch)
WARM_TOKENS = 8
STRIKES = 2
PATIENCE_S, PATIENCE = 30.0, 20.0  # an answer may take that many seconds, and so many times plain's
ROWS = 64  # of a draft and its last page, beside prompt and answer


@dataclass
class Entry:
    """A loaded model and who answers with it. `seconds`: what a unit last took a contestant in a cell."""

    name: str
    llm: LLM
    contestants: dict[str, Contestant]
    units: dict[tuple[str, int], list[Unit]]  # by workload and batch
    cells: list[Cell]
    until: float
    seconds: dict[tuple[str, Cell], float] = field(default_factory=dict)
    failed: set[tuple[str, Cell]] = field(default_factory=set)
    strikes: dict[str, int] = field(default_factory=dict)

    @property
    def others(self) -> list[str]:
        return [name for name in self.contestants if name != PLAIN]


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
        self.config, self.store, self.clock, self._told = config, store, clock, progress
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
        for i, name in enumerate(models):
            if self._over(name):
                continue
            known = self.store.of("model", name)
            until = self.elapsed + (self.config.budget_s - self.elapsed) / (len(models) - i)
            if known and known[-1]["budget_s"] == self.config.budget_s:
                until = known[-1]["until"]
            try:
                with self._open_model(name, max(self.config.batch_sizes)) as llm:
                    self._compare(name, llm, until)
            except OutpaceError as error:
                if len(models) == 1:
                    raise
                self._failure(name, str(error))

    def _over(self, model: str) -> bool:
        """Whether earlier runs did all that is wanted of a model."""
        limit = self.config.rounds
        ends = self.store.of("end", model)
        return any(
            x["model"] == model and x["method"] is None and x["workload"] is None for x in self.store.of("failure")
        ) or any(
            x["budget_s"] >= self.config.budget_s
            and (x["rounds"] is None or (limit is not None and x["rounds"] >= limit))
            for x in ends
        )

    # -- before the rounds ---------------------------------------------------------------------------------------

    def _compare(self, name: str, llm: LLM, until: float) -> None:
        self._tell(f"{name}: getting ready")
        entry = self._entry(name, llm, until)
        try:
            known = self.store.of("model", name)
            if not known:
                self._describe(entry)
            warm = self._warm_up(entry)
            count = known[-1]["units"] if known else self._plan(entry, warm)
            for key in entry.units:
                entry.units[key] = entry.units[key][:count]
            self._remember(entry)
            if not known:
                self._describe_contestants(entry, count)
            if self._began is None:
                self._began = self.clock()
            self._rounds(entry)
        finally:
            for contestant in entry.contestants.values():
                contestant.close()

    def _entry(self, name: str, llm: LLM, until: float) -> Entry:
        """Workloads cut into units that fit the context, and who is to answer them."""
        workloads = load_workloads(self.config.workloads, self.config.categories, self.config.seed)
        entry = Entry(name, llm, {}, {}, [], until)
        self.described: Line = {"kind": "model", "model": name, "workloads": [], "skipped": []}
        for workload in workloads:
            self._add_workload(entry, workload)
        usable = {w.name: w.temperature for w in workloads if w.error is None}
        entry.cells = [c for c in cells(self.config, usable) if entry.units.get((c.workload, c.batch))]
        everything = cells(self.config, {w.name: w.temperature for w in workloads})
        self.described["cells"] = [asdict(c) for c in everything]
        self._line_up(entry)
        return entry

    def _add_workload(self, entry: Entry, workload: Workload) -> None:
        llm, room = entry.llm, entry.llm.config.max_position - self.config.max_tokens
        ids = [prompt.id for prompt in workload.prompts]
        texts = [code_in(prompt) for prompt in workload.prompts]
        tokens = [tuple(llm.tokens(ask(llm, prompt))) for prompt in workload.prompts]
        if workload.name == RANDOM and workload.error is None:
            tokens = random_prompts(llm.config.vocab_size)
            ids, texts = [f"random-{i}" for i in range(len(tokens))], [""] * len(tokens)
        fits = [i for i, t in enumerate(tokens) if 0 < len(t) <= room]
        if len(fits) < len(tokens):
            left = len(tokens) - len(fits)
            workload.notes.append(f"{left} of {len(tokens)} prompts are longer than the context and were left out")
        if workload.error is None and not fits:
            workload.error = f"no prompt fits the context of {llm.config.max_position} tokens"
        sizes = sorted(len(tokens[i]) for i in fits)
        for batch in self.config.batch_sizes:
            made = units([ids[i] for i in fits], [tokens[i] for i in fits], [texts[i] for i in fits], batch)
            entry.units[workload.name, batch] = made[: self.config.prompts]
            if not made and workload.error is None:
                why = f"a batch of {batch} needs as many prompts, and the workload has {len(fits)}"
                self._failure(entry.name, why, workload=workload.name, batch=batch)
        if workload.error is not None:
            self._failure(entry.name, workload.error, workload=workload.name)
        self.described["workloads"].append(
            {
                "name": workload.name,
                "prompts": len(fits),
                "prompt_tokens": [sizes[0], sizes[len(sizes) // 2], sizes[-1]] if sizes else [],
                "notes": workload.notes,
                "error": workload.error,
            }
        )

    def _line_up(self, entry: Entry) -> None:
        """Plain, the methods and the peers."""
        llm, config = entry.llm, self.config
        known = self.store.of("model", entry.name)
        if known:  # the same as before, so that heats are
            names = known[-1]["methods"]
            self.described["skipped"] = known[-1]["skipped"]
        elif config.methods is None:
            names, self.described["skipped"] = default_methods(llm)
        else:
            names = list(config.methods)
        names = [PLAIN, *(n for n in dict.fromkeys(names) if n != PLAIN)]
        self.described["methods"] = names
        largest = max(config.batch_sizes)
        longest = max((len(t) for made in entry.units.values() for u in made for t in u.tokens), default=256)
        kv_tokens = largest * (longest + config.max_tokens + ROWS)

        def maker(name: str) -> Callable[[], LLM]:
            spec, _, verifier = name.partition("/")
            return lambda: llm.with_method(spec, verifier=verifier or None, max_batch=largest, kv_tokens=kv_tokens)

        for name in names:
            entry.contestants[name] = Method(name, maker(name), self.clock)
        for spec in config.peers:
            try:
                entry.contestants[spec] = Engine(spec, self._open_peer(spec, llm, largest))
            except OutpaceError as error:
                self._failure(entry.name, str(error), method=spec)
        self.described["peers"] = list(config.peers)

    def _warm_up(self, entry: Entry) -> dict[tuple[str, int], tuple[float, float]]:
        """Compile, fill caches, start peers. Seconds for each prompt token and each further step, by contestant and
        batch."""
        llm, found = entry.llm, {}
        prompts = own_prompts(["chat"])
        tokens = [tuple(llm.tokens(ask(llm, p)))[: llm.config.max_position - WARM_TOKENS] for p in prompts]
        params = self.config.params(self.config.temperatures[0], 0)
        for name in list(entry.contestants):
            for batch in self.config.batch_sizes:
                self._tell(f"{entry.name}: warming up {name}, batch {batch}")
                chosen = [tokens[i % len(tokens)] for i in range(batch)]
                unit = Unit(("warm-up",) * batch, tuple(chosen), ("",) * batch, tuple(range(batch)))
                short = [_shorter(params, i) for i in range(batch)]
                try:
                    limit = max(PATIENCE_S, min(4 * PATIENCE_S, entry.until - self.elapsed))
                    run = entry.contestants[name].answer(unit, short, "warm-up", limit)
                except Failed as failed:
                    entry.failed |= {(name, cell) for cell in entry.cells if cell.batch == batch}
                    if self._strike(entry, name, str(failed), failed.fatal, batch):
                        break
                    continue
                first = run.first_s if run.first_s is not None else run.total_s / 2
                steps = (run.total_s - first) / (WARM_TOKENS - 1)
                found[name, batch] = first / sum(map(len, chosen)), steps
        return found

    def _plan(self, entry: Entry, warm: dict[tuple[str, int], tuple[float, float]]) -> int:
        """Estimates from the warm-up. Returns the number of units of each cell."""
        for cell in entry.cells:
            made = entry.units[cell.workload, cell.batch]
            size = sum(len(t) for unit in made for t in unit.tokens) / len(made)
            for name in entry.contestants:
                if (name, cell.batch) in warm:
                    reading, step = warm[name, cell.batch]
                    entry.seconds[name, cell] = size * reading + (self.config.max_tokens - 1) * step
        plains = max(len(heats(entry.others, 0)) - 1, 0)
        once = sum(entry.seconds.values()) + plains * sum(
            seconds for (name, _), seconds in entry.seconds.items() if name == PLAIN
        )
        return units_that_fit(self.config.prompts, once, entry.until - self.elapsed)

    def _remember(self, entry: Entry) -> None:
        """What earlier runs measured of this model: times and failures."""
        for line in self.store.of("measurement", entry.name):
            key = (line["method"], Cell(line["workload"], line["batch"], line["temperature"]))
            if line.get("error"):
                entry.failed.add(key)
            else:
                entry.seconds[key] = line["total_s"]
        for line in self.store.of("failure", entry.name):
            if line["method"] is not None and line["batch"] is None:
                self._out(entry, line["method"])

    def _describe(self, entry: Entry) -> None:
        """What the report says of a model beside its figures."""
        llm = entry.llm
        self._tell(f"{entry.name}: measuring the machine")
        draft = llm.draft_loaded
        self.described |= {
            "precision": llm.precision,
            "row_invariant": llm.decoder.row_invariant,
            "threads": getattr(llm.decoder, "threads", None),
            "device": str(llm.decoder.device),
            "draft_model": draft.name if draft is not None else None,
            "ceilings": ceilings.measure(llm).to_json(),
        }

    def _describe_contestants(self, entry: Entry, count: int) -> None:
        """Written after the warm-up: what is in the file before is made again by the next start."""
        about = {}
        for name, contestant in entry.contestants.items():
            if isinstance(contestant, Engine):
                try:
                    about[name] = contestant.peer.about()
                except Exception as error:  # it has just failed to warm up, and that is told elsewhere
                    about[name] = {"error": str(error)}
        end = {"units": count, "until": entry.until, "budget_s": self.config.budget_s, "t": self.elapsed}
        self.store.append([{**self.described, "peers_about": about, **end}])

    # -- rounds --------------------------------------------------------------------------------------------------

    def _rounds(self, entry: Entry) -> None:
        done = {_heat_key(line) for line in self.store.of("measurement", entry.name)}
        number = 0
        while self.config.rounds is None or number < self.config.rounds:
            if not self._round(entry, number, done):
                break
            number += 1
        self.store.append(
            [
                {
                    "kind": "end",
                    "model": entry.name,
                    "budget_s": self.config.budget_s,
                    "rounds": self.config.rounds,
                    "t": self.elapsed,
                }
            ]
        )

    def _round(self, entry: Entry, number: int, done: set[Any]) -> bool:
        """Whether anything was, or had been, measured in it."""
        some = False
        for i, cell in enumerate(entry.cells):
            made = entry.units[cell.workload, cell.batch]
            unit = number % len(made)
            for heat, names in enumerate(heats(entry.others, number + i)):
                if (cell, number, heat) in done:
                    some = True
                    continue
                names = [n for n in names if n in entry.contestants and (n, cell) not in entry.failed]
                if names in ([], [PLAIN]) and heat:
                    continue
                if not names or not self._time_for(entry, cell, names, number):
                    continue
                self._heat(entry, cell, number, heat, names, unit, made[unit], owner=f"{cell}/{number // len(made)}")
                some = True
        return some

    def _time_for(self, entry: Entry, cell: Cell, names: Sequence[str], number: int) -> bool:
        expected = sum(entry.seconds.get((name, cell), 0.0) for name in names) if number else 0.0
        return self.elapsed + expected < entry.until

    def _heat(
        self,
        entry: Entry,
        cell: Cell,
        number: int,
        heat: int,
        names: list[str],
        which: int,
        unit: Unit,
        owner: str,
    ) -> None:
        """Everybody in turn on one unit; then the lines are written, all together."""
        lines: list[Line] = []
        outs: list[tuple[str, str, bool]] = []
        params = [self.config.params(cell.temperature, n) for n in unit.numbers]
        for name in names:
            self._tell(f"{entry.name}, round {number + 1}: {cell.workload}, batch {cell.batch}: {name}")
            line: Line = {
                "kind": "measurement",
                "model": entry.name,
                "workload": cell.workload,
                "batch": cell.batch,
                "temperature": cell.temperature,
                "round": number,
                "unit": which,
                "heat": heat,
                "heat_size": len(names),
                "place": len(lines),
                "method": name,
                "prompts": list(unit.ids),
                "error": None,
            }
            try:
                run = entry.contestants[name].answer(unit, params, owner, self._patience(entry, cell))
                entry.seconds[name, cell] = run.total_s
                line |= _figures(run)
            except Failed as failed:
                line["error"] = str(failed)
                entry.failed.add((name, cell))
                outs.append((name, str(failed), failed.fatal))
            lines.append(line | {"t": round(self.elapsed, 3)})
        self.store.append(lines)
        for name, reason, fatal in outs:
            if isinstance(entry.contestants[name], Engine) or reason.startswith("not ready"):
                self._strike(entry, name, reason, fatal)

    def _patience(self, entry: Entry, cell: Cell) -> float:
        """Seconds that one answer may take."""
        return min(
            PATIENCE_S + PATIENCE * entry.seconds.get((PLAIN, cell), 0.0),
            max(PATIENCE_S, entry.until - self.elapsed + PATIENCE_S),
        )

    # -- failures ------------------------------------------------------------------------------------------------

    def _strike(self, entry: Entry, name: str, reason: str, fatal: bool, batch: int | None = None) -> bool:
        """Count a contestant's failure; out with it at the second one, or when it cannot even start."""
        entry.strikes[name] = entry.strikes.get(name, 0) + 1
        if fatal or entry.strikes[name] >= STRIKES:
            why = reason if fatal else f"given up after {entry.strikes[name]} failures, the last one: {reason}"
            self._failure(entry.name, why, method=name)
            self._out(entry, name)
            return True
        if batch is not None:
            self._failure(entry.name, f"in the warm-up: {reason}", method=name, batch=batch)
        return False

    def _out(self, entry: Entry, name: str) -> None:
        contestant = entry.contestants.get(name)
        if contestant is not None:
            contestant.close()
            entry.failed |= {(name, cell) for cell in entry.cells}

    def _failure(
        self,
        model: str,
        reason: str,
        method: str | None = None,
        workload: str | None = None,
        batch: int | None = None,
    ) -> None:
        """Once: a second start finds the same again."""
        line = {
            "kind": "failure",
            "model": model,
            "method": method,
            "workload": workload,
            "batch": batch,
            "reason": reason,
        }
        if not any({**x, "reason": reason} == line for x in self.store.of("failure", model)):
            self.store.append([line])

    def _tell(self, what: str) -> None:
        self._told(what, self.elapsed, self.config.budget_s)


def _shorter(params: SamplingParams, number: int) -> SamplingParams:
    return replace(params, max_tokens=WARM_TOKENS, seed=params.seed + number)


def _heat_key(line: Line) -> tuple[Cell, int, int]:
    return Cell(line["workload"], line["batch"], line["temperature"]), line["round"], line["heat"]


def _figures(run: Run) -> Line:
    """As they are written: times to the microsecond."""
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(run).items()}
