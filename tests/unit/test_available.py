"""How much memory there is, by what the system says of the machine and of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from outpace.engine import available
from outpace.models.decoder import Cpu


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(available, "_CGROUP", tmp_path)
    return tmp_path


def test_a_machine_without_limits(group: Path) -> None:
    free, whole = available.available_bytes(Cpu()), available.memory_bytes(Cpu())
    assert 0 < free <= whole < 1 << 60
    (group / "memory.max").write_text("max\n")
    assert available.memory_bytes(Cpu()) == whole


def test_a_container_has_what_it_may_have(group: Path) -> None:
    (group / "memory.max").write_text(f"{100 << 20}\n")
    (group / "memory.current").write_text(f"{60 << 20}\n")
    (group / "memory.stat").write_text(f"anon {10 << 20}\ninactive_file {20 << 20}\nactive_file {5 << 20}\n")
    assert available.memory_bytes(Cpu()) == 100 << 20
    assert available.available_bytes(Cpu()) == (100 - 60 + 25) << 20
    (group / "memory.current").write_text(f"{200 << 20}\n")
    assert available.available_bytes(Cpu()) == 0


def test_what_the_system_does_not_say_stops_nobody(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_machine_available", lambda: available._UNKNOWN)
    (group / "memory.max").write_text("odd")
    assert available.available_bytes(Cpu()) == available._UNKNOWN
