"""A model's own texts: what is asked, what is kept out, and a run that goes on where it was stopped."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from outpace import LLM
from outpace.errors import ParameterError
from outpace.training import corpus
from outpace.training.asks import KeptOut, functions, mixed, of_file, written
from outpace.training.corpus import Text
from outpace.training.distil import Distil, distil, straight, users_turn


def test_texts_end_where_they_begin_to_go_in_circles() -> None:
    assert straight([1, 2, 3, 9, 9, 9, 9]) == [1, 2, 3, 9, 9]
    assert straight([5, *[1, 2] * 6]) == [5, 1, 2, 1, 2]
    assert straight([5, *[1, 2] * 3]) == [5, *[1, 2] * 3]  # three rounds are no circle
    assert straight(list(range(100))) == list(range(100))


def test_questions_that_are_kept_out() -> None:
    words = [f"word{i}" for i in range(20)]
    kept_out = KeptOut([" ".join(words), "Name three rivers."])
    assert kept_out.has("Please: " + ", ".join(words[3:16]).upper() + "!")
    assert not kept_out.has(" ".join(words[3:15]))  # twelve in a row
    assert kept_out.has("name three rivers")
    assert not kept_out.has("name four rivers") and not kept_out.has("")


def test_prompts_are_mixed_by_weight_until_all_end() -> None:
    rng = random.Random(1)
    sources = [("a", iter(["x"] * 30), 3.0), ("b", iter(["y"] * 10), 1.0)]
    found = list(mixed(sources, rng))
    assert sorted(found) == [("a", "x")] * 30 + [("b", "y")] * 10
    assert found[:10].count(("a", "x")) > 4


def test_things_to_write_and_functions_to_explain_are_many() -> None:
    rng = random.Random(2)
    assert len(set(islice(written(rng), 300))) > 200
    tasks = list(islice(functions(rng), 60))
    assert len(set(tasks)) == 60 and any("```python" in task for task in tasks)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "q\u2028q"}\n{"turns": ["t", "u"]}\n{"prompt": "p"}\n', encoding="utf-8")
    assert list(of_file(file)) == ["q\u2028q", "t", "p"]
    for wrong, message in (
        ("{", "line 1: not JSON"),
        ('{"text": "x"}', "line 1 has no text"),
        ("[1]", "line 1 has no"),
    ):
        file.write_text(wrong)
        with pytest.raises(ParameterError, match=message):
            list(of_file(file))


def test_a_corpus_loses_no_more_than_its_last_line(tmp_path: Path) -> None:
    file, one = tmp_path / "own.jsonl", Text(3, "self", [1, 2], [3, 4], 0.7)
    file.write_text(corpus.line(one) + corpus.line(one)[:-9])
    assert list(corpus.read(file)) == [one]
    corpus.mend(file)
    assert file.read_text() == corpus.line(one)
    file.write_text(corpus.line(one)[:-9] + "\n" + corpus.line(one))
    with pytest.raises(ParameterError, match="line 1: not JSON"):
        list(corpus.read(file))
    for wrong in ({"ask": 1}, {**vars(one), "tokens": [-1]}, {**vars(one), "tokens": "ab"}, [1]):
        file.write_text(json.dumps(wrong) + "\n")
        with pytest.raises(ParameterError, match="no corpus of"):
            list(corpus.read(file))


def test_a_model_writes_its_own_texts_and_goes_on(tmp_path: Path, default_llm: LLM) -> None:
    file, told = tmp_path / "own.jsonl", []
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"prompt": "What is the capital of France?"}\n')
    (tmp_path / "ask.jsonl").write_text('{"prompt": "What is the capital of France?"}\n{"prompt": "Name a colour."}\n')
    weights = {"self": 1.0, "writing": 1.0, "file": 1.0}
    wanted = Distil(tokens=60, longest=16, weights=weights, files=(tmp_path / "ask.jsonl",), keep_out=(kept,))
    count = distil(default_llm, wanted, file, lambda *now: told.append(now))
    texts = list(corpus.read(file))
    assert count == sum(len(text.tokens) for text in texts) >= 60 and told[-1][1] == count
    assert all(8 <= len(text.tokens) <= 16 for text in texts)
    said = [default_llm.tokenizer.decode(text.prompt_tokens) for text in texts]
    assert not any("France" in prompt for prompt in said)
    assert len({text.ask for text in texts}) == len(texts)
    assert default_llm.idle  # what was still running was cancelled
    more = distil(default_llm, Distil(**{**vars(wanted), "tokens": count + 30}), file)
    again = list(corpus.read(file))
    assert more >= count + 30 and again[: len(texts)] == texts
    assert len({text.ask for text in again}) == len(again)
    few = Distil(tokens=10_000, longest=16, weights={"file": 1.0}, files=(kept,))
    with pytest.raises(ParameterError, match="the prompts ended"):
        distil(default_llm, few, tmp_path / "few.jsonl")


def test_a_question_of_its_own_that_is_kept_out_is_not_answered(tmp_path: Path, default_llm: LLM) -> None:
    wanted = Distil(tokens=40, longest=16, weights={"self": 1.0})
    distil(default_llm, wanted, tmp_path / "own.jsonl")

    def questions(file: str) -> set[str]:
        said = [default_llm.tokenizer.decode(text.prompt_tokens) for text in corpus.read(tmp_path / file)]
        return {prompt.partition("\nuser\n")[2].rpartition("\nassistant")[0] for prompt in said}

    asked = questions("own.jsonl")
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in asked))
    distil(default_llm, Distil(**{**vars(wanted), "keep_out": (kept,)}), tmp_path / "other.jsonl")
    assert asked and "" not in asked and questions("other.jsonl") and not asked & questions("other.jsonl")


def test_a_users_turn_begins_behind_the_template(default_llm: LLM) -> None:
    begun = default_llm.tokenizer.decode(users_turn(default_llm))
    assert begun.rstrip("\n").endswith("user")
