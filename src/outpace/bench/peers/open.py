"""From what a person writes after `--peer` to a peer.

llama.cpp   llama.cpp:draft   transformers:lookup,dtype=float32   openvino   http://localhost:8000   vllm=http://…
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ParameterError
from .hf import TransformersPeer
from .llamacpp import LlamaCppPeer
from .openai import OpenAIPeer
from .openvino import OpenVinoPeer
from .peer import MODES, Peer, PeerConfig, Words
from .process import ScriptPeer

ENGINES: dict[str, type[ScriptPeer]] = {kind.engine: kind for kind in (LlamaCppPeer, TransformersPeer, OpenVinoPeer)}


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """`url` of a server, or `engine`, `mode` and `settings` of one that runs here. `name` as it was written."""

    name: str
    engine: str = ""
    mode: str = "plain"
    settings: tuple[tuple[str, Any], ...] = ()
    url: str = ""

    @classmethod
    def parse(cls, written: str) -> PeerSpec:
        """Raises ParameterError naming what there is."""
        label, _, url = written.rpartition("=") if "://" in written else ("", "", "")
        if url.startswith(("http://", "https://")):
            return cls(label or url, url=url)
        head, *pairs = written.split(",")
        engine, _, mode = head.partition(":")
        if engine not in ENGINES or (mode or "plain") not in MODES:
            raise ParameterError(
                f"no peer {head!r}; there are: {', '.join(ENGINES)}, each with :{', :'.join(MODES[1:])} or nothing, "
                "and the URL of a server with OpenAI's API"
            )
        wrong = [pair for pair in pairs if not all(pair.partition("="))]
        if wrong:
            raise ParameterError(f"peer {written!r}: {wrong[0]!r} is no setting; write name=value")
        settings = tuple((name, _value(value)) for name, _, value in (pair.partition("=") for pair in pairs))
        return cls(written, engine, mode or "plain", settings)


def open_peer(
    spec: PeerSpec | str,
    words: Words,
    model: Path,
    draft: Path | None = None,
    *,
    threads: int = 1,
    context: int = 4096,
    max_batch: int = 1,
    python: Path | None = None,
    start_timeout_s: float = 600.0,
    past_end: bool = False,
) -> Peer:
    """Not started yet. `draft` is used by the mode that drafts with it. `words`: the tokenizer of `model`. `past_end`:
    answers go on behind an end token, except those of a server, whose text would not show it.

    Raises ParameterError for a peer that does not exist, or that cannot take such a model.
    """
    spec = PeerSpec.parse(spec) if isinstance(spec, str) else spec
    if spec.url:
        return OpenAIPeer(spec.url, words, name=spec.name)
    if spec.mode == "draft" and draft is None:
        raise ParameterError(f"peer {spec.name} drafts with a second model: name one")
    config = PeerConfig(
        model,
        words,
        spec.mode,
        draft if spec.mode == "draft" else None,
        threads,
        context,
        max_batch,
        python,
        start_timeout_s,
        dict(spec.settings),
        past_end,
    )
    return ENGINES[spec.engine](config, spec.name)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
