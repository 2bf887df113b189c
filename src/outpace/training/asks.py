"""Prompts for a model to answer: what it asks itself, documentation to explain, things to write about, files.

They are made here from what every machine has, so that training needs no download; questions of benchmarks are kept out
by comparing runs of words.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import ParameterError

#: Words in a row that a prompt must not share with a question that is kept out, as usual for such checks
GRAM = 13


def _listed(*lines: str) -> list[str]:
    return [item for line in lines for item in line.split("|")]


KINDS = _listed("a short story|a poem|an e-mail|a blog post|a letter|a speech|a product description|a plan")
TOPICS = _listed(
    "a lighthouse keeper|the first day at a new school|a broken bicycle|learning to cook|a rainy holiday|bees|the sea",
    "a garden in winter|moving to another city|an old map|a lost dog|a village market|night trains|time zones|jokes",
    "saving energy at home|a football match|a birthday in space|an honest mistake|a job interview|a robot that paints",
    "a library that never closes|a mountain hike|healthy breakfasts|public transport|a surprising inheritance",
    "learning the violin|a power cut",
)
TONES = _listed("| in a friendly tone| for children| in at most 150 words| with a surprising end| in plain words")
QUESTIONS = (
    "Explain {0} to a beginner.",
    "What are the advantages and disadvantages of {0}?",
    "List five facts about {0}.",
    "How does {0} work?",
    "Compare {0} with {1}.",
    "Give me three tips about {0}.",
    "What should I know about {0} before I start?",
)
SUBJECTS = _listed(
    "photosynthesis|inflation|the water cycle|vaccines|black holes|compound interest|plate tectonics|electric cars|DNA",
    "the printing press|the Roman Empire|democracy|machine learning|the human heart|recycling|databases|volcanoes|jazz",
    "the stock market|the internet|meditation|chess|solar panels|public speaking|remote work|bread baking|the moon",
    "encryption|gravity|running a marathon|growing tomatoes|sleep|budgeting|the French Revolution|batteries|tides",
)
CODE = (
    "Explain what this Python function does:\n```python\n{}\n```",
    "Write a docstring for this function:\n```python\n{}\n```",
    "Add type hints to this function:\n```python\n{}\n```",
    "Write unit tests for this function:\n```python\n{}\n```",
    "Rewrite this function so that it is easier to read:\n```python\n{}\n```",
)
WRITE_CODE = "Write a Python function `{}` that does the following: {}"


def written(rng: random.Random) -> Iterator[str]:
    """Things to write and to explain, without an end."""
    while True:
        if rng.random() < 0.5:
            yield f"Write {rng.choice(KINDS)} about {rng.choice(TOPICS)}{rng.choice(TONES)}."
        else:
            yield rng.choice(QUESTIONS).format(*rng.sample(SUBJECTS, 2))


def functions(rng: random.Random) -> Iterator[str]:
    """Tasks about functions of Python's standard library, each function once."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    rng.shuffle(files)
    for file in files:
        try:
            source = file.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and 4 <= (node.end_lineno or 0) - node.lineno <= 30:
                about = ast.get_docstring(node)
                text = ast.get_source_segment(source, node) or ""
                if about and 40 <= len(about) <= 400 and rng.random() < 0.5:
                    yield WRITE_CODE.format(node.name, " ".join(about.split()))
                elif 100 <= len(text) <= 1500:
                    yield rng.choice(CODE).format(text)


def of_file(path: Path) -> Iterator[str]:
    """Prompts of a .jsonl file: its `prompt`, `question`, `instruction` or first turn, line by line."""
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            found = json.loads(line)
        except ValueError:
            raise ParameterError(f"{path}, line {number}: not JSON") from None
        prompt = next((found[k] for k in ("prompt", "question", "instruction", "turns") if k in found), None)
        prompt = prompt[0] if isinstance(prompt, list) and prompt else prompt
        if not isinstance(prompt, str):
            names = "prompt, question, instruction or turns"
            raise ParameterError(f"{path}, line {number} has no text under {names}")
        yield prompt


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class KeptOut:
    """Runs of `GRAM` words of texts that must not be trained on."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._grams = {gram for text in texts for gram in self._of(text)}

    @staticmethod
    def _of(text: str) -> Iterator[tuple[str, ...]]:
        words = _words(text)
        size = min(GRAM, len(words)) or 1
        return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))

    def has(self, text: str) -> bool:
        return any(gram in self._grams for gram in self._of(text))


def mixed(sources: Sequence[tuple[str, Iterator[str], float]], rng: random.Random) -> Iterator[tuple[str, str]]:
    """(kind, prompt) drawn from sources by their weights, until all have ended."""
    left = list(sources)
    while left:
        name, prompts, _ = chosen = rng.choices(left, [weight for *_, weight in left])[0]
        prompt = next(prompts, None)
        if prompt is None:
            left.remove(chosen)
        else:
            yield name, prompt
