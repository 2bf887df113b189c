"""One request from arrival to result: its state, when it ends, its statistics. No tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np

from ..cache.pages import PagedKVCache
from ..cache.swap import Swapped
from ..decoding.advance import Advance
from ..decoding.contracts import NOT_CACHED, Sequence
from ..decoding.drafters.rates import checked_nodes
from ..decoding.policies.policy import KVPolicy
from ..types import (
    Accepted,
    DecodingStats,
    Draft,
    Exactness,
    FinishReason,
    FloatArray,
    IntArray,
    Logits,
    PromptReading,
    RequestOptions,
    Result,
)
from .prediction import common_tokens
from .reading import PromptReader
from .text import TextStream

TARGET = "target"  # the source of tokens that were not drafted


@dataclass(slots=True, eq=False)
class DraftTrace:
    """A step's draft and which of it was accepted, to be shown."""

    tokens: IntArray  # [n]
    parents: IntArray  # [n]
    sources: list[str]  # [n]
    accepted: list[int]  # [a] nodes, from the root down


@dataclass(slots=True, eq=False)
class StepEvent:
    """What one step gave one request. `text` may lag behind `token_ids` (stop strings, unfinished characters).

    `error`: what went wrong with this request alone; it is over then, and `result` has what it got until then.
    """

    id: int
    token_ids: list[int]
    sources: list[str]  # per token: the drafter that proposed it, or "target"
    text: str
    draft: DraftTrace | None  # None for the token that prefill gives
    result: Result | None  # set by the last event of a request
    error: Exception | None = None
    logprobs: list[float] | None = None  # per token, if they were requested
    top_logprobs: list[list[tuple[int, float]]] | None = None
    prompt: PromptReading | None = None  # with the first token, if it was requested


