"""One packed forward step, spelled out. No global context: what a decoder needs is in here.

Shapes: `B` sequences, `T` packed rows (tokens of this step), `P` pages of the longest sequence, `R` rows whose
logits are wanted.

Where a row's K and V live. A sequence's cache is its `committed` tokens followed by a *provisional region* that the
cache reserved for this step. Place `i` of the cache (committed token or provisional offset `i - committed`) is lane
`i % PAGE_SIZE` of page `page_tables[b, i // PAGE_SIZE]`. Row `t` writes its K and V to place
`committed[b] + offsets[t]` and its rotary position is `positions[t]`.

What a row sees. All committed tokens of its sequence (within the layer's sliding window), and of the provisional
region:
  causal[b]      offsets 0..offsets[t]
  otherwise      visible[visible_start[t] : visible_start[t + 1]], offsets in order of their position, own one included
A chain of draft tokens is causal. A tree lists each node's ancestors, a bidirectional block lists the whole block.
Offsets may have been written by an earlier step of the same reservation (a draft model growing a tree).

Example: committed = 5, the last sampled token `a` and a tree below it

    a ── b ── d          row      a  b  c  d
      └─ c               offset   0  1  2  3
                         position 5  6  6  7
                         visible  0 | 0 1 | 0 2 | 0 1 3
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAGE_SIZE = 16


@dataclass(slots=True, eq=False)
class ForwardBatch:
    # filled from the spans
    tokens: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T]
    row_start: NDArray[np.int32]  # [B + 1]
    offsets: NDArray[np.int32]  # [T]
    causal: NDArray[np.bool_]  # [B]
    visible_start: NDArray[np.int32]  # [T + 1]; empty ranges for causal sequences
    visible: NDArray[np.int32]  # [nnz]
    # filled by the cache
    committed: NDArray[np.int32]  # [B]
    page_tables: NDArray[np.int32]  # [B, P]
    # filled by the runner
    logit_rows: NDArray[np.int64]  # [R] ascending
