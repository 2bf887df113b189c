"""The trained head that drafts for a model: read, and held against the model."""

from __future__ import annotations

from pathlib import Path

from ..cache.pages import PAGE_SIZE
from ..decoding.drafters.spark import BlockSource
from ..errors import MethodError
from ..models.heads import Head, fits, read
from .load import LoadedModel

LEAST_SHARE = 0.6  #: of the hits that a file records, which its head must have again


def open_head(name: str | None, target: LoadedModel) -> Head | None:
    """Raises MethodError for a head of another model, ModelNotFound or CorruptModel for a file that is none."""
    if name is None:
        return None
    head = read(Path(name).expanduser())
    if why := fits(head, target.decoder.config):
        raise MethodError(f"{name} is not a head of {target.name}: {why}")
    _check(head, target)
    return head


def _check(head: Head, target: LoadedModel) -> None:
    """Replay the text in the file: a head of another model, or one that is wired wrongly, is hardly ever right."""
    check = head.config.check
    source = BlockSource(head, target.decoder, len(check.tokens) // PAGE_SIZE + 2)
    hits, recorded = float(source.replay(check.tokens, check.prompt).mean()), sum(check.hits) / len(check.hits)
    if hits < LEAST_SHARE * recorded:
        raise MethodError(
            f"{head.path} is right on {hits:.1%} of the tokens of its own text, and was on {recorded:.1%} when it was "
            f"trained for {head.config.target.get('name')}: it is a head of another model than {target.name}, or of "
            "another version; train one with `outpace train-head`, or leave --head out"
        )
