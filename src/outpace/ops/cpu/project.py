"""A few rows times a float32 matrix, on the calling thread.

For the small matrices around a trained head. BLAS would take all cores for them, and its threads go on spinning for
milliseconds afterwards, beside the threads of the next step: three times slower in all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .compiled import compiled

_FEW = 64  # rows; more of them are worth BLAS


def project(x: NDArray[np.float32], matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """f32[n, K] times f32[K, D], both without gaps -> f32[n, D]. Each row is summed in the order of K."""
    if len(x) > _FEW:
        return np.asarray(x @ matrix, dtype=np.float32)
    out = np.zeros((len(x), matrix.shape[1]), dtype=np.float32)
    _add(np.ascontiguousarray(x, dtype=np.float32), matrix, out)
    return out


@compiled
def _add(x, matrix, out):  # type: ignore[no-untyped-def]
    for k in range(matrix.shape[0]):  # a row of the matrix serves all rows while it is in the first-level cache
        for i in range(x.shape[0]):
            factor = x[i, k]
            for d in range(matrix.shape[1]):
                out[i, d] += factor * matrix[k, d]
