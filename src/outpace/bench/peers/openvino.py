"""OpenVINO GenAI: from a GGUF file, or from a folder with a converted model (openvino_model.xml).

Settings: "draft_tokens", "ngram", "kv" (precision of the KV cache: "u8", OpenVINO's own choice on a CPU, or "f16").
"""

from __future__ import annotations

from .process import ScriptPeer


class OpenVinoPeer(ScriptPeer):
    engine = "openvino"
    script = "run_openvino.py"
    package = "openvino-genai"
