"""How much of what a caller predicted came true."""

from __future__ import annotations

from collections.abc import Sequence


def common_tokens(prediction: Sequence[int], output: Sequence[int]) -> int:
    """Length of the longest common subsequence: the tokens of a prediction that the output has, in order.

    Bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): a bit for each token of the prediction,
    one addition of whole numbers for each token of the output.
    """
    places: dict[int, int] = {}
    for i, token in enumerate(prediction):
        places[token] = places.get(token, 0) | (1 << i)
    every = (1 << len(prediction)) - 1
    row = every
    for token in output:
        match = row & places.get(token, 0)
        row = ((row + match) | (row - match)) & every
    return len(prediction) - row.bit_count()
