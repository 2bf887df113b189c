"""A model's own texts, in batches: what it writes to its own questions and to others'.

A head that is trained on what the target itself would write is accepted more often than one trained on any other text
(SpecForge's and FastMTP's ablations), and what it costs is decoding in large batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path

from ..engine.llm import LLM
from ..errors import ParameterError
from ..types import SamplingParams
from . import corpus
from .asks import KeptOut, functions, mixed, of_file, written
from .corpus import Text

Progress = Callable[[str, float, float], None]

SELF = "self"  #: prompts that the model writes itself
#: Half of the answers greedy, the others as people sample
TEMPERATURES = ((0.0, 0.5), (0.7, 0.3), (1.0, 0.2))
#: A text that repeats its end so often goes in circles; what follows the second time teaches nothing
CIRCLES, LONGEST_CIRCLE = 4, 64
SHORTEST = 8  #: tokens of a prompt or an answer that is kept


@dataclass(frozen=True)
class Distil:
    """What to write: `tokens` of answers in all, each of at most `longest`, to prompts of these sources and weights."""

    tokens: int = 1_000_000
    longest: int = 256
    context: int = 768  #: prompt and answer
    seed: int = 0
    weights: dict[str, float] = field(default_factory=lambda: {SELF: 0.3, "writing": 0.3, "code": 0.25, "file": 0.15})
    files: tuple[Path, ...] = ()  #: of more prompts, kind "file"
    keep_out: tuple[Path, ...] = ()  #: of questions that must not be trained on


@dataclass(frozen=True)
class Ask:
    """A prompt on its way. `prompt` is None while the model is still writing it."""

    number: int
    source: str
    temperature: float
    prompt: list[int] | None


def distil(llm: LLM, wanted: Distil, path: Path, progress: Progress | None = None) -> int:
    """Write texts to `path` until it has as many tokens of answers as are wanted; a file that is there goes on.

    Returns the tokens in the file. Raises ParameterError for a file of something else, or prompts that have run out.
    """
    corpus.mend(path)
    done = list(corpus.read(path)) if path.exists() else []
    count, seen = sum(len(t.tokens) for t in done), {t.ask for t in done}
    kept_out = KeptOut(text for file in wanted.keep_out for text in of_file(file))
    asks = (ask for ask in _asks(llm, wanted, kept_out) if ask.number not in seen)
    running: dict[int, Ask] = {}
    with path.open("a", encoding="utf-8") as out:
        try:
            while count < wanted.tokens:
                while len(running) < llm.options.max_batch and (ask := next(asks, None)) is not None:
                    running[_submit(llm, ask, wanted)] = ask
                if not running:
                    raise ParameterError(f"the prompts ended at {count} of {wanted.tokens} tokens: give more files")
                for event in llm.step():
                    if event.error is not None:
                        raise event.error
                    if event.result is None:
                        continue
                    ask, tokens = running.pop(event.id), [int(i) for i in event.result.token_ids]
                    if ask.prompt is None:
                        own = llm.tokenizer.decode(tokens).strip()
                        if len(tokens) >= SHORTEST and not kept_out.has(own):
                            ask = replace(ask, prompt=_chat(llm, own))
                            running[_submit(llm, ask, wanted)] = ask
                    elif len(tokens := straight(tokens)) >= SHORTEST:
                        out.write(corpus.line(Text(ask.number, ask.source, ask.prompt, tokens, ask.temperature)))
                        out.flush()
                        count += len(tokens)
                        if progress is not None:
                            progress(f"{path.name}: tokens", count, wanted.tokens)
        finally:
            for id in running:
                llm.cancel(id)
    return count


def _asks(llm: LLM, wanted: Distil, kept_out: KeptOut) -> Iterator[Ask]:
    rng = random.Random(wanted.seed)
    makers: dict[str, Iterator[str]] = {
        SELF: repeat(""),
        "writing": written(rng),
        "code": functions(rng),
        "file": (prompt for file in wanted.files for prompt in _shuffled(file, rng)),
    }
    sources = [(name, makers[name], weight) for name, weight in wanted.weights.items() if weight > 0]
    values, odds = zip(*TEMPERATURES, strict=True)
    for number, (source, prompt) in enumerate(mixed(sources, rng)):
        temperature = rng.choices(values, odds)[0]
        if source == SELF:
            yield Ask(number, source, temperature, None)
        elif not kept_out.has(prompt):
            tokens = _chat(llm, prompt)
            if len(tokens) + wanted.longest <= wanted.context:
                yield Ask(number, source, temperature, tokens)


def _shuffled(file: Path, rng: random.Random) -> list[str]:
    prompts = list(of_file(file))
    rng.shuffle(prompts)
    return prompts


def _chat(llm: LLM, prompt: str) -> list[int]:
    return llm.tokens([{"role": "user", "content": prompt}])


def _submit(llm: LLM, ask: Ask, wanted: Distil) -> int:
    seed = wanted.seed * 2**32 + ask.number
    if ask.prompt is not None:
        params = SamplingParams(max_tokens=wanted.longest, temperature=ask.temperature, seed=seed)
        return llm.submit(ask.prompt, params)
    return llm.submit(users_turn(llm), SamplingParams(max_tokens=96, temperature=1.0, top_p=0.95, seed=seed))


def users_turn(llm: LLM) -> list[int]:
    """The chat template up to where a user's message begins: what the model writes there is a question of its own
    (Magpie, arXiv:2406.08464)."""
    one, other = _chat(llm, "a"), _chat(llm, "Z")
    same = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[:same]


def straight(tokens: list[int]) -> list[int]:
    """Cut where a text begins to go in circles, behind the second round."""
    for size in range(1, LONGEST_CIRCLE + 1):
        if len(tokens) < CIRCLES * size:
            break
        end = tokens[-size:]
        rounds = 1
        while tokens[-(rounds + 1) * size : -rounds * size] == end:
            rounds += 1
        if rounds >= CIRCLES:
            return tokens[: len(tokens) - (rounds - 2) * size]
    return tokens
