"""From models and names to an engine: the cache, the drafters, the planner, and what each is given of the others."""

from __future__ import annotations

from collections.abc import Callable

from ..cache.storage import PAGE_SIZE
from ..decoding.contracts import Drafter, DrafterContext, Verifier
from ..decoding.grammar import grammars_of
from ..decoding.methods import make_drafter, make_planner
from ..decoding.planners.costs import StepCosts
from ..models.heads import Head
from .engine import Engine, new_cache
from .load import LoadedModel
from .options import EngineOptions


def assemble(
    loaded: LoadedModel,
    draft: LoadedModel | None,
    options: EngineOptions,
    verifier: Verifier,
    costs: Callable[[], StepCosts],
    head: Head | None = None,
) -> tuple[Engine, Drafter]:
    """The engine, and the drafter of its default method. `options` name a method and a planner, where the user left
    them to the engine. `costs` is called only where step times are needed, as measuring them takes a while.
    """
    decoder, tokenizer = loaded.decoder, loaded.tokenizer
    cache = new_cache(decoder, options)
    context = DrafterContext(
        vocab_size=decoder.config.vocab_size,
        draft=draft.decoder if draft is not None else None,
        # everything that the target's cache holds, and a draft for each sequence
        draft_pages=cache.storage.num_pages + options.max_batch * (options.rows + PAGE_SIZE) // PAGE_SIZE + 1,
        sampled=verifier.uses_q,
        owner_of=lambda sequence: sequence.owner,
        target=decoder,
        cache=cache if options.kv is None else None,  # a policy's places are not those that such drafters count on
        target_in=loaded.in_precision,
        tokenizer=tokenizer,
        draft_tokenizer=draft.tokenizer if draft is not None else None,
        head=head,
    )
    planned = options.planner != "fixed"
    drafter = make_drafter(options.method, context, planned)
    engine = Engine(
        decoder,
        drafter,
        verifier,
        detokenizer=tokenizer.detokenizer,
        eos_ids=tokenizer.eos_ids,
        grammars=grammars_of(tokenizer, decoder.config.vocab_size),
        method=options.method,
        options=options,
        cache=cache,
        planner=make_planner(options.planner, costs),
        methods={name: make_drafter(name, context, planned) for name in options.methods if name != options.method},
        step_seconds=None if options.max_step_s is None else costs().step,
    )
    return engine, drafter
