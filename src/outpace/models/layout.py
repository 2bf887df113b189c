"""Which tensors a model must have, and of what shape: every loader checks its file against this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import CorruptModel, UnsupportedModel
from .block import describe
from .config import ModelConfig

Shape = tuple[int, ...]


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Canonical name -> shape of every tensor that a checkpoint of this configuration holds."""
    return {tensor.name: tensor.shape for tensor in describe(config).tensors()}


def check_layout(source: str, config: ModelConfig, found: Mapping[str, Shape], unknown: Iterable[str] = ()) -> None:
    """Raises CorruptModel for a missing tensor or a wrong shape, UnsupportedModel for one that has no place.

    `unknown` are tensors of the file that have no canonical name.
    """
    expected = expected_shapes(config)
    if missing := [name for name in expected if name not in found]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CorruptModel(f"{source}: tensors are missing: {', '.join(missing[:3])}{more}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise CorruptModel(
                f"{source}: {name} has the shape {tuple(found[name])}, the configuration asks for {shape}"
            )
    if extra := sorted(set(unknown) | (set(found) - set(expected))):
        raise UnsupportedModel(
            f"{source}: tensors that a {config.architecture} model does not have here: {', '.join(extra[:3])}"
            f"{' …' if len(extra) > 3 else ''}; ignoring them would change what the model says"
        )
