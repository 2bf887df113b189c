"""What a kernel for the weights of one format is given: its segment's record, and the address of ARGUMENTS int64.

A kernel multiplies rows of packed activations by panels A_FIRST..A_LAST-1 of the segment, a part of a product's
outputs whose weights have one format, and makes of the sums what A_MODE says (linear.py). With A_OTHER, panels of two
segments of one format alternate, gate and up. With the mode EMBED it writes output A_FIRST's own weights x the float32
at A_ROW_SCALES, as f32[A_OUT_STRIDE / 4], instead.

Kernels are compiled one by one and called by their addresses: a step contains none of them.
"""

from __future__ import annotations

(
    A_OTHER, A_LEVEL, A_MODE, A_ROWS, A_FIRST_ROW, A_X, A_X_STRIDE, A_ROW_SCALES, A_FIRST, A_LAST, A_OUT,
    A_OUT_STRIDE, A_SCRATCH,
) = range(13)  # fmt: skip
ARGUMENTS = 16
(S_KERNEL, S_INPUT, S_KIND, S_W, S_SCALE, S_BIAS, S_PANELS, S_STEPS) = range(8)
SEGMENT_SIZE = 8

EMBED = -1  # a mode
