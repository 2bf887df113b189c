"""What a decoding method does to the output: every token compared with plain decoding, one sequence at a time.

The reference of a prompt and sampler setting is plain decoding alone in its batch. Each combination of method, batch
size and setting is then run and compared token for token. Where a sequence differs, the logits after the common prefix
are computed once more by plain prefill, and the divergence is explained by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..errors import MethodError, ParameterError
from ..registry import methods
from ..types import Exactness, Result, SamplingParams
from .audit_engine import as_prompt
from .evidence import Check, seen_one_in
from .settings import Setting, of_temperature, setting
from .workloads import Prompt

if TYPE_CHECKING:
    from ..engine.llm import LLM

PLAIN = "plain"
MERGED = ("suffix", "recycling", "draft")  # audited merged into one tree as well, as far as they can run
_RANK: dict[Exactness, int] = {"identical": 0, "distribution": 1, "approximate": 2}
Progress = Callable[[str, int, int], None]  # what runs, sequences done, sequences in all


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """`methods` None: every lossless drafter whose needs are met, and the default method. `samplers`: further sampler
    settings, by name (see `settings`).

    Raises ParameterError for an empty list, a size below 1 or an unknown setting.
    """

    methods: tuple[str, ...] | None = None
    batch_sizes: tuple[int, ...] = (1, 8)
    temperatures: tuple[float, ...] = (0.0, 0.8)
    max_tokens: int = 64
    seed: int = 0
    samplers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.batch_sizes:
            raise ParameterError("batch_sizes is empty: give at least one")
        if not self.temperatures and not self.samplers:
            raise ParameterError("temperatures and samplers are empty: give at least one")
        if self.methods is not None and not self.methods:
            raise ParameterError("methods is empty: name at least one, or leave it to the default")
        if min(self.batch_sizes) < 1:
            raise ParameterError(f"batch size {min(self.batch_sizes)} is out of range: it must be at least 1")
        for each in self.settings:
            each.params(self.max_tokens, self.seed)

    @property
    def settings(self) -> list[Setting]:
        """Temperatures first; each once."""
        every = [*map(of_temperature, self.temperatures), *map(setting, self.samplers)]
        return list({each.name: each for each in every}.values())

    def params(self, temperature: float, index: int) -> SamplingParams:
        """Of prompt number `index`; each prompt has a seed of its own."""
        return SamplingParams(max_tokens=self.max_tokens, temperature=temperature, seed=self.seed + index)


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token at which a sequence left the reference. Token None: that output had ended."""

    prompt: str
    position: int  # index in the output
    expected: int | None
    got: int | None
    expected_text: str
    got_text: str
    logit_margin: float | None  # expected minus got, by plain prefill of the common prefix
    explanation: str


