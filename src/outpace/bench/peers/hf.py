"""transformers on PyTorch, from the same GGUF file or a folder with safetensors.

Settings: "dtype" ("auto": bfloat16 where the processor multiplies it, else float32), "draft_tokens" and "lookup_tokens"
(transformers' own defaults when not given). Its assisted generation takes one sequence at a time, so there a batch is
answered one after another.
"""

from __future__ import annotations

from .process import ScriptPeer


class TransformersPeer(ScriptPeer):
    engine = "transformers"
    script = "run_transformers.py"
    package = "transformers torch gguf accelerate"
