"""Who answers: a method of ours on the loaded model, or another engine. One unit at a time.

Speed is that of decoding: from the moment when the last answer of the unit has its first token to the moment when the
last one has all; tokens that come earlier do not count. The time of reading the prompts is kept apart (`first_s`).
Answers of a unit that end early leave places empty, which a server fills; so the part until the first one ends, while
all of them run, is kept as well (`full_tokens` in `full_s`).
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from ...errors import OutpaceError
from ...types import RANKS, RequestOptions, Result, SamplingParams
from ..peers.peer import Peer, PeerAnswer, PeerPrompt
from .sets import Unit

if TYPE_CHECKING:
    from ...engine.llm import LLM

Clock = Callable[[], float]


class Failed(OutpaceError):
    """A contestant has no answer. `fatal`: it will not have one to anything else either."""

    def __init__(self, message: str, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


@dataclass(slots=True)
class Run:
    """What one contestant did with one unit. Seconds; None: not known.

    `tokens` of all answers. Of decoding, as defined above: `decode_tokens` in `decode_s`; `steps` of the target, in
    which `turns` sequences took part together and `rows` tokens were computed; `draft_s`, `verify_s` (the target's
    forwards; `forwards` has them by their number of rows: [rows, how many, seconds]) and `sample_s` (choosing tokens,
    verifying drafts). Of the whole answers: `drafted`, `accepted`,
    `tested[d]` and `right[d]` draft nodes of depth d, in `all_turns` turns.
    """

    tokens: int
    total_s: float
    first_s: float | None = None
    decode_tokens: float = 0.0
    decode_s: float = 0.0
    full_tokens: float = 0.0
    full_s: float = 0.0
    steps: int = 0
    turns: int = 0
    rows: int = 0
    draft_s: float | None = None
    verify_s: float | None = None
    sample_s: float | None = None
    forwards: list[tuple[int, int, float]] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    all_turns: int = 0
    tested: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    kv_bytes: int | None = None  # of the target's KV cache, at most
    memory_bytes: int | None = None  # of the whole process, at most, so far
    context: float = 0.0  # tokens in front of a row, on average
    exactness: str | None = None  # as declared; None: nothing is promised
    notes: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)  # one for each answer's tokens


class Contestant(ABC):
    """Not thread-safe. Opened at the first question; after a failure it is closed, and opened again at the next one."""

    name: str

    @abstractmethod
    def answer(self, unit: Unit, params: Sequence[SamplingParams], owner: str, limit_s: float) -> Run:
        """Raises Failed, in one line, for whatever goes wrong or takes longer than `limit_s`. Answers of one `owner`
        may profit from each other, those of others never."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds. Raises nothing; may be called twice."""


class Method(Contestant):
    """A method of ours: `make` opens an LLM."""

    def __init__(self, name: str, make: Callable[[], LLM], clock: Clock = perf_counter) -> None:
        self.name, self._make, self._clock = name, make, clock
        self._llm: LLM | None = None

    def answer(self, unit: Unit, params: Sequence[SamplingParams], owner: str, limit_s: float) -> Run:
        try:
            if self._llm is None:
                self._llm = self._make()
            return self._answer(self._llm, unit, params, RequestOptions(owner=owner), limit_s)
        except Failed:
            self.close()
            raise
        except OutpaceError as error:
            self.close()
            raise Failed(str(error)) from error
        except Exception as error:  # a method that breaks is a finding, and the others go on
            self.close()
            raise Failed(f"{type(error).__name__}: {error}") from error

    def _answer(
        self, llm: LLM, unit: Unit, params: Sequence[SamplingParams], options: RequestOptions, limit_s: float
    ) -> Run:
        ids: list[int] = []
        try:
            began = self._clock()
            for tokens, param, text in zip(unit.tokens, params, unit.predictions, strict=True):
                ids.append(llm.submit(list(tokens), param, text, options))
            seen = _Watch(llm, ids)
            while not llm.idle:
                seen.step(self._clock)
                if self._clock() - began > limit_s:
                    raise Failed(f"not ready after {limit_s:.0f} s")
        except BaseException:
            for id in ids:
                llm.cancel(id)
            raise
        return seen.run(began, unit)

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.close()


