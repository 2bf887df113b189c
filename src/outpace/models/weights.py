"""Reads a checkpoint's tensors against its config: shapes checked, nothing missing, nothing left over."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptModel, UnsupportedModel
from .checkpoint import Checkpoint


class WeightReader:
    """Hands out tensors by name; `finish` refuses tensors that were not used."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._left = set(checkpoint.names())

    def tensor(self, name: str, *shape: int) -> NDArray[np.float32]:
        """Raises CorruptModel when the tensor is missing or has another shape."""
        if name not in self._left:
            raise CorruptModel(f"the checkpoint has no tensor {name!r}, which its configuration calls for")
        self._left.discard(name)
        value = self._checkpoint.tensor(name)
        if value.shape != shape:
            raise CorruptModel(
                f"tensor {name!r} has shape {list(value.shape)}; the configuration calls for {list(shape)}"
            )
        return value

    def finish(self) -> None:
        """Raises UnsupportedModel naming tensors that no layer uses: ignoring them would alter the output."""
        tied = {"lm_head.weight"} if self._checkpoint.config.tie_embeddings else set()
        left = sorted(n for n in self._left - tied if not n.endswith("rotary_emb.inv_freq"))
        if left:
            more = f" and {len(left) - 4} more" if len(left) > 4 else ""
            raise UnsupportedModel(
                f"the checkpoint has tensors that a {self._checkpoint.config.architecture} model "
                f"does not use: {', '.join(left[:4])}{more}; it is a variant that is not supported"
            )
