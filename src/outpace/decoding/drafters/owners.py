"""State that the sequences of one owner share, and those of two owners never do."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from ...errors import ParameterError
from ..contracts import Sequence

T = TypeVar("T")
OwnerOf = Callable[[Sequence], Hashable]


def one_owner(sequence: Sequence) -> Hashable:
    """All sequences have one owner: the default where owners are not distinguished."""
    return None


class PerOwner(dict[Hashable, T]):
    """One `T` per owner, so that nobody's text shapes (and by its timing betrays) what is proposed to another.

    At most `most` are kept; the one whose last sequence began the longest ago goes first. Sequences that still use it
    keep it alive.
    """

    def __init__(self, owner_of: OwnerOf, make: Callable[[], T], most: int) -> None:
        if most < 1:
            raise ParameterError(f"max_owners={most} is out of range: it must be at least 1")
        super().__init__()
        self._owner_of, self._make, self._most = owner_of, make, most

    def of(self, sequence: Sequence) -> T:
        owner = self._owner_of(sequence)
        if owner in self:
            found = self.pop(owner)
        else:
            found = self._make()
            while len(self) >= self._most:
                del self[next(iter(self))]
        self[owner] = found  # last: the most recently used
        return found
