"""A loaded model in a comparison: its workloads cut into units, and who answers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...errors import OutpaceError
from ...types import SamplingParams
from ..audit import as_prompt, default_methods
from ..peers.peer import Peer
from . import ceilings
from .contestant import Clock, Contestant, Engine, Method
from .plan import PLAIN, Cell, CompareConfig, Plan, by_standing, cells, peer_names
from .sets import RANDOM, Unit, Workload, code_in, load_workloads, random_prompts, units
from .store import Line

if TYPE_CHECKING:
    from ...engine.llm import LLM

OpenPeer = Callable[[str, str, "LLM", int], Peer]  # (as requested, model as named, loaded, largest batch)
ROWS = 64  # of a draft and its last page, beside prompt and answer


@dataclass
class Entry:
    """`known`: the model's line of an earlier run, whose contestants take part again. `failures` (reason, and which
    method, workload or batch) are for the caller to write. `seconds`: what a unit last took a contestant in a cell."""

    name: str
    source: str  # the model's name as requested
    llm: LLM
    config: CompareConfig
    until: float
    known: Line | None = None
    contestants: dict[str, Contestant] = field(default_factory=dict)
    units: dict[tuple[str, int], list[Unit]] = field(default_factory=dict)  # by workload and batch
    cells: list[Cell] = field(default_factory=list)  # that can be measured
    rounds: dict[Cell, int] = field(default_factory=dict)  # of each cell in a pass
    described: Line = field(default_factory=dict)
    failures: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    seconds: dict[tuple[str, Cell], float] = field(default_factory=dict)
    failed: set[tuple[str, Cell]] = field(default_factory=set)
    strikes: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # what the budget has no time for, in words
    max_tokens: int = field(init=False)  # of an answer

    def __post_init__(self) -> None:
        self.described = {"kind": "model", "model": self.name, "workloads": [], "skipped": []}
        self.max_tokens = self.config.max_tokens

    @property
    def others(self) -> list[str]:
        return [name for name in self.contestants if name != PLAIN]

    def prepare(self, open_peer: OpenPeer, clock: Clock) -> None:
        """Read the workloads and line up the contestants; nothing is opened or started yet."""
        workloads = load_workloads(self.config.workloads, self.config.categories, self.config.seed)
        for workload in workloads:
            self._cut(workload)
        own = {w.name: w.temperature for w in workloads}
        everything = cells(self.config, own)
        self.cells = [c for c in everything if self.units.get((c.workload, c.batch))]
        self.described["cells"] = [asdict(c) for c in everything]
        known = (self.known or {}).get("rounds_in_a_pass", {})
        self.rounds = {cell: known.get(str(cell), 1) for cell in self.cells}
        self._line_up(open_peer, clock)

    def _cut(self, workload: Workload) -> None:
        """Into units of prompts that fit the context."""
        llm, context = self.llm, self.llm.config.max_position
        ids, texts = [p.id for p in workload.prompts], [code_in(p) for p in workload.prompts]
        tokens = [tuple(llm.tokens(as_prompt(llm, prompt))) for prompt in workload.prompts]
        if workload.name == RANDOM and workload.error is None:
            tokens = random_prompts(llm.config.vocab_size)
            ids, texts = [f"random-{i}" for i in range(len(tokens))], [""] * len(tokens)
        fits = [i for i, t in enumerate(tokens) if 0 < len(t) <= context - self.config.max_tokens]
        if len(fits) < len(tokens):
            left = len(tokens) - len(fits)
            workload.notes.append(f"{left} of {len(tokens)} prompts are longer than the context and were left out")
        if workload.error is None and not fits:
            workload.error = f"no prompt fits the context of {context} tokens"
        for batch in self.config.batch_sizes:
            made = units([ids[i] for i in fits], [tokens[i] for i in fits], [texts[i] for i in fits], batch)
            self.units[workload.name, batch] = made[: self.config.prompts]
            if not made and workload.error is None:
                why = f"a batch of {batch} needs as many prompts, and the workload has {len(fits)}"
                self.failures.append((why, {"workload": workload.name, "batch": batch}))
        if workload.error is not None:
            self.failures.append((workload.error, {"workload": workload.name}))
        sizes = sorted(len(tokens[i]) for i in fits)
        about = {"name": workload.name, "prompts": len(fits), "notes": workload.notes, "error": workload.error}
        about["prompt_tokens"] = [sizes[0], sizes[len(sizes) // 2], sizes[-1]] if sizes else []
        self.described["workloads"].append(about)

    def _line_up(self, open_peer: OpenPeer, clock: Clock) -> None:
        """Plain first, then the methods and the peers in the order in which they are kept if not all can be."""
        llm, config = self.llm, self.config
        if self.known is not None:
            names, self.described["skipped"] = self.known["methods"], self.known["skipped"]
        elif config.methods is None:
            names, self.described["skipped"] = default_methods(llm)
        else:
            names = list(config.methods)
        names = [PLAIN, *(n for n in dict.fromkeys(names) if n != PLAIN)]
        largest = max(config.batch_sizes)
        longest = max((len(t) for made in self.units.values() for u in made for t in u.tokens), default=256)
        kv_tokens = largest * (longest + config.max_tokens + ROWS)

        def maker(name: str) -> Callable[[], LLM]:
            spec, _, verifier = name.partition("/")
            chosen = {"verifier": verifier} if verifier else {}
            return lambda: llm.with_method(spec, max_batch=largest, kv_tokens=kv_tokens, **chosen)

        made: dict[str, Contestant] = {name: Method(name, maker(name), clock) for name in names}
        called = peer_names(config.peers, names)
        for spec, name in called.items():
            try:
                made[name] = Engine(name, open_peer(spec, self.source, llm, largest))
            except OutpaceError as error:
                self.failures.append((str(error), {"method": name}))
        peers = [name for name in called.values() if name in made]
        others = names[1:] + peers if config.methods is not None else by_standing(names[1:], peers)
        self.contestants = {name: made[name] for name in (PLAIN, *others)}
        self.described |= {"methods": [n for n in self.contestants if n in names], "peers": list(called.values())}

    def narrow(self, plan: Plan, why: str = "no time within the budget") -> None:
        """Run this plan alone, and say what it leaves out."""
        others = [name for name in self.others if name not in plan.others]
        if others:
            self.left_out.append(f"{', '.join(others)} ({why})")
        for name in others:
            self.contestants.pop(name).close()
        batches = {cell.batch for cell in plan.cells}
        for batch in sorted({cell.batch for cell in self.cells} - batches):
            self.left_out.append(f"{batch} answers at once ({why})")
        for cell in self.cells:
            if cell not in plan.cells and cell.batch in batches:
                self.left_out.append(f"{cell} ({why})")
        self.cells = [cell for cell in self.cells if cell in plan.cells]
        self.rounds = {cell: count for cell, count in self.rounds.items() if cell in plan.cells}
        if plan.max_tokens < self.max_tokens:
            self.left_out.append(f"{plan.max_tokens} tokens of an answer instead of {self.max_tokens} ({why})")
            self.max_tokens = plan.max_tokens

    def answers(self, temperature: float, number: int) -> SamplingParams:
        """Of prompt number `number` of its workload, in the length of the plan."""
        return replace(self.config.params(temperature, number), max_tokens=self.max_tokens)

    def describe(self, limit_s: float, clock: Clock) -> None:
        """What the report says of the model beside its figures; measures the machine, for about `limit_s`."""
        llm, draft = self.llm, self.llm.draft_loaded
        self.described |= {
            "precision": llm.precision,
            "row_invariant": llm.decoder.row_invariant,
            "threads": getattr(llm.decoder, "threads", None),
            "device": str(llm.decoder.device),
            "draft_model": draft.name if draft is not None else None,
            "ceilings": ceilings.measure(llm, limit_s, clock).to_json(),
        }

    def about_peers(self) -> dict[str, Any]:
        """Versions and settings of those that started."""
        about: dict[str, Any] = {}
        for name, contestant in self.contestants.items():
            if isinstance(contestant, Engine):
                try:
                    about[name] = contestant.peer.about()
                except Exception as error:  # it failed to warm up, which is reported elsewhere
                    about[name] = {"not running": " ".join(str(error).split())}
        return about

    def drop(self, name: str) -> None:
        """A contestant is out."""
        if name in self.contestants:
            self.contestants[name].close()
            self.failed |= {(name, cell) for cell in self.cells}

    def close(self) -> None:
        for contestant in self.contestants.values():
            contestant.close()
