"""First tokens over many seeds against the distribution that the model's own logits give them: chi-square and total
variation on the real model.

The exact probabilities of short texts come from plain reads of the prompt and each likely beginning (`teacher`). A
text that is expected less than five times is counted with its like under the beginning that it shares with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..decoding.sampling import History, distribution
from ..errors import ParameterError
from ..types import SamplingParams
from .audit_engine import as_prompt
from .evidence import ALARM, Check, chi_square, seen_variation, total_variation
from .settings import Setting
from .teacher import last_logits
from .workloads import Prompt

if TYPE_CHECKING:
    from ..engine.llm import LLM

_LEAST = 5.0  # expected times that a cell needs for chi-square to be what it says
_CANDIDATES = 8  # prompts that are looked at for one
_REST = -1  # stands for all tokens that are counted together

Cell = tuple[int, ...]


def expected_cells(
    llm: LLM, prompt: Sequence[int], params: SamplingParams, depth: int, texts: int
) -> dict[Cell, float]:
    """Probabilities of the beginnings of an answer that are counted among so many `texts`; they add up to 1.

    A cell is a text of `depth` tokens, or a shorter one and _REST: whatever else follows it.
    """
    cells: dict[Cell, float] = {}
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else {*llm.config.eos_ids, *llm.tokenizer.eos_ids})}

    def expand(behind: Cell, p: float) -> None:
        if len(behind) == depth or (behind and behind[-1] in ends):
            cells[behind] = p
            return
        tokens = [*prompt, *behind]
        history = History(tokens, len(prompt))
        q = p * distribution(last_logits(llm.decoder, tokens), params, history)
        rest = p
        for token in np.flatnonzero(q * texts >= _LEAST).tolist():
            expand((*behind, token), float(q[token]))
            rest -= float(q[token])
        if rest * texts > 1e-6:
            cells[(*behind, _REST)] = rest

    expand((), 1.0)
    return cells


def cell_of(output: Sequence[int], cells: dict[Cell, float]) -> Cell:
    """The cell that an output falls into; the output itself where the model gives it no probability at all."""
    for n in range(len(output), 0, -1):
        if tuple(output[:n]) in cells:
            return tuple(output[:n])
    for n in range(len(output) - 1, -1, -1):
        if (*output[:n], _REST) in cells:
            return (*output[:n], _REST)
    return tuple(output)


def undecided(llm: LLM, prompts: Sequence[Prompt], how: Setting) -> Prompt:
    """Of the first prompts the one, given twice as below, whose next token is nearest to a toss-up: where one text is
    nearly certain, counting texts shows nothing."""

    def certainty(prompt: Prompt) -> float:
        tokens = _twice(llm, llm.tokens(as_prompt(llm, prompt)))
        return float(distribution(last_logits(llm.decoder, tokens), how.base, History(tokens, len(tokens))).max())

    return min(prompts[:_CANDIDATES], key=lambda prompt: abs(certainty(prompt) - 0.5))


def check_frequencies(
    llm: LLM,
    method: str,
    prompt: Prompt,
    setting: Setting,
    *,
    verifier: str | None = None,
    texts: int = 600,
    depth: int = 3,
    seed: int = 0,
    checks: int = 1,
) -> Check:
    """`texts` answers of `depth` tokens, one seed each, to one prompt. `verifier` None: the model's own. `checks`: how
    many such checks the audit makes, for the level at which it fails. The prompt is given twice, with a greedy answer
    between, so that drafters have what to draft from the first token on. Raises ParameterError for a greedy setting."""
    if setting.base.greedy:
        raise ParameterError("frequencies need a setting that samples: greedy output is one text")
    tokens = _twice(llm, llm.tokens(as_prompt(llm, prompt)))
    # as many more tokens as a draft may hold: a step near the end of the answer would be cut short
    params = replace(setting.base, max_tokens=depth + 4, seed=seed)
    cells = expected_cells(llm, tokens, params, depth, texts)
    with llm.with_method(method, **({} if verifier is None else {"verifier": verifier})) as runner:
        results = runner.generate([tokens] * texts, [replace(params, seed=seed + i) for i in range(texts)])
        verifier = runner.verifier
    counts = Counter(cell_of(result.token_ids[:depth], cells) for result in results)
    names: list[Cell] = [*cells, *(c for c in counts if c not in cells)]
    expected = [texts * cells.get(name, 0.0) for name in names]
    observed = [counts.get(name, 0) for name in names]
    merged_o, merged_e = _merged(observed, expected)
    statistic, freedom, p = chi_square(merged_o, merged_e)
    variation = total_variation(observed, expected)
    accepted = sum(source != "target" for r in results for source in r.sources[:depth])
    limit = ALARM / max(checks, 1)
    seen = seen_variation(texts, freedom, limit)
    claimed = max((r.exactness for r in results), key=("identical", "distribution", "approximate").index)
    said = (
        f"{texts} texts of {depth} tokens in {len(merged_e)} cells: chi-square {statistic:.1f}, p = {p:.2g}, "
        f"total variation {variation:.3f} ({_by_chance(expected):.3f} by chance; a shift of {seen:.2g} would have been "
        f"seen), {accepted} of the tokens were drafted"
    )
    numbers: dict[str, Any] = {
        "p": p, "chi_square": statistic, "freedom": freedom, "total_variation": variation,
        "seen_variation": seen, "texts": texts, "cells": len(merged_e), "accepted": accepted, "claimed": claimed,
    }  # fmt: skip
    holds = p > limit or claimed == "approximate"
    return Check("frequencies", f"{method}, {verifier}, {setting.name}, {prompt.id}", holds, said, numbers)


def _twice(llm: LLM, prompt: list[int]) -> list[int]:
    """Prompt, greedy answer, prompt: a text that is likely to go on as before. The prompt where that does not fit."""
    if 2 * len(prompt) + 64 > llm.config.max_position:
        return prompt
    with llm.with_method("plain", verifier="auto") as plain:
        (answer,) = plain.generate(prompt, SamplingParams(max_tokens=24))
    return [*prompt, *answer.token_ids, *prompt]


def _merged(observed: Sequence[int], expected: Sequence[float]) -> tuple[list[float], list[float]]:
    """Cells that are expected too seldom become one; those never expected stay, each a fault of its own."""
    few = [i for i, e in enumerate(expected) if 0 < e < _LEAST]
    kept = [i for i in range(len(expected)) if i not in set(few)]
    o, e = [float(observed[i]) for i in kept], [expected[i] for i in kept]
    if few:
        o.append(float(sum(observed[i] for i in few)))
        e.append(sum(expected[i] for i in few))
    return o, e


def _by_chance(expected: Sequence[float]) -> float:
    """Total variation that counts of so many texts have from their own distribution, about."""
    total = sum(expected)
    return float(sum(np.sqrt(2 / np.pi * e * (1 - e / total)) for e in expected) / (2 * total)) if total else 0.0
