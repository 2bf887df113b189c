"""An engine without a model: it says what it is told to, one or two tokens a step, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from outpace.engine.request import DraftTrace, StepEvent
from outpace.engine.text import TextStream
from outpace.errors import CapacityError, GrammarError, MethodError, ParameterError, QueueFull
from outpace.models.checkpoint import TokenizerFiles
from outpace.models.tokenizer import Tokenizer
from outpace.types import DecodingStats, PromptReading, RequestOptions, Result, SamplingParams

VOCAB, EOS = 258, 257
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% if tools %}Write <tool_call>.\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.arguments | tojson }}{% endfor %}{{ '\n' }}{% endfor %}"
)


def byte_tokenizer(template: str | None) -> Tokenizer:
    """One token per byte."""
    vocab = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"])}
    rust = RustTokenizer(BPE(vocab, []))
    rust.add_special_tokens(["<s>", "</s>"])
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(TokenizerFiles(rust.to_str(), config | ({"chat_template": template} if template else {})))


@dataclass
class Asked:
    tokens: list[int]
    params: SamplingParams
    prediction: list[int]
    options: RequestOptions


@dataclass
class _Running:
    asked: Asked
    script: list[int]
    text: TextStream
    result: Result
    drafts: int = 0
    since: float = field(default_factory=time.perf_counter)


class FakeEngine:
    """`answer` says what to write for a request; it ends with the end-of-text token. While `hold` is set nothing is
    emitted (steps go on). `fail` is raised by the next step."""

    name, method, precision, width = "fake", "plain", "float32", 4

    def __init__(
        self,
        answer: Callable[[Asked], str] | None = None,
        template: str | None = TEMPLATE,
        max_running: int = 64,
        max_queue: int | None = None,
        context: int = 4096,
        step_s: float = 0.0005,
    ) -> None:
        self.tokenizer = byte_tokenizer(template)
        self.methods = ["plain", "suffix"]
        self.answer = answer or (lambda asked: f"Seed {asked.params.seed} says hello to the world.")
        self.asked: list[Asked] = []
        self.cancelled: list[int] = []
        self.hold = threading.Event()
        self.prepared = threading.Event()  # cleared: grammars take until it is set
        self.prepared.set()
        self.fail: Exception | None = None
        self.fail_cancel: Exception | None = None
        self.wrong_books = False
        self.checks = 0
        self.closed = False
        self.in_step: list[int] = []
        self.steps = 0
        self._max_running, self._max_queue, self._context, self._step_s = max_running, max_queue, context, step_s
        self._live: dict[int, _Running] = {}
        self._thread: int | None = None

    def _same_thread(self) -> None:
        me = threading.get_ident()
        assert self._thread in (None, me), "the engine is used by two threads"
        self._thread = me

    def max_new_tokens(self, prompt: Sequence[int]) -> int:
        if len(prompt) >= self._context:
            raise CapacityError(f"the prompt has {len(prompt)} tokens and leaves no room")
        return self._context - len(prompt)

    def prepare(self, params: SamplingParams) -> None:
        assert threading.get_ident() != self._thread, "a grammar is compiled by the thread that steps"
        assert self.prepared.wait(30)
        if params.regex == "(":
            raise GrammarError("regex='(': unclosed group")

    @property
    def idle(self) -> bool:
        return not self._live

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        prediction: str | Sequence[int] = (),
        options: RequestOptions | None = None,
    ) -> int:
        self._same_thread()
        assert params is not None and options is not None
        if not prompt:
            raise ParameterError("the prompt is empty: give at least one token")
        if max(prompt) >= VOCAB or min(prompt) < 0:
            raise ParameterError(f"token id {max(prompt)} is outside the model's vocabulary of {VOCAB} tokens")
        if len(prompt) + params.max_tokens > self._context:
            raise CapacityError(f"the prompt and max_tokens need more than {self._context} tokens")
        if options.method is not None and options.method not in self.methods:
            raise MethodError(f"method {options.method!r} is not offered here: there are plain and suffix")
        if self._max_queue is not None and len(self._live) >= self._max_running + self._max_queue:
            raise QueueFull("too many requests wait", 2.5)
        asked = Asked([int(t) for t in prompt], params, [int(t) for t in prediction], options)
        script = [*self.tokenizer.encode(self.answer(asked)), EOS]
        stats = DecodingStats(prompt_tokens=len(prompt))
        result = Result("", [], "stop", options.method or "plain", "identical", stats, [])
        if prediction:
            stats.prediction_accepted, stats.prediction_rejected = 3, 1
        if params.logprobs is not None:
            result.logprobs, result.top_logprobs = [], []
        if params.prompt_logprobs is not None or options.pooling is not None:
            result.prompt = reading(asked)
        self.asked.append(asked)
        self._live[len(self.asked)] = _Running(
            asked, script, TextStream(self.tokenizer.detokenizer(), params.stop), result
        )
        return len(self.asked)

    def step(self) -> list[StepEvent]:
        self._same_thread()
        time.sleep(self._step_s)
        self.steps += 1
        self.in_step = list(self._live)[: self._max_running]
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        if self.hold.is_set():
            return []
        return [self._advance(id) for id in self.in_step]

    def _advance(self, id: int) -> StepEvent:
        live = self._live[id]
        result, params, stats = live.result, live.asked.params, live.result.stats
        first = not result.token_ids
        left = params.max_tokens - len(result.token_ids)
        tokens, live.script = live.script[: min(1 if first else 2, left)], live.script[min(1 if first else 2, left) :]
        text, used = live.text.push([t for t in tokens if t != EOS])
        if live.text.stopped:
            tokens = tokens[:used]
        sources = ["suffix"] * (len(tokens) - 1) + ["target"]
        draft = None
        if not first:
            accepted = np.arange(len(tokens) - 1)
            draft = DraftTrace(np.array([*tokens[:1], 65]), np.array([-1, -1]), ["suffix", "suffix"], accepted)
            stats.steps += 1
            stats.drafted += 2
            stats.accepted += len(tokens) - 1
            stats.source("suffix").proposed += 2
            stats.source("suffix").accepted += len(tokens) - 1
        else:
            stats.time_to_first_token_s = time.perf_counter() - live.since
        stats.decode_s = time.perf_counter() - live.since
        result.token_ids += tokens
        result.sources += sources
        stats.tokens += len(tokens)
        event = StepEvent(id, tokens, sources, text, draft, None)
        if first:
            event.prompt = result.prompt
        if params.logprobs is not None:
            top = [(t, -0.5) for t in range(params.logprobs)]
            event.logprobs, event.top_logprobs = [-0.25] * len(tokens), [top] * len(tokens)
            assert result.logprobs is not None and result.top_logprobs is not None
            result.logprobs += event.logprobs
            result.top_logprobs += event.top_logprobs
        ended = live.text.stopped or tokens[-1] == EOS
        if ended or len(result.token_ids) == params.max_tokens:
            event.text += live.text.flush()
            result.finish_reason = "stop" if ended or live.text.stopped else "length"
            result.text, result.stopped_by = live.text.text, live.text.stopped_by
            event.result = result
            del self._live[id]
        return event

    def cancel(self, id: int) -> Result | None:
        self._same_thread()
        if self.fail_cancel is not None:
            raise self.fail_cancel
        live = self._live.pop(id, None)
        if live is None:
            return None
        self.cancelled.append(id)
        live.result.finish_reason = "cancelled"
        return live.result

    def metrics(self) -> dict[str, float]:
        return {"running": len(self._live), "waiting": 0, "steps": self.steps, "kv_pages": 64, "kv_pages_used": 0}

    def check_integrity(self) -> None:
        self.checks += 1
        assert not self.wrong_books, "pages are lost"

    def close(self) -> None:
        self.closed = True


def reading(asked: Asked) -> PromptReading:
    """Of a prompt: token i has the log-probability -i / 8, its likeliest others are 65 on; a vector of its length."""
    k, n = asked.params.prompt_logprobs, len(asked.tokens)
    vector = None if asked.options.pooling is None else np.array([n, 0, 0, 0.125 * n], dtype=np.float32)
    if k is None:
        return PromptReading(None, None, vector)
    top = [[(65 + j, -0.5 * (j + 1)) for j in range(k)] for _ in range(n - 1)]
    return PromptReading([-i / 8 for i in range(1, n)], top, vector)


def lines(stream: bytes) -> list[Any]:
    """The data of a stream's events; [DONE] as it is, comments left out."""
    found = []
    for block in stream.decode().split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found