class _Watch:
    """Steps an LLM and notes what the steps gave, from the moment when every answer has a first token."""

    def __init__(self, llm: LLM, ids: Sequence[int]) -> None:
        self.llm, self.ids = llm, ids
        self.counts = dict.fromkeys(ids, 0)
        self.results: dict[int, Result] = {}
        self.all_first: float | None = None
        self.full: tuple[float, int] | None = None  # when the first one ended, and the tokens of all by then
        self.before: dict[str, float] = {}
        self.last: dict[str, float] | None = None
        self.first_tokens = self.turns = 0
        self.kv_bytes, self.ended = 0, 0.0
        self.forwards: dict[int, tuple[int, float]] = {}  # rows -> how many, seconds

    def step(self, clock: Clock) -> None:
        events = self.llm.step()
        self.ended = clock()
        for event in events:
            if event.error is not None:
                raise event.error
            self.counts[event.id] += len(event.token_ids)
            self.turns += self.all_first is not None
            if event.result is not None:
                self.results[event.id] = event.result
        now = self.llm.metrics()
        self.kv_bytes = max(self.kv_bytes, int(now["kv_bytes"]))
        if self.last is not None and self.all_first is not None:
            rows, seconds = (now[name] - self.last[name] for name in ("rows", "forward_seconds"))
            count, total = self.forwards.get(int(rows), (0, 0.0))
            self.forwards[int(rows)] = count + 1, total + seconds
        self.last = now
        if self.all_first is None and all(self.counts.values()):
            self.all_first, self.before, self.first_tokens = clock(), now, sum(self.counts.values())
        elif self.full is None and self.results:
            self.full = self.ended, sum(self.counts.values())

    def run(self, began: float, unit: Unit) -> Run:
        results = [self.results[id] for id in self.ids]
        first = self.ended if self.all_first is None else self.all_first
        now = self.llm.metrics()

        def spent(name: str) -> float:
            return now[name] - self.before.get(name, now[name])

        tested, right = by_depth(results)
        tokens = sum(len(r.token_ids) for r in results)
        until, full = self.full if self.full is not None and self.all_first is not None else (first, self.first_tokens)
        return Run(
            tokens=tokens,
            total_s=self.ended - began,
            first_s=first - began,
            decode_tokens=tokens - self.first_tokens,
            decode_s=self.ended - first,
            full_tokens=full - self.first_tokens,
            full_s=until - first,
            steps=int(spent("steps")),
            turns=self.turns,
            rows=int(spent("rows")),
            draft_s=spent("draft_seconds"),
            verify_s=spent("forward_seconds"),
            sample_s=spent("sample_seconds"),
            forwards=[(rows, *of) for rows, of in sorted(self.forwards.items())],
            drafted=sum(r.stats.drafted for r in results),
            accepted=sum(r.stats.accepted for r in results),
            all_turns=sum(r.stats.steps for r in results),
            tested=tested,
            right=right,
            kv_bytes=self.kv_bytes,
            memory_bytes=peak_memory(),
            context=sum(map(len, unit.tokens)) / len(unit.tokens) + tokens / len(results) / 2,
            exactness=max((r.exactness for r in results), key=RANKS.index),
            notes=list(dict.fromkeys(note for r in results for note in r.notes)),
            digests=[digest(r.token_ids) for r in results],
        )


