"""`python toy_command.py ARGS`: the command line over a decoder whose logits are a hash, for tests with a terminal.

TOY_STEP_S: seconds that a step takes, so that there is time to press Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hashing import toy_loaded

from outpace.cli import main
from outpace.engine import llm as llm_module
from outpace.engine.engine import Engine
from outpace.models import recommended as recommended_module
from outpace.models import source as source_module

step, pause = Engine.step, float(os.environ.get("TOY_STEP_S", "0"))


def slow_step(self: Engine) -> object:
    time.sleep(pause)
    return step(self)


Engine.step = slow_step  # type: ignore[method-assign, assignment]
llm_module.load_model = lambda name, **how: toy_loaded(name, template="{{ messages[-1].content }}:")  # type: ignore
source_module.find = lambda name: Path(name)
recommended_module.recommended = lambda name: recommended_module.Recommended({"temperature": 0.5}, "the model's file")
main()