@dataclass(slots=True)
class AuditRow:
    """One combination. `tokens_per_s` counts all sequences and the wall clock, prefill included; `sampler` is the name
    of the setting; `accepted` and `declined` are the drafted tokens that the verifier let pass, and those that it
    looked at and did not."""

    method: str
    batch: int
    temperature: float
    exactness: Exactness  # what the results claimed, the weakest of them
    sequences: int
    differing: int
    tokens: int
    mean_accepted: float
    tokens_per_s: float
    divergences: list[Divergence] = field(default_factory=list)
    reference: bool = False
    sampler: str = ""
    accepted: int = 0
    declined: int = 0

    @property
    def promised(self) -> bool:
        """Whether its tokens are to be those of plain decoding: a greedy text has a distribution of one text."""
        return self.exactness == "identical" or (self.exactness == "distribution" and self.temperature == 0)

    @property
    def holds(self) -> bool:
        """Whether what was claimed is what was found."""
        return not self.promised or self.differing == 0


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a method was compared where tokens are promised: of each setting the batch size with the most. The
    same prompts at another batch size are no new looks."""

    method: str
    tokens: int
    accepted: int
    declined: int

    @property
    def wrong_token_in(self) -> int:
        """One wrong token among so many would have been seen, see `seen_one_in`."""
        return seen_one_in(self.tokens)

    @property
    def wrong_draft_in(self) -> int:
        """One wrong draft token let pass among so many that are to be declined would have been seen."""
        return seen_one_in(self.declined)


@dataclass(slots=True)
class AuditSection:
    """All rows of one model in one precision. `skipped` holds (method, why it was left out); `checks` what else was
    looked at; `references` the results of plain decoding by setting."""

    model: str
    precision: str
    row_invariant: bool
    rows: list[AuditRow]
    skipped: list[tuple[str, str]]
    checks: list[Check] = field(default_factory=list)
    references: dict[str, list[Result]] = field(default_factory=dict, repr=False)

    @property
    def holds(self) -> bool:
        return all(row.holds for row in self.rows) and all(check.holds for check in self.checks)

    @property
    def methods(self) -> list[str]:
        """Plain decoding first."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def coverage(self) -> list[Coverage]:
        """Of each method that promises tokens."""
        found = []
        for method in self.methods:
            most: dict[str, AuditRow] = {}
            for row in self.rows:
                if row.method == method and row.promised and not row.reference:
                    best = most.get(row.sampler)
                    most[row.sampler] = row if best is None else max(best, row, key=lambda r: (r.tokens, r.declined))
            if most:
                sums = (sum(getattr(row, name) for row in most.values()) for name in ("tokens", "accepted", "declined"))
                found.append(Coverage(method, *sums))
        return found

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "holds": row.holds} for row in self.rows]
        covered = [
            {**asdict(c), "wrong_token_in": c.wrong_token_in, "wrong_draft_in": c.wrong_draft_in} for c in self.coverage
        ]
        return {
            "model": self.model,
            "precision": self.precision,
            "row_invariant": self.row_invariant,
            "holds": self.holds,
            "rows": rows,
            "coverage": covered,
            "checks": [check.to_json() for check in self.checks],
            "skipped": [{"method": name, "reason": reason} for name, reason in self.skipped],
        }


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Index of the first token that differs, a missing one included; None when the two are equal."""
    for i, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a != b:
            return i
    return None if len(expected) == len(got) else min(len(expected), len(got))


def default_methods(llm: LLM) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the lossless methods that this model can run, each alone, several merged into one tree, and the default
    one; and those left out, with why."""
    names, skipped = [], []
    for method in methods("drafter"):
        if method.name == PLAIN:
            continue
        if method.exactness == "approximate":
            skipped.append((method.name, "it is approximate; name it with --method to audit it"))
            continue
        try:
            with llm.with_method(method.name):
                names.append(method.name)
        except MethodError as error:
            skipped.append((method.name, str(error)))
    merged = [name for name in MERGED if name in names]
    if len(merged) > 1:
        names.append("+".join(merged))
    with llm.with_method("auto") as best:
        if best.method != PLAIN:  # what the planner chooses step by step
            names.append("auto")
    return names, skipped


