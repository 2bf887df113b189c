"""Plain torch operations of a decoder: exact, readable, on any device. What faster backends are tested
against.

Shapes: `T` rows, `D` width, `N` outputs; attention: `G` sequences side by side, `n` rows and `S` places of
the longest of them, `Hq`/`Hkv` heads, `C` head width.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last axis (https://arxiv.org/abs/1910.07467), in float32; x's type comes
    back. [..., D] -> [..., D]
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, where the two lie side by side. [T, 2 * N] -> [T, N]"""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Grouped-query attention: q [G, n, Hq, C], k and v [G, S, Hkv, C], mask bool [G, n, S] -> [G, n, Hq, C].

    The query heads of one KV head are laid side by side as rows, so keys and values are not repeated.
    """
    g, n, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    rows = q.view(g, n, kv_heads, group, width).permute(0, 2, 3, 1, 4).reshape(g, kv_heads, group * n, width)
    out = F.scaled_dot_product_attention(
        rows, k.transpose(1, 2), v.transpose(1, 2), mask.repeat(1, group, 1)[:, None], scale=scale
    )
    return out.reshape(g, kv_heads, group, n, width).permute(0, 3, 1, 2, 4).reshape(g, n, heads, width)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 of every row: scale = max|row| / 127, rounded half to even; a row of zeros has scale 0.

    f32[T, D] -> int8[T, D], f32[T, 1]
    """
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(x / torch.where(scale == 0, 1, scale)).clamp_(-127, 127).to(torch.int8), scale


ROTATION = 64  # block of the rotation that precedes int8


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Walsh-Hadamard transform of the last axis in blocks of 64, not normalised; a short last block gets zeros.

    Twice in a row it multiplies by 64. Spreads an outlier over its block, so that int8 loses less to it
    (https://arxiv.org/abs/2404.00456). [..., K] -> [..., K rounded up to 64]
    """
    signs = torch.ones(1, 1, dtype=torch.float64, device=x.device)  # float64: the same for every number of rows
    while len(signs) < ROTATION:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    x = F.pad(x, (0, -x.shape[-1] % ROTATION))
    return (x.double().reshape(*x.shape[:-1], -1, ROTATION) @ signs).reshape(x.shape).to(x.dtype)


class DenseLinear:
    """x @ weight.T + bias in the weight's own type."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def take(self, outputs: torch.Tensor) -> DenseLinear:
        """The same with some outputs only, in that order."""
        return DenseLinear(self.weight[outputs], None if self.bias is None else self.bias[outputs])


class Int8ReferenceLinear:
    """The definition of int8 arithmetic, slow: weights per output channel, activations per row, both symmetric, both
    rotated.

    The product of whole numbers is exact (float64 holds every sum up to 2**53), so a row's result does not
    depend on its neighbours nor on the order of summation: float32(sum) * row scale * channel scale + bias.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, scale = quantize_rows(rotate(weight.float()) / ROTATION)
        self.scale, self.bias = scale[:, 0], bias
        self.nbytes = self.weight.nbytes + scale.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows, row_scale = quantize_rows(rotate(x.float()))
        total = (rows.double() @ self.weight.double().T).float()
        out = total * row_scale * self.scale
        return out if self.bias is None else out + self.bias

    def take(self, outputs: torch.Tensor) -> Int8ReferenceLinear:
        """The same with some outputs only, in that order."""
        part = copy.copy(self)
        part.weight, part.scale = self.weight[outputs], self.scale[outputs]
        part.bias = None if self.bias is None else self.bias[outputs]
        part.nbytes = part.weight.nbytes + part.scale.nbytes + (0 if part.bias is None else part.bias.nbytes)
        return part
