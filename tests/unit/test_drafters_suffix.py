"""Suffix automaton drafting: the automaton against brute force, trees, and the memory of earlier outputs."""

from __future__ import annotations

from collections import Counter

import pytest
from drafting import propose
from hypothesis import given, settings
from hypothesis import strategies as st

from outpace.decoding.contracts import Sequence
from outpace.decoding.drafters.automaton import SuffixAutomaton
from outpace.decoding.drafters.suffix import Suffix
from outpace.decoding.tree import ancestors, check_draft
from outpace.errors import ParameterError
from outpace.types import NO_PARENT, SamplingParams

V = 200


def occurrences(text: list[int], part: list[int]) -> list[int]:
    return [i + len(part) - 1 for i in range(len(text) - len(part) + 1) if text[i : i + len(part)] == part]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_suffix_automaton_against_brute_force(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.extend([token])
    for start in range(len(text)):
        for stop in range(start + 1, len(text) + 1):
            part, state = text[start:stop], 0
            for token in part:
                state = automaton.next[state][token]
            places = occurrences(text, part)
            assert automaton.count[state] == len(places)
            assert automaton.last[state] == places[-1]
            following = Counter(text[p + 1] for p in places if p + 1 < len(text))
            assert {t: automaton.count[s] for t, s in automaton.continuations(state)} == following
            assert automaton.length[state] >= len(part)
    match = automaton.length[automaton.link[automaton.end]]
    repeated = [n for n in range(1, len(text)) if len(occurrences(text, text[-n:])) > 1]
    assert match == max(repeated, default=0)
    assert len(automaton.next) <= 2 * len(text) + 1


def test_suffix_proposes_the_continuation_of_the_longest_match_first() -> None:
    #      1 2 3 was followed by 4 twice and by 5 once; 2 3 elsewhere by 6
    text = [1, 2, 3, 4, 0, 1, 2, 3, 5, 7, 1, 2, 3, 4, 0, 9, 2, 3, 6, 8, 1, 2, 3]
    sequence = Sequence(0, text, len(text), SamplingParams())
    suffix = Suffix()
    suffix.begin(sequence)
    [draft] = propose(suffix, [sequence], [12])
    roots = [t for t, p in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True) if p == NO_PARENT]
    assert roots[0] == 4 and {5, 6} <= set(roots)
    assert draft.tokens[draft.parents == 0].tolist() == [0]


def remembering(memory: int, **options: object) -> Suffix:
    return Suffix(memory=memory, owner_of=lambda sequence: sequence.id // 10, **options)  # type: ignore[arg-type]


def finish(suffix: Suffix, id: int, prompt: list[int], output: list[int]) -> None:
    sequence = Sequence(id, list(prompt), len(prompt), SamplingParams())
    suffix.begin(sequence)
    sequence.tokens += output
    suffix.end(sequence)
    suffix.end(sequence)


def proposed(suffix: Suffix, id: int, tokens: list[int]) -> list[list[int]]:
    """Paths of the tree."""
    sequence = Sequence(id, list(tokens), len(tokens), SamplingParams())
    suffix.begin(sequence)
    [draft] = propose(suffix, [sequence], [16])
    check_draft(draft, 16, V)
    return [draft.tokens[path].tolist() for path in ancestors(draft.parents)]


def test_suffix_searches_the_owner_s_earlier_outputs() -> None:
    suffix = remembering(100)
    finish(suffix, 1, [9, 9], [1, 2, 3, 4, 5])
    finish(suffix, 2, [9, 9], [6, 2, 3, 7])
    assert [4, 5] in proposed(suffix, 3, [0, 1, 2, 3])
    roots = [path for path in proposed(suffix, 3, [0, 2, 3]) if len(path) == 1]
    assert sorted(roots) == [[4], [7]]
    assert proposed(suffix, 3, [0, 9]) == []  # prompts are not remembered
    assert proposed(suffix, 3, [0, 5]) == []  # nothing follows the end of an output
    assert proposed(suffix, 11, [0, 1, 2, 3]) == []  # another owner
    assert proposed(Suffix(), 3, [0, 1, 2, 3]) == []


def test_what_the_text_itself_says_comes_before_memories() -> None:
    suffix = remembering(100)
    finish(suffix, 1, [9], [1, 2, 3])
    assert proposed(suffix, 2, [1, 2, 8, 0, 1, 2])[0] == [8]


def test_a_memory_is_bounded_and_forgets_the_oldest() -> None:
    suffix = remembering(40)
    for i in range(30):
        finish(suffix, i % 3, [9], [i, i + 1, i, i + 1, i])
        assert sum(one.size for one in suffix._memories[0].automata) <= 40
    assert proposed(suffix, 1, [7, 29, 30]) and not proposed(suffix, 1, [7, 3, 4])
    finish(suffix, 1, [9], list(range(40)) * 3)
    assert sum(one.size for one in suffix._memories[0].automata) <= 40


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=25), st.lists(st.integers(0, 3), max_size=10))
def test_an_automaton_finds_the_longest_suffix_of_another_text(text: list[int], other: list[int]) -> None:
    automaton = SuffixAutomaton(text)
    state, matched = automaton.match(other)
    found = [n for n in range(1, len(other) + 1) if occurrences(text, other[len(other) - n :])]
    assert matched == max(found, default=0)
    if matched:
        last = occurrences(text, other[len(other) - matched :])[-1]
        assert automaton.last[state] == last and automaton.length[state] >= matched


@pytest.mark.parametrize("option", ["contexts", "branches", "max_tokens", "max_owners"])
def test_suffix_refuses_senseless_options(option: str) -> None:
    with pytest.raises(ParameterError, match=f"{option}=0"):
        Suffix(**{option: 0})


def test_a_prediction_is_searched_like_earlier_text() -> None:
    sequence = Sequence(0, [1, 2, 3], 3, SamplingParams(), prediction=[9, 2, 3, 4, 5, 6])
    suffix = Suffix()
    suffix.begin(sequence)
    [draft] = propose(suffix, [sequence], [8])
    assert draft.tokens.tolist()[:3] == [4, 5, 6]
    sequence.tokens += [4, 5, 6, 9]
    [draft] = propose(suffix, [sequence], [8])
    assert draft.tokens.tolist()[:3] == [2, 3, 4]
    assert (draft.tokens < V).all() and (draft.tokens >= 0).all(), "the end of the prediction is no token"
