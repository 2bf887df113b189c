"""What macOS and Windows lack, taken away on this system: nothing may crash for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BARE = """
import importlib, mmap, os, pathlib, pkgutil, subprocess, sys

import llvmlite.binding, numba, numpy, torch, transformers, uvicorn  # what is not ours asks the system before

for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "sched_setaffinity", "getuid", "geteuid", "killpg", "waitid", "setpriority",
             "getpriority", "sysconf", "getloadavg", "posix_fadvise", "sync", "statvfs", "fchmod", "O_PATH"):
    if hasattr(os, name):
        delattr(os, name)
for name in [n for n in dir(mmap) if n.startswith(("MADV_", "MAP_"))]:
    delattr(mmap, name)
read_text = pathlib.Path.read_text

def no_proc(self, *args, **kwargs):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file", str(self))
    return read_text(self, *args, **kwargs)

pathlib.Path.read_text = no_proc
"""
IMPORTS = """
import outpace
left_out = ("outpace.bench.peers.scripts", "outpace.bench.quality.confine", "outpace.__main__")
for module in pkgutil.walk_packages(outpace.__path__, "outpace."):
    if not module.name.startswith(left_out):
        importlib.import_module(module.name)
print("imported")
"""
PARTS = """
from outpace.bench.compare.contestant import peak_memory
from outpace.bench.machine import cpu_features, cpu_name, environment, usable_cores
from outpace.bench.peers.child import Child, Fault
from outpace.engine.busy import watched
from outpace.models.native import default_threads
from outpace.models.packed import huge_memory
from outpace.server.intake import _give_way
from outpace.server.run import files_for

assert peak_memory() is None and files_for(100) == 100 and len(huge_memory(4096)) == 4096
assert usable_cores() == default_threads() == os.cpu_count()
assert cpu_features() == [] and isinstance(cpu_name(), str) and environment()["cores"]
with watched(1) as load:
    pass
assert load.waited is None and not load.busy
try:
    Child([sys.executable, "-c", ""], {})
except Fault as fault:
    assert "process groups" in str(fault)
else:
    raise AssertionError("a child without process groups")
print("parts")
"""
STEPS = """
import numpy as np
from toy import Rig, random_tokens, toy_checkpoint
from outpace.models.native import NativeDecoder

logits = []
for threads in (1, 2):
    rig = Rig(NativeDecoder.from_checkpoint(toy_checkpoint("qwen2")[0], "int8", threads))
    logits.append(rig.feed(rig.cache.new(), random_tokens(20)))
assert np.isfinite(logits[0]).all() and (logits[0] == logits[1]).all()
print("steps")
"""


@pytest.mark.parametrize("part", [IMPORTS, PARTS, STEPS], ids=["imports", "parts", "steps"])
def test_nothing_needs_what_other_systems_lack(part):
    path = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", BARE + part], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] in ("imported", "parts", "steps")


WITHOUT_WAITID = """
import os
if hasattr(os, "waitid"):
    del os.waitid
import sys
from outpace.bench.peers.child import Child, Fault
child = Child([sys.executable, "-c", "print(input()[::-1], flush=True)"], {})
assert child.exchange(b"abc\\n", 60.0) == b"cba"
assert child.end() == 0
child = Child([sys.executable, "-c", "raise SystemExit(3)"], {})
try:
    child.exchange(b"abc\\n", 60.0)
except Fault as fault:
    assert "exit code 3" in str(fault), fault
else:
    raise AssertionError("it answered")
"""


def test_other_engines_end_where_waiting_always_reaps():
    """As on macOS before Python 3.13."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_WAITID], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_huge_pages_may_be_refused(monkeypatch):
    """By a kernel that was built without them."""
    import mmap

    from outpace.models import packed

    class Plain(mmap.mmap):
        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(packed.mmap, "mmap", Plain)
    assert len(packed.huge_memory(8192)) == 8192
