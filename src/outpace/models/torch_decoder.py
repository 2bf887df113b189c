"""The decoder in plain torch: the reference on CPU, and the one that runs on CUDA.

    x = embed(tokens)
    per layer:  x += o(attention(rope(norm(q)), rope(norm(k)), v))       after a norm, and on gemma before
    another
                x += down(act(gate) * up)                               the same
    logits = head(norm(x[logit_rows]))

Shapes: `T` packed rows, `B` sequences, `D` width, `Hq`/`Hkv` heads, `C` head width, `V` vocabulary; a
group of `G` sequences attends together, padded to its longest `n` rows and `S` places.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.storage import KVStorage
from ..cache.torch_storage import TorchStorage
from ..errors import ParameterError
from ..ops.masks import Visible, dense_mask
from ..ops.reference import DenseLinear, Int8ReferenceLinear, attention, gated, rms_norm
from ..ops.rope import cos_sin, rotate
from ..types import FloatArray, Logits, Precision
from .batch import PAGE_SIZE, ForwardBatch
from .block import Block, Norm, Product, describe
from .checkpoint import Checkpoint
from .config import LayerType, ModelConfig, rope_inv_freq
from .decoder import NO_TAPS, Decoder, DecoderOutput, Taps, checked_ids, checked_layers

_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,  # of everything but the products
}
_PADDED_ROWS = {"cpu": 0}  # sequences with at most so many rows attend in one padded call; elsewhere 64

Linear = DenseLinear | Int8ReferenceLinear


@dataclass(slots=True, eq=False)
class _Layer:
    """By the names of models.block. Norm weights are float32, with gemma's one added."""

    kind: LayerType
    norms: dict[str, torch.Tensor]
    attention: dict[str, Linear]
    mlp: dict[str, Linear]


@dataclass(slots=True, eq=False)
class _Group:
    """Sequences that attend in one call."""

    rows: torch.Tensor  # i64[G * n] packed row of each padded row
    targets: torch.Tensor  # i64[T'] packed rows of the group
    sources: torch.Tensor  # i64[T'] and where their results lie among the G * n
    slots: torch.Tensor  # i64[G * S]
    masks: dict[LayerType, torch.Tensor]  # bool[G, n, S]


