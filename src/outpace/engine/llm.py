"""`LLM`: a model and a decoding method, ready to answer. The Python API; one thread at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from ..decoding.contracts import Verifier
from ..decoding.methods import make_verifier, split_spec
from ..decoding.modes.superposed import Suggestions, suggest
from ..decoding.planners.costs import StepCosts
from ..errors import MethodError, ParameterError
from ..models.config import ModelConfig
from ..models.decoder import Decoder
from ..models.tokenizer import Tokenizer
from ..registry import Method, method
from ..types import Precision, RequestOptions, Result, SamplingParams
from .assemble import assemble
from .bar import Bar
from .engine import Engine, EngineConfig
from .inboxes import Inboxes, Stream
from .load import LoadedModel, Progress, load_draft_model, load_model, size_of_cache
from .measure import step_costs
from .metrics import metrics
from .needs import (
    LOSSLESS_METHOD,
    LOSSLESS_METHOD_WITH_DRAFT_MODEL,
    check_draft_precision,
    check_needs,
    check_planner,
    check_vocabulary,
    needs_draft_model,
)
from .prompts import Prompt, as_prompts, token_ids
from .request import StepEvent


class LLM:
    """Loads a model and answers prompts with it.

    model         a known name, a GGUF file, a folder, a hub id, or the `loaded` of another LLM
    draft_model   the same for a small model of the same vocabulary; only for methods that need one
    method        how tokens are drafted, `a+b` merges two and `a:option=value` sets what a method lets you set. "auto"
                  chooses step by step between lookup, token recycling, `draft_model` if there is one, and plain
                  decoding, by measured costs; where the arithmetic cannot promise the same tokens (bfloat16 on CUDA)
                  it is plain decoding: name a method there to have it all the same
    verifier      "auto" is "coupled": the same tokens as plain decoding, sampled ones too
    planner       how rows are shared between drafts: "fixed", "tetris" or "goodput"; "auto" is goodput with method
                  "auto" (step times are measured at first use, and kept), else fixed
    precision     "float32", "bfloat16", "int8" or "int4" (the last two on a CPU only); "auto" is int8 on a CPU and
                  bfloat16 on CUDA
    draft_precision  of the draft model; "auto" is the target's, but beside int8 it is int4, and int8 for prompts
    max_batch     sequences that decode at once; further prompts wait
    max_rows      most rows of one sequence in a step (its last token and the draft); by default 32 with the goodput
                  planner and 16 with the others
    kv_tokens     size of the KV cache; by default `max_batch` contexts as far as memory goes
    prefix_cache  keep keys and values of what was read and written, for requests that begin alike
    methods       further methods that single requests may ask for; "plain" always may be
    max_queue     requests that may wait; one more is refused with QueueFull. None: no limit
    max_step_s    seconds that a step may take while somebody decodes: prompts are read in smaller pieces
    swap_tokens   of requests that must make room, kept outside the cache; beyond that they are read again

    Raises MethodError if a method's needs are not met, ParameterError for values out of range, ModelError if a model
    cannot be had.
    """

    def __init__(
        self,
        model: str | LoadedModel = "smollm2-135m",
        *,
        draft_model: str | LoadedModel | None = None,
        method: str = "auto",
        verifier: str = "auto",
        planner: str = "auto",
        precision: str = "auto",
        draft_precision: str = "auto",
        threads: int | None = None,
        device: str = "auto",
        max_batch: int = 8,
        max_rows: int | None = None,
        kv_tokens: int | None = None,
        prefix_cache: bool = True,
        methods: Sequence[str] = (),
        max_queue: int | None = None,
        max_step_s: float | None = None,
        swap_tokens: int = 0,
        progress: Progress | None = None,
    ) -> None:
        wanted = {"max_batch": max_batch, "max_rows": max_rows, "kv_tokens": kv_tokens}
        given: dict[str, Any] = {name: n for name, n in wanted.items() if n is not None}
        serving: dict[str, Any] = {
            "prefix_cache": prefix_cache, "max_queue": max_queue, "step_s": max_step_s, "swap_tokens": swap_tokens
        }  # fmt: skip
        EngineConfig(**given, **serving)  # refuse before loading
        for other in methods:
            check_needs(other, needs_draft_model(other) and draft_model is not None)
        if method != "auto":
            check_needs(method, draft_model is not None)
        check_planner(planner, method)
        check_draft_precision(draft_precision, draft_model)
        self.verifier = "coupled" if verifier == "auto" else verifier
        judge = make_verifier(self.verifier)
        how: dict[str, Any] = {"precision": precision, "threads": threads, "device": device, "progress": progress}
        self.loaded = model if isinstance(model, LoadedModel) else load_model(model, **how)
        if isinstance(draft_model, str):
            draft_model = load_draft_model(draft_model, self.loaded, draft_precision, threads, progress)
        self.draft_loaded = draft_model
        if self.draft_loaded is not None:
            check_vocabulary(self.loaded, self.draft_loaded, method)
        if planner == "auto":
            planner = "goodput" if method == "auto" else "fixed"
        self.asked_method = method
        if method == "auto":
            method = self._best_lossless()
        self.method, self.planner = method, "fixed" if method == "plain" else planner
        self._told, self._max_rows = progress, max_rows
        rows = max_rows if max_rows is not None else 32 if self.planner == "goodput" else 16
        self._methods, self._serving = tuple(methods), serving
        self._open(judge, {"max_batch": max_batch, "max_rows": rows, "max_step_rows": max(32, rows)}, kv_tokens)

    def _best_lossless(self) -> str:
        if self.draft_loaded is not None:
            return LOSSLESS_METHOD_WITH_DRAFT_MODEL
        return LOSSLESS_METHOD if self.loaded.decoder.row_invariant else "plain"

    def _open(self, judge: Verifier, limits: dict[str, int], wanted: int | None) -> None:
        kv_tokens = size_of_cache(self.decoder, wanted, limits["max_batch"])
        engine, self._drafter = assemble(
            self.loaded,
            self.draft_loaded,
            EngineConfig(**{**limits, **self._serving, "kv_tokens": kv_tokens}),
            method=self.method,
            others=self._methods,
            verifier=judge,
            planner=self.planner,
            costs=self._costs,
        )
        self._inboxes = Inboxes(engine)
        self._limits, self._wanted = limits, wanted

    def _costs(self) -> StepCosts:
        told = self._told
        note = None if told is None else lambda done, total: told("timing steps", done, total)
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
    def name(self) -> str:
        return self.loaded.name

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
    def method_info(self) -> tuple[Method, ...]:
        """The registry's entry of each drafter in `method`."""
        return tuple(method(name, "drafter") for name in split_spec(self.method))

    def with_method(
        self,
        method: str,
        *,
        verifier: str | None = None,
        planner: str = "auto",
        max_batch: int | None = None,
        max_rows: int | None = None,
        kv_tokens: int | None = None,
    ) -> LLM:
        """Another method on the same weights, with a KV cache of its own. The draft model comes along if needed;
        what is not given is as here."""
        drafts = method == "auto" or needs_draft_model(method)
        return LLM(
            self.loaded,
            draft_model=self.draft_loaded if drafts else None,
            method=method,
            verifier=verifier if verifier is not None else self.verifier,
            planner=planner,
            max_batch=max_batch if max_batch is not None else self._limits["max_batch"],
            max_rows=max_rows if max_rows is not None else self._max_rows,
            kv_tokens=kv_tokens if kv_tokens is not None else self._wanted,
            prefix_cache=self._serving["prefix_cache"],
        )

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
        each = [params] * len(asked) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(asked):
            raise ParameterError(f"{len(asked)} prompts but {len(each)} SamplingParams: give one, or one for each")
        expected = [prediction] * len(asked) if isinstance(prediction, str) else list(prediction)
        if len(expected) != len(asked):
            raise ParameterError(f"{len(asked)} prompts but {len(expected)} predictions: give one, or one for each")
        ids: list[int] = []
        results: dict[int, Result] = {}
        try:
            for prompt, param, text in zip(asked, each, expected, strict=True):
                ids.append(self._add(prompt, param, text))
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
        return self.generate(messages, params)[0]

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
        """`k` different continuations of one prompt for about the price of one (decoding.modes.superposed). They are
        approximate: only with k = 1 is the draft that of greedy decoding. `ngram_texts` are texts of the kind that is
        being written; they help to tell the drafts apart."""
        decoder = self._engine.decoder
        params = params if params is not None else SamplingParams(max_tokens=16)
        return suggest(decoder, self.tokenizer, self.tokens(prompt), params, ngram_texts, k=k, **options)

    def tokens(self, prompt: Prompt) -> list[int]:
        """The token ids that the model reads for a prompt."""
        return token_ids(self.tokenizer, prompt)

    def room(self, prompt: Prompt) -> int:
        """The largest `max_tokens` that fits behind a prompt; CapacityError if there is no room at all."""
        return self._engine.room(len(self.tokens(prompt)))

    # -- for servers: many requests, one loop that steps -----------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        prediction: str = "",
        options: RequestOptions | None = None,
    ) -> int:
        """Queue a request and return its id; `step` tells what becomes of it.

        Raises what `generate` does, and QueueFull when too many wait, MethodError for a method that this LLM was not
        opened with (`methods`) or an exactness that cannot be had.
        """
        if options is not None and options.method in ("auto", self.asked_method):
            if self.asked_method != "auto" and options.method == "auto":
                raise MethodError(f"method 'auto' is not offered here, the default is {self.method!r}: name no method")
            options = replace(options, method=None)
        expected = self.tokenizer.encode(prediction) if prediction else []
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
        return list(dict.fromkeys([self.asked_method, self.method, *self._engine.methods]))

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
        id = self.submit(prompt, params, prediction)
        self._inboxes.open(id)
        return id
