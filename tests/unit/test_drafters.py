"""Drafters that need no second model, over a toy language, in the loop that the engine runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from drafting import NO_OUTPUTS, propose
from hypothesis import given, settings
from hypothesis import strategies as st

from outpace.decoding.contracts import Drafter, DrafterContext, Market, Observation, Proposal, Sequence
from outpace.decoding.drafters.aded import Aded
from outpace.decoding.drafters.aggressive import Aggressive
from outpace.decoding.drafters.jacobi import Jacobi
from outpace.decoding.drafters.lookahead import Lookahead
from outpace.decoding.drafters.merged import Merged
from outpace.decoding.drafters.ngram import Ngram, NgramIndex
from outpace.decoding.drafters.plain import Plain
from outpace.decoding.drafters.rates import Rates, checked_nodes, right_prefix
from outpace.decoding.drafters.recycling import Recycling
from outpace.decoding.drafters.rescored import Rescored
from outpace.decoding.drafters.sjd import SpeculativeJacobi
from outpace.decoding.drafters.suffix import Suffix
from outpace.decoding.methods import make_drafter, split_spec
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.tree import check_draft
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.errors import MethodError, ParameterError
from outpace.registry import methods
from outpace.types import NO_PARENT, Accepted, Draft, SamplingParams

CODE = """
def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius * shape.radius
    if shape.kind == "square":
        return shape.side * shape.side
    raise ValueError(shape.kind)

def perimeter(shape):
    if shape.kind == "circle":
        return 2 * 3.14159 * shape.radius
    if shape.kind == "square":
        return 4 * shape.side
    raise ValueError(shape.kind)
