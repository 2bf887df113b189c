"""`EngineOptions`: how a model is opened and what an engine may use. Every option stands here once, with its default,
what it may be and its help; the command line's options are made from these fields. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, get_args

from ..errors import ParameterError
from ..fields import WRONG_TYPE, Choice, Each, Flag, Number, Text, Whole, check, documented, nearest, value
from ..types import Precision

if TYPE_CHECKING:
    from .load import LoadedModel

MOST_ROWS = 4096  # of a step: beyond it nothing gains, and buffers grow with it
MOST_TOKENS = 2**31 - 1  # of a cache; the memory sets the real limit when the cache is made
GOODPUT_ROWS, FIXED_ROWS = 32, 16  # of one sequence, by who plans
STEP_ROWS = 32  # of all of them
PRECISIONS = ("auto", *get_args(Precision))


class Model(Text):
    """A model's name, path, or one that is loaded already."""

    allowed = "a model's name or path, or the `loaded` of another LLM"

    def fault(self, value: Any) -> str | None:
        if isinstance(value, str | os.PathLike):
            return super().fault(os.fspath(value))
        from .load import LoadedModel

        return None if isinstance(value, LoadedModel) else WRONG_TYPE

    def plain(self, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, str | os.PathLike) else value


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a model is opened, how it decodes and what it may use. Raises ParameterError for a value that is not of its
    type or out of range; `engine.needs` refuses what does not go together."""

    draft_model: str | LoadedModel | None = value(
        None, Model(), "A small model of the same vocabulary that drafts (omnidraft: of any).", metavar="MODEL"
    )
    draft_precision: str = value(
        "auto",
        Choice(PRECISIONS),
        "Arithmetic of the draft model; auto: as the model, each in its own file's formats, but beside int8 int4 for "
        "drafting.",
    )
    head: str | None = value(
        None,
        Text(),
        "File of a trained head that drafts; `outpace train-head` makes one.",
        metavar="FILE",
        unset="none",
    )
    method: str = value(
        "auto",
        Text(),
        "How tokens are drafted, see `outpace methods`; a+b merges two, a:option=value sets an option; plain drafts "
        "nothing; auto chooses step by step.",
    )
    verifier: str = value("auto", Text(), "How drafts are accepted; auto: coupled, the same tokens as plain decoding.")
    planner: str = value(
        "auto",
        Text(),
        "How a step's rows are shared between drafts, see `outpace methods`; auto: goodput with method auto, else "
        "fixed.",
    )
    methods: tuple[str, ...] = value(
        (),
        Each(Text(), "a list of methods"),
        "Further methods that a request may ask for by name; plain always may be.",
        metavar="A,B",
    )
    precision: str = value(
        "auto",
        Choice(PRECISIONS),
        "Arithmetic of the model; file: in the formats that its file has its weights in; auto: file for quantised GGUF "
        "on a CPU without AMX, else int8 on a CPU, bfloat16 on CUDA. int4 loses quality.",
    )
    threads: int | None = value(None, Whole(1, 1024), "CPU threads.", unset="one per core")
    device: str = value("auto", Text(), "cpu, cuda, or auto: cuda if there is one.")
    kv: str | None = value(
        None,
        Text(),
        "What is kept of a prompt's keys and values once it was read, see `outpace methods`: snapkv:budget=25% keeps a "
        "quarter; approximate.",
        metavar="POLICY",
        unset="all",
    )
    max_batch: int = value(8, Whole(1, MOST_ROWS), "Requests that decode at once.")
    max_rows: int | None = value(
        None,
        Whole(1, MOST_ROWS),
        "Most rows of one sequence in a step: the last token and its draft.",
        unset=f"{GOODPUT_ROWS} planned by goodput, else {FIXED_ROWS}",
    )
    max_step_rows: int | None = value(
        None,
        Whole(1, MOST_ROWS),
        "Most rows of all decoding sequences in a step.",
        unset=f"as max-rows, at least {STEP_ROWS}",
    )
    prefill_rows: int = value(512, Whole(1, MOST_ROWS), "Most prompt tokens that one step reads.")
    kv_tokens: int | None = value(
        None, Whole(1, MOST_TOKENS), "Size of the KV cache, in tokens.", unset="what memory allows"
    )
    prefix_cache: bool = value(
        True, Flag(), "Keep keys and values of what was read and written, for requests that begin alike."
    )
    max_queue: int | None = value(
        None, Whole(1, MOST_TOKENS), "Requests that wait; one more is refused.", unset="no limit"
    )
    max_step_s: float | None = value(
        None,
        Number(0.0, above=True),
        "Read prompts in pieces, so that nobody waits longer for a token.",
        unset="no limit",
        flag="--max-step-ms",
        scale=1000.0,  # of the flag's unit in one of the field's
    )
    swap_tokens: int = value(
        0,
        Whole(0, MOST_TOKENS),
        "Tokens of requests that made way for others, kept outside the cache; what exceeds it is read again.",
    )

    def __post_init__(self) -> None:
        check(self)

    def changed(self, **changes: Any) -> EngineOptions:
        """With other values. Raises ParameterError for a name that is no option, with the nearest that is."""
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                close = nearest(name, names) or f"; there are: {', '.join(names)}"
                raise ParameterError(f"there is no option {name!r}{close}")
        return replace(self, **changes)

    @property
    def chosen_planner(self) -> str:
        """By name, where it is left to the method."""
        if self.planner != "auto":
            return self.planner
        return "goodput" if self.method == "auto" else "fixed"

    @property
    def rows(self) -> int:
        """Most rows of one sequence in a step."""
        most = GOODPUT_ROWS if self.chosen_planner == "goodput" else FIXED_ROWS
        return self.max_rows or min(most, self.max_step_rows or most)

    @property
    def step_rows(self) -> int:
        """Most rows of all decoding sequences in a step."""
        return self.max_step_rows or max(STEP_ROWS, self.rows)
