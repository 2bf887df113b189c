"""Fill in the middle: a prompt of what stands before and behind a gap, in the control tokens of the model's own."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ParameterError
from ..models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Form:
    """Control tokens of one family of models. The prompt is `before` text `behind` suffix `write`."""

    before: str
    behind: str
    write: str
    ends: tuple[str, ...] = ()  # further ones that end what is filled in


FORMS = (
    Form("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")),
    Form("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<fim_pad>", "<file_sep>")),
    Form("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<fim-pad>",)),
    Form("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    Form("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", ("\u2581<EOT>",)),
)


def infill(tokenizer: Tokenizer, prompt: str, suffix: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt that asks for the text between `prompt` and `suffix`, and the tokens that end it.

    Raises ParameterError if the model has no control tokens for that.
    """
    form = next((form for form in FORMS if all(_id(tokenizer, t) is not None for t in _parts(form))), None)
    if form is None:
        known = ", ".join(form.before for form in FORMS)
        raise ParameterError(
            f"suffix: this model has no control tokens to fill in the middle with (those of other models begin with "
            f"{known}); leave suffix out, or serve a model that was trained for it, such as Qwen2.5-Coder"
        )
    before, behind, write = (_id(tokenizer, token) for token in _parts(form))
    assert before is not None and behind is not None and write is not None
    start = tokenizer.prompt("")  # the beginning token, where the model wants one
    ids = [*start, before, *tokenizer.encode(prompt), behind, *tokenizer.encode(suffix), write]
    ends = [id for token in (*form.ends, *_parts(form)) if (id := _id(tokenizer, token)) is not None]
    return ids, ends


def _parts(form: Form) -> tuple[str, str, str]:
    return form.before, form.behind, form.write


def _id(tokenizer: Tokenizer, token: str) -> int | None:
    """Its id if it is a control token."""
    id = tokenizer.token_id(token)
    return id if id is not None and tokenizer.is_special(id) else None
