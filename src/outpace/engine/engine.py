"""The engine: requests in, steps, events out. One thread; the only place where a sequence grows.

step = admit -> plan rows -> propose, reserve, pack, forward, verify -> cut at stops -> commit -> observe -> events
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

from ..cache.pages import PAGE_SIZE, PagedKVCache
from ..decoding.contracts import Drafter, Verifier
from ..decoding.contracts import Sequence as TokenSequence
from ..decoding.grammar import Grammars, Matcher
from ..decoding.planners.fixed import Fixed
from ..decoding.planners.planner import Planner, Room
from ..errors import CapacityError, ParameterError
from ..models.decoder import Decoder
from ..types import DecodingStats, Exactness, Result, SamplingParams
from .admission import Admission
from .request import DraftTrace, Request, StepEvent, truncate
from .runner import Runner, Verified
from .text import Detokenizer, TextStream

MOST_ROWS = 4096  # of a step: beyond it nothing gains, and buffers grow with it


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. Rows are what a target step computes; a sequence's own row is one of them.

    Raises ParameterError for a value out of range.
    """

    max_batch: int = 8  # sequences that decode at once
    max_rows: int = 16  # rows of one sequence in a step: its last token and its draft
    max_step_rows: int = 32  # rows of all decoding sequences in a step; a sequence always has one
    prefill_rows: int = 512  # prompt rows of a step
    kv_tokens: int = 4096  # tokens that the KV cache holds, all sequences together

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value, most = getattr(self, name), MOST_ROWS if name.endswith("_rows") else None
            if value < 1 or (most is not None and value > most):
                allowed = "at least 1" if most is None else f"from 1 to {most}"
                raise ParameterError(f"{name}={value!r} is out of range: it must be {allowed}")


