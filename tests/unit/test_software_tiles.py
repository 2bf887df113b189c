"""Kernels for AMX tiles and for products of bf16 pairs, on any processor: their own tests, with such instructions in
software."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_tiles_in_software():
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *(p for p in sys.path if p)])}
    env.pop("OUTPACE_ISA", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "software_tiles", "-p", "no:cacheprovider"]
    command += ["-k", "amx or bf16", str(here / "test_cpu_kernels.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