class Engine(Contestant):
    """Another engine. It gets the same token ids; its tokens are counted as PeerAnswer says."""

    def __init__(self, name: str, peer: Peer) -> None:
        self.name, self.peer = name, peer
        self._started = False

    def start(self) -> None:
        """Raises PeerError."""
        if not self._started:
            self.peer.start()
            self._started = True

    def begin(self) -> None:
        """Start it if it is not running. Raises Failed, which is then fatal."""
        try:
            self.start()
        except Exception as error:
            self.close()
            raise Failed(one_line(error), fatal=True) from error

    def answer(self, unit: Unit, params: Sequence[SamplingParams], owner: str, limit_s: float) -> Run:
        self.begin()
        prompts = [PeerPrompt(token_ids=tokens) for tokens in unit.tokens]
        try:
            answers = self.peer.generate(prompts, params[0].max_tokens, params[0].temperature, params[0].seed, limit_s)
        except Exception as error:
            self.close()
            raise Failed(one_line(error)) from error
        wrong = next((a.error for a in answers if a.error), None)
        if wrong is None and (len(answers) != len(prompts) or not all(a.tokens for a in answers)):
            wrong = f"{len(prompts)} prompts, but {sum(a.tokens > 0 for a in answers)} answers"
        if wrong is not None:
            self.close()
            raise Failed(wrong)
        return run_of_answers(answers, unit, self.peer.memory_bytes)

    def close(self) -> None:
        self._started = False
        self.peer.close()


def run_of_answers(answers: Sequence[PeerAnswer], unit: Unit, memory: int | None) -> Run:
    """Of another engine, as far as it reports. Where it is not known when an answer's tokens came, those after its
    first ones are spread evenly over their time, to say how many came after every answer had a first one."""
    total = max(a.total_s for a in answers)
    tokens = sum(a.tokens for a in answers)
    run = Run(tokens=tokens, total_s=total, memory_bytes=memory)
    run.context = sum(map(len, unit.tokens)) / len(answers) + tokens / len(answers) / 2
    run.digests = [digest(a.token_ids) for a in answers if a.token_ids is not None]
    if all(a.steps is not None for a in answers):
        run.all_turns = run.turns = sum(a.steps or 0 for a in answers)
        run.decode_tokens = tokens - sum(a.first_tokens for a in answers)
    firsts = [a.first_token_s for a in answers if a.first_token_s is not None]
    if len(firsts) < len(answers) or max(firsts) >= total:
        return run
    run.first_s = max(firsts)
    run.decode_s = total - run.first_s
    run.decode_tokens = sum(tokens_between(a, run.first_s, total) for a in answers)
    ended = min(a.total_s for a in answers)
    if ended > run.first_s:
        run.full_s = ended - run.first_s
        run.full_tokens = sum(tokens_between(a, run.first_s, ended) for a in answers)
    if run.turns:  # of the whole answers, cut to the same part
        later = tokens - sum(a.first_tokens for a in answers)
        run.turns = round(run.turns * run.decode_tokens / max(later, 1))
    return run


def tokens_between(answer: PeerAnswer, start: float, end: float) -> float:
    """How many of its tokens after the first ones came within these seconds."""
    later, first = answer.tokens - answer.first_tokens, answer.first_token_s
    if answer.arrivals:  # by their share, since text is not cut into tokens as it came
        return later * sum(start < at <= end for at in answer.arrivals) / len(answer.arrivals)
    if first is None or answer.total_s <= max(start, first):
        return 0.0
    return later * (min(end, answer.total_s) - start) / (answer.total_s - first)


def by_depth(results: Sequence[Result]) -> tuple[list[int], list[int]]:
    """Draft nodes that were verified, and those that were right, by depth; all drafters and answers together."""
    sources = [source for r in results for source in r.stats.sources.values()]
    depth = max((len(s.tested) for s in sources), default=0)

    def total(counts: list[list[int]]) -> list[int]:
        return [sum(c[d] for c in counts if d < len(c)) for d in range(depth)]

    return total([s.tested for s in sources]), total([s.right for s in sources])


def digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()[:16]


def peak_memory() -> int | None:
    """The most memory that this process has held, in bytes. None: the system does not say."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, OutpaceError) else f"{type(error).__name__}: {text}"[:300]
