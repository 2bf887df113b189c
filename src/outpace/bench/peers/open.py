"""From what a person writes after `--peer` to a peer.

llama.cpp   llama.cpp:draft   transformers:lookup,dtype=float32   openvino
http://localhost:8000   vllm=http://…                     a server that runs
llama.cpp=build/bin   ik:draft=~/ik/llama-server -fa 1    a program of one's own, with arguments
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ParameterError
from .binary import LlamaProgramPeer, check_arguments, find_program
from .hf import TransformersPeer
from .llamacpp import LlamaCppPeer
from .openai import OpenAIPeer
from .openvino import OpenVinoPeer
from .peer import MODES, Peer, PeerConfig, Words
from .process import ScriptPeer

ENGINES: dict[str, type[ScriptPeer]] = {kind.engine: kind for kind in (LlamaCppPeer, TransformersPeer, OpenVinoPeer)}


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """`url` of a server, or `engine`, `mode` and `settings` of one that runs here, `program` where it is one of the
    user's own. `name`: what it is called where no other peer is called so. `shown`: as written, without folders."""

    name: str
    engine: str = ""
    mode: str = "plain"
    settings: tuple[tuple[str, Any], ...] = ()
    url: str = ""
    program: Path | None = None
    shown: str = field(default="", compare=False)

    @classmethod
    def parse(cls, written: str) -> PeerSpec:
        """Raises ParameterError naming what there is, or what is wrong with the program."""
        name, equals, rest = written.partition("=")
        if "," in name or "://" in name:
            name, equals, rest = "", "", written
        if rest.startswith(("http://", "https://")):
            return cls(name or rest, url=rest, shown=written)
        if equals:
            return _program(name, rest)
        head, *pairs = written.split(",")
        engine, _, mode = head.partition(":")
        if engine not in ENGINES or (mode or "plain") not in MODES:
            raise ParameterError(
                f"no peer {head!r}; there are: {', '.join(ENGINES)}, each with :{', :'.join(MODES[1:])} or nothing, "
                "the URL of a server with OpenAI's API, and NAME=PATH of a llama-server or llama-bench of your own"
            )
        wrong = [pair for pair in pairs if not all(pair.partition("="))]
        if wrong:
            raise ParameterError(f"peer {written!r}: {wrong[0]!r} is no setting; write name=value")
        settings = tuple((name, _value(value)) for name, _, value in (pair.partition("=") for pair in pairs))
        return cls(written, engine, mode or "plain", settings, shown=written)


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
    kind = LlamaProgramPeer if spec.program else ENGINES[spec.engine]
    return kind(config, spec.name)


def _program(name: str, rest: str) -> PeerSpec:
    """`name` may end with a mode. `rest`: a path, and arguments as in a shell; a path with spaces alone needs no
    quotes."""
    label, _, mode = name.partition(":")
    if not label or not rest.strip() or (mode or "plain") not in MODES:
        raise ParameterError(
            f"peer {name + '=' + rest!r}: a program is written NAME=PATH, or NAME:{MODES[1]}=PATH or "
            f"NAME:{MODES[2]}=PATH, and arguments for it behind the path"
        )
    if label in ENGINES and label != LlamaProgramPeer.engine:
        raise ParameterError(
            f"peer {name}: {label} is not started from a program of its own; give its Python with --peer-python, and "
            f"settings as {name},name=value"
        )
    try:
        path, *arguments = [rest] if Path(rest).expanduser().exists() else shlex.split(rest)
    except ValueError as error:  # a quotation mark is missing
        raise ParameterError(f"peer {name}: {rest!r} is no path with arguments: {error}") from None
    check_arguments(arguments)
    program = find_program(path)
    shown = f"{name}={' '.join([program.name, *map(_without_folders, arguments)])}"
    settings = (("program", str(program)), ("arguments", tuple(arguments)))
    return PeerSpec(name, LlamaProgramPeer.engine, mode or "plain", settings, program=program, shown=shown)


def _without_folders(word: str) -> str:
    head, equals, last = word.rpartition("=")
    return head + equals + (Path(last).name if last.startswith(("/", "~")) else last)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
