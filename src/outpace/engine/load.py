"""From a model's name to a loaded decoder: which device, which arithmetic, how much KV cache."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, get_args

from ..cache.storage import PAGE_SIZE
from ..errors import CapacityError, MethodError, ParameterError, UnsupportedModel
from ..models.config import ModelConfig
from ..models.decoder import Cpu, Decoder, Device
from ..models.tokenizer import Tokenizer
from ..types import Precision
from .available import available_bytes, memory_bytes

if TYPE_CHECKING:
    from ..models.formats import Format
    from ..models.prepared import OpenModel

#: What a decoder exists for, the default first
PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "cpu": ("int8", "float32", "bfloat16", "int4", "file"),
    "cuda": ("bfloat16", "float32"),
}
LEAST_TOKENS = 1024  # of a cache, below which a model is of little use
KV_BYTES = 2 << 30  # the default cache holds at most this much, or a quarter of the free memory if that is less

#: progress(what, done, total), called while something takes long
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in memory. It may serve several LLM objects; nothing in it belongs to one of them."""

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    reload: Callable[[Precision], Decoder] | None = None  # the same weights in another precision
    key: str = ""  # names the content of its files, changes when they do; "" if it was not read from files

    def in_precision(self, precision: Precision) -> Decoder:
        """The same weights in another precision; loaded at the first call and kept. Raises MethodError where that
        does not exist."""
        if self.reload is None:
            raise MethodError(
                f"{self.name} runs on {self.decoder.device.type}, where its weights come in one precision only; "
                "use a method that does not need two"
            )
        return self.reload(precision)

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats that the weights of precision "file" are in, the one of most matrices first."""
        if self.decoder.precision != "file":
            return ()
        formats: Mapping[str, Format] = getattr(self.decoder, "formats", {})
        return tuple(name for name, _ in Counter(form.name for form in formats.values()).most_common())

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config


def choose_device(device: str) -> Device:
    """ "auto": CUDA if there is one. Raises ParameterError for a device that is not there. Torch is imported only where
    there may be CUDA."""
    if device == "cpu" or (device == "auto" and not _has_cuda_driver()):
        return Cpu()
    kind, _, number = device.partition(":")
    if device != "auto" and (kind not in PRECISIONS or not (number.isdecimal() or device == kind)):
        raise ParameterError(f"device={device!r} is unknown: it must be auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return Cpu()
    import torch

    if device == "auto":
        return torch.device("cuda") if torch.cuda.is_available() else Cpu()
    if int(number or 0) >= torch.cuda.device_count():
        raise ParameterError(f"device={device!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(device)


def _has_cuda_driver() -> bool:
    """Whether this system has the driver's library, without which PyTorch sees no CUDA device."""
    import ctypes

    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def choose_precision(precision: str, device: Device) -> Precision | None:
    """None for "auto". Raises ParameterError for one without a decoder."""
    possible = PRECISIONS[device.type]
    if precision == "auto":
        return None
    for known in get_args(Precision):
        if precision == known and known in possible:
            chosen: Precision = known
            return chosen
    raise ParameterError(
        f"precision={precision!r} does not work on {device.type}: it must be auto, {', '.join(possible)}"
    )


