"""What a client is told of results: choices, log-probabilities, usage, and how it was decoded. Plain dictionaries."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from .. import __version__
from ..types import Result
from .calls import Call as MadeCall
from .calls import new_id, read
from .logprobs import Shown
from .service import ServingEngine
from .submissions import Call

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop", "error": "stop"}


def head(kind: str, prefix: str, engine: ServingEngine) -> dict[str, Any]:
    """What every body and chunk of one response begins with. The fingerprint names what decides the tokens."""
    what = f"{__version__}|{engine.name}|{engine.precision}|{engine.method}"
    return {
        "id": f"{prefix}-{uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": engine.name,
        "system_fingerprint": f"op_{hashlib.sha256(what.encode()).hexdigest()[:12]}",
    }


def chat_body(call: Call, results: Sequence[Result], engine: ServingEngine) -> dict[str, Any]:
    """Of /v1/chat/completions."""
    choices = []
    for i, result in enumerate(results):
        message, reason = _message(call, result)
        logprobs = None
        if result.logprobs is not None:
            shown = Shown(engine.tokenizer, call.submissions[i].params)
            logprobs = {"content": shown.chat(shown.whole(result)), "refusal": None}
        choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": reason})
    return _with_figures(head("chat.completion", "chatcmpl", engine), choices, call, results)


def completion_body(call: Call, results: Sequence[Result], engine: ServingEngine) -> dict[str, Any]:
    """Of /v1/completions."""
    choices = []
    results = [call.answered(result) for result in results]
    for i, result in enumerate(results):
        logprobs = None
        shown, before = Shown(engine.tokenizer, call.submissions[i].params), ""
        parts = []
        if call.echo is not None:
            before = call.echo[i // call.n]
            if result.prompt is not None:
                parts.append(shown.prompt(call.submissions[i].tokens, result.prompt, len(before)))
        if result.logprobs is not None:
            parts.append(shown.legacy(shown.whole(result)))
            logprobs = {name: [item for part in parts for item in part[name]] for name in parts[0]}
        reason = FINISH[result.finish_reason]
        choices.append({"index": i, "text": before + result.text, "logprobs": logprobs, "finish_reason": reason})
    return _with_figures(head("text_completion", "cmpl", engine), choices, call, results)


def _message(call: Call, result: Result) -> tuple[dict[str, Any], str]:
    reader = call.reader()
    content: str | None = result.text
    calls: list[MadeCall] = []
    if reader is not None and call.tools is not None:
        text, calls = read(reader, result.text, cut=result.finish_reason == "length")
        content = text if text.strip() or not (calls or call.tools.forced) else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = [tool_call(new_id(), made.name, made.arguments) for made in calls]
    return message, finish_of(result, bool(calls) and calls[-1].complete)


def tool_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def finish_of(result: Result, called: bool) -> str:
    """Why a choice ended, as OpenAI says it. `called`: with a complete call."""
    reason = FINISH[result.finish_reason]
    return "tool_calls" if called and reason == "stop" else reason


def _with_figures(
    body: dict[str, Any], choices: list[dict[str, Any]], call: Call, results: Sequence[Result]
) -> dict[str, Any]:
    figures = [decoding(call, i, result) for i, result in enumerate(results)]
    own = {**(figures[0] if len(figures) == 1 else {"choices": figures}), **ignored(call)}
    return {**body, "choices": choices, "usage": usage(call, results), "outpace": own}


def usage(call: Call, results: Sequence[Result]) -> dict[str, Any]:
    """A prompt counts once, whatever `n`."""
    firsts = range(0, len(results), call.n)
    cached = sum(min(r.stats.cached_tokens for r in results[i : i + call.n]) for i in firsts)
    written = sum(len(r.token_ids) for r in results)
    return {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": call.prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(r.stats.prediction_accepted for r in results),
            "rejected_prediction_tokens": sum(r.stats.prediction_rejected for r in results),
            "reasoning_tokens": 0,
        },
    }


def decoding(call: Call, index: int, result: Result) -> dict[str, Any]:
    """`outpace` of a body, or of the last chunk of a choice: how it was decoded, and the seed that repeats it."""
    stats, params = result.stats, call.submissions[index].params
    listed = {} if params.logprobs is None else {"logprobs": "raw" if params.raw_logprobs else "processed"}
    return {
        "method": result.method,
        "exactness": result.exactness,
        "notes": result.notes,
        "seed": params.seed,
        **listed,
        "stats": {
            "tokens": stats.tokens,
            "steps": stats.steps,
            "mean_accepted": round(stats.mean_accepted, 4),
            "acceptance_rate": round(stats.acceptance_rate, 4),
            "tokens_per_s": round(stats.tokens_per_s, 3),
            "time_to_first_token_s": round(stats.time_to_first_token_s, 5),
            "queue_s": round(stats.queue_s, 5),
            "cached_tokens": stats.cached_tokens,
            "preemptions": stats.preemptions,
            "accepted_by_source": stats.accepted_by_source,
            "drafted_by_source": stats.drafted_by_source,
        },
    }


def ignored(call: Call) -> dict[str, list[str]]:
    """The fields that had no effect, if there are any."""
    return {"ignored": call.ignored} if call.ignored else {}
