"""In CI a skipped test is a failed one, but for what only another machine could run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent / "conftest.py"
SKIPS = {
    "in_a_test": "import pytest\ndef test_it():\n    pytest.skip('the default model is not to be had')\n",
    "by_a_mark": "import pytest\n@pytest.mark.skipif(True, reason='not today')\ndef test_it():\n    pass\n",
    "by_an_import": "import pytest\npytest.importorskip('no_such_package_anywhere')\ndef test_it():\n    pass\n",
    "in_a_fixture": "import pytest\n@pytest.fixture\ndef x():\n    pytest.skip('no')\ndef test_it(x):\n    pass\n",
}
ALLOWED = "import pytest\n@pytest.mark.skipif(True, reason='platform: signals')\ndef test_it():\n    pass\n"


def outcome(folder: Path, text: str, ci: str) -> tuple[int, str]:
    (folder / "conftest.py").write_text(CONFTEST.read_text("utf-8"), "utf-8")
    (folder / "test_one.py").write_text(text, "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", str(folder), folder]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CI": ci}, cwd=folder)
    return done.returncode, done.stdout


@pytest.mark.parametrize("how", SKIPS)
def test_skips_fail_in_ci_alone(tmp_path: Path, how: str) -> None:
    code, shown = outcome(tmp_path, SKIPS[how], "true")
    assert code != 0 and "which CI does not allow" in shown
    code, shown = outcome(tmp_path, SKIPS[how], "")
    assert code in (0, 5) and "1 skipped" in shown and "SKIPPED" in shown  # 5: pytest's word for "no test ran"


def test_what_only_another_machine_could_run_may_be_skipped(tmp_path: Path) -> None:
    code, shown = outcome(tmp_path, ALLOWED, "true")
    assert code == 0 and "1 skipped" in shown
