"""The loop of a peer's process: a line of JSON in, a line out. Imports nothing but Python's own modules.

An engine is a class that is made from the first line, has `about` (plain data) and answers a request with a list of
plain answers, `token_ids` or `text` with `first_token_s`, `total_s` and `steps` each. See `../process.py`. One that has
a process of its own ends it in `close()`, and says in `memory_bytes` what that held at most.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


class Refused(Exception):
    """What an engine says in its own words when it cannot do what is wanted."""


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """`make(hello)` imports its engine and loads the model; it may raise anything."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand among the answers

    def say(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    hello = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with, args=(hello["parent"],), daemon=True).start()
    try:
        engine = make(hello)
    except ModuleNotFoundError as e:
        say({"error": words(e), "missing": e.name})
        return
    except Exception as e:
        say({"error": words(e)})
        return
    say({"about": engine.about})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = engine.generate(request)
            say({"id": request["id"], "answers": found, "memory_bytes": getattr(engine, "memory_bytes", None)})
        except Exception as e:
            say({"id": request["id"], "error": words(e)})
    if close := getattr(engine, "close", None):
        close()


def words(error: Exception) -> str:
    said = [line for line in str(error).splitlines() if line.strip()]
    if isinstance(error, Refused):
        return said[-1]
    return type(error).__name__ + (": " + said[-1] if said else "")


def end_with(parent: int) -> None:
    """Whoever asked has gone, whatever this process is at: end, and with it all that it started."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def look_up(tokens: list[int], longest: int, most: int) -> list[int]:
    """What followed the last tokens where they stood before, the longest match first, the newest of these."""
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        key = tokens[-size:]
        for at in range(len(tokens) - size - 1, -1, -1):
            if tokens[at] == key[0] and tokens[at : at + size] == key:
                return tokens[at + size : at + size + most]
    return []
