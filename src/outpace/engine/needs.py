"""What methods need beside the target, and which method is the default: refused or chosen before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..cache.pages import PagedKVCache
from ..decoding.contracts import Verifier
from ..decoding.methods import make_policy, make_verifier, split_spec
from ..errors import MethodError, ParameterError
from ..models.decoder import Decoder
from ..registry import method as registry_method
from .load import LoadedModel
from .options import EngineOptions

DEFAULT_VERIFIER = "coupled"
LOSSLESS_METHOD = "suffix+recycling"
LOSSLESS_METHOD_WITH_DRAFT_MODEL = f"{LOSSLESS_METHOD}+draft-tree:width=2,max_depth=12"  # the cheap ones first
LOSSLESS_METHOD_WITH_HEAD = f"{LOSSLESS_METHOD}+spark"
DRAFT_MODEL = "draft model"  # as drafters name it in what they need
ANY_DRAFT_MODEL = "draft model of any vocabulary"
HEAD = "head"
OPTIONAL_DRAFT_MODEL = "draft model (optional)"


def needs_draft_model(spec: str) -> bool:
    """Whether some drafter of `a+b` needs one. Raises MethodError for unknown names."""
    return _names_any(spec, DRAFT_MODEL, ANY_DRAFT_MODEL)


def _names_any(spec: str, *needs: str) -> bool:
    """Whether some drafter of `a+b` names one of these among what it needs."""
    return any({*needs} & {*registry_method(name, "drafter").needs} for name in split_spec(spec))


def _uses_draft_model(spec: str) -> bool:
    return spec == "auto" or _names_any(spec, DRAFT_MODEL, ANY_DRAFT_MODEL, OPTIONAL_DRAFT_MODEL)


def _uses_head(spec: str) -> bool:
    return spec == "auto" or _names_any(spec, HEAD)


def check_options(options: EngineOptions) -> Verifier:
    """Refuse options that do not go together, before a model is loaded. Returns the verifier.

    Raises MethodError for methods that do not exist or lack what they need, and for options without any effect.
    """
    method, has_draft = options.method, options.draft_model is not None
    for spec in (method, *options.methods):
        if spec != "auto":
            check_needs(spec, has_draft)
    if has_draft and not any(map(_uses_draft_model, (method, *options.methods))):
        raise MethodError(
            f"method {method!r} has no use for a draft model: leave it out, or use a method that needs one "
            f"(such as draft, or {LOSSLESS_METHOD_WITH_DRAFT_MODEL})"
        )
    if options.head is not None and not any(map(_uses_head, (method, *options.methods))):
        raise MethodError(
            f"method {method!r} has no use for head={options.head!r}: leave it out, or use a method that needs one "
            f"(such as spark, or {LOSSLESS_METHOD_WITH_HEAD})"
        )
    if not has_draft and options.draft_precision != "auto":
        raise MethodError(
            f"draft_precision={options.draft_precision!r} has no use, as there is no draft model: leave it out"
        )
    if options.planner != "auto":
        registry_method(options.planner, "planner")
        if method == "plain":
            raise MethodError(f"planner {options.planner!r} has nothing to plan with method 'plain': drop one")
    if options.kv is not None:
        make_policy(options.kv)
    verifier = make_verifier(DEFAULT_VERIFIER if options.verifier == "auto" else options.verifier)
    if method == "plain" and not any(spec != "plain" for spec in options.methods):
        if options.verifier not in ("auto", DEFAULT_VERIFIER):
            raise MethodError(
                f"verifier={options.verifier!r} has nothing to verify with method 'plain', which drafts nothing: "
                "leave it out, or name a method that drafts"
            )
        for name in ("max_rows", "max_step_rows"):
            if getattr(options, name) is not None:
                raise MethodError(
                    f"{name}={getattr(options, name)} has no use with method 'plain', whose steps have one row of each "
                    "sequence: leave it out, or name a method that drafts"
                )
    if options.rows > options.step_rows:
        raise MethodError(
            f"max_rows={options.rows} of one sequence cannot be had in steps of max_step_rows={options.step_rows}: "
            "lower the one or raise the other"
        )
    return verifier


def check_policy(decoder: Decoder, cache: PagedKVCache, options: EngineOptions) -> None:
    """Refuse what a KV policy does not go with. Raises MethodError."""
    try:
        cache.heads  # noqa: B018
    except ParameterError as error:
        raise MethodError(f"kv={options.kv!r}: {error}") from None
    if "sliding" in decoder.config.layer_types:
        raise MethodError(f"kv={options.kv!r}: this model's sliding layers keep a window already; leave kv out")
    if options.swap_tokens:
        raise MethodError(
            f"kv={options.kv!r} does not go with swap_tokens={options.swap_tokens}: a text of which a part is kept is "
            "read again, not brought back; leave swap_tokens out"
        )


def for_method(
    options: EngineOptions, method: str, draft: LoadedModel | None, changes: Mapping[str, Any]
) -> EngineOptions:
    """The same options for another method, with the draft model that is loaded, where it has a use."""
    changed = options.changed(**{"method": method, "draft_model": draft, **changes})
    specs = (method, *changed.methods)
    unused: dict[str, Any] = {}
    if not any(map(_uses_draft_model, specs)):
        unused |= {"draft_model": None, "draft_precision": "auto"}
    if not any(map(_uses_head, specs)):
        unused["head"] = None
    if method == "plain":
        unused["planner"] = "auto"
    if all(spec == "plain" for spec in specs):
        unused |= {"verifier": "auto", "max_rows": None, "max_step_rows": None}
    return changed.changed(**{name: value for name, value in unused.items() if name not in changes})


def check_needs(spec: str, has_draft_model: bool) -> None:
    """Raises MethodError for a method that does not exist, or has no draft model though it needs one."""
    if needs_draft_model(spec) and not has_draft_model:
        raise MethodError(
            f"method {spec!r} needs a draft model: name a small model of the same vocabulary "
            "(draft_model=…, --draft-model …), or use a method without one"
        )


def check_vocabulary(target: LoadedModel, draft: LoadedModel, specs: Sequence[str]) -> None:
    """A draft model's tokens must be the target's, unless the methods translate them."""
    if not any(spec == "auto" or _names_any(spec, DRAFT_MODEL, OPTIONAL_DRAFT_MODEL) for spec in specs):
        return
    if not target.tokenizer.same_vocabulary(draft.tokenizer):
        raise MethodError(
            f"{draft.name} cannot draft for {target.name}: their vocabularies differ, so its tokens mean something "
            "else; use a draft model of the same family, or method omnidraft, which translates"
        )
