"""`LLM`: a model and a decoding method, ready to answer. The Python API; one thread at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from ..decoding.methods import split_spec
from ..decoding.modes.superposed import Suggestions, Superposed
from ..decoding.planners.costs import StepCosts
from ..errors import MethodError, ParameterError
from ..fields import checked, shown
from ..models.catalog import DEFAULT_MODEL
from ..models.config import ModelConfig
from ..models.decoder import Decoder
from ..models.tokenizer import Tokenizer
from ..registry import Method, method
from ..types import Precision, RequestOptions, Result, SamplingParams
from .assemble import assemble
from .bar import Bar
from .engine import Engine
from .heads import open_head
from .inboxes import Inboxes, Stream
from .load import LoadedModel, Progress, check_loaded, load_draft_model, load_model
from .measure import step_costs
from .metrics import metrics
from .needs import (
    DEFAULT_VERIFIER,
    LOSSLESS_METHOD,
    LOSSLESS_METHOD_WITH_DRAFT_MODEL,
    LOSSLESS_METHOD_WITH_HEAD,
    check_options,
    check_vocabulary,
    for_method,
)
from .options import EngineOptions, Model
from .prompts import Prompt, as_prompts, checked_tokens, token_ids
from .request import StepEvent


class LLM:
    """Loads a model and answers prompts with it.

    `model` is a known name, a GGUF file, a folder, a hub id, or the `loaded` of another LLM. How it is opened, how it
    decodes and what it may use are `EngineOptions`, given whole, one by one, or both (single ones then replace those
    of the record):

        LLM("smollm2-135m", method="suffix", max_batch=16)
        LLM("smollm2-135m", options=EngineOptions(max_batch=16))

    Method "auto" chooses step by step between lookup, token recycling, `draft_model` if there is one, and plain
    decoding, by measured costs; where the arithmetic cannot promise the same tokens (bfloat16 on CUDA) it is plain
    decoding: name a method there to have it all the same. `progress(what, done, total)` is called while something takes
    long.

    Raises ParameterError for an option that is out of range or contradicts a loaded model, MethodError if a method's
    needs are not met or options do not go together, ModelError if a model cannot be had.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LoadedModel = DEFAULT_MODEL,
        *,
        options: EngineOptions | None = None,
        progress: Progress | None = None,
        **given: Any,
    ) -> None:
        if not isinstance(options, EngineOptions | None):
            raise ParameterError(f"options={shown(options)} is of the wrong type: it must be EngineOptions")
        opened: str | LoadedModel = checked("model", model, Model())
        self.options = options = (options or EngineOptions()).changed(**given)
        judge = check_options(options)  # refuse before loading
        self._progress = progress
        if isinstance(opened, LoadedModel):
            check_loaded(opened, options.precision, options.threads, options.device)
            self.loaded = opened
        else:
            self.loaded = load_model(
                opened,
                precision=options.precision,
                device=options.device,
                threads=options.threads,
                kv_tokens=options.kv_tokens,
                progress=progress,
            )
        self.name = self.loaded.name  # by which responses call it; may be changed
        self.draft_loaded = self._open_draft()
        self.head = open_head(options.head, self.loaded)
        self.method = self._best_lossless() if options.method == "auto" else options.method
        self.planner = "fixed" if self.method == "plain" else options.chosen_planner
        self.verifier = DEFAULT_VERIFIER if options.verifier == "auto" else options.verifier
        chosen = options.changed(method=self.method, planner=self.planner)
        engine, self._drafter = assemble(self.loaded, self.draft_loaded, chosen, judge, self._costs, self.head)
        self._inboxes = Inboxes(engine)

    def _open_draft(self) -> LoadedModel | None:
        options, draft = self.options, self.options.draft_model
        if isinstance(draft, str):
            draft = load_draft_model(draft, self.loaded, options.draft_precision, options.threads, self._progress)
        elif draft is not None:
            check_loaded(draft, options.draft_precision, None, "auto", what="draft_precision")
        if draft is not None:
            check_vocabulary(self.loaded, draft, (options.method, *options.methods))
        return draft

    def _best_lossless(self) -> str:
        if self.draft_loaded is not None:
            return LOSSLESS_METHOD_WITH_DRAFT_MODEL
        if not self.loaded.decoder.row_invariant:
            return "plain"
        return LOSSLESS_METHOD if self.head is None else LOSSLESS_METHOD_WITH_HEAD

    def _costs(self) -> StepCosts:
        progress = self._progress
        note = None if progress is None else lambda done, total: progress("timing steps", done, total)
        return step_costs(self.loaded.decoder, self.loaded.name, note)

    @property
    def _engine(self) -> Engine:
        """Raises ParameterError when closed."""
        return self._inboxes.engine

    def explain(self) -> list[str]:
        """What the planner and the drafters did so far, and why, in lines for a person."""
        planner = self._engine.planner
        return [f"planner {self.planner}, method {self.method}", *planner.explain(), *self._drafter.explain()]

    # -- what it is --------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.loaded.decoder.config

    @property
    def decoder(self) -> Decoder:
        return self.loaded.decoder

    @property
    def precision(self) -> Precision:
        return self.loaded.decoder.precision

    @property
    def arithmetic(self) -> str:
        """The precision in words for people, as in "file (Q4_K, Q6_K)"."""
        formats = self.loaded.formats
        return f"{self.precision} ({', '.join(formats)})" if formats else self.precision

    @property
    def width(self) -> int:
        """Of the model's hidden states, and so of the vectors that `RequestOptions.pooling` gives."""
        return self.config.hidden_size

    @property
    def method_info(self) -> tuple[Method, ...]:
        """The registry's entry of each drafter in `method`."""
        return tuple(method(name, "drafter") for name in split_spec(self.method))

    def with_method(self, method: str, **changes: Any) -> LLM:
        """Another method on the same weights, with a KV cache of its own. Every other option is as here, unless it is
        named in `changes`, or `method` has no use for it: a draft model, and what plain decoding leaves no choice of
        (verifier, planner, most rows)."""
        options = for_method(self.options, method, self.draft_loaded, changes)
        return LLM(self.loaded, options=options, progress=self._progress)

    # -- answers -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
        prediction: str | Sequence[str] = "",
    ) -> list[Result]:
        """Answer one or many prompts in one batch; results in the order of the prompts.

        A string is continued as it is; messages ({"role": …, "content": …}) go through the model's chat template.
        `params` is one for all, or one for each, and so is `prediction`: text that the output is expected to repeat
        in large part (the code to be edited), which changes the speed but never the output. `progress` shows a bar on
        stderr. If one request is refused, or the call is interrupted, none of them goes on.
        """
        asked = as_prompts(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(asked)
        if len(each) != len(asked):
            raise ParameterError(f"{len(asked)} prompts but {len(each)} SamplingParams: give one, or one for each")
        expected = [prediction] * len(asked) if isinstance(prediction, str) else list(prediction)
        if len(expected) != len(asked):
            raise ParameterError(f"{len(asked)} prompts but {len(expected)} predictions: give one, or one for each")
        return self._results((self._add(*one) for one in zip(asked, each, expected, strict=True)), progress)

    def _results(self, queued: Iterable[int], progress: bool = False) -> list[Result]:
        """The results of requests with an inbox. `queued` adds them; if one is refused, none of them goes on."""
        ids: list[int] = []
        results: dict[int, Result] = {}
        try:
            for id in queued:
                ids.append(id)
            with Bar(len(ids), progress) as advance:
                while len(results) < len(ids):
                    self._inboxes.pump()
                    for id in ids:
                        for event in self._inboxes.take(id):
                            if event.error is not None:
                                raise event.error
                            if event.result is not None:
                                results[id] = event.result
                                advance()
        finally:
            for id in ids:
                if id not in results:
                    self._inboxes.cancel(id)
                self._inboxes.leave(id)
        return [results[id] for id in ids]

    def chat(self, messages: str | Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> Result:
        """Answer a conversation, or one message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate([messages], params)[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, prediction: str = "") -> Stream:
        """Answer one prompt step by step. Refusals are raised here, before the first step."""
        return Stream(self._inboxes, self._add(prompt, params, prediction))

    def superposed(
        self,
        prompt: Prompt,
        k: int = 3,
        params: SamplingParams | None = None,
        ngram_texts: Sequence[str] = (),
        **options: Any,
    ) -> Suggestions:
        """`k` different continuations of one prompt in about the time of one (decoding.modes.superposed). They are
        approximate: only with k = 1 is the draft that of greedy decoding. `ngram_texts` are texts of the kind that is
        being written; they help to tell the drafts apart."""
        engine = self._engine
        params = params if params is not None else SamplingParams(max_tokens=16)
        mode = Superposed(engine.decoder, self.tokenizer, k, ngram_texts, params.stop, **options)
        tokens, params = self.tokens(prompt), replace(params, stop=())
        [result] = self._results(self._inbox(engine.add(tokens, params, advance=mode)) for _ in range(1))
        return mode.found(result)

    def tokens(self, prompt: Prompt) -> list[int]:
        """The token ids that the model reads for a prompt."""
        return token_ids(self.tokenizer, prompt)

    def max_new_tokens(self, prompt: Prompt) -> int:
        """The largest `max_tokens` that fits behind a prompt; CapacityError if there is no room at all."""
        return self._engine.max_new_tokens(len(self.tokens(prompt)))

    # -- for servers: many requests, one loop that steps -----------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        prediction: str | Sequence[int] = "",
        options: RequestOptions | None = None,
    ) -> int:
        """Queue a request and return its id; `step` tells what becomes of it. `prediction` may be token ids as well.

        Raises what `generate` does, and QueueFull when too many wait, MethodError for a method that this LLM was not
        opened with (`methods`) or an exactness that cannot be had.
        """
        for name, given, kind in (("params", params, SamplingParams), ("options", options, RequestOptions)):
            if given is not None and not isinstance(given, kind):
                raise ParameterError(f"{name}={shown(given)} is of the wrong type: it must be {kind.__name__}")
        if options is not None and options.method in ("auto", self.options.method):
            if self.options.method != "auto" and options.method == "auto":
                raise MethodError(f"method 'auto' is not offered here, the default is {self.method!r}: name no method")
            options = replace(options, method=None)
        if isinstance(prediction, str):
            prediction = self.tokenizer.encode(prediction)
        expected = checked_tokens("prediction", prediction)
        return self._engine.add(self.tokens(prompt), params, expected, options)

    def prepare(self, params: SamplingParams) -> None:
        """Compile the grammar of `params`, if it has one: `submit` then does not hold up the steps of others. May be
        called from any thread. Raises GrammarError for one that does not compile."""
        self._engine.prepare(params)

    def step(self) -> list[StepEvent]:
        """One step of everybody; the events of submitted requests. None when `idle`.

        An exception is of the whole step: cancel the requests in `in_step`, the others go on.
        """
        return self._inboxes.step()

    def cancel(self, id: int) -> Result | None:
        """End a submitted request between steps. Returns what it has, or None if it was over."""
        return self._inboxes.cancel(id)

    @property
    def idle(self) -> bool:
        return self._engine.idle

    @property
    def in_step(self) -> list[int]:
        """The requests of the last step."""
        return self._engine.in_step

    @property
    def methods(self) -> list[str]:
        """What a request may name: the default first."""
        return list(dict.fromkeys([self.options.method, self.method, *self._engine.methods]))

    def metrics(self) -> dict[str, float]:
        """Plain numbers of this moment, and counts since the start."""
        return metrics(self._engine)

    # -- life --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back the KV cache. The weights stay as long as another LLM uses them. Safe to call twice."""
        self._inboxes.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_integrity(self) -> None:
        """Compare the books of the engine; AssertionError if they differ."""
        self._engine.check_integrity()

    def _add(self, prompt: Prompt, params: SamplingParams | None, prediction: str) -> int:
        """Queue a request with an inbox of its own."""
        return self._inbox(self.submit(prompt, params, prediction))

    def _inbox(self, id: int) -> int:
        self._inboxes.open(id)
        return id
