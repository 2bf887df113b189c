"""Who sees whom among the provisional rows of one sequence: causal, tree, block-causal, bidirectional.

A mask is described over *offsets* of the provisional region. Each function gives the visible offsets of
the `n` rows from offset `first` on, as (start i32[n + 1], visible i32[nnz]): row `i` sees
`visible[start[i] : start[i + 1]]`, in order of position, itself included. Offsets before `first` were
written earlier in the same reservation.

    causal          tree([-1, -1, 0])     block(2)          bidirectional
    0 |x . . .      root |x . . .         0 |x x . .        0 |x x x x
    1 |x x . .      n0   |x x . .         1 |x x . .        1 |x x x x
    2 |x x x .      n1   |x . x .         2 |x x x x        2 |x x x x
    3 |x x x x      n2   |x x . x         3 |x x x x        3 |x x x x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Visible: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class Causal:
    """A row sees the offsets up to its own."""


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """A row sees its ancestors. `parents` are those of *all* draft nodes of the region up to the span's
    last row.

    Rooted: the row at offset 0 is the token that the nodes hang from (parent -1), node `i` has offset `1 +
    i`. Otherwise that token is committed already, and node `i` has offset `i`.
    """

    parents: NDArray[np.int64]
    rooted: bool = True


@dataclass(frozen=True, slots=True)
class Block:
    """Rows in blocks of `size`, counted from offset 0: a row sees its whole block and the blocks before
    it."""

    size: int


@dataclass(frozen=True, slots=True)
class Bidirectional:
    """A row sees every offset of the region."""


CAUSAL = Causal()
Mask: TypeAlias = Causal | Tree | Block | Bidirectional


def tree_visible(parents: NDArray[np.int64] | Sequence[int], first: int = 0, rooted: bool = True) -> Visible:
    """Ancestors of each row; `parents[i] < i`, -1 for children of the root. See Tree for offsets."""
    listed: list[int] = parents.tolist() if isinstance(parents, np.ndarray) else list(parents)
    assert min(listed, default=-1) >= -1, f"parents below -1: {listed}"
    shift = 1 if rooted else 0
    paths = [[0] if rooted else []]  # paths[i + 1] is that of node i
    for i, parent in enumerate(listed):
        paths.append([*paths[parent + 1], i + shift])
    rows = paths[first + 1 - shift :]
    start = np.array(list(accumulate(map(len, rows), initial=0)), dtype=np.int32)
    return start, np.array(list(chain.from_iterable(rows)), dtype=np.int32)


def block_visible(n: int, size: int, first: int = 0) -> Visible:
    """Block-causal over blocks of `size`; the last block may be short."""
    assert size >= 1, f"a block of {size}"
    end = first + n
    seen = np.minimum((np.arange(first, end) // size + 1) * size, end)
    return _prefixes(seen)


def bidirectional_visible(n: int, first: int = 0) -> Visible:
    """Every row sees offsets 0..first + n - 1."""
    return _prefixes(np.full(n, first + n))


def is_chain(parents: NDArray[np.int64]) -> bool:
    """Whether every node is the child of the one before it, so that the tree is causal."""
    return parents.tolist() == list(range(-1, len(parents) - 1))


def _prefixes(lengths: NDArray[np.int64]) -> Visible:
    """Row `i` sees offsets 0..lengths[i] - 1."""
    start = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=start[1:])
    visible = np.arange(start[-1], dtype=np.int32) - np.repeat(start[:-1], lengths)
    return start, visible


def dense_mask(
    positions: NDArray[np.int64],
    offsets: NDArray[np.int32],
    committed: int,
    places: int,
    window: int | None = None,
    seen: Visible | None = None,
) -> NDArray[np.bool_]:
    """What the rows of one sequence see of its `places`: committed tokens, then the region. [n, places]

    `seen` as above, or None for causal rows; with `window` a row at position p sees positions above p -
    window.
    """
    place = np.arange(places)
    floor = positions[:, None] - (window if window is not None else 1 + int(positions.max(initial=0)))
    mask = place > floor
    if seen is None:
        mask &= place <= committed + offsets[:, None]
        return mask
    start, visible = seen[0], seen[1][seen[0][0] : seen[0][-1]]
    counts = np.diff(start)
    row = np.repeat(np.arange(len(counts)), counts)
    position = committed + np.arange(len(visible)) - np.repeat(start[:-1] - start[0], counts)
    mask[:, committed:] = False
    mask[row, committed + visible] = position > floor[row, 0]
    return mask
