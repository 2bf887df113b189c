"""A `llama-server` or `llama-bench` of the user's own as a peer; which of them it is, its help says.

Settings: "program" (its path) and "arguments" (a list, as the user wrote them).
"""

from __future__ import annotations

from typing import Any

from llama_bench import LlamaBench
from llama_server import LlamaServer
from peer_loop import Refused, serve
from program import Program


def make(hello: dict[str, Any]) -> Any:
    program = Program(hello["settings"]["program"], hello["settings"]["arguments"])
    if program.has("--port") and program.has("-m", "--model"):
        return LlamaServer(program, hello)
    if program.has("--n-gen") and program.has("-m", "--model"):
        return LlamaBench(program, hello)
    raise Refused(f"{program.name} is neither llama-server nor llama-bench: its --help lists no --port and no --n-gen")


if __name__ == "__main__":
    serve(make)
