"""Teacher forcing: the target's logits for given tokens, by plain prefill. Nothing is drafted or sampled.

Shapes: `S` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..cache.pages import PAGE_SIZE, PagedKVCache
from ..errors import CapacityError, ParameterError
from ..models.batch import Span, pack
from ..models.decoder import Decoder
from ..types import FloatArray

CHUNK = 512


def forced_logits(decoder: Decoder, tokens: Sequence[int], chunk: int = CHUNK) -> Iterator[torch.Tensor]:
    """Raw logits after every token, in pieces f32[<= chunk, V]; each is valid until the next is requested.

    Raises ParameterError for an empty sequence, CapacityError for one longer than the model's context.
    """
    yield from _forward(decoder, tokens, chunk, every_row=True)


def last_logits(decoder: Decoder, tokens: Sequence[int], chunk: int = CHUNK) -> FloatArray:
    """Raw logits after the last token alone, a copy on the host. f32[V]"""
    *_, last = _forward(decoder, tokens, chunk, every_row=False)
    return last[-1].detach().to("cpu", torch.float32).numpy().copy()


def _forward(decoder: Decoder, tokens: Sequence[int], chunk: int, every_row: bool) -> Iterator[torch.Tensor]:
    size = len(tokens)
    if not size:
        raise ParameterError("there are no tokens to read: give at least one")
    if size > decoder.config.max_position:
        raise CapacityError(
            f"{size} tokens do not fit the model's context of {decoder.config.max_position}: read them in windows"
        )
    cache = PagedKVCache(decoder.new_storage(-(-size // PAGE_SIZE)))
    sequence = cache.new()
    for start in range(0, size, chunk):
        part = np.asarray(tokens[start : start + chunk], dtype=np.int64)
        cache.reserve(sequence, len(part))
        ends = start + len(part) == size
        wanted: Literal["all", "last", "none"] = "all" if every_row else "last" if ends else "none"
        span = Span(part, cache.length(sequence), logits=wanted)
        logits = decoder.forward(pack([span], cache.page_tables([sequence])), cache.storage).logits
        cache.commit(sequence, range(len(part)))
        if wanted != "none":
            yield logits


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`nll` is the sum of negative log-likelihoods in nats over `tokens` predictions."""

    tokens: int
    nll: float

    @property
    def value(self) -> float:
        return float(np.exp(self.nll / self.tokens))


def perplexity(
    decoder: Decoder, tokens: Sequence[int], *, window: int = 2048, chunk: int = CHUNK, bos: int | None = None
) -> Iterator[Perplexity]:
    """Perplexity over disjoint windows; yields the running total after each window.

    Every window starts with an empty cache (and `bos`, when the model has one), so its first token is not predicted
    unless `bos` is given. Raises ParameterError when there is nothing to predict.
    """
    if window < 2 or len(tokens) < 2:
        raise ParameterError("perplexity needs at least two tokens and a window of at least two")
    parts = [list(tokens[start : start + window]) for start in range(0, len(tokens), window)]
    return of_windows(decoder, parts if bos is None else [[bos, *part] for part in parts], chunk=chunk)


def of_windows(
    decoder: Decoder, windows: Sequence[Sequence[int]], *, skip: int = 0, chunk: int = CHUNK
) -> Iterator[Perplexity]:
    """Perplexity over texts of their own. Of each, the first `skip` predictions, which have little to go by, do not
    count."""
    count, nll = 0, 0.0
    for given in windows:
        if len(given) < 2 + skip:
            continue
        done = 0
        for logits in forced_logits(decoder, given[:-1], chunk):
            first = min(max(skip - done, 0), len(logits))
            answers = torch.as_tensor(given[done + first + 1 : done + 1 + len(logits)], device=logits.device)
            # float64 sums: the comparison of precisions must not be one of summation orders
            scores = logits[first:].float()
            norm = torch.logsumexp(scores.double(), dim=-1)
            chosen = scores.gather(1, answers[:, None])[:, 0].double()
            nll += float((norm - chosen).sum())
            count += len(scores)
            done += len(logits)
        yield Perplexity(count, nll)