"""
PROSE = """
The tide went out in the morning and left the boats on the sand. In the morning the children went out to the boats,
and when the tide came in the children went home. The boats went out with the tide, and the morning went on.
"""
WORDS = re.findall(r"\w+|\s+|[^\w\s]", CODE + PROSE + CODE)
VOCAB = {word: i for i, word in enumerate(dict.fromkeys(WORDS))}
TEXT = [VOCAB[word] for word in WORDS]
V = len(VOCAB)
PROMPT = len(TEXT) // 3
FOLLOWS = dict(itertools.pairwise(TEXT))  # what the toy target says off the text


def target_row(text: list[int], at: int, token: int | None = None) -> np.ndarray:
    """Logits that say text[at]; after a token that strayed from the text, what often follows that token."""
    row = np.random.default_rng([at, 0 if token is None else token + 1]).standard_normal(V).astype(np.float32)
    if token is not None:
        row[FOLLOWS.get(token, 0)] += 8
    elif at < len(text):
        row[text[at]] += 8
    return row


def outputs_of(text: list[int], done: int, draft: Draft) -> TargetOutputs:
    """What a target that only knows `text` answers after its first `done` tokens and after each node."""
    rows, on_text = [target_row(text, done)], {NO_PARENT: done}
    for node, (token, parent) in enumerate(zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True)):
        at = on_text.get(parent)
        right = at is not None and at < len(text) and text[at] == token
        if right and at is not None:
            on_text[node] = at + 1
        rows.append(target_row(text, (at or 0) + 1, None if right else token))
    return TargetOutputs.of(torch.from_numpy(np.stack(rows)))


def decode(
    drafter: Drafter, text: list[int], prompt_length: int, budget: int, id: int = 0, end: bool = True
) -> tuple[float, Sequence]:
    """Greedy decoding of `text` after its prompt; returns tau and the sequence."""
    verifier, sequence = CoupledVerifier(), Sequence(id, text[:prompt_length], prompt_length, SamplingParams())
    drafter.begin(sequence)
    sequence.tokens.append(text[prompt_length])
    drafter.observe(
        sequence,
        Observation(Accepted([], text[prompt_length : prompt_length + 1]), Draft.empty(), NO_OUTPUTS, "prefill"),
    )
    steps = 0
    while len(sequence.tokens) < len(text):
        [draft] = propose(drafter, [sequence], [budget])
        check_draft(draft, budget, V)
        outputs = outputs_of(text, len(sequence.tokens), draft)
        accepted = verifier.verify(sequence, draft, outputs)
        new = accepted.tokens[: len(text) - len(sequence.tokens)]
        sequence.tokens += new
        drafter.observe(sequence, Observation(Accepted(accepted.path, new), draft, outputs))
        steps += 1
    if end:
        drafter.end(sequence)
        drafter.end(sequence)
    return (len(text) - prompt_length - 1) / steps, sequence


MAKERS: dict[str, Callable[[], Drafter]] = {
    "ngram": Ngram,
    "suffix": Suffix,
    "recycling": lambda: Recycling(V),
    "recycling:published": lambda: Recycling(V, tree="published"),
    "recycling:fitted": lambda: Recycling(V, tree="fitted"),
    "iad": Aggressive,
    "aded": Aded,
    "jacobi": lambda: Jacobi(V),
    "jacobi:gauss-seidel": lambda: Jacobi(V, form="gauss-seidel"),
    "sjd": lambda: SpeculativeJacobi(V),
    "lookahead": Lookahead,
    "rescored": lambda: Rescored(V, Jacobi(V)),
    "rescored:recycling": lambda: Rescored(V, Recycling(V)),
    "suffix+recycling": lambda: Merged([Suffix(), Recycling(V)]),
    "ngram+suffix+recycling": lambda: Merged([Ngram(), Suffix(), Recycling(V)]),
}


PAYS = {0: 1.0, 1: 1.1, 7: 1.25, 31: 1.4}  # least tau by budget
# Their guesses are the target's own answers, but in a text that went another way: little of it is right.
GUESSING = ("jacobi", "jacobi:gauss-seidel", "sjd", "rescored")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("budget", [0, 1, 7, 31])
def test_text_is_untouched_and_drafts_pay(name: str, budget: int) -> None:
    tau, sequence = decode(MAKERS[name](), TEXT, PROMPT, budget)
    assert sequence.tokens == TEXT
    if budget == 0 or name in GUESSING:
        assert tau == 1.0 if budget == 0 else tau >= 1.0
    else:
        assert tau >= PAYS[budget]


def test_merging_is_no_worse_than_its_parts() -> None:
    merged, _ = decode(MAKERS["suffix+recycling"](), TEXT, PROMPT, 15)
    for part in ("suffix", "recycling"):
        assert merged >= decode(MAKERS[part](), TEXT, PROMPT, 15)[0] * 0.97


@pytest.mark.parametrize("name", MAKERS)
def test_a_loop_is_followed(name: str) -> None:
    text = TEXT[:3] + TEXT[40:47] * 20
    tau, _ = decode(MAKERS[name](), text, 24, 16)
    least = {"lookahead": 2.9, "aded": 4.0} | dict.fromkeys(GUESSING, 1.0)
    assert tau > (2 if name.startswith("recycling") else least.get(name, 6 if "rescored" not in name else 2))


@pytest.mark.parametrize("name", MAKERS)
def test_end_forgets_the_sequence(name: str) -> None:
    drafter = MAKERS[name]()
    decode(drafter, TEXT, PROMPT, 8, id=3)
    for part in drafter.drafters if isinstance(drafter, Merged) else [drafter]:
        assert not part._states  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["ngram", "suffix", "iad", "jacobi", "lookahead", "rescored"])
def test_sequences_are_strangers_to_each_other(name: str) -> None:
    drafter = MAKERS[name]()
    decode(drafter, TEXT, PROMPT, 8, id=1, end=False)
    other = Sequence(2, TEXT[-2:], 2, SamplingParams())
    drafter.begin(other)
    [draft] = propose(drafter, [other], [8])
    assert (
        set(draft.tokens.tolist()) <= set(TEXT[-2:]) if name in ("jacobi", "lookahead", "rescored") else not len(draft)
    )


@pytest.mark.parametrize("name", MAKERS)
def test_a_drafter_may_be_skipped(name: str) -> None:
    """Steps for which a drafter is not called it does not see, and what was proposed in an abandoned one is nothing."""
    drafter, verifier = MAKERS[name](), CoupledVerifier()
    sequence = Sequence(0, TEXT[:PROMPT], PROMPT, SamplingParams())
    drafter.begin(sequence)
    rng, calls = np.random.default_rng(5), 0
    while len(sequence.tokens) < len(TEXT):
        awake, abandoned, unheard = rng.random(3) < (0.6, 0.2, 0.2)
        draft = Draft.empty()
        if awake:
            [draft] = propose(drafter, [sequence], [7])
            check_draft(draft, 7, V)
            calls += 1
            if abandoned:
                continue
        outputs = outputs_of(TEXT, len(sequence.tokens), draft)
        accepted = verifier.verify(sequence, draft, outputs)
        new = accepted.tokens[: len(TEXT) - len(sequence.tokens)]
        sequence.tokens += new
        if awake and not unheard:
            drafter.observe(sequence, Observation(Accepted(accepted.path, new), draft, outputs))
    assert sequence.tokens == TEXT and calls > 10
    drafter.end(sequence)


@pytest.mark.parametrize("name", ["ngram", "suffix", "recycling", "recycling:fitted", "iad", "aded"])
def test_nodes_that_do_not_repay_their_row_are_left_out(name: str) -> None:
    drafter = MAKERS[name]()
    _, sequence = decode(drafter, TEXT, PROMPT, 15, end=False)
    del sequence.tokens[-20:]
    sizes = []
    for floor in (0.0, 0.2, 0.6, 1.0):
        [draft] = propose(drafter, [sequence], [31], Market(floor))
        sizes.append(len(draft))
        assert draft.scores is not None
        reach: dict[int, float] = {NO_PARENT: 1.0}
        for node, (parent, score) in enumerate(zip(draft.parents.tolist(), draft.scores.tolist(), strict=True)):
            reach[node] = reach[parent] * score
            assert reach[node] >= floor - 1e-6
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_sequences_are_drafted_for_together_as_alone() -> None:
    prompts = [TEXT[:60], TEXT[20:50], TEXT[30:110]]
    alone = []
    for prompt in prompts:
        drafter = MAKERS["suffix+recycling"]()
        sequence = Sequence(0, list(prompt), len(prompt), SamplingParams())
        drafter.begin(sequence)
        alone.append(propose(drafter, [sequence], [9])[0])
    drafter = Merged([Suffix(), Recycling(V, owner_of=lambda sequence: sequence.id)])
    sequences = [Sequence(i, list(p), len(p), SamplingParams()) for i, p in enumerate(prompts)]
    for sequence in sequences:
        drafter.begin(sequence)
    for one, together in zip(alone, propose(drafter, sequences, [9, 9, 9]), strict=True):
        assert one.tokens.tolist() == together.tokens.tolist()
        assert one.parents.tolist() == together.parents.tolist()


def test_plain_proposes_nothing() -> None:
    tau, _ = decode(Plain(), TEXT, PROMPT, 8)
    assert tau == 1.0


# -- rates ---------------------------------------------------------------------------------------------------


def test_judged_nodes_are_those_with_right_ancestors() -> None:
    draft = Draft(np.array([5, 6, 7, 8, 9]), np.array([-1, -1, 1, 0, 2]), ["x"] * 5)
    assert checked_nodes(draft, np.array([6, 7])) == [(0, 0, False), (1, 0, True), (2, 1, True)]
    assert checked_nodes(draft, np.array([6])) == [(0, 0, False), (1, 0, True)]
    assert right_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2
    assert right_prefix(np.array([1, 2]), np.array([1, 2, 4])) == 2


def test_rates_move_from_the_prior_to_the_frequency() -> None:
    rates = Rates([0.5, 0.1])
    for i in range(2000):
        rates.update(0, i % 4 != 0)
    assert rates.value[0] == pytest.approx(0.75, abs=0.03)
    assert rates.value[1] == pytest.approx(0.1)


# -- n-gram --------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 3), st.integers(0, 3))
def test_ngram_index_finds_the_longest_then_latest_match(tokens: list[int], shortest: int, more: int) -> None:
    index = NgramIndex(shortest, shortest + more)
    for token in tokens:
        index.extend([token])
    expected = (0, len(tokens))
    for n in range(shortest, shortest + more + 1):
        places = [i for i in range(n, len(tokens)) if tokens[i - n : i] == tokens[len(tokens) - n :]]
        if places:
            expected = (n, places[-1])
    assert index.find() == expected


def test_ngram_continuation_reads_itself_past_the_end() -> None:
    index = NgramIndex(1, 3)
    index.extend([1, 2, 3, 1, 2, 3, 1])
    n, place = index.find()
    assert (n, place) == (3, 4)
    assert index.continuation(place, 8) == [2, 3, 1, 2, 3, 1, 2, 3]


def test_ngram_refuses_senseless_lengths() -> None:
    with pytest.raises(ParameterError, match="min_ngram"):
        Ngram(min_ngram=4, max_ngram=3)


# -- merged --------------------------------------------------------------------------------------------------


class Parrot(Drafter):
    """Always proposes one chain, sure of it. Right or wrong."""

    name = "parrot"
    paper = ""

    def __init__(self, tokens: list[int], score: float) -> None:
        self.chain, self.score = tokens, score

    def propose(self, sequences: object, budgets: list[int], market: object) -> Proposal:  # type: ignore[override]
        scores = np.full(len(self.chain), self.score, dtype=np.float32)
        return Proposal([Draft.chain(self.chain[:b], self.name, scores[:b]) for b in budgets])


def test_merged_learns_whom_to_believe() -> None:
    liar, honest = Parrot([1, 1, 1], 0.9), Parrot([2, 2, 2], 0.5)
    merged = Merged([liar, honest])
    sequence = Sequence(0, [0], 1, SamplingParams())
    merged.begin(sequence)
    assert propose(merged, [sequence], [3])[0].tokens.tolist() == [1, 1, 1]
    for _ in range(60):
        propose(merged, [sequence], [3])
        truth = np.array([2, 2, 2, 0])
        sequence.tokens += truth.tolist()
        merged.observe(sequence, Observation(Accepted([], truth), Draft.empty(), NO_OUTPUTS, "prefill"))
    [draft] = propose(merged, [sequence], [3])
    assert draft.tokens.tolist() == [2, 2, 2]
    assert draft.scores is not None and draft.scores[0] > 0.8


# -- names ---------------------------------------------------------------------------------------------------


def test_every_registered_drafter_can_be_made_or_says_what_it_needs() -> None:
    context, made = DrafterContext(vocab_size=V), set()
    for method in methods("drafter"):
        try:
            made.add(make_drafter(method.name, context).name)
        except MethodError as error:
            assert method.needs and repr(method.name) in str(error)
    assert made >= {"plain", *(name.partition(":")[0] for name in MAKERS if "+" not in name)}
    merged = make_drafter("suffix + recycling", context)
    assert isinstance(merged, Merged) and [d.name for d in merged.drafters] == ["suffix", "recycling"]


@pytest.mark.parametrize("spec", ["", "sufix", "suffix+", "suffix+suffix", "plain+ngram", "coupled"])
def test_senseless_specs_are_refused(spec: str) -> None:
    with pytest.raises(MethodError):
        split_spec(spec)
