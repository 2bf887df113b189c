"""All that an audit looks at beside the tokens: verifiers by themselves, the loop, the frequencies of real texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ..decoding.methods import make_verifier
from ..errors import ParameterError
from .audit import PLAIN, AuditConfig, AuditSection, Progress
from .audit_engine import check_owners, check_ragged, check_seeds
from .audit_frequencies import check_frequencies, undecided
from .audit_samplers import check_samplers
from .audit_verifiers import check_verifier
from .evidence import Check
from .settings import Setting, setting
from .workloads import Prompt

if TYPE_CHECKING:
    from ..engine.llm import LLM

KINDS = ("samplers", "verifiers", "ragged", "seeds", "owners", "frequencies")
_PROMPTS, _TOKENS = 6, 24  # of the checks of the loop: enough to part, few enough for every method

Task = Callable[[], Iterator[Check]]


def prove(
    llm: LLM,
    prompts: Sequence[Prompt],
    config: AuditConfig,
    section: AuditSection,
    kinds: Sequence[str] = KINDS,
    *,
    texts: int = 600,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Run the checks of these kinds for the methods of `section`, and append what they found to it.

    Raises ParameterError for an unknown kind.
    """
    if unknown := sorted({*kinds} - {*KINDS}):
        raise ParameterError(f"no check {unknown[0]!r}; there are: {', '.join(KINDS)}")
    tasks = list(_tasks(llm, prompts, config, section, kinds, texts))
    for done, (what, task) in enumerate(tasks):
        progress(f"{llm.precision} {what}", done, len(tasks))
        section.checks += task()
    progress("", len(tasks), len(tasks))


def _tasks(
    llm: LLM, prompts: Sequence[Prompt], config: AuditConfig, section: AuditSection, kinds: Sequence[str], texts: int
) -> Iterator[tuple[str, Task]]:
    how = _sampled(config)
    few, tokens = list(prompts[:_PROMPTS]), min(config.max_tokens, _TOKENS)
    if "samplers" in kinds:
        yield "samplers", lambda: check_samplers(config.settings)
    if "verifiers" in kinds:
        for spec in dict.fromkeys((llm.verifier, "coupled", "rejection", "block")):
            yield f"verifier {spec}", lambda spec=spec: check_verifier(spec)  # type: ignore[misc]
    for method in section.methods:
        if "ragged" in kinds:
            for each in config.settings:
                yield f"{method}, ragged batch", lambda m=method, s=each: _ragged(llm, m, few, config, section, s)  # type: ignore[misc]
        if "seeds" in kinds:
            yield f"{method}, seeds", lambda m=method: iter([check_seeds(llm, m, few[:3], how, tokens, config.seed)])  # type: ignore[misc]
        if "owners" in kinds and method != PLAIN:
            yield f"{method}, owners", lambda m=method: check_owners(llm, m, config.seed)  # type: ignore[misc]
    if "frequencies" in kinds:
        pairs, prompt = _pairs(llm, section), cache(lambda: undecided(llm, prompts, how))
        for method, verifier in pairs:
            yield (
                f"{method}, {verifier}, frequencies",
                lambda m=method, v=verifier: iter(  # type: ignore[misc]
                    [check_frequencies(llm, m, prompt(), how, verifier=v, texts=texts, checks=len(pairs))]
                ),
            )


def _sampled(config: AuditConfig) -> Setting:
    """The first setting that samples."""
    return next((each for each in config.settings if not each.base.greedy), setting("temperature"))


def _ragged(
    llm: LLM, method: str, prompts: list[Prompt], config: AuditConfig, section: AuditSection, how: Setting
) -> Iterator[Check]:
    with llm.with_method(
        method, verifier="auto" if method == PLAIN else llm.verifier, max_batch=max(2, *config.batch_sizes)
    ) as runner:
        yield from check_ragged(runner, prompts, section.references[how.name], how, config.max_tokens, config.seed)


def _pairs(llm: LLM, section: AuditSection) -> list[tuple[str, str]]:
    """Methods and verifiers whose texts are counted: plain, and what drafts with each exact verifier, where possible a
    drafter that samples."""
    verifiers = [v for v in dict.fromkeys((llm.verifier, "rejection", "block")) if _exact(v)]
    drafters: list[str] = [m for m in ("suffix", "draft", "draft-tree") if m in section.methods]
    drafters = drafters or [m for m in section.methods if m != PLAIN][:1]
    return [(PLAIN, "coupled"), *((m, v) for m in drafters for v in verifiers)]


def _exact(spec: str) -> bool:
    return make_verifier(spec).exactness != "approximate"
