"""What verifiers share: walking down a tree with the sampler's history and log-probabilities in step."""

from __future__ import annotations

from types import TracebackType

import numpy as np

from ...types import Accepted, FloatArray
from .. import sampling
from ..contracts import Sequence
from ..outputs import TargetOutputs
from ..sampling import host_row


def target_row(outputs: TargetOutputs, node: int) -> FloatArray:
    """Raw logits f32[V] of the target's answer after `node` (NO_PARENT: after the last committed token)."""
    return host_row(outputs.logits(node + 1))


class Recorder:
    """Collects a walk's tokens. As a context manager it leaves the sequence's history as it found it."""

    def __init__(self, sequence: Sequence) -> None:
        self.params = sequence.params
        self.history = sequence.history if sequence.edits_logits else None
        self.position = len(sequence.tokens)  # of the token to be chosen next
        self._length = len(sequence.tokens)
        self._path: list[int] = []
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[list[tuple[int, float]]] = []
        self._raw: list[tuple[FloatArray, FloatArray]] = []  # processed logits and what they were made of

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.history is not None:
            self.history.truncate(self._length)

    def process(self, logits: FloatArray) -> FloatArray:
        processed = sampling.process(logits, self.params, self.history)
        if self.params.raw_logprobs:
            self._raw.append((processed, logits))
        return processed

    def choose(self, processed: FloatArray) -> int:
        return sampling.choose(processed, self.params, self.position)

    def emit(self, processed: FloatArray, token: int, node: int | None) -> None:
        """`token` was chosen from `processed`; `node` is the draft node that carried it, None if none did."""
        if self.params.logprobs is not None:
            row = processed
            if self.params.raw_logprobs:
                row = next(raw for made, raw in reversed(self._raw) if made is processed)
            chosen, top = sampling.logprobs(row, token, self.params.logprobs)
            self._logprobs.append(chosen)
            self._top.append(top)
        if self.history is not None:
            self.history.append(token)
        self._tokens.append(token)
        if node is not None:
            self._path.append(node)
        self.position += 1

    def cut(self, n: int) -> None:
        """Forget all but the first `n` tokens emitted."""
        del self._path[n:], self._tokens[n:], self._logprobs[n:], self._top[n:]
        self.position = self._length + n
        if self.history is not None:
            self.history.truncate(self.position)

    def move_to(self, tokens: list[int]) -> None:
        """Go to where `process` sees `tokens` behind the committed ones. Nothing may be emitted yet."""
        if self.history is not None:
            self.history.truncate(self._length)
            for token in tokens:
                self.history.append(token)

    def result(self) -> Accepted:
        done = Accepted(self._path, self._tokens)
        if self.params.logprobs is not None:
            done.logprobs = np.array(self._logprobs, dtype=np.float32)
            done.top_logprobs = self._top
        return done
