"""One packed forward step, spelled out. No global context: what a decoder needs is in here.

Shapes: `B` sequences, `T` packed rows (tokens of this step), `P` pages of the longest sequence, `R` rows
whose logits are wanted.

Where a row's K and V live. A sequence's cache is its `committed` tokens followed by a *provisional region*
that the cache reserved for this step. Place `i` of the cache (committed token or provisional offset `i -
committed`) is lane `i % PAGE_SIZE` of page `page_tables[b, i // PAGE_SIZE]`. Row `t` writes its K and V to
place `committed[b] + offsets[t]` and its rotary position is `positions[t]`.

What a row sees. All committed tokens of its sequence (within the layer's sliding window), and of the
provisional region:
  causal[b]      offsets 0..offsets[t]
  otherwise      visible[visible_start[t] : visible_start[t + 1]], offsets in order of position, own one
  included
A chain of draft tokens is causal. A tree lists each node's ancestors, a bidirectional block lists the
whole block. Offsets may have been written by an earlier step of the same reservation (a draft model
growing a tree). The j-th visible offset of a row has position `committed + j`; a layer's sliding window
holds for these too: a row at position p sees positions above p - window, later ones included where the
mask shows them.

Example: committed = 5, the last sampled token `a` and a tree below it

    a ── b ── d          row      a  b  c  d
      └─ c               offset   0  1  2  3
                         position 5  6  6  7
                         visible  0 | 0 1 | 0 2 | 0 1 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..ops.masks import (
    CAUSAL,
    Bidirectional,
    Block,
    Mask,
    Tree,
    Visible,
    bidirectional_visible,
    block_visible,
    is_chain,
    tree_visible,
)

PAGE_SIZE = 16


@dataclass(slots=True, eq=False)
class Compact:
    """A draft reads the first pages of each sequence from a copy in few bits (cache.quantized)."""

    layout: NDArray[np.int64]  # [9] of ops.cpu.attention_int4
    pages: NDArray[np.int32]  # [B] how many


@dataclass(slots=True, eq=False)
class Ragged:
    """What each layer and head of a sequence reads: its head pages, in order. A head page holds PAGE_SIZE places of one
    head; `table` names them by their number in the storage, the sequence's own pages at the end among them. `before`:
    places of this head in front of the sequence's own pages; positions are in the keys already."""

    table: NDArray[np.int32]  # [L, Hkv, P]
    before: NDArray[np.int32]  # [L, Hkv], multiples of PAGE_SIZE


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
    # filled by who has vectors instead of tokens (`Decoder.embedding`); `tokens` then only count
    embeddings: NDArray[np.float32] | None = None  # [T, D]
    # filled by the cache, where a sequence has other places in each layer and head; None: it has not
    ragged: Sequence[Ragged | None] | None = None  # [B]
    # filled by who drafts from a compact copy of the keys and values; not for verifying
    compact: Compact | None = None


@dataclass(slots=True, eq=False)
class Span:
    """One sequence's slice of a step. Its rows take the offsets `offset`.. of the provisional region.

    A decoding step is `Span([last token, *draft tokens], committed, Tree(draft.parents))`; a chunk of a
    prompt is `Span(tokens, committed, logits="last")`, or "none" when the prompt goes on; a draft model
    adds one layer to its tree with `Span(layer tokens, committed, Tree(parents of all nodes so far),
    offset=1 + nodes before)`.
    """

    tokens: NDArray[np.int64] | Sequence[int]  # [n]
    committed: int
    mask: Mask = CAUSAL
    offset: int = 0
    logits: Literal["all", "last", "none"] = "all"
    before: int = 0  # tokens of the text before the first of the committed places, which are elsewhere (Ragged)


_NOTHING = np.empty(0, dtype=np.int32)


def pack(spans: Sequence[Span], page_tables: NDArray[np.int32]) -> ForwardBatch:
    """Assemble a step; `page_tables` i32[B, P] as `PagedKVCache.page_tables` gives them, after reserving.

    The batch may hold a view of `page_tables`: use it before the cache changes.
    """
    assert len(spans) == len(page_tables), f"{len(spans)} spans, {len(page_tables)} page tables"
    # Lists first, then one array for all spans: with a row or two for each, arrays of their own would cost more
    tokens: list[int] = []
    row_start = [0]
    for span in spans:
        tokens += span.tokens.tolist() if isinstance(span.tokens, np.ndarray) else span.tokens
        row_start.append(len(tokens))
    starts = np.array(row_start, dtype=np.int32)
    committed = np.array([span.committed for span in spans], dtype=np.int32)
    offsets = np.array([span.offset for span in spans], dtype=np.int32)
    begins = np.array([span.committed + span.before for span in spans], dtype=np.int32)
    where = begins
    if len(tokens) != len(spans):
        lengths = starts[1:] - starts[:-1]
        offsets = np.arange(len(tokens), dtype=np.int32) + (offsets - starts[:-1]).repeat(lengths)
        where = begins.repeat(lengths)
    seen = [None if span.mask is CAUSAL else _seen(span) for span in spans]
    positions = (where + offsets).astype(np.int64)
    for span, one, begin, end in zip(spans, seen, row_start, row_start[1:], strict=False):
        if one is not None and isinstance(span.mask, Tree):
            positions[begin:end] = one[0][1:] - one[0][:-1] + (span.committed + span.before - 1)
    visible_start, visible = _join(seen, row_start)
    return ForwardBatch(
        tokens=np.array(tokens, dtype=np.int64),
        positions=positions,
        row_start=starts,
        offsets=offsets,
        causal=np.array([one is None for one in seen], dtype=np.bool_),
        visible_start=visible_start,
        visible=visible,
        committed=committed,
        page_tables=page_tables,
        logit_rows=_logit_rows(spans, row_start),
    )


def _seen(span: Span) -> Visible | None:
    """What the rows of a span see, unless it is causal."""
    first, n, mask = span.offset, len(span.tokens), span.mask
    if isinstance(mask, Tree):
        nodes = first + n - mask.rooted
        assert len(mask.parents) == nodes, f"{len(mask.parents)} parents for the {nodes} nodes up to the last row"
        return None if is_chain(mask.parents) else tree_visible(mask.parents, first, mask.rooted)
    if isinstance(mask, Block):
        return block_visible(n, mask.size, first)
    if isinstance(mask, Bidirectional):
        return bidirectional_visible(n, first)
    return None


def _logit_rows(spans: Sequence[Span], row_start: list[int]) -> NDArray[np.int64]:
    if all(span.logits == "all" for span in spans):
        return np.arange(row_start[-1])
    wanted: list[int] = []
    for span, begin, end in zip(spans, row_start, row_start[1:], strict=False):
        if span.logits != "none" and end > begin:
            wanted += range(end - 1 if span.logits == "last" else begin, end)
    return np.array(wanted, dtype=np.int64)


def _join(seen: list[Visible | None], row_start: list[int]) -> Visible:
    """One list of visible offsets for the whole step. [T + 1], [nnz]"""
    if len(seen) == 1 and seen[0] is not None:
        return seen[0]
    starts = np.zeros(row_start[-1] + 1, dtype=np.int32)
    if not any(seen):
        return starts, _NOTHING
    parts, total = [], 0
    for b, one in enumerate(seen):
        begin, end = row_start[b], row_start[b + 1]
        starts[begin:end] = total
        if one is not None:
            start, visible = one
            starts[begin:end] += start[:-1]
            parts.append(visible)
            total += len(visible)
    starts[-1] = total
    return starts, np.concatenate(parts)
