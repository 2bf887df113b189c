"""What the scheduler sees of the KV cache."""

from __future__ import annotations

from collections.abc import Mapping

from ..cache.pages import PAGE_SIZE, PagedKVCache
from ..cache.prefix import PrefixTree
from .request import Request


class KVMemory:
    """Answers in pages, for the requests of one engine. Changes nothing."""

    def __init__(self, cache: PagedKVCache, prefixes: PrefixTree | None, requests: Mapping[int, Request]) -> None:
        self._cache, self._prefixes, self._requests = cache, prefixes, requests

    @property
    def available_pages(self) -> int:
        """Free ones, and those that only the prefix cache holds."""
        return self._cache.available_pages

    def shared_pages(self, id: int) -> int:
        """Of what a waiting request will find in the prefix cache: whole pages that a running request uses as well."""
        if self._prefixes is None:
            return 0
        request = self._requests[id]
        length, idle = self._prefixes.needs(request.sequence.owner, request.common)
        return max(length // PAGE_SIZE - idle, 0)

    def pages_needed(self, id: int, rows: int) -> int:
        """Pages that `rows` more rows of a running request take."""
        return self._cache.pages_needed(self._requests[id].kv, rows)

    def pages_held(self, id: int) -> int:
        """Pages that would be free if a running request gave its own back."""
        return self._cache.pages_held(self._requests[id].kv)
