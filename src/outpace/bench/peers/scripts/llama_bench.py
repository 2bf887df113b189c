"""A `llama-bench`: it answers nothing, so it gives the times of as many random tokens as the prompt and answer have.

It is started for every answer; loading the model is not in its times.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

from peer_loop import Refused
from program import Own, Program


class LlamaBench:
    """Raises Refused for what it cannot do."""

    def __init__(self, program: Program, hello: dict[str, Any]) -> None:
        if hello["mode"] != "plain":
            raise Refused(f"{program.name} measures plain decoding alone; name a llama-server for :{hello['mode']}")
        given = [name for name in ("-p", "-n", "-pg", "-gp", "-d", "-r", "-o") if program.given(name)]
        if given:
            raise Refused(f"{program.name} is given {given[0]} by the comparison: leave it out")
        self.program = program
        self.own: list[Own] = [
            (("--model", "-m"), hello["model"]),
            (("--threads", "-t"), hello["threads"]),
            (("--n-gpu-layers", "-ngl"), 0),
            (("--repetitions", "-r"), 1),
            (("--output", "-o"), "json"),
        ]
        self.about = {
            "program": program.name,
            "version": program.version() or "not said before its first run",
            "arguments": program.shown(program.command(self.own)),
            "batches": "one answer at a time",
            "output": "none: random tokens, nothing is sampled",
        }

    def generate(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        if len(request["prompts"]) > 1:
            raise Refused("measures one sequence at a time; name a llama-server for more")
        prompt, tokens = len(request["prompts"][0]), request["max_tokens"]
        if self.program.has("-gp"):  # times the tokens behind a prompt
            runs = [["-p", prompt, "-n", 0, "-gp", f"{prompt},{tokens - 1}"]]
        elif self.program.has("--n-depth"):
            runs = [["-p", prompt, "-n", 0], ["-p", 0, "-n", tokens - 1, "-d", prompt]]
        else:
            runs = [["-p", prompt, "-n", tokens - 1]]
        found = [test for run in runs for test in self._run([str(word) for word in run])]
        read_s = sum(test["avg_ns"] for test in found if not test["n_gen"]) / 1e9
        write_s = sum(test["avg_ns"] for test in found if test["n_gen"]) / 1e9
        if not read_s or not write_s:
            raise Refused("did not measure a prompt and an answer: is its output that of llama-bench?")
        answer = {"text": "", "tokens": tokens, "steps": tokens - 1}
        return [answer | {"first_token_s": read_s, "total_s": read_s + write_s}]

    def _run(self, tests: list[str]) -> list[dict[str, Any]]:
        done = subprocess.run(self.program.command(self.own) + tests, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode:
            raise Refused(self.program.ended(done.returncode, done.stderr.decode("utf-8", "replace").splitlines()))
        try:
            text = done.stdout.decode("utf-8", "replace")
            found: list[dict[str, Any]] = json.loads(text[text.index("[") :])
            assert all(type(test["avg_ns"]) is int and type(test["n_gen"]) is int for test in found)
        except (ValueError, AssertionError, KeyError, TypeError):
            raise Refused(f"wrote what is no result of llama-bench: {done.stdout[:80]!r}") from None
        return found

    @property
    def memory_bytes(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
