"""The engine: requests in, steps, events out. One thread; the only place where a sequence grows.

step = start and preempt -> plan rows -> spans, reserve, pack, forward, judge -> cut at stops -> commit -> events
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

from ..cache.pages import PAGE_SIZE, PagedKVCache
from ..cache.prefix import PrefixTree
from ..decoding.advance import Advance
from ..decoding.contracts import NOT_CACHED, Drafter, Verifier
from ..decoding.contracts import Sequence as TokenSequence
from ..decoding.draft_verify import DraftVerify
from ..decoding.drafters.plain import Plain
from ..decoding.drafters.routed import Routed
from ..decoding.grammar import Grammars, Matcher
from ..decoding.methods import make_policy
from ..decoding.planners.fixed import Fixed
from ..decoding.planners.planner import Planner
from ..errors import CapacityError, MethodError, ParameterError
from ..models.decoder import Decoder
from ..types import RANKS, DecodingStats, Exactness, RequestOptions, Result, SamplingParams
from .exactness import exactness
from .jobs import Job, Preempt, SchedulerLimits, Start
from .load import size_of_cache
from .memory import KVMemory
from .needs import check_policy
from .options import EngineOptions
from .reading import PromptReader
from .request import DraftTrace, Request, StepEvent, truncate
from .rows import StepSeconds
from .runner import Part, Runner
from .scheduler import Scheduler
from .text import Detokenizer, TextStream


def new_cache(decoder: Decoder, options: EngineOptions) -> PagedKVCache:
    """As many whole pages as `kv_tokens` take, or as many as memory allows."""
    tokens = size_of_cache(decoder, options.kv_tokens, options.max_batch)
    return PagedKVCache(decoder.new_storage(-(-tokens // PAGE_SIZE)))


class Engine:
    """Runs requests through one decoder with one verifier. Not thread-safe.

    `detokenizer` makes what turns one output into text; without it results have no text and stop strings are
    refused. `eos_ids` end an output beside those that the model's config names. `cache`: the one that the drafter was
    built with, if it drafts in the target's own cache. `methods`: further drafters, by the names under which requests
    may ask for them. `step_seconds(rows, context)`: the measured time of a step, for `max_step_s`.

    What goes wrong with one request alone ends that request, with an event that says so. An exception from `step` is
    of the whole step: cancel the requests in `in_step`; what they had reserved is given back, others go on.
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
        options: EngineOptions | None = None,
        cache: PagedKVCache | None = None,
        planner: Planner | None = None,
        grammars: Grammars | None = None,
        methods: Mapping[str, Drafter] | None = None,
        step_seconds: StepSeconds | None = None,
    ) -> None:
        self.options = options = options if options is not None else EngineOptions()
        self.decoder, self.verifier = decoder, verifier
        self.method = method if method is not None else drafter.name
        self.cache = new_cache(decoder, options) if cache is None else cache
        self.planner = planner if planner is not None else Fixed()
        self.policy = None if options.kv is None else make_policy(options.kv)
        if self.policy is not None:
            check_policy(decoder, self.cache, options)
        self.methods = {"plain": Plain(), **(methods or {})}
        self.advance = DraftVerify(Routed(drafter, self.methods), verifier, self.planner)
        self._runner = Runner(decoder, self.cache)
        self._detokenizer, self._grammars = detokenizer, grammars
        self._eos_ids = frozenset(decoder.config.eos_ids) | frozenset(eos_ids)
        self._requests: dict[int, Request] = {}
        self.prefixes = PrefixTree(self.cache) if options.prefix_cache else None
        self.scheduler = Scheduler(
            SchedulerLimits.of(options, self.cache.storage.num_pages, PAGE_SIZE, decoder.config.max_position),
            KVMemory(self.cache, self.prefixes, self._requests),
            perf_counter,
            step_seconds,
        )
        self.in_step: list[int] = []  # requests of the last step
        self.steps = self.rows = 0  # so far; rows of prompts and of drafts included
        self._next_id = 0

    # -- requests ----------------------------------------------------------------------------------------------

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        prediction: Sequence[int] = (),
        options: RequestOptions | None = None,
        advance: Advance | None = None,
    ) -> int:
        """Queue a request; returns its id. `prediction`: tokens that the output is expected to repeat. `advance`: its
        way to advance, if it is not the engine's own.

        Raises ParameterError for a prompt that is empty or for ids outside the vocabulary, GrammarError for a grammar
        that does not compile, CapacityError for a request that could never fit, QueueFull when too many wait,
        MethodError for a method that is not offered or an exactness that cannot be had, and what `advance` refuses.
        """
        advance = advance if advance is not None else self.advance
        params = params if params is not None else SamplingParams()
        options = options if options is not None else RequestOptions()
        prompt = [int(t) for t in prompt_ids]
        self._check(prompt, params, options, advance)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self._eos_ids
        method = "" if options.method in (None, self.method) else str(options.method)
        sequence = TokenSequence(
            self._next_id,
            prompt,
            len(prompt),
            params,
            [int(t) for t in prediction],
            method=method,
            owner=options.owner,
            matcher=self._matcher(params, stop_ids),
            stop_ids=stop_ids,
            stats=DecodingStats(prompt_tokens=len(prompt)),
        )
        request = Request(
            sequence=sequence,
            text=self._text(params),
            stop_ids=stop_ids,
            method=(method or self.method) if advance is self.advance else advance.name,
            advance=advance,
            options=options,
            policy=self.policy,
            reader=self._reader(prompt, params, options),
        )
        job = self._job(request)
        job.group = options.group
        if request.reader is not None:
            job.whole, job.logits = True, request.reader.wants_logits
        self.scheduler.add(job)
        self._requests[request.id] = request
        self._next_id += 1
        return request.id

    def fork(self, id: int, seeds: Sequence[int]) -> list[int]:
        """Requests that go on from where a decoding one is now, one for each seed, and share its keys and values as far
        as they are equal. Their results begin with what it has written. Returns their ids.

        Raises ParameterError for a request that does not decode, CapacityError when more would run than may; then
        none of them is made.
        """
        parent, forks = self._requests.get(id), list[int]()
        if parent is None or not parent.cached or not parent.decoding or parent.fresh:
            raise ParameterError(f"request {id} cannot be forked: it has written nothing yet, waits or is over")
        try:
            for seed in seeds:
                params = replace(parent.sequence.params, seed=seed)
                matcher = self._matcher(params, parent.stop_ids)
                request = parent.fork(parent.sequence.fork(self._next_id, params, matcher), self._text(params))
                self.scheduler.fork(id, self._job(request))
                self.cache.rollback(parent.kv)
                request.sequence.kv = self.cache.fork(parent.kv)
                self._requests[request.id] = request
                self._next_id += 1
                forks.append(request.id)
                request.advance.begin(request.sequence)
        except BaseException:
            for fork in forks:
                self.cancel(fork)
            raise
        return forks

    def _job(self, request: Request) -> Job:
        """A request as the scheduler sees it."""
        sequence, options, advance = request.sequence, request.options, request.advance
        tokens = sequence.prompt_length, sequence.params.max_tokens
        job = Job(request.id, *tokens, options.owner, options.priority, max_draft=options.max_draft)
        if request.method == "plain" or advance is not self.advance:
            job.max_draft = 0
        job.rows, job.ahead = advance.rows, request.unread
        job.pause = sequence.prompt_length if self.policy is not None else 0
        return job

    def _text(self, params: SamplingParams) -> TextStream | None:
        if self._detokenizer is None:
            return None
        return TextStream(self._detokenizer(), params.stop, params.min_tokens)

    def _check(self, prompt: list[int], params: SamplingParams, options: RequestOptions, advance: Advance) -> None:
        """Refuse what cannot be done."""
        advance.check(params)
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
        if advance.rows > self.options.rows:
            raise ParameterError(f"{advance.name} takes {advance.rows} rows of a step: raise max_rows to as many")
        if not advance.reads_last and (params.prompt_logprobs is not None or options.pooling is not None):
            raise ParameterError(f"{advance.name} gives nothing of its prompt: leave prompt_logprobs and pooling out")
        method = options.method if options.method is not None else self.method
        if method != self.method and method not in self.methods:
            offered = ", ".join(dict.fromkeys([self.method, *self.methods]))
            raise MethodError(f"method {method!r} is not offered here; there are: {offered}")
        if options.exactness is not None:
            alone = self.options.max_batch == 1
            declared, notes = self._exactness(params, method, alone, advance)
            if RANKS.index(declared) > RANKS.index(options.exactness):
                why = f": {notes[0]}" if notes else f" (verifier {self.verifier.name})"
                raise MethodError(
                    f"exactness {options.exactness!r} cannot be had with method {method!r} here, only {declared!r}{why}"
                )

    def prepare(self, params: SamplingParams) -> None:
        """Compile the grammar of `params`, if it has one, so that `add` need not. The only method, beside
        `max_new_tokens`, that other threads may call. Raises GrammarError, and ParameterError without a tokenizer or
        the library."""
        if params.constraint is not None:
            if self._grammars is None:
                name = params.constraint[0]
                raise ParameterError(f"{name} needs a tokenizer, and this engine has none: use logit_bias on token ids")
            self._grammars.prepare(params.constraint)

    def _matcher(self, params: SamplingParams, stop_ids: frozenset[int]) -> Matcher | None:
        if params.constraint is None:
            return None
        self.prepare(params)
        assert self._grammars is not None
        if not stop_ids:
            raise ParameterError(
                f"{params.constraint[0]} needs a token that ends the output, and the model has none: name one in "
                "stop_token_ids"
            )
        return self._grammars.matcher(params, stop_ids)

    def _reader(self, prompt: list[int], params: SamplingParams, options: RequestOptions) -> PromptReader | None:
        if params.prompt_logprobs is None and options.pooling is None:
            return None
        return PromptReader(prompt, params.prompt_logprobs, options.pooling, self.decoder.final_norm)

    def cancel(self, id: int) -> Result | None:
        """End a request now, between steps; its pages are free again. Returns what it has, or None if it is over."""
        request = self._requests.get(id)
        if request is None:
            return None
        self._end(request)
        request.finish = "cancelled"
        if request.text is not None:
            request.text.flush()
        return self._result(request)

    @property
    def idle(self) -> bool:
        return not self._requests

    # -- steps -------------------------------------------------------------------------------------------------

    def step(self) -> list[StepEvent]:
        """Run one packed step. Returns the events of requests that got tokens; none when idle."""
        self.in_step, events = [], []
        for start in self.scheduler.admit():
            try:
                self._start(start)
            except Exception as error:
                events.append(self._failed(self._requests[start.id], error))
        plan = self.scheduler.plan()
        for preempt in plan.preempt:
            self._preempt(preempt)
        decoding = [self._requests[id] for id in plan.decoding]
        chunks = [(self._requests[id], rows) for id, rows in plan.chunks]
        self.in_step = [*plan.decoding, *(id for id, _ in plan.chunks)]
        if plan.empty:
            return events
        began = perf_counter()
        parts = self._runner.forward(decoding, chunks, plan)
        if decoding and chunks:
            self.scheduler.took(self._runner.rows, perf_counter() - began)
        self.steps += 1
        self.rows += self._runner.rows
        for request, rows in chunks:
            self.scheduler.prefilled(request.id, rows)
            if self.prefixes is not None and request.decoding and request.fresh and request.shares:
                self.prefixes.insert(request.sequence.owner, request.sequence.tokens[: request.to_read], request.kv)
            request.compact(self.cache)
        return [*events, *filter(None, map(self._advance, parts))]

    def _start(self, start: Start) -> None:
        request = self._requests[start.id]
        if not request.stats.preemptions:
            request.prefill_began = perf_counter()
            request.stats.queue_s = request.prefill_began - request.arrived
        if start.swapped:
            assert request.swapped is not None, "what was swapped out comes back"
            request.sequence.kv, request.swapped = self.cache.swap_in(request.swapped), None
        else:
            request.sequence.kv, cached = self.cache.new(), 0
            if self.prefixes is not None and start.cached:
                cached = self.prefixes.attach(request.sequence.owner, request.common, request.kv)
            request.begin_again(cached)
            if not request.stats.preemptions:
                request.stats.cached_tokens = cached
        request.advance.begin(request.sequence)
        self.scheduler.started(request.id, self.cache.length(request.kv))

    def _preempt(self, preempt: Preempt) -> None:
        """Give a request's pages back, and what an open region holds."""
        request = self._requests[preempt.id]
        request.stats.preemptions += 1
        request.advance.pause(request.sequence)
        self.cache.rollback(request.kv)
        if preempt.how == "swap":
            request.swapped = self.cache.swap_out(request.kv)
        else:
            self._share(request)
            self.cache.free(request.kv)
        request.sequence.kv = NOT_CACHED

    def _share(self, request: Request) -> None:
        """Keep what a request leaves in the cache for others of its owner, until its pages are needed."""
        if self.prefixes is not None and request.cached and request.shares and not self.cache.before(request.kv):
            common = request.common[: self.cache.length(request.kv)]
            self.prefixes.insert(request.sequence.owner, common, request.kv, final=True)

    def _end(self, request: Request) -> None:
        """The request is over, however it ended. Safe at any moment outside a forward."""
        del self._requests[request.id]
        self.scheduler.finished(request.id)
        if request.swapped is not None:
            self.cache.discard(request.swapped)
            request.swapped = None
        if request.cached:
            self.cache.rollback(request.kv)
            self._share(request)
        self._runner.end(request)

    def _advance(self, part: Part) -> StepEvent | None:
        """Cut at what ends the request, commit, count, and make the event. An error here is this request's own."""
        request = part.request
        try:
            if part.error is not None:
                raise part.error
            return self._commit(part)
        except Exception as error:
            return self._failed(request, error)

    def _failed(self, request: Request, error: Exception) -> StepEvent:
        if request.id in self._requests:
            self._end(request)
        request.finish = "error"
        return StepEvent(request.id, [], [], "", None, self._result(request), error)

    def _commit(self, part: Part) -> StepEvent | None:
        request, draft, accepted = part.request, part.work.draft, part.outcome.accepted
        if not part.judged:  # a chunk of a text that goes on
            self._runner.commit(part, accepted)
            return None
        kept_count, text = request.keep(accepted.tokens)
        kept = accepted if kept_count == len(accepted.tokens) else truncate(accepted, kept_count)
        if part.outcome.finished and request.finish is None:
            request.finish = "stop"
        self._runner.commit(part, kept)
        if kept_count:
            self.scheduler.advanced(request.id, kept_count)
        sources = request.record(draft, accepted.path, kept, perf_counter())
        trace = None
        if draft is not None:
            trace = DraftTrace(draft.tokens, draft.parents, draft.sources, accepted.path[:kept_count])
        result = None
        if request.finish is not None:
            self._end(request)
            if request.text is not None:
                text += request.text.flush()
                request.finish = "stop" if request.text.stopped else request.finish
            result = self._result(request)
        elif not kept_count:
            return None
        event = StepEvent(request.id, kept.tokens, sources, text, trace, result)
        if request.sequence.params.logprobs is not None and kept.logprobs is not None:
            event.logprobs, event.top_logprobs = kept.logprobs.tolist(), kept.top_logprobs
        if request.reader is not None and request.stats.tokens == kept_count:
            event.prompt = request.reader.result()
        return event

    # -- results -----------------------------------------------------------------------------------------------

    def _result(self, request: Request) -> Result:
        params = request.sequence.params
        kept = request.stats.kv_freed > 0
        return request.result(*self._exactness(params, request.method, request.alone, request.advance, kept))

    def _exactness(
        self, params: SamplingParams, method: str, alone: bool, advance: Advance, kept: bool = True
    ) -> tuple[Exactness, list[str]]:
        """`kept`: whether the KV policy, if there is one, gave anything up."""
        if self.policy is not None and kept:
            return "approximate", [f"{self.policy.says()} are kept"]
        if advance is not self.advance:
            return advance.exactness, []
        return exactness(self.decoder, self.verifier, params, method, alone)

    def check_integrity(self) -> None:
        """Compare the counters of cache, prefix tree and scheduler with the requests; AssertionError if they differ."""
        self.cache.check_integrity()
        self.scheduler.check_integrity()
        for request in self._requests.values():
            if request.cached:
                tokens = len(request.sequence.tokens) - 1 if request.decoding else request.prefilled
                assert self.cache.length(request.kv) == tokens
                assert not self.cache.reserved(request.kv) or request.advance is not self.advance
        if self.prefixes is not None:
            self.prefixes.check_integrity()
        if not self._requests:
            assert self.cache.available_pages == self.cache.storage.num_pages, "pages are lost"

    def max_new_tokens(self, prompt_tokens: int) -> int:
        """The largest max_tokens that a prompt of this length may ask for; CapacityError when there is none."""
        room = min(self.decoder.config.max_position, self.cache.storage.num_pages * PAGE_SIZE) - prompt_tokens
        if room < 1:
            raise CapacityError(
                f"the prompt has {prompt_tokens} tokens and leaves no room for an answer: the context is "
                f"{self.decoder.config.max_position} tokens, the KV cache holds "
                f"{self.cache.storage.num_pages * PAGE_SIZE}; shorten the prompt"
            )
        return room
