"""Input-guided Aggressive Decoding: alignment of an output with a reference, and edits of real code."""

from __future__ import annotations

import re

import pytest
from drafting import NO_OUTPUTS, propose
from hypothesis import given, settings
from hypothesis import strategies as st

from outpace.decoding.contracts import Observation, Sequence
from outpace.decoding.drafters.aggressive import Aggressive, Alignment
from outpace.decoding.drafters.ngram import Ngram
from outpace.decoding.drafters.suffix import Suffix
from outpace.decoding.tree import ancestors
from outpace.errors import ParameterError
from outpace.types import NO_PARENT, Accepted, Draft, SamplingParams

BEFORE = '''
def sync_folders(source, target, dry_run=False):
    """Copy what is new in source to target."""
    copied = 0
    skipped = 0
    for name in sorted(wanted):
        origin = source / name
        copy = target / name
        if copy.exists() and copy.stat().st_mtime >= origin.stat().st_mtime:
            skipped += 1
            continue
        print(f"copy {name}")
        if not dry_run:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin, copy)
        copied += 1
    print(f"{copied} copied, {skipped} up to date")
    return copied, skipped
'''
AFTER = BEFORE.replace("print(", "log.info(").replace("dry_run=False)", "dry_run=False, log=None)")
AFTER = AFTER.replace("    skipped = 0\n", "").replace("sorted(wanted)", "sorted(wanted, key=str)")
REQUEST = "Use the logger instead of print, please, and answer with the whole function.\n"


def words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)


VOCAB = {word: i for i, word in enumerate(dict.fromkeys(words(BEFORE + AFTER + REQUEST)))}


def ids(text: str) -> list[int]:
    return [VOCAB[word] for word in words(text)]


def tau(drafter: Aggressive | Suffix | Ngram, prompt: list[int], output: list[int], prediction: list[int]) -> float:
    """Tokens per step if `output` is what the target says."""
    sequence = Sequence(0, list(prompt), len(prompt), SamplingParams(), prediction)
    drafter.begin(sequence)
    steps = 0
    while len(sequence.output) < len(output):
        [draft] = propose(drafter, [sequence], [15])
        assert len(draft) <= 15
        ahead = output[len(sequence.output) :]
        right = max(
            (
                len(path)
                for path in ancestors(draft.parents)
                if draft.tokens[path].tolist() == ahead[: len(path)]
            ),
            default=0,
        )  # fmt: skip
        new = ahead[: right + 1]
        sequence.tokens += new
        drafter.observe(sequence, Observation(Accepted([], list(new)), draft, NO_OUTPUTS, "prefill"))
        steps += 1
    drafter.end(sequence)
    assert not drafter._states
    return len(output) / steps


def test_an_edit_with_a_prediction_is_copied_faster_than_by_any_search() -> None:
    prompt, output, prediction = ids(REQUEST), ids(AFTER), ids(BEFORE)
    copied = tau(Aggressive(), prompt, output, prediction)
    assert copied > 7
    # the others have the same text in their prompt
    for other in (Suffix(), Ngram()):
        assert copied > tau(other, prompt + prediction, output, []) + 0.3


def test_the_prompt_is_the_reference_where_nothing_is_predicted() -> None:
    assert tau(Aggressive(), ids(REQUEST + BEFORE), ids(AFTER), []) > 4
    sequence = Sequence(0, ids(BEFORE), len(ids(BEFORE)), SamplingParams())
    drafter = Aggressive()
    drafter.begin(sequence)
    assert len(propose(drafter, [sequence], [8])[0]) == 0  # nothing of it was said yet


def proposed(prediction: list[int], output: list[int], **options: int) -> list[list[int]]:
    """The paths of the tree, as tokens."""
    drafter = Aggressive(**options)
    sequence = Sequence(0, [90, 91, *output], 2, SamplingParams(), prediction)
    drafter.begin(sequence)
    [draft] = propose(drafter, [sequence], [64])
    return [draft.tokens[path].tolist() for path in ancestors(draft.parents)]


def test_the_copy_starts_at_the_start_and_goes_on_behind_what_was_said() -> None:
    reference = list(range(10, 40))
    assert proposed(reference, [])[-1][:8] == reference[:8]
    assert reference[5:12] in proposed(reference, reference[:5])


def test_after_a_mismatch_a_token_was_replaced_inserted_or_left_out() -> None:
    reference = list(range(10, 40))
    paths = proposed(reference, [10, 11, 12, 80])
    assert [14, 15] in paths  # 80 for 13
    assert [13, 14] in paths  # 80 before 13
    assert [20, 21] in proposed(reference, [10, 11, 12, 19])  # 13 to 18 left out


def test_of_equal_matches_the_nearest_behind_the_last_place_is_taken() -> None:
    #            0  1  2  3  4  5  6  7  8  9  10
    reference = [7, 1, 2, 3, 4, 5, 7, 8, 6, 7, 9]
    paths = proposed(reference, [7, 1, 2, 3, 99, 7], branches=1)
    assert [8] in paths and [9] not in paths and [1] not in paths
    alignment = Alignment(reference)
    alignment.extend([7, 1, 2, 3])
    assert (alignment.place, alignment.lost) == (4, 0)
    alignment.extend([99, 7])
    assert alignment.ranked(1, 4) == [7, 10, 13, 1]  # 13 is in the output
    assert (alignment.place, alignment.lost) == (4, 2)  # one token is not a sure match
    alignment.extend([8, 6, 7])
    assert (alignment.place, alignment.lost) == (10, 0)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), max_size=20))
def test_match_lengths_against_brute_force(reference: list[int], output: list[int]) -> None:
    alignment = Alignment(reference)
    for token in output:
        alignment.extend([token])
    text = [*reference, -1, *output]
    for place in range(1, len(text)):  # what stands before the last token's own place
        length = 0
        while length < min(place, len(output)) and text[place - 1 - length] == output[-1 - length]:
            length += 1
        assert alignment.lengths.get(place, 0) == length


def test_nothing_is_copied_across_the_end_of_a_part() -> None:
    assert proposed([5, 6], [5, 6]) == []


def test_a_child_of_the_root_is_proposed_once() -> None:
    paths = proposed([1, 2, 3, 1, 2, 4, 1, 2, 3, 5], [1, 2])
    roots = [path[0] for path in paths if len(path) == 1]
    assert sorted(roots) == [3, 4]


@pytest.mark.parametrize("option", ["max_tokens", "min_match", "branches"])
def test_senseless_options_are_refused(option: str) -> None:
    with pytest.raises(ParameterError, match=f"iad:{option}=0"):
        Aggressive(**{option: 0})


def test_an_empty_draft_is_judged_as_nothing() -> None:
    drafter = Aggressive()
    sequence = Sequence(0, [1, 2], 2, SamplingParams())
    drafter.begin(sequence)
    sequence.tokens.append(3)
    drafter.observe(sequence, Observation(Accepted([], [3]), Draft.empty(), NO_OUTPUTS, "prefill"))
    [draft] = propose(drafter, [sequence], [0])
    assert len(draft) == 0 and NO_PARENT not in draft.tokens
