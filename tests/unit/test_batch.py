"""Masks, packing and the reference operations."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outpace.models.batch import Span, pack
from outpace.ops.masks import CAUSAL, Bidirectional, Block, Tree, block_visible, dense_mask, tree_visible
from outpace.ops.reference import DenseLinear, Int8ReferenceLinear, quantize_rows, rotate

TABLE = np.zeros((1, 4), dtype=np.int32)


def lists(start, visible):
    return [visible[a:b].tolist() for a, b in pairwise(start)]


def test_the_example_of_the_contract():
    batch = pack([Span([1, 2, 3, 4], 5, Tree(np.array([-1, -1, 0])))], TABLE)
    assert batch.offsets.tolist() == [0, 1, 2, 3] and batch.positions.tolist() == [5, 6, 6, 7]
    assert lists(batch.visible_start, batch.visible) == [[0], [0, 1], [0, 2], [0, 1, 3]]
    assert batch.causal.tolist() == [False] and batch.logit_rows.tolist() == [0, 1, 2, 3]


@given(st.lists(st.integers(0, 10**6), max_size=20), st.booleans(), st.data())
def test_tree_rows_see_their_ancestors_in_order(numbers, rooted, data):
    parents = np.array([n % (i + 1) - 1 for i, n in enumerate(numbers)], dtype=np.int64)
    first = data.draw(st.integers(0, len(parents)))
    rows = lists(*tree_visible(parents, first, rooted))
    shift = int(rooted)
    expected = []
    for offset in range(first, len(parents) + shift):
        node, path = offset - shift, []
        while node >= 0:
            path.append(node + shift)
            node = parents[node]
        expected.append(([0] if rooted else []) + path[::-1])
    assert rows == expected


def test_a_chain_is_causal_and_blocks_end_with_the_region():
    assert pack([Span([1, 2, 3], 9, Tree(np.array([-1, 0])))], TABLE).causal.tolist() == [True]
    assert lists(*block_visible(5, 2)) == [[0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert lists(*block_visible(2, 4, first=3)) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_packing_of_mixed_spans():
    spans = [
        Span([1, 2], 5, logits="last"),
        Span([7, 8, 9], 0, Block(2), logits="none"),
        Span([3, 4], 3, Tree(np.array([-1, -1, 0, 0]), rooted=False), offset=2),
        Span([5], 1, Bidirectional(), offset=1),
    ]
    batch = pack(spans, np.zeros((4, 2), dtype=np.int32))
    assert batch.tokens.tolist() == [1, 2, 7, 8, 9, 3, 4, 5]
    assert batch.row_start.tolist() == [0, 2, 5, 7, 8] and batch.committed.tolist() == [5, 0, 3, 1]
    assert batch.offsets.tolist() == [0, 1, 0, 1, 2, 2, 3, 1]
    assert batch.positions.tolist() == [5, 6, 0, 1, 2, 4, 4, 2]
    assert batch.causal.tolist() == [True, False, False, False]
    rows = lists(batch.visible_start, batch.visible)
    assert rows == [[], [], [0, 1], [0, 1], [0, 1, 2], [0, 2], [0, 3], [0, 1]]
    assert batch.logit_rows.tolist() == [1, 5, 6, 7]
    types = {"tokens": np.int64, "positions": np.int64, "logit_rows": np.int64, "causal": np.bool_}
    for name in ("tokens", "positions", "row_start", "offsets", "causal", "visible_start", "visible", "logit_rows"):
        assert getattr(batch, name).dtype == types.get(name, np.int32), name


MASKS = st.one_of(
    st.just(CAUSAL),
    st.integers(1, 4).map(Block),
    st.just(Bidirectional()),
    st.lists(st.integers(0, 9), max_size=6).map(
        lambda numbers: Tree(np.array([n % (i + 1) - 1 for i, n in enumerate(numbers)], dtype=np.int64))
    ),
)


@st.composite
def spans(draw):
    mask = draw(MASKS)
    n = len(mask.parents) + 1 if isinstance(mask, Tree) else draw(st.integers(0 if mask is CAUSAL else 1, 5))
    first = draw(st.integers(0, n - 1)) if isinstance(mask, Tree) else draw(st.integers(0, 3))
    rows = n - first if isinstance(mask, Tree) else n
    tokens = draw(st.lists(st.integers(0, 99), min_size=rows, max_size=rows))
    given = np.array(tokens, dtype=np.int64) if draw(st.booleans()) else tokens
    return Span(given, draw(st.integers(0, 40)), mask, first, draw(st.sampled_from(["all", "last", "none"])))


@given(st.lists(spans(), min_size=1, max_size=6))
def test_a_step_is_its_spans_one_after_the_other(some):
    batch, row, logits = pack(some, np.zeros((len(some), 1), dtype=np.int32)), 0, []
    for b, span in enumerate(some):
        alone, n = pack([span], TABLE), len(span.tokens)
        assert batch.row_start[b : b + 2].tolist() == [row, row + n]
        assert (batch.causal[b], batch.committed[b]) == (alone.causal[0], span.committed)
        for name in ("tokens", "positions", "offsets"):
            assert getattr(batch, name)[row : row + n].tolist() == getattr(alone, name).tolist(), name
        assert lists(batch.visible_start[row : row + n + 1], batch.visible) == lists(alone.visible_start, alone.visible)
        logits += [row + int(i) for i in alone.logit_rows]
        shown = lists(alone.visible_start, alone.visible)
        causal = [span.committed + span.offset + i for i in range(n)]
        if isinstance(span.mask, Tree) and shown and shown[0]:
            causal = [span.committed + len(seen) - 1 for seen in shown]  # as many before it as it sees
        assert alone.positions.tolist() == causal
        assert alone.tokens.tolist() == list(span.tokens)
        row += n
    assert batch.logit_rows.tolist() == logits and len(batch.visible_start) == row + 1


@pytest.mark.parametrize("parents", [np.array([-1, -1]), np.array([-1, -2, 0])])
def test_wrong_trees_are_refused(parents):
    with pytest.raises(AssertionError):
        pack([Span([1, 2, 3, 4], 5, Tree(parents))], TABLE)


def test_dense_mask_windows_the_region_too():
    positions, offsets = np.array([3, 4, 5]), np.array([0, 1, 2], dtype=np.int32)
    mask = dense_mask(positions, offsets, 3, 6, window=2)
    assert [np.flatnonzero(row).tolist() for row in mask] == [[2, 3], [3, 4], [4, 5]]
    seen = (np.array([0, 3, 6, 9], dtype=np.int32), np.tile(np.arange(3, dtype=np.int32), 3))
    mask = dense_mask(positions, offsets, 3, 6, window=2, seen=seen)
    assert [np.flatnonzero(row).tolist() for row in mask] == [[2, 3, 4, 5], [3, 4, 5], [4, 5]]


def test_rows_quantise_symmetrically_half_to_even():
    x = torch.tensor([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 0.0, 0.5]])
    q, scale = quantize_rows(x)
    assert q.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0], [-127, 64, 0, 32]]
    assert torch.equal(scale[:, 0], torch.tensor([127.0, 0.0, 2.0]) / 127)


def test_int8_products_are_exact_near_and_the_same_for_every_batch():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 4096, generator=generator)
    bias, x = torch.randn(48, generator=generator), torch.randn(33, 4096, generator=generator)
    linear = Int8ReferenceLinear(weight, bias)
    out = linear(x)
    q, row = quantize_rows(rotate(x))
    total = q.numpy().astype(np.int64) @ linear.weight.numpy().astype(np.int64).T
    expected = total.astype(np.float32) * row.numpy() * linear.scale.numpy() + bias.numpy()
    assert np.array_equal(out.numpy(), expected)
    assert all(torch.equal(linear(x[i : i + 1])[0], out[i]) for i in range(len(x)))
    error = (out - DenseLinear(weight, bias)(x)).abs().max() / out.std()
    assert error < 0.05