def new_cache(decoder: Decoder, config: EngineConfig) -> PagedKVCache:
    return PagedKVCache(decoder.new_storage(-(-config.kv_tokens // PAGE_SIZE)))


class Engine:
    """Runs requests through one decoder with one drafter and one verifier. Not thread-safe.

    `detokenizer` makes what turns one output into text; without it results have no text and stop strings are
    refused. `eos_ids` end an output beside those that the model's config names. After an exception from `step`
    cancel the requests: what their step had reserved is given back, other requests go on. `cache`: the one that the
    drafter was built with, if it drafts in the target's own cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        drafter: Drafter,
        verifier: Verifier,
        *,
        detokenizer: Callable[[], Detokenizer] | None = None,
        eos_ids: Iterable[int] = (),
        method: str | None = None,
        config: EngineConfig | None = None,
        cache: PagedKVCache | None = None,
        planner: Planner | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.config = config = config if config is not None else EngineConfig()
        self.decoder, self.verifier = decoder, verifier
        self.method = method if method is not None else drafter.name
        self.cache = new_cache(decoder, config) if cache is None else cache
        pages = self.cache.storage.num_pages
        self.planner = planner if planner is not None else Fixed()
        self._runner = Runner(decoder, self.cache, drafter, verifier, self.planner)
        self._admission = Admission(config.max_batch, pages, PAGE_SIZE, decoder.config.max_position)
        self._detokenizer, self._grammars = detokenizer, grammars
        self._eos_ids = frozenset(decoder.config.eos_ids) | frozenset(eos_ids)
        self._waiting: dict[int, Request] = {}
        self._running: dict[int, Request] = {}
        self._next_id = 0

    # -- requests ----------------------------------------------------------------------------------------------

    def add(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, prediction: Sequence[int] = ()
    ) -> int:
        """Queue a request; returns its id. `prediction`: tokens that the output is expected to repeat.

        Raises ParameterError for a prompt that is empty or for ids outside the vocabulary, GrammarError for a grammar
        that does not compile, CapacityError for a request that could never fit.
        """
        params = params if params is not None else SamplingParams()
        prompt = [int(t) for t in prompt_ids]
        vocab = self.decoder.config.vocab_size
        if not prompt:
            raise ParameterError("the prompt is empty: give at least one token (a start-of-text token will do)")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(t for t in prompt if not 0 <= t < vocab)
            raise ParameterError(f"token id {bad} is outside the model's vocabulary of {vocab} tokens")
        if params.stop and self._detokenizer is None:
            raise ParameterError("stop strings need a tokenizer; use stop_token_ids")
        named = [*params.stop_token_ids, *params.logit_bias]
        if named and max(named) >= vocab:
            raise ParameterError(
                f"logit_bias or stop_token_ids name token {max(named)}, which the model does not have: ids run from 0 "
                f"to {vocab - 1}"
            )
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self._eos_ids
        matcher = self._matcher(params, stop_ids)
        self._admission.add(self._next_id, len(prompt), params.max_tokens)
        id, self._next_id = self._next_id, self._next_id + 1
        self._waiting[id] = Request(
            sequence=TokenSequence(id, prompt, len(prompt), params, [int(t) for t in prediction], matcher=matcher),
            text=TextStream(self._detokenizer(), params.stop) if self._detokenizer is not None else None,
            stop_ids=stop_ids,
            method=self.method,
            stats=DecodingStats(prompt_tokens=len(prompt)),
        )
        return id

    def _matcher(self, params: SamplingParams, stop_ids: frozenset[int]) -> Matcher | None:
        if params.constraint is None:
            return None
        name = params.constraint[0]
        if self._grammars is None:
            raise ParameterError(f"{name} needs a tokenizer, and this engine has none: use logit_bias on token ids")
        if not stop_ids:
            raise ParameterError(
                f"{name} needs a token that ends the output, and the model has none: name one in stop_token_ids"
            )
        return self._grammars.matcher(params, stop_ids)

    def cancel(self, id: int) -> Result | None:
        """End a request now, between steps; its pages are free again. Returns what it has, or None if it is over."""
        request = self._running.pop(id, None)
        if request is None:
            request = self._waiting.pop(id, None)
        else:
            self._runner.end(request)
        self._admission.release(id)
        if request is None:
            return None
        request.finish = "cancelled"
        if request.text is not None:
            request.text.flush()
        return self._result(request)

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    # -- steps -------------------------------------------------------------------------------------------------

    def step(self) -> list[StepEvent]:
        """Run one packed step. Returns the events of requests that got tokens; none when idle."""
        self._admit()
        decoding = [r for r in self._running.values() if r.decoding]
        chunks = self._chunks()
        if not decoding and not chunks:
            return []
        verified = self._runner.forward(decoding, self._room(decoding), chunks)
        return [self._advance(v) for v in verified]

    def _admit(self) -> None:
        for id in self._admission.admit():
            request = self._running[id] = self._waiting.pop(id)
            request.prefill_began = perf_counter()
            self._runner.begin(request)

    def _chunks(self) -> list[tuple[Request, int]]:
        """Prompts to read on, in order of arrival, and how many rows of each."""
        chunks, left = [], self.config.prefill_rows
        for request in self._running.values():
            n = min(request.sequence.prompt_length - request.prefilled, left)
            if n > 0:
                chunks.append((request, n))
                left -= n
        return chunks

    def _room(self, decoding: list[Request]) -> Room:
        """For drafts: what is left of the step's rows, and for each sequence no more than could still be emitted."""
        most = self.config.max_rows - 1
        return Room(
            [min(r.remaining - 1, most) for r in decoding],
            max(self.config.max_step_rows - len(decoding), 0),
            [len(r.sequence.tokens) for r in decoding],
        )

    def _advance(self, verified: Verified) -> StepEvent:
        """Cut at what ends the request, commit, count, and tell."""
        request, draft = verified.request, verified.draft
        kept_count, text = request.keep(verified.accepted)
        kept = truncate(verified.accepted, kept_count)
        self._runner.commit(verified, kept)
        path = verified.accepted.path
        sources = request.record(draft, path.tolist(), kept, perf_counter())
        trace = None if draft is None else DraftTrace(draft.tokens, draft.parents, draft.sources, path[:kept_count])
        result = None
        if request.finish is not None:
            del self._running[request.id]
            self._runner.end(request)
            self._admission.release(request.id)
            if request.text is not None:
                text += request.text.flush()
                request.finish = "stop" if request.text.stopped else request.finish
            result = self._result(request)
        return StepEvent(request.id, kept.tokens.tolist(), sources, text, trace, result)

    # -- truth -------------------------------------------------------------------------------------------------

    def _result(self, request: Request) -> Result:
        exactness, notes = self.exactness(request.sequence.params, request.alone)
        return request.result(exactness, notes)

    def exactness(self, params: SamplingParams, alone: bool = True) -> tuple[Exactness, list[str]]:
        """What a result is worth, and why it is not more. `alone`: no step held another sequence's rows.

        `identical` rests on a decoder whose rows do not depend on each other. Without that, greedy output may
        part from plain decoding where two logits nearly tie; sampled output keeps its distribution, as far as
        the rounding of the logits goes.
        """
        declared = self.verifier.exactness
        plain = self.method == "plain" and alone  # then it is the reference itself
        if declared == "approximate" and self.method != "plain":
            return declared, [f"verifier {self.verifier.name} accepts drafts that plain decoding would not have chosen"]
        if declared == "approximate" or self.decoder.row_invariant or plain:
            return declared, []
        note = (
            f"{self.decoder.precision} on {self.decoder.device.type} rounds a row differently when other rows share "
            "its step, so tokens may differ from plain decoding where two logits nearly tie; "
            "the native CPU decoder does not"
        )
        return ("approximate" if params.greedy else "distribution"), [note]

    def check_integrity(self) -> None:
        """Compare the books of cache and admission with the requests; AssertionError if they differ."""
        self.cache.check_integrity()
        self._admission.check_integrity()
        for request in self._running.values():
            tokens = len(request.sequence.tokens) - 1 if request.decoding else request.prefilled
            assert self.cache.length(request.kv) == tokens
            assert self.cache.reserved(request.kv) == 0
        if not self._running:
            assert self.cache.free_pages == self.cache.storage.num_pages, "pages are lost"

    def room(self, prompt_tokens: int) -> int:
        """The largest max_tokens that a prompt of this length may ask for; CapacityError when there is none."""
        room = min(self.decoder.config.max_position, self.cache.storage.num_pages * PAGE_SIZE) - prompt_tokens
        if room < 1:
            raise CapacityError(
                f"the prompt has {prompt_tokens} tokens and leaves no room: the context is "
                f"{self.decoder.config.max_position} tokens, the KV cache holds "
                f"{self.cache.storage.num_pages * PAGE_SIZE}; shorten the prompt"
            )
        return room
