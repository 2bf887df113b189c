"""Hidden states of the target for its own texts, kept in a file: what the heads of a training read.

The serving engine computes them, in the precision in which it serves: a head then sees in training what it will see.
Layout of a folder: `features.f16`, f16[tokens, layers, D], one text behind the other; `texts.jsonl`, a line for each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..decoding.drafters.spark import hidden_states
from ..errors import ParameterError
from ..models.decoder import Decoder
from .corpus import Text

_MOST = 60000.0  # float16 holds no more; a few channels of some models come near


@dataclass(frozen=True)
class Example:
    """One text. `tokens` i64[T], `features` f16[T, layers, D]; the answer begins at `prompt`."""

    ask: int
    source: str
    prompt: int
    tokens: NDArray[np.int64]
    features: NDArray[np.float16]


@dataclass(frozen=True)
class Meta:
    """What the features are of; a folder goes on with the same alone."""

    target: str
    precision: str
    layers: tuple[int, ...]
    width: int


class Features:
    """A folder of features, which grows text by text; what a kill cut short is cut off."""

    def __init__(self, folder: Path, meta: Meta | None = None) -> None:
        """Open or begin one. Raises ParameterError if `folder` has features of something else, or none to read."""
        self.folder, about = folder, folder / "meta.json"
        if about.exists():
            found = json.loads(about.read_text(encoding="utf-8"))
            self.meta = Meta(**{**found, "layers": tuple(found["layers"])})
            if meta is not None and meta != self.meta:
                raise ParameterError(f"{folder} has features of {self.meta}, not of {meta}: name another folder")
        elif meta is None:
            raise ParameterError(f"{folder} has no features: no {about.name} is there")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.meta = meta
            about.write_text(json.dumps(vars(meta)), encoding="utf-8")
        self._index: list[tuple[dict[str, int | str], int, int]] = []
        self._read_index()

    @property
    def _data(self) -> Path:
        return self.folder / "features.f16"

    @property
    def _lines(self) -> Path:
        return self.folder / "texts.jsonl"

    @property
    def _row_bytes(self) -> int:
        return 2 * len(self.meta.layers) * self.meta.width

    def _read_index(self) -> None:
        held = self._data.stat().st_size // self._row_bytes if self._data.exists() else 0
        start = 0
        for line in self._lines.read_text(encoding="utf-8").split("\n") if self._lines.exists() else ():
            try:
                found = json.loads(line)
            except ValueError:
                break
            if start + len(found["tokens"]) > held:
                break
            self._index.append((found, start, start + len(found["tokens"])))
            start += len(found["tokens"])

    def __len__(self) -> int:
        return len(self._index)

    @property
    def asks(self) -> set[int]:
        return {int(found["ask"]) for found, *_ in self._index}

    def tokens(self, i: int) -> tuple[list[int], int]:
        """Of a text, and where its answer begins; without its hidden states."""
        found, *_ = self._index[i]
        return found["tokens"], int(found["prompt"])  # type: ignore[return-value]

    def __getitem__(self, i: int) -> Example:
        found, start, end = self._index[i]
        shape = (end - start, len(self.meta.layers), self.meta.width)
        rows = np.fromfile(self._data, np.float16, shape[0] * shape[1] * shape[2], offset=start * self._row_bytes)
        tokens = np.array(found["tokens"], dtype=np.int64)
        return Example(int(found["ask"]), str(found["source"]), int(found["prompt"]), tokens, rows.reshape(shape))

    def add(self, decoder: Decoder, texts: Iterable[Text], progress: Callable[[int], None] | None = None) -> None:
        """Read the texts that are not there yet with `decoder` and append their hidden states."""
        known, end = self.asks, self._index[-1][2] if self._index else 0
        written = [json.dumps(found) + "\n" for found, *_ in self._index]
        self._lines.write_text("".join(written), encoding="utf-8")
        with self._data.open("ab") as data, self._lines.open("a", encoding="utf-8") as lines:
            data.truncate(end * self._row_bytes)
            for text in texts:
                if text.ask in known:
                    continue
                tokens = [*text.prompt_tokens, *text.tokens]
                states = hidden_states(decoder, tokens, self.meta.layers)
                data.write(np.clip(states, -_MOST, _MOST).astype(np.float16).tobytes())
                data.flush()
                line = {"ask": text.ask, "source": text.source, "prompt": len(text.prompt_tokens), "tokens": tokens}
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                self._index.append((line, end, end + len(tokens)))  # type: ignore[arg-type]
                end += len(tokens)
                if progress is not None:
                    progress(len(self._index))
