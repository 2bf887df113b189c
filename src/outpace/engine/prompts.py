"""What a prompt may be, and the tokens that the model reads for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import ParameterError
from ..models.tokenizer import Tokenizer

#: Text to continue, token ids, or the messages of a chat
Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]


def token_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """A string is continued as it is; messages go through the model's chat template."""
    if isinstance(prompt, str):
        return tokenizer.prompt(prompt)
    if prompt and isinstance(prompt[0], Mapping):
        return tokenizer.chat(prompt)  # type: ignore[arg-type]
    return [int(t) for t in prompt]  # type: ignore[arg-type]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list. A list of numbers, or of messages, is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise ParameterError(f"a prompt is text, token ids or messages, not {prompts!r}")
    found = list(prompts)
    if found and all(isinstance(p, Mapping) for p in found):
        return [found]  # type: ignore[list-item]
    if found and all(hasattr(p, "__index__") for p in found):
        return [found]  # type: ignore[list-item]
    for p in found:
        if isinstance(p, Mapping) or hasattr(p, "__index__") or not isinstance(p, Sequence):
            raise ParameterError(f"a prompt is text, token ids or messages, not {p!r}")
    return found  # type: ignore[return-value]
