"""What the kernels are told of a model's weights: a record of each product, and a row of addresses for each layer.

The layouts are those of ops.cpu.product, ops.cpu.arguments and ops.cpu.step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..ops.cpu import step
from ..ops.cpu.arguments import SEGMENT_SIZE
from ..ops.cpu.blocks import KERNELS
from ..ops.cpu.compiled import address_of
from ..ops.cpu.linear import KIND_BF16, KIND_F16, KIND_F32, KIND_INT8
from ..ops.cpu.product import IN_BF16, IN_BLOCKS, IN_F32, IN_INT8, PRODUCT_SIZE, whole_kinds
from ..types import Precision
from . import packed
from .block import Block, Product
from .formats import Format
from .packed import Tensors

#: Weights without blocks: kind and what activations are packed to, by precision or format
_WHOLE = {
    "float32": (KIND_F32, IN_F32), "bfloat16": (KIND_BF16, IN_BF16), "int8": (KIND_INT8, IN_INT8),
    "F32": (KIND_F32, IN_F32), "BF16": (KIND_BF16, IN_BF16), "F16": (KIND_F16, IN_F32),
}  # fmt: skip


class Records:
    """`tensors` and `formats` as in packed.Weights. They may change; the records of what has changed are then made
    anew. Addresses are valid as long as the tensors and this are held."""

    def __init__(self, tensors: Tensors, formats: Mapping[str, Format], precision: Precision) -> None:
        self._tensors, self._formats, self._precision = tensors, formats, precision
        self._products: dict[str, NDArray[np.int64]] = {}
        self.inputs = 0  # bits of all that activations are packed to (P_INPUTS)

    def fill(self, row: NDArray[np.int64], prefix: str, block: Block) -> None:
        """Addresses of a layer's parts; what is called `norm_1` is the entry L_NORM_1 of the step's table."""
        addresses = {product.name: self.product(prefix, product) for product in block.products}
        addresses |= {norm.name: self._tensors[prefix + norm.name].ctypes.data for norm in block.norms}
        for name, address in addresses.items():
            row[getattr(step, f"L_{name.upper()}")] = address

    def product(self, prefix: str, product: Product) -> int:
        """Address of a product's record: one segment where its parts are packed as one, else one for each."""
        record = np.zeros(PRODUCT_SIZE, dtype=np.int64)
        bias = self._tensors[f"{prefix}{product.name}.bias"].ctypes.data if product.bias else 0
        for part in product.parts if self._precision in packed.IN_BLOCKS else (product,):
            at = 2 + SEGMENT_SIZE * int(record[0])
            record[at : at + SEGMENT_SIZE] = segment = self.segment(prefix + part.name, bias)
            record[0] += 1
            record[1] |= 1 << segment[1]
            bias += 64 * len(self._tensors[f"{prefix}{part.name}.w"]) if bias else 0
        self.inputs |= int(record[1])
        self._products[prefix + product.name] = record
        return record.ctypes.data

    def segment(self, name: str, bias: int = 0) -> NDArray[np.int64]:
        """The record of one matrix. `bias`: address of that of its first output, 0: none."""
        w, scale, form = self._tensors[f"{name}.w"], self._tensors.get(f"{name}.scale"), self._formats.get(name)
        key = self._precision if form is None else form.name
        kind, inputs = _WHOLE.get(key, (0, IN_BLOCKS))
        kernel = address_of(KERNELS.get(key, whole_kinds))
        steps = w[0].nbytes // 1024
        if form is not None and form.name in KERNELS:
            steps = w.shape[1] * form.unit_depth // 64
        where = 0 if scale is None else scale.ctypes.data
        return np.array([kernel, inputs, kind, w.ctypes.data, where, bias, len(w), steps], dtype=np.int64)
