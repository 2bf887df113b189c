"""The questions of both tasks, from the file beside this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load(**more: Any) -> Any:
    """As lm-eval wants a data set of one's own."""
    import datasets

    lines = Path(__file__).with_name("capitals.jsonl").read_text("utf-8").splitlines()
    return datasets.DatasetDict({"test": datasets.Dataset.from_list([json.loads(line) for line in lines])})
