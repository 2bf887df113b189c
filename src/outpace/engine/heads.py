"""Which trained head drafts for a model: the one that was named, or the one that comes with it."""

from __future__ import annotations

from pathlib import Path

from ..errors import MethodError
from ..models.heads import Head, fits, read
from .load import LoadedModel

#: Heads that come with the package, by the name of their model
SHIPPED = Path(__file__).parent.parent / "heads"
NO_HEAD = "none"


def open_head(name: str | None, target: LoadedModel) -> Head | None:
    """Raises MethodError for a head of another model, ModelNotFound or CorruptModel for a file that is none."""
    if name == NO_HEAD:
        return None
    if name is None:
        path = SHIPPED / f"{target.name}.safetensors"
        if not path.is_file() or target.decoder.device.type != "cpu":
            return None
        head = read(path)
        return None if fits(head, target.decoder.config) else head
    head = read(Path(name).expanduser())
    if why := fits(head, target.decoder.config):
        raise MethodError(f"{name} is not a head of {target.name}: {why}")
    return head