def load_model(
    name: str,
    *,
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    kv_tokens: int | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Open a model (fetching it at first use) and make its decoder: fused kernels on the CPU, PyTorch on CUDA.

    `kv_tokens`: of the cache that is to be made, as far as it is known. Raises ParameterError for a device or precision
    that does not work, CapacityError where the memory cannot hold the model, ModelError for the model's own troubles.
    """
    from ..models.native import NativeDecoder
    from ..models.prepared import open_model

    where = choose_device(device)
    wanted = choose_precision(precision, where)
    if threads is not None and where.type != "cpu":
        raise ParameterError(f"threads={threads} has no use on {where.type}, only on a CPU: leave it out")
    opened = open_model(name, progress)
    arithmetic = wanted or best_precision(opened, where)
    check_memory(opened, arithmetic, where, kv_tokens)
    decoder: Decoder
    if where.type == "cuda":
        import torch

        from ..models.torch_decoder import TorchDecoder

        decoder = TorchDecoder.from_checkpoint(opened.checkpoint(), arithmetic, torch.device(str(where)))
        return LoadedModel(opened.name, decoder, opened.tokenizer, key=opened.source.key)

    @cache
    def native(precision: Precision) -> Decoder:
        # of what was asked for a copy is kept, but not of what a method needs beside it
        keep = precision == arithmetic
        return NativeDecoder.load(opened, precision, threads, _packing(progress), keep, lambda: opened.tokenizer)

    decoder = native(arithmetic)
    return LoadedModel(opened.name, decoder, opened.tokenizer, native, opened.source.key)


def best_precision(opened: OpenModel, device: Device) -> Precision:
    """The fastest that is as good as lossless: on a CPU the formats of a quantised file, else int8. What a file has in
    blocks that cannot run so is said on stderr."""
    from ..models.packing import is_quantised, own_formats
    from ..ops.cpu.isa import AMX, best_level

    default = PRECISIONS[device.type][0]
    # with AMX, int8 reads prompts and runs batches several times as fast: blocks have no kernel for its tiles yet
    may_be = device.type == "cpu" and best_level() < AMX and opened.source.kind == "gguf"
    if not may_be or not is_quantised(opened.checkpoint()):
        return default
    try:
        own_formats(opened.checkpoint())
    except UnsupportedModel as error:
        print(f"{opened.name} runs in {default}: {error}", file=sys.stderr, flush=True)
        return default
    return "file"


def check_memory(opened: OpenModel, precision: Precision, device: Device, kv_tokens: int | None) -> None:
    """Raises CapacityError if the weights and the least useful cache do not fit into the memory that is left. Reads
    no weights, allocates nothing."""
    from ..models.packing import weight_bytes

    def total(precision: Precision) -> int:
        return weight_bytes(opened, precision) + kv

    width = 4 if precision == "float32" else 2
    c = opened.config
    kv = 2 * width * c.num_layers * c.num_kv_heads * c.head_dim * (kv_tokens or LEAST_TOKENS)
    there = available_bytes(device)
    if total(precision) <= there:
        return
    others = [p for p in PRECISIONS[device.type] if p != "file" and total(p) <= there]
    raise CapacityError(
        f"{opened.name} in {precision} needs {total(precision) / 1e9:.1f} GB ({(total(precision) - kv) / 1e9:.1f} of "
        f"weights, {kv / 1e9:.1f} of KV cache), and of {memory_bytes(device) / 1e9:.1f} GB of memory "
        f"{there / 1e9:.1f} GB are free: end other programs, take a smaller model"
        f"{', a smaller kv_tokens' if kv_tokens else ''}{f' or precision {others[-1]!r}' if others else ''}"
    )


def check_loaded(
    loaded: LoadedModel, precision: str, threads: int | None, device: str, what: str = "precision"
) -> None:
    """Raises ParameterError for what a model that is loaded already is not. `what`: how the precision is called."""
    decoder = loaded.decoder
    kind = decoder.device.type
    if precision not in ("auto", decoder.precision):
        given, found = f"{what}={precision!r}", f"in {decoder.precision}"
    elif threads is not None and threads != getattr(decoder, "threads", None):
        of = getattr(decoder, "threads", None)
        given, found = f"threads={threads}", f"on {kind}" if of is None else f"with threads={of}"
    elif device != "auto" and not _same(choose_device(device), decoder.device):
        given, found = f"device={device!r}", f"on {decoder.device}"
    else:
        return
    raise ParameterError(
        f"{given} contradicts {loaded.name}, which is loaded {found}: leave it out, or give the model by its name"
    )


def _same(one: Device, other: Device) -> bool:
    return (one.type, one.index or 0) == (other.type, other.index or 0)


def load_draft_model(
    name: str,
    target: LoadedModel,
    precision: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """A draft model beside its target, on the same device. "auto": as the target; each in its own file's formats where
    the target is; and for int8 on the CPU int4 for drafting and int8 for reading prompts. Raises as `load_model`.
    """
    from ..models.native import NativeDecoder
    from ..models.two_speed import TwoSpeed

    of_target = target.decoder.precision
    own = precision if precision != "auto" or of_target == "file" else of_target
    loaded = load_model(name, precision=own, device=str(target.decoder.device), threads=threads, progress=progress)
    if precision == "auto" and loaded.decoder.precision == "int8":
        few, many = loaded.in_precision("int4"), loaded.decoder
        assert isinstance(few, NativeDecoder) and isinstance(many, NativeDecoder)
        return replace(loaded, decoder=TwoSpeed(few, many))
    return loaded


def _packing(progress: Progress | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress("packing the weights", done, total)


def size_of_cache(decoder: Decoder, wanted: int | None, max_batch: int) -> int:
    """Tokens of the KV cache: as requested, or `max_batch` whole contexts as far as memory goes. Raises
    ParameterError for more than the memory could ever hold."""
    page = decoder.new_storage(1).bytes_per_page
    if wanted is not None:
        size, most = -(-wanted // PAGE_SIZE) * page, memory_bytes(decoder.device)
        if size > most:
            raise ParameterError(
                f"kv_tokens={wanted} is out of range: it takes {size / 2**30:,.1f} GiB, and {decoder.device} has "
                f"{most / 2**30:,.1f} GiB: at most {most // page * PAGE_SIZE} tokens fit"
            )
        return wanted
    limit = min(KV_BYTES, available_bytes(decoder.device) // 4)
    return PAGE_SIZE * max(1, min(-(-decoder.config.max_position // PAGE_SIZE) * max_batch, limit // page))