class TorchDecoder(Decoder):
    """Runs llama, mistral, qwen2, qwen3 and gemma3 in float32 or bfloat16, on CPU or CUDA, and on CPU in
    int8 as the slow exact definition of that arithmetic (embeddings are looked up unquantised; the head is
    quantised).

    Not row-invariant: torch picks its kernels by the number of rows.
    """

    row_invariant = False
    device: torch.device

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        device: torch.device,
        embedding: torch.Tensor,
        layers: list[_Layer],
        final_norm: torch.Tensor,
        head: Linear,
    ) -> None:
        self.config, self.precision, self.device = config, precision, device
        self._dtype = _DTYPES[precision]
        self._embedding, self._layers, self._final_norm, self._head = embedding, layers, final_norm, head
        self._scale = torch.tensor(config.embedding_scale, dtype=self._dtype, device=device)
        self.padded_rows = _PADDED_ROWS.get(device.type, 64)
        self._rope = {kind: _RopeTable(config, kind, device) for kind in set(config.layer_types)}
        self._head_ids: torch.Tensor | None = None  # of a trimmed head; None: all
        self.skip((), ())

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, precision: Precision = "float32", device: torch.device | str = "cpu"
    ) -> TorchDecoder:
        """Load every tensor. Raises CorruptModel for one that cannot be read, ParameterError for a precision that this
        decoder does not run on the device.
        """
        device = torch.device(device)
        allowed = list(_DTYPES) if device.type == "cpu" else ["float32", "bfloat16"]
        if precision not in allowed:
            raise ParameterError(
                f"precision={precision!r} does not run in the torch decoder on {device.type}; "
                f"it must be {', '.join(allowed[:-1])} or {allowed[-1]}"
            )
        return _Loader(checkpoint, precision, device).decoder(cls)

    def new_storage(self, num_pages: int) -> TorchStorage:
        c = self.config
        return TorchStorage(c.num_layers, num_pages, c.num_kv_heads, c.head_dim, self._dtype, self.device)

    def view(self) -> TorchDecoder:
        """The same weights and KV layout; `skip` and `trim` on it leave this one alone."""
        return copy.copy(self)

    def skip(self, attention: Collection[int], mlp: Collection[int]) -> None:
        """From the next forward on leave out the attention and the MLP of these layers, and no others. A skipped
        attention neither writes nor reads its layer's keys and values.
        """
        self.skipped = checked_layers(self.config, attention), checked_layers(self.config, mlp)
        kept = [m for i, x in enumerate(self._layers) if i not in self.skipped[0] for m in x.attention.values()]
        kept += [m for i, x in enumerate(self._layers) if i not in self.skipped[1] for m in x.mlp.values()]
        self.weight_bytes = self._head.nbytes + sum(m.nbytes for m in kept)

    def trim(self, ids: NDArray[np.int64]) -> None:
        """From the next forward on compute the logits of `ids` only; the others are -inf."""
        if self._head_ids is not None:
            raise ParameterError("the head is trimmed already; trim the whole model instead")
        self._head_ids = self._to_device(checked_ids(self.config, ids))
        self._head = self._head.take(self._head_ids)
        self.skip(*self.skipped)

    @torch.inference_mode()
    def final_norm(self, hidden: Logits) -> FloatArray:
        assert isinstance(hidden, torch.Tensor)
        normed: FloatArray = self._norm(hidden.to(self._dtype), self._final_norm).float().cpu().numpy()
        return normed

    def embedding(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._embedding[self._to_device(tokens)].float().cpu().numpy()

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, storage: KVStorage, taps: Taps = NO_TAPS) -> DecoderOutput:
        assert isinstance(storage, TorchStorage), "a TorchDecoder runs over a storage of its own new_storage"
        assert batch.compact is None, "copies of pages in few bits are read by the CPU decoder alone"
        rotary = {kind: table.at(batch.positions) for kind, table in self._rope.items()}
        written = self._to_device(_slots(batch))
        groups = self._groups(batch)
        x = self._embedded(batch) * self._scale
        hidden: dict[int, Logits] = {}
        queries: dict[int, Logits] = dict.fromkeys(taps.queries, x)
        for i, layer in enumerate(self._layers):
            if i not in self.skipped[0]:
                y = self._attend(i, layer, x, rotary[layer.kind], written, groups, storage, queries)
                x = x + self._norm(y, layer.norms.get("post_1"))
            if i not in self.skipped[1]:
                y = layer.mlp["gate_up"](self._norm(x, layer.norms["norm_2"]))
                y = layer.mlp["down"](gated(y, self.config.activation))
                x = x + self._norm(y, layer.norms.get("post_2"))
            if i in taps.hidden:
                hidden[i] = x.float()
        rows = x[self._to_device(batch.logit_rows)]
        logits = self._head(self._norm(rows, self._final_norm)).float()
        if self._head_ids is not None:
            whole = torch.full((len(rows), self.config.vocab_size), -torch.inf, device=self.device)
            whole[:, self._head_ids] = logits
            logits = whole
        return DecoderOutput(logits, hidden, queries)

    def _embedded(self, batch: ForwardBatch) -> torch.Tensor:
        if batch.embeddings is None:
            return self._embedding[self._to_device(batch.tokens)]
        assert batch.embeddings.shape == (len(batch.tokens), self.config.hidden_size), "embeddings are f32[T, D]"
        return self._to_device(np.ascontiguousarray(batch.embeddings, dtype=np.float32)).to(self._dtype)

    def _attend(
        self,
        index: int,
        layer: _Layer,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        written: torch.Tensor,
        groups: list[_Group],
        storage: TorchStorage,
        queries: dict[int, Logits],
    ) -> torch.Tensor:
        """One layer's attention, its keys and values written to their slots, its queries kept where they are wanted.
        [T, D] -> [T, D]"""
        c = self.config
        qkv = layer.attention["qkv"](self._norm(x, layer.norms["norm_1"]))
        qkv = qkv.view(len(x), c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        q = rotate(self._norm(q, layer.norms.get("q_norm")).float(), *rotary).to(v.dtype)
        if index in queries:
            queries[index] = q.float() * c.attention_scale
        keys, values = storage.k_slots[index], storage.v_slots[index]
        keys[written] = rotate(self._norm(k, layer.norms.get("k_norm")).float(), *rotary).to(v.dtype)
        values[written] = v
        out = torch.empty_like(q)
        compute = torch.float32 if self.device.type == "cpu" else v.dtype
        for group in groups:
            mask = group.masks[layer.kind]
            g, n, s = mask.shape
            result = attention(
                q[group.rows].view(g, n, c.num_heads, c.head_dim).to(compute),
                keys[group.slots].view(g, s, c.num_kv_heads, c.head_dim).to(compute),
                values[group.slots].view(g, s, c.num_kv_heads, c.head_dim).to(compute),
                mask,
                c.attention_scale,
            )
            out[group.targets] = result.reshape(g * n, c.num_heads, c.head_dim)[group.sources].to(out.dtype)
        return layer.attention["out"](out.view(len(x), c.num_heads * c.head_dim))

    def _groups(self, batch: ForwardBatch) -> list[_Group]:
        """On CPU each sequence by itself; on CUDA the short ones together, because launches cost."""
        counts = np.diff(batch.row_start)
        short = [b for b, n in enumerate(counts) if 0 < n <= self.padded_rows]
        alone = [[b] for b, n in enumerate(counts) if n > 0 and b not in set(short)]
        return [self._group(batch, members) for members in ([short] if short else []) + alone]

    def _group(self, batch: ForwardBatch, members: list[int]) -> _Group:
        counts = np.diff(batch.row_start)[members]
        places = [_places(batch, b) for b in members]
        n, s = int(counts.max()), max(places)
        lane = np.arange(n)
        valid = lane < counts[:, None]  # [G, n]
        rows = np.where(valid, batch.row_start[members][:, None] + lane, batch.row_start[members][:, None])
        place = np.arange(s)
        tables = batch.page_tables[members]
        page = tables[:, np.minimum(place // PAGE_SIZE, tables.shape[1] - 1)]
        slots = page.astype(np.int64) * PAGE_SIZE + place % PAGE_SIZE  # past a sequence's end: masked
        masks: dict[LayerType, torch.Tensor] = {}
        for kind in self._rope:
            window = self.config.sliding_window if kind == "sliding" else None
            mask = np.zeros((len(members), n, s), dtype=np.bool_)
            mask[:, :, 0] = ~valid  # rows that pad see something, so that none divides by zero
            for g, b in enumerate(members):
                mask[g, : counts[g], : places[g]] = _mask(batch, b, places[g], window)
            masks[kind] = self._to_device(mask)
        flat = rows.ravel()
        return _Group(
            self._to_device(flat.astype(np.int64)),
            self._to_device(flat[valid.ravel()].astype(np.int64)),
            self._to_device(np.flatnonzero(valid)),
            self._to_device(slots.ravel()),
            masks,
        )

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return x if weight is None else rms_norm(x, weight, self.config.rms_norm_eps)

    def _to_device(self, x: NDArray) -> torch.Tensor:
        return torch.from_numpy(x).to(self.device)


def _slots(batch: ForwardBatch) -> NDArray[np.int64]:
    """Where each row writes. [T]"""
    b = np.repeat(np.arange(len(batch.committed)), np.diff(batch.row_start))
    place = batch.committed[b] + batch.offsets
    return batch.page_tables[b, place // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + place % PAGE_SIZE


def _seen(batch: ForwardBatch, b: int) -> Visible | None:
    if batch.causal[b]:
        return None
    return batch.visible_start[batch.row_start[b] : batch.row_start[b + 1] + 1], batch.visible


def _places(batch: ForwardBatch, b: int) -> int:
    """Committed tokens and as much of the region as the rows look at."""
    seen = _seen(batch, b)
    if seen is None:
        last = batch.offsets[batch.row_start[b] : batch.row_start[b + 1]].max()
    else:
        last = seen[1][seen[0][0] : seen[0][-1]].max()
    return int(batch.committed[b]) + int(last) + 1


def _mask(batch: ForwardBatch, b: int, places: int, window: int | None) -> NDArray[np.bool_]:
    rows = slice(batch.row_start[b], batch.row_start[b + 1])
    committed = int(batch.committed[b])
    return dense_mask(batch.positions[rows], batch.offsets[rows], committed, places, window, _seen(batch, b))


class _RopeTable:
    """Cosines and sines of one layer type, for as many positions as were needed so far."""

    def __init__(self, config: ModelConfig, kind: LayerType, device: torch.device) -> None:
        self._inv_freq, self._device = rope_inv_freq(config, kind), device
        self._cos, self._sin = cos_sin(self._inv_freq, np.arange(512), device)

    def at(self, positions: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """f32[T, C/2] each."""
        top = int(positions.max(initial=0))
        if top >= len(self._cos):
            self._cos, self._sin = cos_sin(self._inv_freq, np.arange(2 * top), self._device)
        index = torch.from_numpy(positions).to(self._device)
        return self._cos[index], self._sin[index]


class _Loader:
    """Turns a checkpoint into the decoder's tensors."""

    def __init__(self, checkpoint: Checkpoint, precision: Precision, device: torch.device) -> None:
        self._checkpoint, self._precision, self._device = checkpoint, precision, device

    def decoder(self, cls: Callable[..., TorchDecoder]) -> TorchDecoder:
        config = self._checkpoint.config
        model = describe(config)
        embedding = self._tensor(f"{model.embedding.source}.weight", _DTYPES[self._precision])
        layers = [self._layer(*parts) for parts in zip(config.layer_types, model.blocks, strict=True)]
        # A tied head is the same tensor, except where int8 keeps it in whole numbers.
        tied = config.tie_embeddings and self._precision != "int8"
        head = DenseLinear(embedding) if tied else self._product(model.head)
        return cls(config, self._precision, self._device, embedding, layers, self._norm(model.norm), head)

    def _layer(self, kind: LayerType, block: Block) -> _Layer:
        norms = {norm.name: self._norm(norm) for norm in block.norms}
        attention, mlp = (
            {product.name: self._product(product) for product in sublayer.products}
            for sublayer in (block.attention, block.mlp)
        )
        return _Layer(kind, norms, attention, mlp)

    def _product(self, product: Product) -> Linear:
        """Several projections of the same rows as one matrix."""
        dtype = _DTYPES[self._precision]
        weight = torch.cat([self._tensor(f"{part.source}.weight", dtype) for part in product.parts])
        bias = [
            self._tensor(f"{part.source}.bias", dtype) if part.bias else weight.new_zeros(part.outputs.size)
            for part in product.parts
        ]
        kind = Int8ReferenceLinear if self._precision == "int8" else DenseLinear
        return kind(weight, torch.cat(bias) if product.bias else None)

    def _norm(self, norm: Norm) -> torch.Tensor:
        weight = self._tensor(f"{norm.source}.weight", torch.float32)
        return weight + 1 if self._checkpoint.config.norm_plus_one else weight

    def _tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        value = np.ascontiguousarray(self._checkpoint.tensor(name))
        return torch.from_numpy(value).to(self._device, dtype, copy=True)
