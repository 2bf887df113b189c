"""Plain decoding and approximate ways to decode on the same questions: right answers, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...types import Exactness, Result, SamplingParams
from ..evidence import sign_test, wilson
from . import gsm8k, humaneval
from .likelihood import of_answers
from .sandbox import Limits

if TYPE_CHECKING:
    from ...engine.llm import LLM

PLAIN = "plain"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Suite:
    """Questions of one kind. `grade(place, text, chat)` says whether an answer is right; None: no answer is graded, and
    only likelihoods are compared."""

    name: str
    questions: tuple[str, ...]  # as a chat asks them
    continued: tuple[str, ...]  # as a text to go on with, for models without a chat template
    max_tokens: int
    grade: Callable[[int, str, bool], bool] | None


@dataclass(slots=True)
class Score:
    """One way to decode on one suite. `lost` and `won`: questions that plain decoding got right and this did not, and
    the other way round; `p` that so uneven a split comes by chance; `perplexity` of the answers, as the target reads
    them; `cut`: answers that ended at the limit of tokens, which may be why they are wrong."""

    suite: str
    method: str
    verifier: str
    precision: str
    exactness: Exactness
    questions: int
    right: int | None
    interval: tuple[float, float] | None
    lost: int
    won: int
    p: float
    same_text: int
    perplexity: float
    mean_accepted: float
    cut: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def humaneval_suite(tasks: Sequence[humaneval.Task], limits: Limits, notes: list[str], max_tokens: int = 256) -> Suite:
    """`notes` gets what the sandbox could not hold back."""

    def grade(place: int, text: str, chat: bool) -> bool:
        verdict = humaneval.grade(tasks[place], text, chat, limits)
        note = f"this system cannot shut off {', '.join(verdict.open)}: the code that was run could use them"
        if verdict.open and note not in notes:
            notes.append(note)
        return verdict.passed

    questions, continued = tuple(t.question for t in tasks), tuple(t.prompt for t in tasks)
    return Suite("humaneval", questions, continued, max_tokens, grade)


def gsm8k_suite(problems: Sequence[gsm8k.Problem], max_tokens: int = 256) -> Suite:
    questions = tuple(p.question for p in problems)
    continued = tuple(f"Question: {p.text}\nAnswer:" for p in problems)
    return Suite("gsm8k", questions, continued, max_tokens, lambda i, text, chat: gsm8k.right(problems[i], text))


@dataclass(slots=True)
class Answers:
    """Of one way to decode."""

    results: list[Result]
    right: list[bool] | None


def answer(llm: LLM, suite: Suite, method: str, verifier: str, temperature: float, progress: Progress) -> Answers:
    """Ask all questions and grade the answers."""
    chat = llm.tokenizer.has_chat_template
    params = [
        SamplingParams(max_tokens=suite.max_tokens, temperature=temperature, seed=i)
        for i in range(len(suite.questions))
    ]
    results: list[Result] = []
    with llm.with_method(method, verifier=verifier) as runner:
        for start in range(0, len(params), 16):
            questions = _prompts(suite, chat)[start : start + 16]
            results += runner.generate(questions, params[start : start + 16])
            progress(f"{suite.name} {method} {verifier} {llm.precision}", len(results), len(params))
    grade = suite.grade
    right = None if grade is None else [grade(i, result.text, chat) for i, result in enumerate(results)]
    return Answers(results, right)


def _prompts(suite: Suite, chat: bool) -> list[Any]:
    if chat:
        return [[{"role": "user", "content": question}] for question in suite.questions]
    return list(suite.continued)


def score(llm: LLM, reader: LLM, suite: Suite, method: str, verifier: str, found: Answers, plain: Answers) -> Score:
    """`found` of `llm` against `plain`; `reader` is the target that reads the answers."""
    results, pairs = found.results, list(zip(found.right or [], plain.right or [], strict=True))
    prompts = [reader.tokens(prompt) for prompt in _prompts(suite, llm.tokenizer.has_chat_template)]
    steps, tokens = sum(r.stats.steps for r in results), sum(r.stats.tokens for r in results)
    lost, won = sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs)
    read = of_answers(reader, prompts, results)
    right = None if found.right is None else sum(found.right)
    return Score(
        suite=suite.name,
        method=method,
        verifier=verifier,
        precision=llm.precision,
        exactness=max((r.exactness for r in results), key=("identical", "distribution", "approximate").index),
        questions=len(results),
        right=right,
        interval=None if right is None else wilson(right, len(results)),
        lost=lost,
        won=won,
        p=sign_test(lost, won),
        same_text=sum(a.token_ids == b.token_ids for a, b in zip(results, plain.results, strict=True)),
        perplexity=read.value if read.tokens else float("nan"),
        mean_accepted=(tokens - len(results)) / steps if steps else 1.0,
        cut=sum(r.finish_reason == "length" for r in results),
    )
