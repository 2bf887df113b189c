"""Starting is light: a model that is prepared answers on a CPU without torch, whose import takes most of a second."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import toy_model

from outpace.paths import cache_dir

CODE = """
import sys
from outpace import LLM, SamplingParams
drafting = dict(draft_model=sys.argv[1], draft_precision="int8")  # which is kept packed, as the target is
with_model = [(method, drafting) for method in ("auto", "draft-tree", "vocabtrim")]
for method, more in [("auto", {}), ("plain", {}), *with_model]:
    with LLM(sys.argv[1], method=method, device="cpu", threads=1, max_batch=1, **more) as llm:
        for params in (SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, temperature=1.0, top_k=5)):
            assert len(llm.generate("abcabcabc", params)[0].token_ids) <= 4
print(*(name for name in ("torch", "transformers", "huggingface_hub", "rich") if name in sys.modules))
"""


def test_an_answer_on_the_cpu_needs_no_torch(tmp_path: Path) -> None:
    toy_model.write_folder(tmp_path / "toy", 1)
    (tmp_path / "cache").mkdir()
    (cache_dir() / "kernels").mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache" / "kernels").symlink_to(cache_dir() / "kernels")  # compiling takes longer than all else
    environment = os.environ | {"OUTPACE_CACHE": str(tmp_path / "cache")}

    def loaded() -> str:
        command = [sys.executable, "-c", CODE, str(tmp_path / "toy")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert "torch" in loaded()  # which packs the weights
    assert loaded() == ""
