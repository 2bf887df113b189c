"""Verifiers proved by themselves, without a model: what they accept is what they declare.

Two ways. On a language of three tokens every outcome of a step is enumerated with its probability, for every sampler
and every kind of draft; the joint distribution of the first tokens must be the target's to 1e-9. And many steps are
walked with the real random numbers: an `identical` verifier must give token for token what plain decoding says at that
seed and position; of one that keeps the distribution, texts of several steps are counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ..decoding.contracts import Sequence
from ..decoding.methods import make_verifier
from ..decoding.outputs import TargetOutputs
from ..decoding.sampling import History, Stream, draw, sample, uniform
from ..errors import OutpaceError
from ..registry import methods
from ..types import NO_PARENT, Draft, Exactness, SamplingParams
from . import language
from .enumeration import scripted
from .evidence import ALARM, Check, chi_square, seen_one_in

EXACT = 1e-9  # total variation that rounding of float64 sums may leave
_WALKS, _NODES, _VOCAB = 4000, 5, 12  # steps that are walked with each sampler: a fault in 500 shows some ten times
_TEXTS, _TEXT = 3000, 4  # texts that are counted, and their length
_BLIND = "cannot be enumerated: it does more with a random number than compare it or draw by it"


def verifier_names() -> list[str]:
    return [m.name for m in methods("verifier")]


def check_verifier(spec: str) -> Iterator[Check]:
    """All checks of one verifier, such as "rejection" or "typical:epsilon=0.1". Raises MethodError for no such one."""
    declared = make_verifier(spec).exactness
    yield from (_enumerated(spec, declared, name, params) for name, params in language.SAMPLERS.items())
    if declared == "identical":
        for n, name in enumerate(("greedy", "temperature", "penalties")):
            yield _walked(spec, name, n * _WALKS)
    elif declared == "distribution":
        yield _walked(spec, "greedy", 0)  # a greedy text has a distribution of one text
        yield _counted(spec)


def _enumerated(spec: str, declared: Exactness, sampler: str, params: SamplingParams) -> Check:
    """Total variation over every shape of draft, every way in which it was drawn, and every token in it."""
    worst, where, drafts = 0.0, "", 0
    verifier = make_verifier(spec)  # one for all: what it keeps from step to step, if anything, must not matter
    subject = f"{spec}, {sampler}"
    try:
        with scripted() as script:
            for shape, parents, draws, group in _cases():
                seeded = replace(params, seed=drafts)
                found, _ = language.joint(script, verifier, parents, group, draws, seeded)
                drafts += len(group)
                off = language.distance(found, params)
                if off > worst:
                    worst, where = off, f"{shape}, {draws}"
    except TypeError as error:
        return Check("enumeration", subject, True, f"{_BLIND} ({error})", {"declared": declared, "drafts": 0})
    except (AssertionError, ValueError, IndexError, OutpaceError) as error:
        return Check("enumeration", subject, False, f"a step fails: {error}", {"declared": declared})
    said = f"total variation {worst:.2g} at most over {drafts} drafts" + (f" ({where})" if worst > EXACT else "")
    holds = worst <= EXACT or declared == "approximate"
    return Check(
        "enumeration", subject, holds, said, {"declared": declared, "total_variation": worst, "drafts": drafts}
    )


def _cases() -> Iterator[tuple[str, list[int], language.Draws, list[tuple[int, ...]]]]:
    """Shape, parents, how it was drawn, and drafts whose outcomes together are one distribution."""
    for shape, parents in (language.CHAINS | language.TREES).items():
        drafts = language.all_drafts(parents)
        yield shape, parents, "independent", drafts
        if len(set(parents)) < len(parents):  # without siblings it is the same
            yield shape, parents, "without replacement", drafts
        for tokens in drafts[::7]:  # each one, whatever its tokens
            yield shape, parents, "outright", [tokens]


def _walked(spec: str, sampler: str, seed: int) -> Check:
    """Random trees over random logits, partly right: tokens and path against their definition."""
    verifier, wrong, first = make_verifier(spec), 0, ""
    rng = np.random.default_rng(seed)
    for n in range(seed, seed + _WALKS):
        params = replace(language.SAMPLERS[sampler], seed=n)
        sequence = Sequence(n, rng.integers(_VOCAB, size=1 + n % 20).tolist(), 1, params)
        logits = (2 * rng.standard_normal((_NODES + 1, _VOCAB))).astype(np.float32)
        draft = _partly_right(sequence, logits, rng)
        path, tokens = _defined(sequence, draft, logits)
        seen = verifier.verify(sequence, draft, TargetOutputs.of(torch.from_numpy(logits)))
        if seen.tokens != tokens or seen.path != path:
            wrong += 1
            first = first or f"; first: {seen.tokens} for {tokens} at seed {n}"
    evidence = f"{wrong} of {_WALKS} steps differ from plain sampling{first}"
    evidence += "" if wrong else f"; one in {seen_one_in(_WALKS)} would have been seen"
    return Check("walk", f"{spec}, {sampler}", not wrong, evidence, {"steps": _WALKS, "wrong": wrong})


def _partly_right(sequence: Sequence, logits: np.ndarray, rng: np.random.Generator) -> Draft:
    """A tree in which some nodes carry what plain decoding says there."""
    tokens: list[int] = []
    parents: list[int] = []
    taken: set[tuple[int, int]] = set()
    for node in range(_NODES):
        parent = int(rng.integers(NO_PARENT, node))
        right = _plain(sequence, [tokens[i] for i in _path(parents, parent)], logits[parent + 1])
        token = right if rng.random() < 0.4 else int(rng.integers(_VOCAB))
        while (parent, token) in taken:
            token = (token + 1) % _VOCAB
        taken.add((parent, token))
        tokens.append(token)
        parents.append(parent)
    return Draft(np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64), ["x"] * _NODES)


def _path(parents: list[int], node: int) -> list[int]:
    """From the root down to `node`, itself included."""
    path: list[int] = []
    while node != NO_PARENT:
        path.insert(0, node)
        node = parents[node]
    return path


def _plain(sequence: Sequence, behind: list[int], row: np.ndarray) -> int:
    """What plain decoding says after the sequence and `behind`."""
    params, position = sequence.params, len(sequence.tokens) + len(behind)
    wanted = params.edits_logits  # else nobody looks at the history
    history = History([*sequence.tokens, *behind], sequence.prompt_length) if wanted else None
    return sample(row, params, history, position)


def _defined(sequence: Sequence, draft: Draft, logits: np.ndarray) -> tuple[list[int], list[int]]:
    """Path and tokens of a step by definition: plain decoding, as long as the draft has its tokens."""
    path: list[int] = []
    tokens: list[int] = []
    node = NO_PARENT
    while True:
        tokens.append(_plain(sequence, tokens, logits[node + 1]))
        below = [i for i in np.flatnonzero(draft.parents == node).tolist() if draft.tokens[i] == tokens[-1]]
        if not below:
            return path, tokens
        node = below[0]
        path.append(node)


def _counted(spec: str) -> Check:
    """Texts of `_TEXT` tokens by steps in a row, with chains that a drafter samples: no random number may serve
    twice."""
    counts: Counter[tuple[int, ...]] = Counter()
    base = SamplingParams(temperature=1.0)
    verifier = make_verifier(spec)
    for seed in range(_TEXTS):
        sequence = language.new_sequence(SamplingParams(temperature=1.0, seed=seed))
        while len(sequence.output) < _TEXT:
            draft, outputs = _sampled_chain(sequence, 3)
            sequence.tokens += verifier.verify(sequence, draft, outputs).tokens
        counts[tuple(sequence.output[:_TEXT])] += 1
    cells = list(itertools.product(range(language.V), repeat=_TEXT))
    expected = [
        _TEXTS * float(np.prod([language.target(cell[:i], base)[cell[i]] for i in range(_TEXT)])) for cell in cells
    ]
    statistic, freedom, p = chi_square([counts[cell] for cell in cells], expected)
    evidence = f"chi-square {statistic:.1f} at {freedom} degrees of freedom, p = {p:.2g}, over {_TEXTS} texts"
    return Check("frequencies", f"{spec}, steps in a row", p > ALARM, evidence, {"p": p, "chi_square": statistic})


def _sampled_chain(sequence: Sequence, length: int) -> tuple[Draft, TargetOutputs]:
    """As a drafter draws it: by the step's first position and a running number."""
    at, out, drafted = len(sequence.tokens), tuple(sequence.output), list[int]()
    for i in range(length):
        q = language.drafter((*out, *drafted), sparse=False)
        drafted.append(draw(q, uniform(sequence.params.seed, at, Stream.DRAFT, i)))
    contexts = [(*out, *drafted[:i]) for i in range(length + 1)]
    draft = Draft.chain(drafted, "x", q=np.stack([language.drafter(c, sparse=False) for c in contexts[:length]]))
    return draft, TargetOutputs.of(torch.from_numpy(np.stack([language.target_logits(c) for c in contexts])))
