"""From models and names to an engine: the cache, the drafters, the planner, and how they know of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..cache.storage import PAGE_SIZE
from ..decoding.contracts import Drafter, DrafterContext, Verifier
from ..decoding.grammar import grammars_of
from ..decoding.methods import make_drafter, make_planner
from ..decoding.planners.costs import StepCosts
from .engine import Engine, EngineConfig, new_cache
from .load import LoadedModel


def assemble(
    loaded: LoadedModel,
    draft: LoadedModel | None,
    config: EngineConfig,
    *,
    method: str,
    others: Sequence[str],
    verifier: Verifier,
    planner: str,
    costs: Callable[[], StepCosts],
) -> tuple[Engine, Drafter]:
    """The engine, and the drafter of its default method. `others`: methods that single requests may name. `costs` is
    asked where step times are needed, as measuring them takes a while.
    """
    decoder, tokenizer = loaded.decoder, loaded.tokenizer
    cache = new_cache(decoder, config)
    context = DrafterContext(
        vocab_size=decoder.config.vocab_size,
        draft=draft.decoder if draft is not None else None,
        # everything that the target's cache holds, and a draft for each sequence
        draft_pages=(config.kv_tokens + config.max_batch * (config.max_rows + PAGE_SIZE)) // PAGE_SIZE + 1,
        sampled=verifier.uses_q,
        owner_of=lambda sequence: sequence.owner,
        target=decoder,
        cache=cache,
        target_in=loaded.in_precision,
        tokenizer=tokenizer,
        draft_tokenizer=draft.tokenizer if draft is not None else None,
    )
    planned = planner != "fixed"
    drafter = make_drafter(method, context, planned)
    engine = Engine(
        decoder,
        drafter,
        verifier,
        detokenizer=tokenizer.detokenizer,
        eos_ids=tokenizer.eos_ids,
        grammars=grammars_of(tokenizer, decoder.config.vocab_size),
        method=method,
        config=config,
        cache=cache,
        planner=make_planner(planner, costs),
        methods={name: make_drafter(name, context, planned) for name in others if name != method},
        step_seconds=None if config.step_s is None else costs().step,
    )
    return engine, drafter
