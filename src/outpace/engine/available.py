"""How much memory there is: of the machine, of the container that this process runs in, or of a CUDA device."""

from __future__ import annotations

import os
from pathlib import Path

from ..models.decoder import Device

_UNKNOWN = 1 << 62
_CGROUP = Path("/sys/fs/cgroup")  # as a process in a container sees its own


def memory_bytes(device: Device) -> int:
    """In all, used or not; very much where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(str(device))[1])
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return _UNKNOWN
    return min(whole, _cgroup_limit())


def available_bytes(device: Device) -> int:
    """What this process can still have, files that are only kept in memory for speed not counted as used; very much
    where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(str(device))[0])
    return max(0, min(_machine_available(), _cgroup_available()))


def _machine_available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return _UNKNOWN


def _cgroup_limit() -> int:
    try:
        return int((_CGROUP / "memory.max").read_text())
    except (OSError, ValueError):  # no such limit: "max"
        return _UNKNOWN


def _cgroup_available() -> int:
    limit = _cgroup_limit()
    if limit == _UNKNOWN:
        return _UNKNOWN
    try:
        used = int((_CGROUP / "memory.current").read_text())
        for line in (_CGROUP / "memory.stat").read_text().splitlines():
            name, value = line.split()
            used -= int(value) if name in ("inactive_file", "active_file") else 0
    except (OSError, ValueError):
        return _UNKNOWN
    return limit - used
