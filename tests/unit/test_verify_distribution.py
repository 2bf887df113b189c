"""The output distribution of the exact verifiers, by enumeration of every outcome: verifier x sampler x draft.

The verifier's own code runs once for every outcome of its random choices. Together with the probability that the
drafter draws the draft, this gives the joint distribution of the first tokens without drawing anything. It must be the
target's, to 1e-9 in total variation.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from outpace.bench.enumeration import Enumeration, scripted
from outpace.bench.language import (
    CHAINS,
    PROMPT,
    SAMPLERS,
    TREES,
    V,
    all_drafts,
    distance,
    drafter,
    joint,
    target,
    target_logits,
)
from outpace.decoding.contracts import Sequence, Verifier
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import Stream, draw, uniform
from outpace.decoding.verify import rejection
from outpace.decoding.verify.block import BlockVerifier
from outpace.decoding.verify.rejection import RejectionVerifier
from outpace.types import Draft, SamplingParams

DRAWS = ("outright", "independent", "without replacement")


@pytest.fixture
def script() -> Iterator[Enumeration]:
    with scripted() as found:
        yield found


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "verifier, shape",
    [
        *((RejectionVerifier, shape) for shape in [*CHAINS, *TREES]),
        *((BlockVerifier, shape) for shape in [*CHAINS, "siblings"]),  # trees are handed to the other
    ],
)
def test_the_output_has_the_target_distribution(
    script: Enumeration, verifier: type[Verifier], shape: str, sampler: str
) -> None:
    parents, params = (CHAINS | TREES)[shape], SAMPLERS[sampler]
    for draws in DRAWS[1:]:
        if draws == "without replacement" and len(set(parents)) == len(parents):
            continue  # without siblings it is the same
        found, _ = joint(script, verifier(), parents, all_drafts(parents), draws, params)
        assert distance(found, params) <= 1e-9, draws
    for tokens in all_drafts(parents)[::7]:  # each one, whatever its tokens
        found, _ = joint(script, verifier(), parents, [tokens], "outright", params)
        assert distance(found, params) <= 1e-9, tokens


def test_a_wrong_q_shows() -> None:
    """The measure is not blind: siblings drawn without replacement but declared independent change the output."""
    with scripted() as script, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rejection, "drawn_from", lambda draft, node, excluded=(): draft.q[node].astype(np.float64))
        params = SAMPLERS["temperature"]
        found, _ = joint(script, RejectionVerifier(), [-1, -1], all_drafts([-1, -1]), "without replacement", params)
    assert distance(found, params) > 1e-3


@pytest.mark.parametrize("shape", ["one", "chain", "long"])
def test_a_block_accepts_no_less_than_token_by_token(script: Enumeration, shape: str) -> None:
    parents, params = CHAINS[shape], SAMPLERS["temperature"]
    drafts = all_drafts(parents)
    _, together = joint(script, BlockVerifier(), parents, drafts, "independent", params)
    _, apart = joint(script, RejectionVerifier(), parents, drafts, "independent", params)
    assert together > apart + 1e-3 if len(parents) > 1 else together == pytest.approx(apart, abs=1e-12)


def test_a_block_proposed_outright_is_accepted_as_token_by_token(script: Enumeration) -> None:
    for tokens in all_drafts([-1, 0, 1])[::5]:
        _, together = joint(script, BlockVerifier(), [-1, 0, 1], [tokens], "outright", SAMPLERS["temperature"])
        _, apart = joint(script, RejectionVerifier(), [-1, 0, 1], [tokens], "outright", SAMPLERS["temperature"])
        assert together == pytest.approx(apart, abs=1e-12)


def test_siblings_without_replacement_are_accepted_more_often(script: Enumeration) -> None:
    parents, params = [-1, -1], SAMPLERS["temperature"]
    rates = {d: joint(script, RejectionVerifier(), parents, all_drafts(parents), d, params)[1] for d in DRAWS[1:]}
    assert rates["without replacement"] > rates["independent"]


@pytest.mark.parametrize("verifier", [RejectionVerifier, BlockVerifier])
def test_steps_in_a_row_use_no_random_number_twice(verifier: type[Verifier]) -> None:
    """A loop of real steps: 6000 seeds, the drafter samples its chains by the stream's rule. A block verifier looks at
    drafts that it then rejects, so that a drafter that drew by the token's position would spoil the distribution."""
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    n, length = 6000, 4
    for seed in range(n):
        params = SamplingParams(temperature=1.0, seed=seed)
        sequence = Sequence(0, list(PROMPT), len(PROMPT), params)
        while len(sequence.output) < length:
            at, out = len(sequence.tokens), tuple(sequence.output)
            drafted: list[int] = []
            for i in range(3):
                q = drafter((*out, *drafted), sparse=False)
                drafted.append(draw(q, uniform(seed, at, Stream.DRAFT, i)))
            contexts = [(*out, *drafted[:i]) for i in range(4)]
            draft = Draft.chain(drafted, "x", q=np.stack([drafter(c, sparse=False) for c in contexts[:3]]))
            outputs = TargetOutputs.of(torch.from_numpy(np.stack([target_logits(c) for c in contexts])))
            sequence.tokens += verifier().verify(sequence, draft, outputs).tokens
        counts[tuple(sequence.output[:length])] += 1
    statistic = 0.0
    for whole in itertools.product(range(V), repeat=length):
        p = np.prod([target(whole[:i], SamplingParams(temperature=1.0))[whole[i]] for i in range(length)])
        statistic += (counts[whole] - n * p) ** 2 / (n * p)
    assert statistic < 131  # chi-square, 80 degrees of freedom, p = 0.0003
