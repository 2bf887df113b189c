"""A server's resident memory under mixed load: benchmarks/memory.py for some minutes, or for an hour with
`--soak-minutes 60`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_RUN = """
import json, sys
from memory import soak
from servers import Server, free_port, outpace_serve
port = free_port()
with Server(outpace_serve("smollm2-135m", port, *sys.argv[2:]), port, patience_s=600) as server:
    print(json.dumps(soak(port, server._process.pid, 60 * float(sys.argv[1]), 4, lambda text: None)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="platform: resident memory is read from /proc")
def test_memory_does_not_grow(request: pytest.FixtureRequest) -> None:
    minutes = request.config.getoption("--soak-minutes")
    options = [
        "--kv-tokens",
        "4096",
        "--max-batch",
        "4",
        "--max-queue",
        "64",
        "--header-timeout",
        "3",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(minutes), *options], cwd=BENCHMARKS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    seen = found["seen"]
    assert {"200", "400", "streams read", "streams left", "halves"} <= seen.keys(), seen
    assert found["growth"] < 0.02, found
