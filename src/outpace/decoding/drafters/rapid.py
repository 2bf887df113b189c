"""Drafting from a short, retrieved part of a long prompt."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import ParameterError
from ...models.decoder import Decoder
from ...registry import register
from ...types import FloatArray
from ..contracts import DrafterContext, Sequence
from .grown import Draws
from .sources import ModelSource, draft_model_of
from .specdec import SpecDec

_K1, _B = 1.2, 0.75  # the usual constants of BM25


def bm25(chunks: list[list[int]], query: list[int]) -> FloatArray:
    """How much each chunk of tokens has to do with the query, f32[chunks]. Robertson et al., Okapi at TREC-3."""
    term = {token: i for i, token in enumerate(dict.fromkeys(query))}
    counts = np.zeros((len(chunks), len(term)))
    for row, chunk in zip(counts, chunks, strict=True):
        for token in chunk:
            if token in term:
                row[term[token]] += 1
    holding = (counts > 0).sum(axis=0)
    idf = np.log(1 + (len(chunks) - holding + 0.5) / (holding + 0.5))
    lengths = np.array([len(chunk) for chunk in chunks])
    longer = 1 - _B + _B * lengths / lengths.mean()
    scores: FloatArray = (counts * (_K1 + 1) / (counts + _K1 * longer[:, None]) @ idf).astype(np.float32)
    return scores


def shorten(prompt: list[int], limit: int, chunk: int) -> list[int]:
    """At most `limit` tokens of a prompt: its head (a chunk), its tail (a quarter of the limit: the question), and of
    the chunks between them, in their order, those that score best against the tail. A short prompt stays whole."""
    if len(prompt) <= limit:
        return list(prompt)
    tail = len(prompt) - max(limit // 4, chunk)
    chunks = [prompt[at : min(at + chunk, tail)] for at in range(chunk, tail, chunk)]
    most = (limit - chunk - (len(prompt) - tail)) // chunk
    best = np.argsort(-bm25(chunks, prompt[tail:]), kind="stable")[:most]
    kept = [token for i in sorted(best.tolist()) for token in chunks[i]]
    return [*prompt[:chunk], *kept, *prompt[tail:]]


class RetrievedSource(ModelSource):
    """A draft model that reads `limit` tokens of each prompt, in chunks of `chunk`, and all of the output.

    Raises ParameterError for values out of range.
    """

    def __init__(self, decoder: Decoder, num_pages: int, vocab_size: int, limit: int, chunk: int) -> None:
        super().__init__(decoder, num_pages, vocab_size)
        if chunk < 1 or limit < 4 * chunk:
            raise ParameterError(
                f"prompt={limit} with chunk={chunk} is out of range: a chunk has at least 1 token, and the part of the "
                "prompt that the draft model reads at least 4 chunks"
            )
        self._limit, self._chunk = limit, chunk
        self._texts: dict[int, list[int]] = {}
        self._seen: dict[int, int] = {}  # tokens of the sequence that its text covers

    def begin(self, sequence: Sequence) -> None:
        super().begin(sequence)
        prompt = sequence.tokens[: sequence.prompt_length]
        self._texts[sequence.id], self._seen[sequence.id] = shorten(prompt, self._limit, self._chunk), len(prompt)

    def end(self, sequence: Sequence) -> None:
        super().end(sequence)
        self._texts.pop(sequence.id, None)
        self._seen.pop(sequence.id, None)

    def text(self, sequence: Sequence) -> list[int]:
        text = self._texts[sequence.id]
        text += sequence.tokens[self._seen[sequence.id] :]
        self._seen[sequence.id] = len(sequence.tokens)
        return text


@register(
    family="SPEC",
    title="Draft model over a retrieved part of a long prompt (RAPID)",
    paper="https://arxiv.org/abs/2502.20330",
    exactness="identical",
    needs=("draft model",),
    claim="more than 2x beyond 32K tokens",
)
class Rapid(SpecDec):
    """The chain of `specdec` from a draft model that reads a short part of a long prompt: its head, its end, and the
    chunks that BM25 finds closest to that end. Reading the prompt and each forward then cost the draft model little,
    whatever the prompt's length, so that even a model of the target's size can draft; the draft model's own context may
    be shorter than the prompt.

    The target reads everything and verifies, so its output is untouched. The paper also lets the draft model's
    distribution flow into the target's (its section 3.3), which changes the output and is left out here.

    Chen et al., "Long-Context Inference with Retrieval-Augmented Speculative Decoding", section 3.1. The paper
    retrieves by embeddings; BM25 over tokens needs no other model.

    Parameters: `prompt` tokens of the prompt that the draft model reads at most; `chunk` tokens that are kept or left
    out together; the others as in `specdec`. Raises ParameterError out of range.
    """

    name = "rapid"
    paper = "https://arxiv.org/abs/2502.20330"

    @classmethod
    def create(cls, context: DrafterContext, *, prompt: int = 1024, chunk: int = 64, **options: Any) -> Rapid:
        decoder = draft_model_of(context, cls.name)
        source = RetrievedSource(decoder, context.draft_pages, context.vocab_size, prompt, chunk)
        return cls(source, Draws.of(context), **options)
