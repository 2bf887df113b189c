"""What a result guarantees."""

from __future__ import annotations

from ..decoding.contracts import Verifier
from ..models.decoder import Decoder
from ..types import Exactness, SamplingParams


def exactness(
    decoder: Decoder, verifier: Verifier, params: SamplingParams, method: str, alone: bool
) -> tuple[Exactness, list[str]]:
    """What drafts by `method` and this verifier leave of plain decoding, and why it is not more. `alone`: no step holds
    another sequence's rows.

    `identical` rests on a decoder whose rows do not depend on each other. Without that, greedy output may differ from
    plain decoding where two logits nearly tie; sampled output keeps its distribution, as far as the rounding of the
    logits goes.
    """
    declared = verifier.exactness
    plain = method == "plain" and alone  # then it is the reference itself
    if declared == "approximate" and method != "plain":
        return declared, [f"verifier {verifier.name} accepts drafts that plain decoding would not have chosen"]
    if declared == "approximate" or decoder.row_invariant or plain:
        return declared, []
    note = (
        f"{decoder.precision} on {decoder.device.type} rounds a row differently when other rows share its step, so "
        "tokens may differ from plain decoding where two logits nearly tie; the native CPU decoder does not"
    )
    return ("approximate" if params.greedy else "distribution"), [note]
