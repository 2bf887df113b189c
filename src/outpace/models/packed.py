"""Weights in the layout of the CPU kernels, built from a checkpoint once and kept in one file.

A product's weights lie in panels of sixteen outputs; within a panel the depth runs in rows of 64 bytes (see
ops.cpu.linear). int8 has one symmetric scale per output. Widths are padded to sixteen and depths to a panel's KiB with
zeros. Gate and up projections alternate panel by panel, so that the gated activation happens in the epilogue.

The file is in the safetensors format, with a digest of each tensor (see models.digests). It is read in one sweep into
memory backed by huge pages where the system has them (streaming 1.5 GB of weights through 4 KiB pages costs a tenth of
the bandwidth).
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptModel, ParameterError
from ..ops.cpu.products import GROUP_BYTES
from ..types import Precision
from .checkpoint import Checkpoint
from .config import ModelConfig
from .digests import damaged, digests, forget_checked, is_checked, note_checked

if TYPE_CHECKING:
    import torch

FORMAT = 5  # part of the file's name: a new layout gets a new file
DEPTH_UNIT: dict[Precision, int] = {"float32": 16, "bfloat16": 32, "int8": 64, "int4": 64}
Tensors = dict[str, NDArray[Any]]
Progress = Callable[[int, int], None]


def padded(n: int, unit: int = 16) -> int:
    return -(-n // unit) * unit


def head_width(config: ModelConfig) -> int:
    """Head width in the kernels: half a tile of bf16 pairs must be whole."""
    return padded(config.head_dim, 32)


def _panels(w: torch.Tensor, per_row: int) -> NDArray[Any]:
    """[N, K] -> [N/16, K/per_row, 16, per_row]"""
    n, k = w.shape
    return w.view(n // 16, 16, k // per_row, per_row).transpose(1, 2).contiguous().numpy()


def _pack_int4(w: torch.Tensor) -> NDArray[Any]:
    """f32[N, K] -> bytes [N/16, K/64, 640]: nibbles of 64 depths, then scales and minima (bf16) of its two groups.

    A weight is scale * nibble + minimum in groups of 32, as in Q4_1 and Q4_K. A group of such a file that spans n steps
    comes back exactly when n is tried; of the candidates the one with the least squared error is taken.
    """
    import torch

    n, k = w.shape
    groups = w.view(n, k // 32, 32)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    low = low.to(torch.bfloat16).float()
    best, scale = torch.full_like(low, torch.inf), torch.ones_like(low)
    for steps in range(15, 8, -1):
        candidate = ((high - low) / steps).clamp_min(1e-30).to(torch.bfloat16).float()
        error = (((groups - low) / candidate).round().clamp(0, 15) * candidate + low - groups).square().sum(-1, True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
    q = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8)
    tiles = q.view(n // 16, 16, k // 64, 16, 4).permute(0, 2, 3, 1, 4).reshape(n // 16, k // 64, 2, 512)
    nibbles = (tiles[:, :, 0] | (tiles[:, :, 1] << 4)).numpy()

    def by_group(values: torch.Tensor) -> NDArray[np.uint8]:
        laid = values.view(n // 16, 16, k // 64, 2).permute(0, 2, 3, 1).reshape(n // 16, k // 64, 32)
        return laid.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)

    return np.concatenate((nibbles, by_group(scale), by_group(low)), axis=-1).view(np.int8)


def pack_product(w: torch.Tensor, precision: Precision) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """f32[N, K] -> panels (int8, int4 groups, bf16 bits as i16, or float32) and scales f32[N] (ones but for int8).

    int8 weights are rotated in blocks of 64 as the kernel rotates the activations (rows.pack_row): int8 then
    costs 0.5 % of perplexity where it cost 3 % (SmolLM2), without calibration. The idea is QuaRot's (arXiv 2404.00456).
    """
    import torch

    n, k = w.shape
    w = torch.nn.functional.pad(w, (0, padded(k, DEPTH_UNIT[precision]) - k, 0, padded(n) - n))
    scales = torch.ones(len(w))
    if precision == "int4":
        return _pack_int4(w), scales.numpy()
    if precision == "int8":
        from ..ops.cpu.rotation import BLOCK, rotate_weights

        w = torch.from_numpy(rotate_weights(w.contiguous().numpy(), torch.get_num_threads())) / BLOCK
        scales = w.abs().amax(dim=1) / 127
        w = (w / scales.clamp_min(1e-30)[:, None]).round_().to(torch.int8)
        return _panels(w, 4), scales.numpy()
    if precision == "bfloat16":
        return _panels(w.to(torch.bfloat16).view(torch.int16), 2), scales.numpy()
    return _panels(w, 1), scales.numpy()


def take_outputs(
    w: NDArray[Any], scales: NDArray[np.float32], outputs: NDArray[np.int64], precision: Precision
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """A packed product with some outputs only, in that order: panels and scales as `pack_product` makes them.

    The padding repeats the last output.
    """
    wanted = np.append(outputs, np.repeat(outputs[-1:], padded(len(outputs)) - len(outputs)))
    panel, lane = (part.reshape(-1, 16) for part in np.divmod(wanted, 16))

    def take(parts: NDArray[Any]) -> NDArray[Any]:
        """[N/16, rows, 16, ...] -> [n/16, rows, 16, ...]"""
        rows = np.arange(parts.shape[1])[None, :, None]
        return parts[panel[:, None], rows, lane[:, None]]

    if precision != "int4":
        return np.ascontiguousarray(take(w)), scales[wanted]
    n, steps = w.shape[:2]
    nibbles = take(w[..., :512].reshape(n, steps * 8, 16, 4)).reshape(-1, steps, 512)
    factors = take(w[..., 512:].reshape(n, steps * 4, 16, 2)).reshape(-1, steps, 128)
    return np.concatenate((nibbles, factors), axis=-1), scales[wanted]


def _pad_heads(w: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """[heads * C, ...] -> [heads * width, ...] with zero rows behind each head."""
    import torch

    c = w.shape[0] // heads
    shaped = w.reshape(heads, c, *w.shape[1:])
    out = torch.zeros(heads, width, *w.shape[1:])
    out[:, :c] = shaped
    return out.reshape(heads * width, *w.shape[1:])


def _alternate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up, sixteen of one and sixteen of the other in turn."""
    import torch

    n, k = gate.shape
    rows = padded(n)
    both = torch.zeros(rows // 16, 2, 16, k)
    for i, w in enumerate((gate, up)):
        both[:, i] = torch.nn.functional.pad(w, (0, 0, 0, rows - n)).view(rows // 16, 16, k)
    return both.view(2 * rows, k)


class _Packer:
    def __init__(self, checkpoint: Checkpoint, precision: Precision) -> None:
        self.checkpoint, self.precision, self.config = checkpoint, precision, checkpoint.config
        self.out: Tensors = {}

    def read(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(self.checkpoint.tensor(name), dtype=np.float32))

    def product(self, name: str, w: torch.Tensor) -> None:
        self.out[f"{name}.w"], self.out[f"{name}.scale"] = pack_product(w, self.precision)

    def vector(self, name: str, v: torch.Tensor, width: int = 0) -> None:
        import torch

        self.out[name] = torch.nn.functional.pad(v, (0, max(padded(len(v)), width) - len(v))).contiguous().numpy()

    def norm(self, name: str, source: str, width: int = 0) -> None:
        self.vector(name, self.read(source) + (1.0 if self.config.norm_plus_one else 0.0), width)

    def layer(self, i: int) -> None:
        import torch

        c, head = self.config, head_width(self.config)
        source, name = f"model.layers.{i}.", f"{i}."
        parts = [("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)]

        def qkv(kind: str) -> torch.Tensor:
            read = [(self.read(f"{source}self_attn.{p}_proj.{kind}"), n) for p, n in parts]
            return torch.cat([_pad_heads(w, n, head) for w, n in read])

        self.product(name + "qkv", qkv("weight"))
        if c.qkv_bias:
            self.vector(name + "qkv.bias", qkv("bias"))
        out = _pad_heads(self.read(f"{source}self_attn.o_proj.weight").T.contiguous(), c.num_heads, head)
        self.product(name + "out", out.T.contiguous())
        gate, up = (self.read(f"{source}mlp.{p}_proj.weight") for p in ("gate", "up"))
        self.product(name + "gate_up", _alternate(gate, up))
        self.product(name + "down", self.read(f"{source}mlp.down_proj.weight"))
        self.norm(name + "norm_1", f"{source}input_layernorm.weight")
        if c.post_norms:
            self.norm(name + "post_1", f"{source}post_attention_layernorm.weight")
            self.norm(name + "norm_2", f"{source}pre_feedforward_layernorm.weight")
            self.norm(name + "post_2", f"{source}post_feedforward_layernorm.weight")
        else:
            self.norm(name + "norm_2", f"{source}post_attention_layernorm.weight")
        if c.qk_norm:
            self.norm(name + "q_norm", f"{source}self_attn.q_norm.weight", head)
            self.norm(name + "k_norm", f"{source}self_attn.k_norm.weight", head)

    def ends(self) -> None:
        import torch

        embedding = self.read("model.embed_tokens.weight")
        head = embedding if self.config.tie_embeddings else self.read("lm_head.weight")
        self.product("head", head)
        width = embedding.shape[1]
        embedding = torch.nn.functional.pad(embedding, (0, padded(width) - width))
        exact = self.precision == "float32"
        self.out["embedding"] = (embedding if exact else embedding.to(torch.bfloat16).view(torch.int16)).numpy()
        self.norm("norm", "model.norm.weight")


def pack(checkpoint: Checkpoint, precision: Precision, progress: Progress | None = None) -> Tensors:
    """All of a model's weights in kernel layout. `progress(done, total)` counts layers and the embedding."""
    packer = _Packer(checkpoint, precision)
    total = checkpoint.config.num_layers + 1
    for i in range(checkpoint.config.num_layers):
        packer.layer(i)
        if progress:
            progress(i + 1, total)
    packer.ends()
    if progress:
        progress(total, total)
    return packer.out


def file_name(precision: Precision) -> str:
    return f"weights-{precision}-v{FORMAT}.bin"


def save(tensors: Tensors, path: Path) -> None:
    """Write atomically: a killed process leaves no half file under the final name. Raises ParameterError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, {_DIGESTS: json.dumps(digests(tensors))})
        os.replace(partial, path)
        for old in path.parent.glob(re.sub(r"-v\d+\.", "-v*.", path.name)):  # of earlier layouts
            if old != path:
                old.unlink(missing_ok=True)
                forget_checked(old)
    except (OSError, SafetensorError) as error:
        raise ParameterError(
            f"the packed weights cannot be written to {path.parent}: {error}; make room there, or set OUTPACE_CACHE "
            "to a folder that can be written to"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _huge(size: int) -> mmap.mmap:
    memory = mmap.mmap(
        -1, size, **({"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {})
    )
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


_DTYPES = {"F32": np.float32, "I8": np.int8, "I16": np.int16}
_DIGESTS = "digests"  # where the file's metadata have them


def load(path: Path) -> Tensors:
    """Read a file that `save` wrote. Raises CorruptModel when it is damaged; the tensors' bytes are looked at when
    the file is first used after a start of the machine."""
    tensors, recorded = _read(path)
    if not is_checked(path):
        if wrong := damaged(tensors, recorded):
            forget_checked(path)
            raise CorruptModel(f"{path}: {_named(wrong)} not what was written (wrong digest)")
        note_checked(path)
    return tensors


def _named(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]} is"
    return f"tensors {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} are"


def verify(path: Path) -> None:
    """Check every tensor of a file, whether or not it has been. Raises CorruptModel, naming the tensors."""
    forget_checked(path)
    load(path)


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and their digests as the file has them."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            header_size = int.from_bytes(f.read(8), "little")
            if not 0 < header_size < min(size, 1 << 26):
                raise ValueError("header size out of range")
            header = json.loads(f.read(header_size))
            body = size - 8 - header_size
            memory = memoryview(_huge(max(body, 1)))
            done = 0
            while done < body:
                n = f.readinto(memory[done : min(body, done + (1 << 26))])
                if not n:
                    raise ValueError("truncated")
                done += n
        out: Tensors = {}
        recorded = json.loads(header["__metadata__"][_DIGESTS])
        if not isinstance(recorded, dict):
            raise ValueError("no digests")
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop <= body:
                raise ValueError(f"tensor {name} lies outside the file")
            out[name] = np.frombuffer(memory[start:stop], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return out, recorded
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptModel(f"{path}: not a sound file of packed weights ({error})") from None


def expected(config: ModelConfig, precision: Precision) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all that `pack` makes, for checking a file against its model."""
    unit, head = DEPTH_UNIT[precision], head_width(config)
    per_row = unit // 16
    attention, width, hidden = config.num_heads * head, config.hidden_size, config.intermediate_size
    columns = attention + 2 * config.num_kv_heads * head
    shapes: dict[str, tuple[int, ...]] = {}

    def product(name: str, n: int, k: int) -> None:
        shape = (
            (padded(k, unit) // per_row, 16, per_row) if precision != "int4" else (padded(k, unit) // unit, GROUP_BYTES)
        )
        shapes[f"{name}.w"], shapes[f"{name}.scale"] = (padded(n) // 16, *shape), (padded(n),)

    for i in range(config.num_layers):
        product(f"{i}.qkv", columns, width)
        product(f"{i}.out", width, attention)
        product(f"{i}.gate_up", 2 * padded(hidden), width)
        product(f"{i}.down", width, hidden)
        for norm in ("norm_1", "norm_2", *(("post_1", "post_2") if config.post_norms else ())):
            shapes[f"{i}.{norm}"] = (padded(width),)
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            shapes[f"{i}.{norm}"] = (head,)
        if config.qkv_bias:
            shapes[f"{i}.qkv.bias"] = (columns,)
    product("head", config.vocab_size, width)
    return shapes | {"embedding": (config.vocab_size, padded(width)), "norm": (padded(width),)}


def check(tensors: Tensors, config: ModelConfig, precision: Precision, path: Path) -> None:
    """Raises CorruptModel when the file is not this model's."""
    wanted = expected(config, precision)
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or tensors[name].shape != wanted.get(name):
            raise CorruptModel(f"{path}: {name} is missing, misshapen or unknown")


def load_checked(path: Path, config: ModelConfig, precision: Precision) -> Tensors:
    """`load` and `check`."""
    tensors = load(path)
    check(tensors, config, precision, path)
    return tensors
