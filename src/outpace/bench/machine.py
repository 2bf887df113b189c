"""What a result file says about where it was measured: hardware, versions, commit. And the memory ceiling."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..models.decoder import Device

PACKAGES = ("outpace", "torch", "numpy", "numba", "transformers", "tokenizers", "gguf")


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, as plain data. Holds no host or user name and no path."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "cpu_features": cpu_features(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Of those that matter here."""
    x86 = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
    wanted = (*x86, "asimd", "asimddp", "i8mm")
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return [f for f in wanted if f in present]
    return []


def commit() -> str:
    """Of the checkout that this package lies in, with "+changes" when tracked files differ; "unknown" outside one."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        name = git("rev-parse", "--short=12", "HEAD")
        return name + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def read_bandwidth(threads: int, device: Device | None = None, size: int = 1 << 30, repeats: int = 5) -> list[float]:
    """Bytes per second at which `threads` threads (or a CUDA device) read `size` bytes once, for each repeat.

    On the CPU, the sums are numba loops over integers that release the interpreter lock; a pass over 1 GiB cannot live
    in a cache. Each thread has a core of its own, where the system lets it. The first, untimed, pass touches the pages.
    """
    if device is not None and device.type == "cuda":
        return _cuda_bandwidth(str(device), size, repeats)
    data = np.ones(size // 8, dtype=np.int64)
    parts = np.array_split(data, threads)
    kernel = _reader()
    kernel(data[:64])

    def read(part: NDArray[np.int64], core: int | None) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread alone
        kernel(part)

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    places: list[int | None] = [*cores[:threads]] if len(cores) >= threads else [None] * threads

    def once() -> float:
        workers = [Thread(target=read, args=pair) for pair in zip(parts, places, strict=True)]
        began = perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return data.nbytes / (perf_counter() - began)

    once()
    return [once() for _ in range(repeats)]


def _cuda_bandwidth(device: str, size: int, repeats: int) -> list[float]:
    """By summing float32 numbers in the device's memory."""
    import torch

    data = torch.ones(size // 4, dtype=torch.float32, device=device)

    def once() -> float:
        torch.cuda.synchronize(device)
        began = perf_counter()
        data.sum()
        torch.cuda.synchronize(device)
        return size / (perf_counter() - began)

    once()
    return [once() for _ in range(repeats)]


def _reader() -> Any:
    import numba

    @numba.njit(nogil=True)
    def read(values: NDArray[np.int64]) -> int:
        part = len(values) // 4  # four streams keep more of the memory busy than one, and simple sums become vectors
        a = b = c = d = 0
        for i in range(part):
            a += values[i]
            b += values[part + i]
            c += values[2 * part + i]
            d += values[3 * part + i]
        return a + b + c + d

    return read


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return []


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    name: str = torch.cuda.get_device_name(0)
    return name


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
