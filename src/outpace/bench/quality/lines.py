"""Files of problems: one JSON object a line."""

from __future__ import annotations

from pathlib import Path

from ...errors import ParameterError


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers. Raises ParameterError for a file that cannot be read."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"cannot read {path}: {error}") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
