"""Top-k over rows of logits against a stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outpace.ops.select import row_argmax, row_logsumexp, row_topk


@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([3, 10**6]))
def test_equals_a_stable_sort(rows: int, vocabulary: int, k: int, seed: int, distinct: int) -> None:
    k = min(k, vocabulary)
    rng = np.random.default_rng(seed)
    # few distinct values make ties, which must go to the smaller id
    data = rng.integers(-distinct, distinct, (rows, vocabulary)).astype(np.float32)
    values, ids = row_topk(torch.from_numpy(data), k)
    order = np.argsort(-data, axis=1, kind="stable")[:, :k]
    assert (ids == order).all()
    assert (values == np.take_along_axis(data, order, axis=1)).all()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_rows(threads: int) -> None:
    data = np.random.default_rng(threads).integers(-50, 50, (7, 1000)).astype(np.float32)  # with ties
    for k in (1, 5):
        for rows in (1, 2, 7):
            for one, all_of in zip(row_topk(data[:rows], k), row_topk(data[:rows], k, threads), strict=True):
                assert (one == all_of).all()


def test_reads_rows_of_a_wider_buffer() -> None:
    buffer = torch.randn(4, 200)
    assert (row_argmax(buffer[:, :150]) == buffer[:, :150].argmax(dim=1).numpy()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_layouts_take_the_same_answer(dtype: torch.dtype) -> None:
    data = torch.randint(0, 5, (100, 6)).to(dtype).T
    values, ids = row_topk(data, 4)
    assert (ids == np.argsort(-data.numpy(), axis=1, kind="stable")[:, :4]).all()
    assert values.shape == (6, 4)


def test_logsumexp_is_torch_s() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 30
    logits[1, :900] = float("-inf")
    np.testing.assert_allclose(row_logsumexp(logits), torch.logsumexp(logits.double(), dim=-1).numpy(), rtol=1e-6)
