"""llama.cpp by its C functions, through the package llama-cpp-python. Reads GGUF files.

Settings: "flash" (true: llama.cpp decides, its default), "kv" ("f16" or "q8_0"), "batch" (rows of a prompt at once),
"draft_tokens" (most of one draft), "draft_min_p" (a draft ends before a token less likely than this), "ngram".
"""

from __future__ import annotations

from typing import ClassVar

from .process import ScriptPeer


class LlamaCppPeer(ScriptPeer):
    engine = "llama.cpp"
    script = "run_llamacpp.py"
    package = "llama-cpp-python"
    takes: ClassVar[tuple[str, ...]] = ("a GGUF file",)
