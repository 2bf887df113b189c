"""Answers of a step: one scan of the logits for argmax and top-k where both will be wanted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drafting import propose

from outpace.decoding import outputs as module
from outpace.decoding.contracts import DrafterContext, Sequence
from outpace.decoding.methods import make_drafter
from outpace.decoding.outputs import StepOutputs, TargetOutputs
from outpace.models.decoder import DecoderOutput
from outpace.types import SamplingParams


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The k of every scan so far."""
    made: list[int] = []
    argmax, topk = module.row_argmax, module.row_topk

    def counted(logits: torch.Tensor, k: int, threads: int) -> object:
        made.append(k)
        return topk(logits, k, threads)

    monkeypatch.setattr(module, "row_argmax", lambda logits, threads: (made.append(1), argmax(logits, threads))[1])
    monkeypatch.setattr(module, "row_topk", counted)
    return made


def test_argmax_and_topk_do_not_depend_on_what_was_expected(scans: list[int]) -> None:
    logits = torch.randint(0, 9, (5, 30)).float()  # ties
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    for expected, before in ((0, 0), (0, 3), (8, 0), (8, 3), (99, 2)):
        step = StepOutputs(DecoderOutput(logits), expected)
        if before:
            assert (step.topk(before)[1] == order[:, :before]).all()
        assert (step.argmax() == order[:, 0]).all()
        values, ids = TargetOutputs(step, 1, 4, slice(1, 4)).topk(8)
        assert (ids == order[1:4, :8]).all() and values.shape == (3, 8)


def test_one_scan_where_topk_is_expected(scans: list[int]) -> None:
    step = StepOutputs(DecoderOutput(torch.randn(4, 50)), 8)
    step.argmax(), step.topk(8), step.topk(3), step.argmax()
    assert scans == [8]
    scans.clear()
    plain = StepOutputs(DecoderOutput(torch.randn(4, 50)))
    plain.argmax(), plain.argmax()
    assert scans == [1]


def test_a_few_rows_are_scanned_alone(scans: list[int]) -> None:
    logits = torch.randn(6, 50)
    step = StepOutputs(DecoderOutput(logits))
    step.argmax()
    values, ids = TargetOutputs(step, 2, 4, slice(2, 4)).topk(5)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    assert (ids == order[2:4, :5]).all() and (values == np.take_along_axis(logits.numpy()[2:4], ids, 1)).all()
    assert scans == [1, 5] and step._topk is None, "the other rows were left alone"


def test_merged_expects_topk_for_most_of_a_batch_only() -> None:
    drafter = make_drafter("suffix+recycling", DrafterContext(vocab_size=100))
    sequences = [Sequence(i, [1, 2, 1], 3, SamplingParams()) for i in range(4)]
    for sequence in sequences:
        drafter.begin(sequence)
    propose(drafter, sequences, [4, 0, 0, 0])
    assert drafter.taps.topk == 0
    propose(drafter, sequences, [4, 4, 0, 0])
    assert drafter.taps.topk == 8


def test_drafters_say_what_they_will_ask_for() -> None:
    context = DrafterContext(vocab_size=100)
    for spec, k in (("plain", 0), ("suffix", 0), ("recycling", 8), ("suffix+recycling", 8), ("ngram+suffix", 0)):
        drafter, sequence = make_drafter(spec, context), Sequence(0, [1, 2, 1], 3, SamplingParams())
        drafter.begin(sequence)
        propose(drafter, [sequence], [4])
        assert drafter.taps.topk == k
