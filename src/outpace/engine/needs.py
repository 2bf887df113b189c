"""What methods need beside the target, and which method is the default: refused or chosen before a model is loaded."""

from __future__ import annotations

from ..decoding.methods import split_spec
from ..errors import MethodError
from ..registry import method
from .load import LoadedModel

LOSSLESS_METHOD = "suffix+recycling"
LOSSLESS_METHOD_WITH_DRAFT_MODEL = f"{LOSSLESS_METHOD}+draft-tree:width=2,max_depth=12"  # the cheap ones first
DRAFT_MODEL = "draft model"  # as drafters name it in what they need
ANY_DRAFT_MODEL = "draft model of any vocabulary"
OPTIONAL_DRAFT_MODEL = "draft model (optional)"


def needs_draft_model(spec: str) -> bool:
    """Whether some drafter of `a+b` needs one. Raises MethodError for unknown names."""
    return _names_any(spec, DRAFT_MODEL, ANY_DRAFT_MODEL)


def _names_any(spec: str, *needs: str) -> bool:
    """Whether some drafter of `a+b` names one of these among what it needs."""
    return any({*needs} & {*method(name, "drafter").needs} for name in split_spec(spec))


def check_needs(spec: str, has_draft_model: bool) -> None:
    """Raises MethodError for a method without what it needs, or a draft model that nobody would use."""
    needed = needs_draft_model(spec)
    if needed and not has_draft_model:
        raise MethodError(
            f"method {spec!r} needs a draft model: name a small model of the same vocabulary "
            "(draft_model=…, --draft-model …), or use a method without one"
        )
    if has_draft_model and not needed and not _names_any(spec, OPTIONAL_DRAFT_MODEL):
        raise MethodError(
            f"method {spec!r} has no use for a draft model: leave it out, or use a method that needs one "
            f"(such as draft, or {LOSSLESS_METHOD_WITH_DRAFT_MODEL})"
        )


def check_planner(planner: str, spec: str) -> None:
    """Raises MethodError for a planner that does not exist or would have nothing to plan."""
    if planner == "auto":
        return
    method(planner, "planner")
    if spec == "plain":
        raise MethodError(f"planner {planner!r} has nothing to plan with method 'plain': drop one")


def check_draft_precision(precision: str, draft_model: object) -> None:
    """Raises MethodError for a precision that no draft model would be loaded in."""
    if precision != "auto" and not isinstance(draft_model, str):
        why = "there is no draft model" if draft_model is None else "the draft model is loaded already"
        raise MethodError(f"draft_precision={precision!r} has no use, as {why}: leave it out")


def check_vocabulary(target: LoadedModel, draft: LoadedModel, spec: str) -> None:
    """A draft model's tokens must be the target's, unless the method translates them."""
    if spec != "auto" and not _names_any(spec, DRAFT_MODEL, OPTIONAL_DRAFT_MODEL):
        return
    if not target.tokenizer.same_vocabulary(draft.tokenizer):
        raise MethodError(
            f"{draft.name} cannot draft for {target.name}: their vocabularies differ, so its tokens mean something "
            "else; use a draft model of the same family, or method omnidraft, which translates"
        )