@dataclass(slots=True, eq=False)
class Request:
    """State of one request inside the engine.

    `prefilled` counts tokens that were read, of the `to_read` that must be before it decodes: the prompt, or all its
    tokens when it was preempted and begins again. The last of them gives a token.
    """

    sequence: Sequence
    text: TextStream | None
    stop_ids: frozenset[int]
    method: str
    advance: Advance
    options: RequestOptions = field(default_factory=RequestOptions)
    reader: PromptReader | None = None  # gathers what is requested of its prompt
    policy: KVPolicy | None = None  # what is kept of its prompt
    queries: dict[int, FloatArray] = field(default_factory=dict)  # by layer, of the prompt's last rows, for the policy
    prefilled: int = 0
    to_read: int = field(init=False)
    swapped: Swapped | None = None  # its keys and values, while they are out of the cache
    alone: bool = True  # no step had rows of another sequence in it
    finish: FinishReason | None = None
    sources: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    arrived: float = field(default_factory=perf_counter)
    prefill_began: float = 0.0
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.to_read = self.sequence.prompt_length - self.unread

    @property
    def id(self) -> int:
        return self.sequence.id

    @property
    def stats(self) -> DecodingStats:
        return self.sequence.stats

    @property
    def unread(self) -> int:
        """Tokens at the end of its text that its first step reads."""
        return 0 if self.advance.reads_last else 1

    @property
    def common(self) -> list[int]:
        """Of its tokens those whose keys and values are the same in every request that begins with them."""
        sequence = self.sequence
        if self.policy is not None:  # which looks at the rows of its window
            return sequence.tokens[: max(sequence.prompt_length - self.policy.window, 0)]
        return sequence.tokens if self.advance.shares_output else sequence.tokens[: sequence.prompt_length]

    def window_of(self, rows: int) -> int:
        """Of the next `rows` rows of its prompt how many the policy wants the queries of; they are the last ones."""
        if self.policy is None or not self.policy.window:
            return 0
        end = min(self.prefilled + rows, self.sequence.prompt_length)
        return max(min(rows, end - (self.sequence.prompt_length - self.policy.window)), 0)

    def tap(self, queries: Mapping[int, Logits], rows: slice) -> None:
        """Keep those of a chunk that was run; before it counts as read."""
        wanted = self.window_of(rows.stop - rows.start)
        for layer, found in queries.items() if wanted else ():
            new = np.array(found[rows.stop - wanted : rows.stop], dtype=np.float32)
            old = self.queries.get(layer)
            self.queries[layer] = new if old is None else np.concatenate([old, new])

    def compact(self, cache: PagedKVCache) -> None:
        """Keep of its prompt, which was read to the end, what the policy says."""
        if self.policy is not None and self.prefilled == self.sequence.prompt_length and not cache.before(self.kv):
            queries, self.queries = self.queries, {}
            freed = self.policy.compact(cache, self.kv, queries)
            self.stats.kv_freed = freed

    @property
    def kv(self) -> int:
        """Handle in the KV cache while it runs."""
        return self.sequence.kv

    @property
    def cached(self) -> bool:
        return self.sequence.kv != NOT_CACHED

    @property
    def decoding(self) -> bool:
        return self.prefilled == self.to_read

    @property
    def fresh(self) -> bool:
        """Nothing was emitted yet."""
        return len(self.sequence.tokens) == self.sequence.prompt_length

    @property
    def shares(self) -> bool:
        """Whether what it leaves in the cache is kept for others: a text to be embedded begins no other."""
        return self.options.pooling is None

    @property
    def reading(self) -> PromptReader | None:
        """What gathers the prompt's results, while it is read for the first time."""
        return self.reader if self.fresh else None

    def begin_again(self, cached: int) -> None:
        """It has `cached` tokens in the KV cache, and must read the rest of its tokens."""
        self.queries.clear()
        self.prefilled, self.to_read = cached, len(self.sequence.tokens) - self.unread
        if self.reading is not None:
            self.reading.restart()

    def fork(self, sequence: Sequence, text: TextStream | None) -> Request:
        """Another request that goes on from here with `sequence`; `text` is new."""
        other = replace(
            self,
            sequence=sequence,
            text=text,
            reader=None,
            sources=[*self.sources],
            logprobs=[*self.logprobs],
            top_logprobs=[*self.top_logprobs],
        )
        other.to_read = self.to_read
        if text is not None:
            text.push(sequence.output)
        return other

    def keep(self, tokens: list[int]) -> tuple[int, str]:
        """How many of the accepted tokens stay, and the text they make; sets `finish` when one of them ends it.

        The token that ends the output is kept in `token_ids`. A stop token gives no text.
        """
        remaining = self.sequence.params.max_tokens - (len(self.sequence.tokens) - self.sequence.prompt_length)
        assert len(tokens) <= remaining, "the draft was longer than its budget"
        ended = None
        for i, token in enumerate(tokens):
            if token in self.stop_ids:
                ended = i
                break
        visible = tokens if ended is None else tokens[:ended]
        text = ""
        if self.text is not None:
            text, used = self.text.push(visible)
            if self.text.stopped:
                self.finish = "stop"
                return used, text
        if ended is not None:
            self.finish = "stop"
            return ended + 1, text
        if len(tokens) == remaining:
            self.finish = "length"
        return len(tokens), text

    def record(self, draft: Draft | None, path: list[int], accepted: Accepted, now: float) -> list[str]:
        """Count a committed step (`draft` None: none could be proposed). Returns the source of each token.

        `path` is all that the verifier accepted, `accepted` what of it was kept.
        """
        stats = self.stats
        kept = len(accepted.tokens)
        if draft is None and not stats.tokens:
            self.first_token = now
            stats.prefill_s = now - self.prefill_began
            stats.time_to_first_token_s = now - self.arrived
            sources = [TARGET] * kept
        elif draft is None:  # read again after it was preempted, or it does not draft
            stats.steps += 1
            stats.decode_s = now - self.first_token
            sources = [TARGET] * kept
        else:
            names = draft.sources
            drafted = [names[i] for i in path[:kept]]
            sources = drafted + [TARGET] * (kept - len(drafted))
            stats.steps += 1
            stats.drafted += len(names)
            stats.accepted += len(drafted)
            stats.decode_s = now - self.first_token
            if names:
                self._record_nodes(draft, drafted, accepted)
        stats.tokens += kept
        self.sources += sources
        if accepted.logprobs is not None:
            self.logprobs += accepted.logprobs.tolist()
        if accepted.top_logprobs is not None:
            self.top_logprobs += accepted.top_logprobs
        return sources

    def _record_nodes(self, draft: Draft, drafted: list[str], accepted: Accepted) -> None:
        """Count what became of a draft, by who proposed its nodes; `drafted`: of those that were kept."""
        stats, names = self.stats, draft.sources
        for name in names:
            stats.source(name).proposed += 1
        for name in drafted:
            stats.source(name).accepted += 1
        for node, depth, right in checked_nodes(draft, accepted.tokens):
            stats.source(names[node]).record(depth, right)

    def result(self, exactness: Exactness, notes: list[str]) -> Result:
        assert self.finish is not None
        expected, stats = self.sequence.prediction, self.stats
        stats.prediction_accepted = common_tokens(expected, self.sequence.output)
        stats.prediction_rejected = len(expected) - stats.prediction_accepted
        wants = self.sequence.params.logprobs is not None
        return Result(
            text=self.text.text if self.text is not None else "",
            token_ids=self.sequence.output,
            finish_reason=self.finish,
            method=self.method,
            exactness=exactness,
            stats=stats,
            sources=self.sources,
            logprobs=self.logprobs if wants else None,
            top_logprobs=self.top_logprobs if wants else None,
            notes=notes,
            stopped_by=None if self.text is None else self.text.stopped_by,
            prompt=None if self.reader is None else self.reader.result(),
        )


def truncate(accepted: Accepted, kept: int) -> Accepted:
    """The first `kept` tokens of an accepted path, as if the target had stopped there.

    A kept draft token at the end counts as the target's own: its KV is not wanted, it is the last token.
    """
    return Accepted(
        path=accepted.path[: kept - 1],
        tokens=accepted.tokens[:kept],
        logprobs=None if accepted.logprobs is None else accepted.logprobs[:kept],
        top_logprobs=None if accepted.top_logprobs is None else accepted.top_logprobs[:kept],
    )