def split_by_length(llm: LLM, prompts: Sequence[Prompt], max_tokens: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts that fit the model's context together with their answer, and those that do not."""
    room = llm.config.max_position - max_tokens
    fits = [len(llm.tokens(as_prompt(llm, prompt))) <= room for prompt in prompts]
    return (
        [p for p, ok in zip(prompts, fits, strict=True) if ok],
        [p for p, ok in zip(prompts, fits, strict=True) if not ok],
    )


def audit(
    llm: LLM, prompts: Sequence[Prompt], config: AuditConfig, progress: Progress = lambda what, done, total: None
) -> AuditSection:
    """Run every combination on one loaded model. Raises MethodError for a method that cannot run here and
    ParameterError for prompts that are missing or do not fit the context."""
    if not prompts:
        raise ParameterError("there are no prompts to audit")
    if config.methods is None:
        names, skipped = default_methods(llm)
    else:
        names, skipped = [n for n in dict.fromkeys(config.methods) if n != PLAIN], []
    runs = _plan([PLAIN, *names], config)
    total, done = len(runs) * len(prompts), 0
    section = AuditSection(llm.name, llm.precision, llm.decoder.row_invariant, [], skipped)
    for method, batch, how in runs:
        what = f"{llm.precision} {method}, batch {batch}, {how.name}"
        params = [how.params(config.max_tokens, config.seed + i) for i in range(len(prompts))]
        verifier = "auto" if method == PLAIN else llm.verifier
        with llm.with_method(method, verifier=verifier, max_batch=batch) as runner:
            began, results = perf_counter(), []
            for part in _generate(runner, prompts, params, batch):
                results += part
                progress(what, done + len(results), total)
            seconds = perf_counter() - began
        done += len(prompts)
        reference = section.references.setdefault(how.name, results)
        row = _row(method, batch, how, results, seconds)
        row.reference = reference is results
        row.divergences = [
            _explain(llm, prompt, param, expected, got)
            for prompt, param, expected, got in zip(prompts, params, reference, results, strict=True)
            if first_difference(expected.token_ids, got.token_ids) is not None
        ]
        row.differing = len(row.divergences)
        section.rows.append(row)
    return section


def _plan(names: Sequence[str], config: AuditConfig) -> list[tuple[str, int, Setting]]:
    """Combinations in the order in which they run: each setting begins with its reference, plain at batch 1."""
    runs = []
    for how in config.settings:
        runs.append((PLAIN, 1, how))
        runs += [
            (name, batch, how)
            for name in names
            for batch in dict.fromkeys(config.batch_sizes)
            if (name, batch) != (PLAIN, 1)
        ]
    return runs


def _generate(
    llm: LLM, prompts: Sequence[Prompt], params: Sequence[SamplingParams], batch: int
) -> Iterator[list[Result]]:
    """Results in order. Twice the batch goes in at a time, so that sequences also join a step that is under way."""
    size = 1 if batch == 1 else 2 * batch
    for start in range(0, len(prompts), size):
        part = [as_prompt(llm, prompt) for prompt in prompts[start : start + size]]
        yield llm.generate(part, list(params[start : start + size]))


def _row(method: str, batch: int, how: Setting, results: Sequence[Result], seconds: float) -> AuditRow:
    tokens = sum(r.stats.tokens for r in results)
    steps = sum(r.stats.steps for r in results)
    sources = [source for r in results for source in r.stats.sources.values()]
    return AuditRow(
        method=method,
        batch=batch,
        temperature=how.base.temperature,
        sampler=how.name,
        exactness=max((r.exactness for r in results), key=_RANK.__getitem__),
        sequences=len(results),
        differing=0,
        tokens=tokens,
        mean_accepted=(tokens - len(results)) / steps if steps else 1.0,
        tokens_per_s=tokens / seconds if seconds > 0 else 0.0,
        accepted=sum(sum(s.right) for s in sources),
        declined=sum(sum(s.tested) - sum(s.right) for s in sources),
    )


def _explain(llm: LLM, prompt: Prompt, params: SamplingParams, expected: Result, got: Result) -> Divergence:
    """Why two outputs part: from the logits that plain prefill gives after their common prefix."""
    at = first_difference(expected.token_ids, got.token_ids)
    assert at is not None
    a = expected.token_ids[at] if at < len(expected.token_ids) else None
    b = got.token_ids[at] if at < len(got.token_ids) else None

    def text(token: int | None) -> str:
        return "(end of output)" if token is None else llm.tokenizer.decode([token])

    if a is None or b is None:
        margin, why = None, "one output ended where the other went on: they were cut differently"
    else:
        tokens = llm.tokens(as_prompt(llm, prompt))
        margin, why = _margin(llm, tokens, expected.token_ids[:at], params, a, b)
    if got.exactness == "identical" or (got.exactness == "distribution" and params.greedy):
        why = f"BROKEN PROMISE of identical tokens, please report it. {why}"
    return Divergence(prompt.id, at, a, b, text(a), text(b), margin, why)


def _margin(
    llm: LLM, prompt: list[int], output: list[int], params: SamplingParams, a: int, b: int
) -> tuple[float, str]:
    """Logit of `a` minus that of `b`, and what that says about the divergence."""
    from ..decoding.sampling import History, distribution, uniform
    from .teacher import last_logits

    prefix, prompt_length = [*prompt, *output], len(prompt)
    logits = last_logits(llm.decoder, prefix)
    margin = float(logits[a]) - float(logits[b])
    why = f"the logits of the two tokens are {abs(margin):.4g} apart"
    if llm.precision == "bfloat16":
        step = 2.0 ** (math.floor(math.log2(max(abs(float(logits[a])), 1e-30))) - 7)
        why += f" (bfloat16 holds numbers of that size in steps of {step:.4g})"
    if not params.greedy:
        p = distribution(logits, params, History(prefix, prompt_length))
        u, low = uniform(params.seed, len(prefix)), float(p[:b].sum())
        away = max(low - u, u - low - float(p[b]), 0.0)
        why += f"; the sampled tokens part where {away:.3g} of probability moves across the draw"
    if not llm.decoder.row_invariant:
        why += f"; {llm.precision} rounds a row differently when others share its step"
    return margin, why
