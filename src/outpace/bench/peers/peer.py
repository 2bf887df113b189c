"""What another engine is to a comparison: something that starts, answers batches of prompts and closes.

A peer never hurts its caller. One that cannot start says so in one line (PeerError); one that later dies, hangs or
answers nonsense gives answers that carry an `error` and no figures, and stays closed until it is started again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ...errors import OutpaceError, ParameterError

#: What a peer may do beside plain decoding: draft with a second model, or look drafts up in prompt and output
MODES = ("plain", "draft", "lookup")


class PeerError(OutpaceError):
    """A peer cannot be started: not installed, not there, or it does not take the model."""


class Words(Protocol):
    """The one counter of tokens: `models.tokenizer.Tokenizer` is one."""

    eos_ids: frozenset[int]
    vocab_size: int

    def encode(self, text: str, special: bool = False) -> list[int]: ...
    def prompt(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...
    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **values: Any
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class PeerPrompt:
    """One of the three: `token_ids` as they are, `text` as a raw prompt, `messages` in the model's chat format.

    Raises ParameterError unless exactly one is given and it is not empty.
    """

    text: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        given = [name for name in ("text", "messages", "token_ids") if getattr(self, name)]
        if len(given) != 1:
            raise ParameterError(
                f"a peer's prompt has {' and '.join(given) or 'nothing'}: give one of text, messages or token_ids"
            )

    def ids(self, words: Words) -> list[int]:
        """Raises ParameterError when the model has no chat template for messages."""
        if self.token_ids:
            return list(self.token_ids)
        return words.chat(self.messages) if self.messages else words.prompt(self.text)


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """What came of one prompt of a batch. Seconds count from the moment the whole batch was handed over.

    `tokens` are counted by one counter for all engines: `token_ids` where the peer gives them, else the tokens of the
    text by our tokenizer and one for the end of an answer that ended by itself. An end token counts, as it does for us.
    With an `error` there is nothing else.
    """

    text: str = ""
    token_ids: tuple[int, ...] | None = None
    tokens: int = 0
    first_token_s: float | None = None  # None: not reported by the peer
    total_s: float = 0.0
    error: str | None = None
    steps: int | None = None  # target forwards that decoded, the one over the prompt apart; None: not reported
    reported_tokens: int | None = None  # by the peer's own count
    first_tokens: int = 1  # that came at `first_token_s`: a first step that verifies a draft gives more than one
    arrivals: tuple[float, ...] = ()  # when those after the first ones came, as far as the peer shows it

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first ones, a second; None where that cannot be said."""
        later = self.tokens - self.first_tokens
        if self.error or self.first_token_s is None or later < 1 or self.total_s <= self.first_token_s:
            return None
        return later / (self.total_s - self.first_token_s)


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """Of an engine that runs here, in a process of its own. `settings` go to its script and into `about()`.

    Raises ParameterError for a size below 1, and for an unknown mode or one without the draft model that it needs.
    """

    model: Path  # a GGUF file or a folder with safetensors
    words: Words
    mode: str = "plain"
    draft: Path | None = None  # of the mode "draft"
    threads: int = 1
    context: int = 4096  # tokens of one sequence, prompt and output
    max_batch: int = 1
    python: Path | None = None  # None: the one that runs this
    start_timeout_s: float = 600.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    past_end: bool = False  # an end token does not end an answer, so that all have the same work

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ParameterError(f"a peer has no mode {self.mode!r}; there are: {', '.join(MODES)}")
        if (self.mode == "draft") != (self.draft is not None):
            raise ParameterError("a peer's mode draft and a draft model go together: give both or neither")
        for name in ("threads", "context", "max_batch", "start_timeout_s"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name}={getattr(self, name)!r} is out of range: it must be at least 1")


class Peer(ABC):
    """An engine beside ours. One thread at a time. As a context manager it starts, and closes whatever happens."""

    name: str

    @abstractmethod
    def start(self) -> None:
        """Make it ready to answer; nothing if it is. Raises PeerError in one line that says what to do."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind. May be called at any time and twice; raises nothing."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Of a started peer, for the report: version, settings and model, as plain data without paths."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[PeerPrompt], max_tokens: int, temperature: float, seed: int, timeout_s: float
    ) -> list[PeerAnswer]:
        """Answer one batch at once, prompt number i with the seed `seed + i`. One answer for each prompt, in order.

        Never raises for what the peer does: what went wrong stands in `PeerAnswer.error`. Raises ParameterError for
        sizes and prompts that make no sense.
        """

    @property
    def memory_bytes(self) -> int | None:
        """The most memory that the started peer has held; None where that cannot be seen."""
        return None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_ask(prompts: Sequence[PeerPrompt], max_tokens: int, temperature: float, timeout_s: float) -> None:
    """Raises ParameterError for what no peer could answer."""
    if not prompts:
        raise ParameterError("there are no prompts: give at least one")
    if max_tokens < 1:
        raise ParameterError(f"max_tokens={max_tokens!r} is out of range: it must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ParameterError(f"temperature={temperature!r} is out of range: it must be at least 0")
    if not timeout_s > 0:
        raise ParameterError(f"timeout_s={timeout_s!r} is out of range: it must be more than 0")
