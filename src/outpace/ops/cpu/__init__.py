"""Fused CPU kernels, compiled by numba; no compiler is needed on the machine.

Everything here works on raw addresses and 16-lane vectors. The rule that the whole package keeps: the arithmetic of a
row depends on that row alone, never on which or how many rows share the step. That is what makes `identical` hold.
"""
