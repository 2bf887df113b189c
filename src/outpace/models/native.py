"""The fast CPU decoder: packed weights, one compiled step on all threads, each row's result independent of the others.

Shapes: `B` sequences, `T` packed rows, `R` rows of logits, `D` width, `Hq`/`Hkv` heads, `C` head width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import gt
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ..cache.native_storage import NativeStorage
from ..cache.storage import KVStorage
from ..errors import ParameterError, UnsupportedModel
from ..ops.cpu import isa, step
from ..ops.cpu.address import address
from ..ops.cpu.attention import MAX_QUERIES
from ..ops.cpu.attention_int4 import SCRATCH_FIXED
from ..ops.cpu.blocks import X_BLOCK
from ..ops.cpu.compiled import address_of
from ..ops.cpu.linear import GATED_GELU, GATED_SILU
from ..ops.cpu.product import IN_BF16, IN_BLOCKS, IN_F32, IN_INT8, INPUTS, PRODUCT_SCRATCH
from ..ops.cpu.ready import made_ready
from ..ops.cpu.team import team
from ..types import FloatArray, Logits, Precision
from . import packed
from .batch import PAGE_SIZE, ForwardBatch, Ragged
from .block import describe
from .checkpoint import Checkpoint
from .config import ModelConfig, rope_inv_freq
from .decoder import NO_TAPS, Cpu, Decoder, DecoderOutput, Taps, checked_ids, checked_layers
from .formats import Format, dequantise, take_outputs
from .native_inputs import Inputs, Rope
from .packed import Tensors, padded
from .packing import pack, weights_of
from .records import Records


def default_threads() -> int:
    """Cores that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NativeDecoder(Decoder):
    """Runs on any CPU with numba; fastest with AMX. Precisions float32, bfloat16, int8, int4, and file: each matrix in
    the format that its file has it in.

    Every row's result is independent of the others' (`row_invariant`), in all precisions: chunked prefill, batches and
    trees give the bits that one token at a time gives.
    """

    row_invariant = True

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors,
        precision: Precision,
        threads: int | None = None,
        level: int | None = None,
        formats: Mapping[str, Format] | None = None,
    ) -> None:
        """`formats`: of the products' parts ("0.q", "head", "embedding"), where they have formats of a file."""
        self.formats = dict(formats or {})
        self.config, self.precision, self.device = config, precision, Cpu()
        self.threads = threads or default_threads()
        self.level = isa.best_level() if level is None else level
        self._team = team(self.threads)
        self._keep: dict[str, NDArray[Any]] = dict(tensors)
        self._head_ids: NDArray[np.int64] | None = None  # of a trimmed head; None: all
        self.skipped: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
        self._buffers: dict[str, NDArray[Any]] = {}
        self._rows = self._logit_rows = self._score_places = 0
        self._control = np.zeros(step.CONTROL_SIZE, dtype=np.int64)
        self._arrays = Inputs(self._control)
        self._most: tuple[int, ...] = (0, 0, 0)  # rows, rows of logits and places that the buffers hold
        self._saves_hidden = self._saves_queries = False
        self._ragged = np.zeros((0, step.RAGGED_SIZE), dtype=np.int64)
        self._rope = Rope(rope_inv_freq(config, "full"))
        self._rope_local = Rope(rope_inv_freq(config, "sliding")) if config.rope_local_theta else None
        self._fill_constants()
        self.weight_bytes = self._streamed_bytes()

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, precision: Precision = "int8", threads: int | None = None, level: int | None = None
    ) -> NativeDecoder:
        """Pack and run, keeping nothing on disk."""
        cls.require(precision)
        weights = pack(checkpoint, precision, threads or default_threads())
        return cls(checkpoint.config, weights.tensors, precision, threads, level, weights.formats)

    @classmethod
    def load(
        cls,
        model: Any,
        precision: Precision,
        threads: int | None = None,
        progress: packed.Progress | None = None,
        keep: bool = True,
        meanwhile: Callable[[], object] | None = None,
    ) -> NativeDecoder:
        """From an opened model (models.prepared.OpenModel): its own blocks, a file of packed weights, or packed now.
        With `keep` such a file is then written in the background; one that is damaged is made anew, with a line on
        stderr. `meanwhile` is called on this thread while others pack."""
        cls.require(precision)
        with made_ready():
            weights = weights_of(model, precision, threads or default_threads(), progress, keep, meanwhile)
        return cls(model.config, weights.tensors, precision, threads, formats=weights.formats)

    @staticmethod
    def require(precision: Precision) -> None:
        known = get_args(Precision)
        if precision not in known:
            raise UnsupportedModel(f"precision {precision!r} is not for the CPU decoder; it has {', '.join(known)}")

    def new_storage(self, num_pages: int) -> NativeStorage:
        c = self.config
        return NativeStorage(c.num_layers, num_pages, c.num_kv_heads, packed.head_width(c), self.precision != "float32")

    def view(self, threads: int | None = None) -> NativeDecoder:
        """The same weights and KV layout with buffers of its own; `skip` and `trim` on it leave this one alone. It runs
        on as many threads as this one, or on `threads`; the two may run at the same time."""
        twin = NativeDecoder(self.config, self._keep, self.precision, threads or self.threads, self.level, self.formats)
        twin._rope, twin._rope_local = self._rope, self._rope_local
        twin._set_head(self._head_ids)
        twin.skip(*self.skipped)
        return twin

    def skip(self, attention: Collection[int], mlp: Collection[int]) -> None:
        """From the next forward on leave out the attention and the MLP of these layers, and no others. A skipped
        attention neither writes nor reads its layer's keys and values.
        """
        self.skipped = checked_layers(self.config, attention), checked_layers(self.config, mlp)
        for entry, layers in zip((step.L_SKIP_ATTENTION, step.L_SKIP_MLP), self.skipped, strict=True):
            self._layers[:, entry] = 0
            self._layers[list(layers), entry] = 1
        self.weight_bytes = self._streamed_bytes()

    def trim(self, ids: NDArray[np.int64]) -> None:
        """From the next forward on compute the logits of `ids` only; the others are -inf. Cuts a head once cut further,
        never grows it."""
        kept = checked_ids(self.config, ids)
        rows = kept
        if self._head_ids is not None:
            rows = np.searchsorted(self._head_ids, kept)
            known = self._head_ids[np.minimum(rows, len(self._head_ids) - 1)] == kept
            if not known.all():
                raise ParameterError("a trimmed head can only be trimmed further; trim the whole model instead")
        if not {"embedding", "embedding.w"} & self._keep.keys():  # rows of it were read from the whole head
            self._keep["embedding.w"] = self._keep["head.w"]
            self.formats["embedding"] = self.formats["head"]
        if "head" in self.formats:
            self._keep["head.w"] = take_outputs(self._keep["head.w"], self.formats["head"], rows)
        else:
            w, scale = packed.take_outputs(self._keep["head.w"], self._keep["head.scale"], rows)
            self._keep |= {"head.w": w, "head.scale": scale}
        self._set_head(kept)
        self.weight_bytes = self._streamed_bytes()

    def final_norm(self, hidden: Logits) -> FloatArray:
        assert isinstance(hidden, np.ndarray)
        squares = np.square(hidden, dtype=np.float64).mean(axis=-1, keepdims=True)
        scale = 1 / np.sqrt(squares + self.config.rms_norm_eps)
        weight = self._keep["norm"][: self.config.hidden_size]
        return ((hidden * scale).astype(np.float32) * weight).astype(np.float32)

    def embedding(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        if "embedding" not in self._keep:
            name = "embedding" if "embedding.w" in self._keep else "head"
            form, wanted = self.formats[name], np.unique(tokens)
            panels = take_outputs(self._keep[f"{name}.w"], form, wanted)
            rows = dequantise(panels, form, len(wanted), self.config.hidden_size)
            return rows[np.searchsorted(wanted, tokens)]
        rows = self._keep["embedding"][tokens, : self.config.hidden_size]
        return rows if rows.dtype == np.float32 else (rows.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def forward(self, batch: ForwardBatch, storage: KVStorage, taps: Taps = NO_TAPS) -> DecoderOutput:
        assert isinstance(storage, NativeStorage)
        rows, wanted = len(batch.tokens), len(batch.logit_rows)
        pages = max(
            [batch.page_tables.shape[1], *(one.table.shape[2] for one in batch.ragged or () if one is not None)]
        )
        size = (rows, wanted, pages * PAGE_SIZE)
        if any(map(gt, size, self._most)) or not self._logit_rows:
            self._most = tuple(map(max, size, self._most))
            self._reserve(*self._most)
        c = self._control
        table = self._point_at_batch(batch)
        self._point_at_rope(batch.positions)
        c[step.C_KEYS], c[step.C_VALUES] = storage.addresses
        c[step.C_KV_LAYER_BYTES], c[step.C_KV_PAGE_BYTES], c[step.C_KV_HEAD_BYTES] = storage.strides
        hidden, queries = self._hidden(taps.hidden, rows), self._queries(taps.queries, rows)
        self._items[:] = 0
        self._team.run(c)
        del table  # was to live until the step is done
        logits = self._buffers["logits"][:wanted, : self._outputs]
        if self._head_ids is not None:
            whole = self._buffers["all_logits"][:wanted]
            whole[:, self._head_ids] = logits
            logits = whole
        return DecoderOutput(logits, hidden, queries)

    def _queries(self, layers: Sequence[int], rows: int) -> dict[int, Logits]:
        """Where the step saves the queries of the wanted layers, f32[T, Hq, C] each."""
        if self._saves_queries:
            self._layers[:, step.L_SAVE_QUERIES] = -1
        self._saves_queries = bool(layers)
        if not layers:
            return {}
        if skipped := self.skipped[0] & set(layers):
            raise ParameterError(f"layer {min(skipped)} is left out here and has no queries")
        out = np.empty((len(layers), rows, self.config.num_heads, packed.head_width(self.config)), dtype=np.float32)
        self._control[step.C_QUERIES_OUT] = out.ctypes.data
        self._layers[list(layers), step.L_SAVE_QUERIES] = range(len(layers))
        return dict(zip(layers, out, strict=True))

    # What follows keeps the control block in step with the buffers.

    def _fill_constants(self) -> None:
        cfg, c, keep = self.config, self._control, self._keep
        head = packed.head_width(cfg)
        width, hidden = padded(cfg.hidden_size), padded(cfg.intermediate_size)
        self._model, self._records = describe(cfg), Records(keep, self.formats, self.precision)
        self._deepest = padded(max(packed.width_of(p.inputs, head) for p in self._model.projections()), 256)
        self._inputs = np.zeros((INPUTS, 2), dtype=np.int64)
        self._floats = np.array([cfg.rms_norm_eps, cfg.embedding_scale, cfg.attention_scale], dtype=np.float32)
        self._tiles, self._page_tiles = isa.tile_config(), isa.tile_config(page_tiles=True)
        self._items = np.zeros(cfg.num_layers, dtype=np.int64)  # of attention, taken so far in each layer
        self._layers = np.zeros((cfg.num_layers, step.LAYER_SIZE), dtype=np.int64)
        sliding = np.array([kind == "sliding" for kind in cfg.layer_types])
        self._layers[:, step.L_WINDOW] = (cfg.sliding_window or 0) * sliding
        self._layers[:, step.L_LOCAL_ROPE] = sliding & (self._rope_local is not None)
        self._layers[:, step.L_SAVE_HIDDEN] = self._layers[:, step.L_SAVE_QUERIES] = -1
        for i, block in enumerate(self._model.blocks):
            self._records.fill(self._layers[i], f"{i}.", block)
        values = {
            step.C_ATTEND: address_of(step.attention), step.C_LEVEL: self.level,
            step.C_INPUTS: self._inputs.ctypes.data, step.C_TILE_CONFIG: self._tiles.ctypes.data,
            step.C_PAGE_TILE_CONFIG: self._page_tiles.ctypes.data,
            step.C_ITEMS: self._items.ctypes.data,
            step.C_THREADS: self.threads, step.C_LAYERS: cfg.num_layers, step.C_LAYER_TABLE: self._layers.ctypes.data,
            step.C_FLOATS: self._floats.ctypes.data, step.C_WIDTH: width, step.C_TRUE_WIDTH: cfg.hidden_size,
            step.C_HIDDEN: hidden, step.C_HEADS: cfg.num_heads, step.C_KV_HEADS: cfg.num_kv_heads, step.C_HEAD: head,
            step.C_HEAD_TRUE: cfg.head_dim, step.C_POST_NORMS: int(cfg.post_norms),
            step.C_ACTIVATION: GATED_GELU if cfg.activation == "gelu_tanh" else GATED_SILU,
            step.C_FINAL_NORM: keep["norm"].ctypes.data, step.C_KV_BF16: int(self.precision != "float32"),
        }  # fmt: skip
        for index, value in values.items():
            c[index] = value
        self._embedding, self._embedding_kind = self._embedding_table()
        self._embedding_address = self._embedding.ctypes.data
        self._set_head(None)

    def _embedding_table(self) -> tuple[NDArray[Any], int]:
        """What tokens are looked up in, and its kind (step.C_EMBEDDING)."""
        table = self._keep.get("embedding")
        if table is not None:
            return table, step.ROWS_F32 if table.dtype == np.float32 else step.ROWS_BF16
        return self._records.segment("embedding" if "embedding.w" in self._keep else "head"), step.PANELS

    def _set_head(self, ids: NDArray[np.int64] | None) -> None:
        """Point at the output head as it is in `_keep`, which gives the logits of `ids`."""
        c = self._control
        self._head_ids = ids
        self._outputs = self.config.vocab_size if ids is None else len(ids)
        c[step.C_HEAD_PRODUCT] = self._records.product("", self._model.head)
        c[step.C_LOGITS_STRIDE] = 4 * padded(self._outputs)
        self._logit_rows = 0  # their buffers are made at the next forward

    def _streamed_bytes(self) -> int:
        """Weights that a step of one row reads."""
        blocks = self._model.blocks
        skipped = [(i, blocks[i].attention) for i in self.skipped[0]] + [(i, blocks[i].mlp) for i in self.skipped[1]]
        left_out = {"embedding"} | {f"{i}.{name}" for i, sublayer in skipped for name in sublayer.names()}
        kept = [array for name, array in self._keep.items() if not {name, name.rpartition(".")[0]} & left_out]
        return sum(array.nbytes for array in kept)

    def _reserve(self, rows: int, wanted: int, places: int) -> None:
        """Grow the buffers to what this step needs; they never shrink."""
        cfg, c, buffers = self.config, self._control, self._buffers
        head = packed.head_width(cfg)
        if rows > self._rows or places > self._score_places:
            self._rows = rows = max(padded(rows, 32), self._rows)
            self._score_places = places = max(padded(places, 256), self._score_places)
            attention, columns = cfg.num_heads * head, (cfg.num_heads + 2 * cfg.num_kv_heads) * head
            width, hidden = padded(cfg.hidden_size), padded(cfg.intermediate_size)
            for name, entry, columns_ in (
                ("x", step.C_X, width), ("qkv", step.C_QKV, columns), ("attention", step.C_ATTENTION, attention),
                ("gated", step.C_GATED, hidden), ("sublayer", step.C_SUBLAYER, width if cfg.post_norms else 0),
            ):  # fmt: skip
                buffers[name] = np.zeros((rows, columns_), dtype=np.float32)
                c[entry] = buffers[name].ctypes.data
            group = cfg.num_heads // cfg.num_kv_heads
            queries = max(MAX_QUERIES, padded(group, 8)) + 16
            c[step.C_SCORE_STRIDE] = 4 * (places + padded(rows) + 96)
            space = max(
                PRODUCT_SCRATCH,
                8 * max(width, attention, hidden) + 512,
                8 * queries * head
                + 128 * head
                + 256
                + queries * int(c[step.C_SCORE_STRIDE])
                + queries * (head + 8)
                + SCRATCH_FIXED,
            )
            c[step.C_THREAD_STRIDE] = padded(space, 4096)
            buffers["space"] = np.zeros(self.threads * int(c[step.C_THREAD_STRIDE]) + 64, dtype=np.uint8)
            c[step.C_THREAD_SPACE] = padded(buffers["space"].ctypes.data, 64)
        if max(rows, wanted) > len(buffers.get("input_scales", ())):
            n = padded(max(rows, wanted), 32)
            buffers["input_scales"] = np.zeros((n, 2), dtype=np.float32)  # and the sums, int32
            c[step.C_INPUT_SCALES] = buffers["input_scales"].ctypes.data
            for kind, row_bytes in ((IN_F32, 4), (IN_BF16, 2), (IN_INT8, 1)):
                if self._records.inputs >> kind & 1:
                    self._set_input(kind, np.zeros((n, row_bytes * self._deepest), dtype=np.uint8))
            if self._records.inputs >> IN_BLOCKS & 1:
                self._set_input(IN_BLOCKS, np.zeros((self._deepest // 256, n * X_BLOCK), dtype=np.uint8))
        if wanted > self._logit_rows or not self._logit_rows:  # a first chunk may want none
            self._logit_rows = max(wanted, 32)
            buffers["logits"] = np.empty((self._logit_rows, padded(self._outputs)), dtype=np.float32)
            c[step.C_LOGITS] = buffers["logits"].ctypes.data
            if self._head_ids is not None:
                buffers["all_logits"] = np.full((self._logit_rows, cfg.vocab_size), -np.inf, dtype=np.float32)

    def _set_input(self, kind: int, buffer: NDArray[np.uint8]) -> None:
        self._buffers[f"input {kind}"] = buffer
        self._inputs[kind] = buffer.ctypes.data, buffer.strides[0]

    def _point_at_batch(self, batch: ForwardBatch) -> NDArray[np.float32] | None:
        """Returns the table of the step's own embeddings, if it has some, which must live until the step is done."""
        c, tokens, put = self._control, batch.tokens, self._arrays.put
        most = int(tokens.view(np.uint64).max(initial=0))  # a negative one is larger than all
        assert most < self.config.vocab_size, "token out of range"
        c[step.C_ROWS], c[step.C_SEQUENCES] = len(tokens), len(batch.committed)
        c[step.C_LOGIT_ROWS] = len(batch.logit_rows)
        c[step.C_PAGES_STRIDE] = 4 * batch.page_tables.shape[1]
        table = None
        c[step.C_EMBEDDING], c[step.C_EMBEDDING_KIND] = self._embedding_address, self._embedding_kind
        if batch.embeddings is not None:  # a table of this step's own, one entry for each row
            assert batch.embeddings.shape == (len(tokens), self.config.hidden_size), "embeddings are f32[T, D]"
            table = np.zeros((len(tokens), padded(self.config.hidden_size)), dtype=np.float32)
            table[:, : self.config.hidden_size] = batch.embeddings
            tokens = np.arange(len(tokens))
            c[step.C_EMBEDDING], c[step.C_EMBEDDING_KIND] = table.ctypes.data, step.ROWS_F32
        put(step.C_TOKENS, tokens, np.int64)
        put(step.C_POSITIONS, batch.positions, np.int32)
        put(step.C_ROW_START, batch.row_start, np.int32)
        put(step.C_OFFSETS, batch.offsets, np.int32)
        put(step.C_CAUSAL, batch.causal, np.int32)
        put(step.C_VISIBLE_START, batch.visible_start, np.int32)
        put(step.C_VISIBLE, batch.visible, np.int32)
        put(step.C_COMMITTED, batch.committed, np.int32)
        put(step.C_PAGES, batch.page_tables, np.int32)
        put(step.C_LOGIT_INDEX, batch.logit_rows, np.int64)
        c[step.C_RAGGED] = 0
        if batch.ragged is not None:
            self._ragged = np.array([_record(one) for one in batch.ragged], dtype=np.int64)  # as long as the step
            c[step.C_RAGGED] = address(self._ragged)
        c[step.C_COMPACT] = 0
        if batch.compact is not None:
            assert self.precision != "float32", "copies in few bits are made of bf16"
            c[step.C_COMPACT], c[step.C_COMPACT_PAGES] = (
                array.ctypes.data for array in (batch.compact.layout, batch.compact.pages)
            )
        return table

    def _point_at_rope(self, positions: NDArray[np.int64]) -> None:
        top, put_rows = int(positions.max(initial=0)), self._arrays.put_rows
        for rope, entries in (
            (self._rope, (step.C_COS, step.C_SIN)),
            (self._rope_local, (step.C_COS_LOCAL, step.C_SIN_LOCAL)),
        ):
            if rope is not None:
                for entry, values in zip(entries, rope.tables(top), strict=True):
                    put_rows(entry, values, positions)

    def _hidden(self, layers: Sequence[int], rows: int) -> dict[int, Logits]:
        """Where the step saves the residual stream after the wanted layers."""
        if self._saves_hidden:
            self._layers[:, step.L_SAVE_HIDDEN] = -1
        self._saves_hidden = bool(layers)
        if not layers:
            return {}
        width = padded(self.config.hidden_size)
        out = np.empty((len(layers), rows, width), dtype=np.float32)
        self._control[step.C_HIDDEN_OUT] = out.ctypes.data
        self._layers[list(layers), step.L_SAVE_HIDDEN] = range(len(layers))
        return {layer: out[i, :, : self.config.hidden_size] for i, layer in enumerate(layers)}


def _record(one: Ragged | None) -> tuple[int, int, int]:
    """See step.C_RAGGED."""
    return (0, 0, 0) if one is None else (address(one.table), one.table.shape[2], address(one.before))
