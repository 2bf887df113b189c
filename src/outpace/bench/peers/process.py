"""A peer that is a script in a process of its own. The adapters of the single engines say which, and check the model.

The script (`scripts/`) imports nothing of this package, so that any Python that has the engine can run it. It reads a
line of JSON and answers with one:

    {"model", "mode", "draft", "threads", "context", "max_batch", "stop_ids", "past_end", "settings", "parent"}
        -> {"about": {...}}  |  {"error": "...", "missing": "the module that is not installed" | null}
    {"id", "prompts": [[token, ...], ...], "max_tokens", "temperature", "seed"}
        -> {"id", "answers": [{"token_ids" | "text", "ended", "first_token_s", "first_tokens", "total_s", "steps"}
            | {"error"}, ...], "memory_bytes": of the process that has the model, where that is another one, at most}
        |  {"id", "error": "..."}

Every engine gets the token ids that ours would read, and answers with ids where it can.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from ...errors import ParameterError
from .child import Child, Fault
from .peer import Peer, PeerAnswer, PeerConfig, PeerError, PeerPrompt, check_ask

SCRIPTS = Path(__file__).parent / "scripts"
_CLOCKS = 0.05  # seconds by which two processes' ideas of a duration may differ


class ScriptPeer(Peer):
    """Raises ParameterError when the engine cannot take such a model at all."""

    engine: ClassVar[str]
    script: ClassVar[str]  # a file of `scripts/`
    package: ClassVar[str]  # what pip installs
    takes: ClassVar[tuple[str, ...]] = ("a GGUF file", "a folder")
    counts: ClassVar[bool] = False  # text has as many tokens as the engine says: some that it generates have no text

    def __init__(self, config: PeerConfig, name: str | None = None) -> None:
        for model in filter(None, (config.model, config.draft)):
            kind = "a folder" if model.is_dir() else "a GGUF file"
            if kind not in self.takes:
                raise ParameterError(f"{self.engine} reads {' or '.join(self.takes)}, and {model.name} is {kind}")
        self.config = config
        self.name = name or (self.engine if config.mode == "plain" else f"{self.engine}:{config.mode}")
        self._child: Child | None = None
        self._about: dict[str, Any] = {}
        self._memory: int | None = None  # of a process of its own
        self._sent = 0
        self._closed = "was not started"

    def command(self) -> list[str]:
        return [str(self.config.python or sys.executable), str(SCRIPTS / self.script)]

    def start(self) -> None:
        if self._child is not None:
            return
        config = self.config
        hello = {
            "model": str(config.model),
            "mode": config.mode,
            "draft": config.draft and str(config.draft),
            "threads": config.threads,
            "context": config.context,
            "max_batch": config.max_batch,
            "stop_ids": sorted(config.words.eos_ids),
            "past_end": config.past_end,
            "settings": dict(config.settings),
            "parent": os.getpid(),
        }
        try:
            self._closed = "was not started"
            self._child = Child(self.command(), self._environment())
            reply = _object(self._child.exchange(json.dumps(hello).encode(), config.start_timeout_s))
            if reply.get("missing"):
                python = config.python or "this Python"
                raise Fault(
                    f"needs {reply['missing']}, which {python} has not: pip install {self.package}, or name a Python "
                    "that has it with --peer-python"
                )
            if "error" in reply:
                raise Fault(f"does not start: {self._public(reply['error'])}")
            if not isinstance(reply.get("about"), dict):
                raise Fault("did not say what it is")
        except Fault as e:
            self._drop(str(e))
            raise PeerError(f"{self.name} {e}") from None
        except BaseException:
            self.close()
            raise
        self._about = reply["about"]

    def _public(self, error: object) -> str:
        """What went wrong, in a line, with files by their names alone: reports are passed on."""
        text = _line(error)
        for path in filter(None, (self.config.model, self.config.draft)):
            text = text.replace(str(path), path.name)
        return text

    def close(self) -> None:
        self._drop("was closed")

    def about(self) -> dict[str, Any]:
        files = {"model": self.config.model.name} | ({"draft": self.config.draft.name} if self.config.draft else {})
        return {"engine": self.engine, "mode": self.config.mode, "threads": self.config.threads, **files, **self._about}

    @property
    def memory_bytes(self) -> int | None:
        return None if self._child is None else self._memory or self._child.memory_bytes()

    def generate(
        self, prompts: Sequence[PeerPrompt], max_tokens: int, temperature: float, seed: int, timeout_s: float
    ) -> list[PeerAnswer]:
        check_ask(prompts, max_tokens, temperature, timeout_s)
        if len(prompts) > self.config.max_batch:
            raise ParameterError(f"{len(prompts)} prompts at once: {self.name} was made for {self.config.max_batch}")
        ids = [prompt.ids(self.config.words) for prompt in prompts]
        answers = [self._too_long(prompt, max_tokens) for prompt in ids]
        fits = [i for i, answer in enumerate(answers) if answer is None]
        if fits:
            request = {"prompts": [ids[i] for i in fits], "max_tokens": max_tokens, "temperature": temperature}
            found = self._exchange(request | {"seed": seed}, len(fits), timeout_s)
            for i, answer in zip(fits, found, strict=True):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _too_long(self, prompt: list[int], max_tokens: int) -> PeerAnswer | None:
        needed, most = len(prompt) + max_tokens, self.config.context
        return PeerAnswer(error=f"{needed} tokens do not fit its context of {most}") if needed > most else None

    def _exchange(self, request: dict[str, Any], count: int, timeout_s: float) -> list[PeerAnswer]:
        if self._child is None:
            return [PeerAnswer(error=f"{self.name} {self._closed}")] * count
        self._sent += 1
        began = perf_counter()
        try:
            reply = _object(self._child.exchange(json.dumps({"id": self._sent, **request}).encode(), timeout_s))
            elapsed = perf_counter() - began
            if reply.get("id") != self._sent:
                raise Fault(f"answered request {reply.get('id')!r} instead of {self._sent}")
            if "error" in reply:
                return [PeerAnswer(error=f"{self.name}: {self._public(reply['error'])}")] * count
            self._memory = reply["memory_bytes"] if type(reply.get("memory_bytes")) is int else None
            raw = reply.get("answers")
            if not isinstance(raw, list) or len(raw) != count:
                raise Fault(f"did not answer {count} prompts with a list of {count} answers")
            return [self._answer(item, request["max_tokens"], elapsed) for item in raw]
        except Fault as e:
            self._drop(str(e))
            return [PeerAnswer(error=f"{self.name} {e}")] * count
        except BaseException:  # an interrupt: whatever it would still answer belongs to nobody
            self.close()
            raise

    def _answer(self, raw: Any, max_tokens: int, elapsed: float) -> PeerAnswer:
        """Believe nothing that can be checked. A wrong answer is an error; it says nothing of the others."""
        words = self.config.words
        if not isinstance(raw, dict):
            return PeerAnswer(error=f"{self.name}: an answer is {type(raw).__name__}, not an object")
        if raw.get("error"):
            return PeerAnswer(error=f"{self.name}: {_line(raw['error'])}")
        first: Any = raw.get("first_token_s")
        total: Any = raw.get("total_s")
        steps: Any = raw.get("steps")
        at_first: Any = raw.get("first_tokens", 1)
        if not _seconds(total) or not (first is None or _seconds(first)):
            return PeerAnswer(error=f"{self.name}: its times {first!r} and {total!r} are no durations")
        if total > elapsed + _CLOCKS or (first is not None and first > total):
            return PeerAnswer(
                error=f"{self.name}: says {first} s to the first token, {total} s in all; it took {elapsed:.3f} s"
            )
        if not (steps is None or (type(steps) is int and steps >= 0)):
            return PeerAnswer(error=f"{self.name}: {steps!r} is no number of steps")
        if "token_ids" in raw:
            ids = raw["token_ids"]
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < words.vocab_size for i in ids):
                return PeerAnswer(error=f"{self.name}: gave tokens that are not in the vocabulary")
            text, tokens = words.decode(ids), len(ids)
        else:
            ids, text = None, raw.get("text", "")
            if not isinstance(text, str) or "text" not in raw:
                return PeerAnswer(error=f"{self.name}: gave neither tokens nor text")
            tokens = len(words.encode(text)) + bool(raw.get("ended"))
            if self.counts and type(raw.get("tokens")) is int:
                tokens = raw["tokens"]
        if wrong := _wrong_count(raw, tokens, self.counts or ids is not None, max_tokens):
            return PeerAnswer(error=f"{self.name}: {wrong}")
        if type(at_first) is not int or not 1 <= at_first <= tokens:
            return PeerAnswer(error=f"{self.name}: says that {at_first!r} of {tokens} tokens came first")
        counted = raw.get("tokens")
        return PeerAnswer(
            text, None if ids is None else tuple(ids), tokens, first, total, None, steps, counted, at_first
        )

    def _drop(self, why: str) -> None:
        child, self._child = self._child, None
        if child is not None:
            self._closed = why
            child.end()

    def _environment(self) -> dict[str, str]:
        """Another Python gets none of our path; nothing is fetched; thread pools have the configured size."""
        kept = dict(os.environ)
        if self.config.python is not None:
            for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
                kept.pop(name, None)
        threads = str(self.config.threads)
        return kept | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }


def _wrong_count(raw: dict[str, Any], tokens: int, exact: bool, max_tokens: int) -> str | None:
    """Text that is encoded anew may have a few tokens more or fewer than were generated; ids may not."""
    counted = raw.get("tokens")
    if not (counted is None or type(counted) is int):
        return f"{counted!r} is no number of tokens"
    if exact and counted is not None and counted != tokens:
        return f"says that it gave {counted} tokens, and gave {tokens}"
    if tokens > (max_tokens if exact else max_tokens + 8 + max_tokens // 8):
        return f"gave {tokens} tokens instead of at most {max_tokens}"
    if tokens == 0:
        return "gave no token"
    return None


def _object(line: bytes) -> dict[str, Any]:
    """Raises Fault for what is not a JSON object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Fault(f"answered with what is no JSON object: {line[:80].decode('utf-8', 'replace')!r}")
    return value


def _seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _line(text: Any) -> str:
    """The last line of a message, where Python puts the reason, not too long."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[-1][:400] if lines else "an error without words"
