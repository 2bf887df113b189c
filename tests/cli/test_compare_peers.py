"""`outpace compare` beside other engines that are killed, never answer, are not installed, or are not there at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from llama_programs import bench, server
from peering import GOOD, gone

from outpace.bench.compare import ceilings, run
from outpace.bench.compare.store import read
from outpace.bench.peers import open as peers
from outpace.bench.peers.process import SCRIPTS, ScriptPeer

Run = Callable[..., Result]
ARGS = (
    "compare", "--method", "ngram", "--workload", "code", "--batch", "1", "-n", "6", "--rounds", "3", "--prompts", "2",
    "--budget", "5m",
)  # fmt: skip

#: What each engine does at a batch: it is asked once to warm up, then once a round
BEHAVIOURS = {
    "good": "pass",
    "killed": "import os; self.n = getattr(self, 'n', 0) + 1; self.n < 3 or os.kill(os.getpid(), 9)",
    "hangs": "import os, time; open(PIDS, 'a').write(str(os.getpid()) + ' '); time.sleep(600)",
    "missing": "pass",
    "lies": "[a.update(token_ids=[5]) for a in answers]; answers[0]['tokens'] = 6",
}


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Engines by the names above, each a script of its own. Where those that hang write their process ids."""
    pids = tmp_path / "pids"

    def made(name: str, at_batch: str) -> type[ScriptPeer]:
        script = tmp_path / f"{name}.py"
        source = GOOD.format(scripts=str(SCRIPTS), at_start="pass", at_batch=at_batch)
        script.write_text(f"PIDS = {str(pids)!r}\n{source}")

        class Engine(ScriptPeer):
            engine, package = name, f"{name}-engine"
            takes = ("a GGUF file", "a folder")

            def command(self) -> list[str]:
                return [str(self.config.python or sys.executable), str(script)]

        return Engine

    monkeypatch.setattr(peers, "ENGINES", {name: made(name, does) for name, does in BEHAVIOURS.items()})
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda *a, **k: [1e10])
    monkeypatch.setattr(run, "PATIENCE_S", 2.0)
    (tmp_path / "toy.gguf").write_bytes(b"GGUF")
    return pids


def test_the_rest_goes_on_and_every_failure_stands_in_the_table_the_file_and_the_page(
    outpace: Run, engines: Path, tmp_path: Path
) -> None:
    out, nowhere = tmp_path / "out", str(tmp_path / "venv" / "bin" / "python")
    names = (*BEHAVIOURS, "good:lookup", "http://127.0.0.1:9")
    asked = [part for name in names for part in ("--peer", name)]
    done = outpace(
        *ARGS, "-m", str(tmp_path / "toy.gguf"), *asked, "--peer-python", f"absent={nowhere}", "--out", str(out)
    )
    assert done.exit_code == 2 and "no engine 'absent'" in done.output

    done = outpace(
        *ARGS, "-m", str(tmp_path / "toy.gguf"), *asked, "--peer-python", f"missing={nowhere}", "--out", str(out)
    )
    assert done.exit_code == 0, done.output
    lines = read(out)
    made = [x for x in lines if x["kind"] == "measurement"]
    good = {name: [x["round"] for x in made if x["method"] == name and not x["error"]] for name in names}
    assert good["good"] == good["good:lookup"] == [0, 1, 2]
    assert good["killed"] == [0] and not good["hangs"] and not good["lies"] and not good["missing"]
    ours = [x for x in made if x["method"] in ("plain", "ngram")]
    assert not any(x["error"] for x in ours) and {x["round"] for x in ours} == {0, 1, 2}

    expected = {
        "killed": "ended with signal SIGKILL",
        "hangs": "gave no answer within",
        "lies": "says that it gave 6 tokens, and gave 1",
        "missing": "cannot be run by",
        "http://127.0.0.1:9": "is a server with OpenAI's API running at",
    }
    told = {x["method"]: x["reason"] for x in lines if x["kind"] == "failure"}
    told |= {x["method"]: x["error"] for x in made if x["error"]}
    page, table = (out / "report.html").read_text("utf-8"), " ".join(done.stdout.split())
    for name, why in expected.items():
        assert why in told.pop(name)
        assert why.replace("'", "&#x27;") in page and why in table
    assert not told
    assert table.count("failed") >= len(expected)
    assert all(gone(int(pid)) for pid in engines.read_text().split())


def test_programs_of_the_user_stand_beside_ours_and_leave_no_process_and_no_path(
    outpace: Run, engines: Path, tmp_path: Path
) -> None:
    """Two builds by their labels; one that is a bench, one that ends at once; those that cannot be run at all."""
    folders = {name: tmp_path / f"builds {name}" for name in ("mine", "ends", "bench", "other")}
    programs = {name: server(folders[name]) for name in ("mine", "other")}
    programs["ends"] = server(folders["ends"], at_start="print('no such option: -rtr'); sys.exit(1)")
    programs["bench"] = bench(folders["bench"])
    asked = {name: f"{name}='{path}' -rtr" for name, path in programs.items() if name != "other"}
    asked["other:lookup"] = f"other:lookup={folders['other']}"
    out = tmp_path / "out"
    args = (*ARGS, "-m", str(tmp_path / "toy.gguf"), "--out", str(out))
    for wrong, why in (
        (["ik=/no/such"], "there is no such file"),
        ([f"ik={folders['mine']}", f"ik={folders['other']}"], "two peers are called ik=llama-server"),
    ):
        done = outpace(*args, *(part for peer in wrong for part in ("--peer", peer)))
        assert done.exit_code == 2 and why in " ".join(done.output.split())
        assert not out.exists()

    done = outpace(*args, *(part for peer in asked.values() for part in ("--peer", peer)))
    assert done.exit_code == 0, done.output
    lines = read(out)
    made = [x for x in lines if x["kind"] == "measurement"]
    for name in ("mine", "other:lookup", "bench"):
        own = [x for x in made if x["method"] == name]
        assert [x["round"] for x in own] == [0, 1, 2] and all(x["tokens"] == 6 and x["decode_s"] for x in own)
    (failure,) = (x for x in lines if x["kind"] == "failure")
    assert failure["method"] == "ends" and "no such option: -rtr" in failure["reason"]
    about = next(x for x in lines if x["kind"] == "model")["peers_about"]
    assert about["mine"]["version"] == "version: 77 (abcdef)" and about["mine"]["arguments"].endswith(" -rtr")
    page, results = (out / "report.html").read_text("utf-8"), (out / "results.jsonl").read_text("utf-8")
    assert "no such option: -rtr" in page and "version: 77 (abcdef)" in page
    assert str(tmp_path) not in page + results and "builds" not in page + results
    started = [json.loads(x) for path in folders.values() for x in (path / "started").read_text().splitlines()]
    assert len(started) > 4 and all(gone(line["pid"]) for line in started)
