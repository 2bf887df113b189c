"""Two servers with OpenAI's API asked the same, greedily: is the text with speculation the text without? No torch.

A server that differs from itself when it is asked twice is distinguished from one that differs from the other.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ParameterError
from .audit_files import text_difference
from .evidence import Check, seen_one_in
from .workloads import Prompt

_SHOWN = 3
_LONGEST = 64 << 20  # bytes of an answer that are read


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server's /v1. `model` None: the first that it lists."""

    url: str
    model: str | None = None
    key: str | None = None
    timeout_s: float = 120.0

    def get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Raises OSError (of which urllib's errors are) or ValueError."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            return json.loads(answer.read(_LONGEST))

    def named(self) -> str:
        """The model that is asked. Raises ParameterError if the server names none."""
        if self.model:
            return self.model
        try:
            return str(self.get("/models")["data"][0]["id"])
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise ParameterError(
                f"{self.url} names no model ({error}): is it the address of a /v1? Else name one"
            ) from None


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy text. `tokens`: as the server counts them, 0 if it does not; `wrong`: what went wrong."""

    text: str = ""
    tokens: int = 0
    wrong: str = ""


def answer(endpoint: Endpoint, model: str, prompt: str, max_tokens: int) -> Answer:
    """A failed request is an answer that says so."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    try:
        got = endpoint.get("/chat/completions", body)
        choice, usage = got["choices"][0], got.get("usage") or {}
        message = choice["message"]
        # models that think aloud say part of it under another name
        text = (message.get("reasoning_content") or "") + (message["content"] or "")
        tokens = int(usage.get("completion_tokens") or 0)
        ended = choice.get("finish_reason")
    except urllib.error.HTTPError as error:
        return Answer(wrong=f"HTTP {error.code}: {error.read(300).decode(errors='replace')}")
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        return Answer(wrong=f"{type(error).__name__}: {error}")
    if ended is None:
        return Answer(wrong="the answer has no finish_reason: it was cut short")
    return Answer(text, tokens)


def check_urls(
    plain: Endpoint,
    other: Endpoint,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    at_once: int = 1,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Check]:
    """Greedy texts of `other` against those of `plain`, and both against themselves. `at_once`: requests under way.

    A failed request fails the check. Raises ParameterError when a server is not there.
    """
    total, texts = 3 * len(prompts), list[list[Answer]]()
    for n, endpoint in enumerate((plain, plain, other)):
        model = endpoint.named()
        with ThreadPoolExecutor(at_once if n else 1) as pool:
            got: list[Answer] = []
            answers = pool.map(lambda p, e=endpoint, m=model: answer(e, m, p.text, max_tokens), prompts)  # type: ignore[misc]
            for one in answers:
                got.append(one)
                progress(endpoint.url, n * len(prompts) + len(got), total)
            texts.append(got)
    first, again, others = texts
    alone = _compare(f"{plain.url} asked twice", prompts, first, again)
    if alone.numbers["differing"]:  # that is what it is, and no promise to the other
        note = f"{alone.evidence}; it does not repeat itself, so differences of the other prove nothing"
        alone = replace(alone, holds=not alone.numbers["failed"], evidence=note)
    return [alone, _compare(f"{other.url} against {plain.url}", prompts, first, others)]


def _compare(subject: str, prompts: Sequence[Prompt], a: Sequence[Answer], b: Sequence[Answer]) -> Check:
    failed, found, tokens = [], [], 0
    for prompt, expected, got in zip(prompts, a, b, strict=True):
        if expected.wrong or got.wrong:
            failed.append(f"{prompt.id}: {expected.wrong or got.wrong}")
        elif difference := text_difference(expected.text, got.text):
            found.append(f"{prompt.id}: {difference}")
        else:
            tokens += expected.tokens
    if not failed and not any(one.text for one in (*a, *b)):
        failed.append("every text is empty: there is nothing to compare")
    said = f"{len(found)} of {len(prompts)} texts differ, {len(failed)} requests failed"
    shown = [*failed, *found]
    said += "".join(f"; {one}" for one in shown[:_SHOWN])
    if tokens and not shown:
        said += f"; {tokens:,} tokens are the same: one wrong in {seen_one_in(tokens):,} would have been seen"
    numbers = {
        "differing": len(found), "failed": len(failed), "prompts": len(prompts), "differences": shown,
        "tokens": tokens, "wrong_token_in": 0 if shown else seen_one_in(tokens),
    }  # fmt: skip
    return Check("url", subject, not shown, said, numbers)
