"""llama.cpp in a process of its own, as the benchmarks talk to it (the other side is `llamacpp_peer.py`)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from outpace.errors import OutpaceError

PEER = "llama.cpp"


class Peer:
    """`context` tokens for `sequences` sequences together. Raises OutpaceError when it cannot start or dies."""

    def __init__(
        self, python: Path, model: Path, threads: int, context: int, sequences: int = 1, settings: tuple[str, ...] = ()
    ) -> None:
        script = Path(__file__).with_name("llamacpp_peer.py")
        args = [str(python), str(script), str(model), str(threads), str(context)]
        args += ["--sequences", str(sequences), *settings]
        self.process = subprocess.Popen(
            args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.about = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise OutpaceError(f"llama.cpp ended with exit code {self.process.wait()}; run llamacpp_peer.py by hand")
        return json.loads(line)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def generate(self, tokens: list[int], max_tokens: int, stop: list[int]) -> Any:
        """{"tokens", "prefill_s", "decode_s"} of one sequence."""
        return self._ask({"tokens": tokens, "max_tokens": max_tokens, "stop": stop})

    def batch(self, prompts: list[list[int]], max_tokens: int) -> Any:
        """{"outputs", "prefill_s", "decode_s"} of all prompts in lock-step, each of exactly `max_tokens` tokens."""
        return self._ask({"prompts": prompts, "max_tokens": max_tokens})

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)

    @property
    def words(self) -> str:
        """Version and settings, for a page."""
        settings = ", ".join(f"{k} {v}" for k, v in self.about["settings"].items())
        return f"llama-cpp-python {self.about['version']} ({settings}): {self.about['system_info'].strip()}"
