"""A progress bar over requests."""

from __future__ import annotations

from typing import Any


class Bar:
    """A progress bar over requests on stderr, or nothing. `with Bar(n, show) as advance: advance()`"""

    def __init__(self, total: int, show: bool) -> None:
        self._bar = None
        if show:
            from rich.console import Console
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("generating", total=total)

    def __enter__(self) -> Any:
        if self._bar is not None:
            self._bar.start()
        return self._advance

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
