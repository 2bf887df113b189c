"""`outpace batch` over a decoder whose logits are a hash."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from outpace.engine.llm import LLM

Outpace = Callable[..., Result]


def chat(custom_id: str, text: str, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(custom_id: str, prompt: Any, **body: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 12} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def write(path: Path, *requests: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in requests), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(answer: dict[str, Any]) -> Any:
    """What must not depend on when, beside whom and in which run a request was answered."""
    if answer["response"] is None or answer["response"]["status_code"] != 200:
        return answer
    body = answer["response"]["body"]
    own = body["outpace"]
    seeds = [choice["seed"] for choice in own.get("choices", [own])]
    usage = {name: n for name, n in body["usage"].items() if name.endswith("_tokens")}
    return answer["id"], answer["custom_id"], answer["error"], body["choices"], usage, seeds


def by_id(path: Path) -> dict[str, Any]:
    answers = read(path)
    assert len({a["id"] for a in answers}) == len(answers), "a line was answered twice"
    return {a["id"]: said(a) for a in answers}


def mixed(n: int = 40) -> list[dict[str, Any]]:
    """Requests with a few common beginnings, greedy and sampled, with and without a seed, one and several choices."""
    rng = random.Random(5)
    texts = ["".join(rng.choices("abcdef ", k=150)) for _ in range(4)]
    requests = []
    for i in range(n):
        text = rng.choice(texts) + f" question {i}"
        if i % 3 == 0:
            requests.append(completion(f"r{i}", text, temperature=i % 2, n=1 + (i % 4 == 0), max_tokens=5 + i % 20))
        else:
            requests.append(chat(f"r{i}", text, temperature=i % 2, max_tokens=5 + i % 20))
    return requests


def test_answers_are_those_of_run(outpace: Outpace, tmp_path: Path) -> None:
    write(tmp_path / "in", chat("one", "hello", temperature=0), completion("two", "hello", temperature=0))
    result = outpace("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy")
    assert result.exit_code == 0, result.stderr
    answers = {a["custom_id"]: a for a in read(tmp_path / "out")}
    assert answers.keys() == {"one", "two"}
    one = answers["one"]["response"]
    assert one["status_code"] == 200 and answers["one"]["error"] is None
    assert one["request_id"] == answers["one"]["id"].removeprefix("batch_") and answers["one"]["id"].startswith(
        "batch_"
    )
    assert one["body"]["object"] == "chat.completion" and one["body"]["model"] == "toy"
    assert one["body"]["usage"]["completion_tokens"] == 12
    texts = one["body"]["choices"][0]["message"]["content"], answers["two"]["response"]["body"]["choices"][0]["text"]
    for text, args in zip(texts, ((), ("--raw",)), strict=True):
        assert text + "\n" == outpace("run", "hello", "--max-tokens", "12", "-m", "toy", *args).stdout
    assert "2 requests" in result.stderr and "2/2 answered, 2 of them in" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("order", ["grouped", "as-given"])
def test_every_request_once_whatever_the_order(outpace: Outpace, tmp_path: Path, order: str) -> None:
    requests = mixed()
    write(tmp_path / "in", *requests)
    args = ("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy", "--order", order, "--ordered")
    assert outpace(*args).exit_code == 0
    assert [a["custom_id"] for a in read(tmp_path / "out")] == [r["custom_id"] for r in requests]
    narrow = ("batch", str(tmp_path / "in"), str(tmp_path / "narrow"), "-m", "toy", "--max-batch", "2")
    assert outpace(*narrow, "--kv-tokens", "512").exit_code == 0
    assert by_id(tmp_path / "narrow") == by_id(tmp_path / "out")


def test_a_long_input_is_looked_at_in_blocks(outpace: Outpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outpace.server import batchrun

    write(tmp_path / "in", *mixed())
    assert outpace("batch", str(tmp_path / "in"), str(tmp_path / "whole"), "-m", "toy").exit_code == 0
    for name, limit in (("BLOCK_LINES", 7), ("BLOCK_TOKENS", 500)):
        with monkeypatch.context() as patch:
            patch.setattr(batchrun, name, limit)
            assert outpace("batch", str(tmp_path / "in"), str(tmp_path / name), "-m", "toy").exit_code == 0
        assert by_id(tmp_path / name) == by_id(tmp_path / "whole")


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom outpace.cli import main\n"
        "try: main(['batch', '-h'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "INPUT OUTPUT" in out and out.endswith("0 False\n")


def test_grouped_prompts_are_read_once(outpace: Outpace, tmp_path: Path) -> None:
    """With a cache that holds few requests, the order given reads the common beginnings again and again."""
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdef ", k=250)) for _ in range(8)]
    requests = [completion(f"r{i}", texts[i % 8] + f" question {i}", temperature=0, max_tokens=4) for i in range(48)]
    write(tmp_path / "in", *requests)
    cached = {}
    for order in ("grouped", "as-given"):
        args = ("batch", str(tmp_path / "in"), str(tmp_path / order), "-m", "toy", "--order", order)
        assert outpace(*args, "--max-batch", "2", "--kv-tokens", "1024").exit_code == 0
        bodies = [a["response"]["body"] for a in read(tmp_path / order)]
        cached[order] = sum(b["usage"]["prompt_tokens_details"]["cached_tokens"] for b in bodies)
    assert by_id(tmp_path / "grouped") == by_id(tmp_path / "as-given")
    assert cached["grouped"] >= 8 * 5 * 224  # all but the first of each group, in whole pages
    assert cached["as-given"] < cached["grouped"] / 2


BAD = [
    ("{", "invalid_json"),
    ({"custom_id": "no-url"}, "invalid_method"),
    (chat("first", "again"), "duplicate_custom_id"),
    (chat("hot", "x", temperature=-1), "invalid_value"),
    (chat("unknown", "x", temprature=1), "unknown_parameter"),
    (chat("none", "x", messages=[]), "invalid_type"),
    (chat("long", "x" * 5000), "context_length_exceeded"),
    (chat("other", "x", model="gpt-4o-mini"), "model_not_found"),
    (chat("stream", "x", stream=True), "invalid_value"),
    (
        chat("schema", "x", response_format={"type": "json_schema", "json_schema": {"schema": {"type": 7}}}),
        "invalid_value",
    ),
    (chat("method", "x", outpace={"method": "magic"}), "invalid_value"),
    (completion("ids", [1, 10**6]), "invalid_value"),
    (completion("later", ["fine", ""]), "invalid_value"),  # its first choice is in the engine already
]


def test_bad_lines_get_their_reason_and_the_rest_goes_on(outpace: Outpace, tmp_path: Path) -> None:
    write(tmp_path / "in", chat("first", "hello"), *(line for line, _ in BAD), chat("last", "hello"))
    args = ("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy", "--ordered")
    result = outpace(*args)
    assert result.exit_code == 1 and result.stdout == ""
    assert f"{len(BAD)} of {len(BAD) + 2} requests could not be answered" in result.stderr
    answers = read(tmp_path / "out")
    assert [a["error"] and a["error"]["code"] for a in answers] == [None, *(code for _, code in BAD), None]
    for answer in answers[1:-1]:
        assert len(answer["error"]["message"]) > 10
        if answer["response"] is not None:
            assert answer["response"]["status_code"] in (400, 404)
            assert answer["response"]["body"]["error"]["message"] == answer["error"]["message"]
    again = outpace(*args)
    assert again.exit_code == 1 and f"{len(answers)} of {len(answers)} are answered already" in again.stderr
    assert read(tmp_path / "out") == answers


def test_any_model(outpace: Outpace, tmp_path: Path) -> None:
    write(tmp_path / "in", chat("other", "x", model="gpt-4o-mini"))
    assert outpace("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy", "--any-model").exit_code == 0
    assert read(tmp_path / "out")[0]["response"]["body"]["model"] == "toy"


@pytest.mark.parametrize("seed", range(6))
def test_resumed_from_any_byte_it_is_as_if_it_never_stopped(outpace: Outpace, tmp_path: Path, seed: int) -> None:
    write(tmp_path / "in", *mixed(16), "{bad")
    args = ("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy")
    assert outpace(*args).exit_code == 1
    data, whole = (tmp_path / "out").read_bytes(), by_id(tmp_path / "out")
    cut = random.Random(seed).randrange(len(data))
    (tmp_path / "out").write_bytes(data[:cut])
    result = outpace(*args)
    assert result.exit_code == 1
    found = data[:cut].count(b"\n")
    assert (f"{found} of 17 are answered already" if found else "17 requests") in result.stderr
    assert by_id(tmp_path / "out") == whole
    assert (tmp_path / "out").read_bytes().startswith(data[: data.rfind(b"\n", 0, cut) + 1])


def test_what_does_not_belong_together_is_refused(outpace: Outpace, tmp_path: Path) -> None:
    write(tmp_path / "in", chat("a", "hello"), chat("b", "hello"))
    args = ("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy")
    assert outpace(*args).exit_code == 0
    data = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(data.splitlines(keepends=True)[0])
    other = outpace("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "base")
    assert other.exit_code == 2 and "another --model" in other.stderr and other.stderr.count("error:") == 1
    write(tmp_path / "in", chat("a", "changed"))
    changed = outpace(*args)
    assert changed.exit_code == 2 and "another input" in changed.stderr and "Traceback" not in changed.stderr
    assert (tmp_path / "out").read_bytes() == data.splitlines(keepends=True)[0]
    missing = outpace("batch", str(tmp_path / "none"), str(tmp_path / "out"))
    assert missing.exit_code == 2 and "cannot be read" in missing.stderr


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (("--answer-tokens", "7"), "--answer-tokens (now 7)"),
        (("-m", "base"), "--model (now 'base')"),
        (("--verifier", "typical"), "--verifier (now 'typical')"),
        (("--any-model",), "--any-model (now True)"),
        (("--methods", "suffix"), "--methods (now ('suffix',))"),
    ],
)
def test_a_finished_output_is_not_taken_for_that_of_other_settings(
    outpace: Outpace, tmp_path: Path, changed: tuple[str, ...], name: str
) -> None:
    write(tmp_path / "in", chat("a", "hello", max_tokens=None))
    args = ("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy", "--answer-tokens", "5")
    assert outpace(*args).exit_code == 0
    before = (tmp_path / "out").read_bytes()
    again = outpace(*args)
    assert again.exit_code == 0 and "1 of 1 are answered already" in again.stderr
    result = outpace(*args, *changed)
    assert result.exit_code == 2 and f"was begun with another {name}" in " ".join(result.stderr.split())
    assert "name another output" in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
    assert (tmp_path / "out").read_bytes() == before


def test_what_changes_no_answer_may_be_another(outpace: Outpace, tmp_path: Path) -> None:
    write(tmp_path / "in", *mixed(6))
    args = ("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy")
    assert outpace(*args, "--method", "suffix", "--max-batch", "2", "--kv-tokens", "1024").exit_code == 0
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert outpace(*args, "--method", "ngram", "--threads", "1", "--max-rows", "5").exit_code == 0
    assert len(by_id(tmp_path / "out")) == 6


def test_where_drafts_change_the_answers_the_method_counts(outpace: Outpace, tmp_path: Path) -> None:
    write(tmp_path / "in", chat("a", "hello"))
    args = ("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy", "--verifier", "rejection")
    assert outpace(*args, "--method", "suffix").exit_code == 0
    other = outpace(*args, "--method", "ngram")
    assert other.exit_code == 2 and "--method, --draft-model" in other.stderr and "'ngram'" in other.stderr


def test_interrupt_leaves_a_clean_file(outpace: Outpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in", *mixed())
    args = ("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy", "--max-batch", "2")
    steps, step = [], LLM.step

    def interrupted(self: LLM) -> Any:
        steps.append(1)
        if len(steps) == 60:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(LLM, "step", interrupted)
        result = outpace(*args)
    assert result.exit_code == 130 and "the same command goes on" in result.stderr and "Traceback" not in result.stderr
    kept = read(tmp_path / "out")
    assert 0 < len(kept) < 40
    assert outpace(*args).exit_code == 0
    assert len(by_id(tmp_path / "out")) == 40 and read(tmp_path / "out")[: len(kept)] == kept


def test_one_request_that_breaks_a_step_fails_alone(
    outpace: Outpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others of its step are tried again, and say what they would have said."""
    requests = mixed(12)
    write(tmp_path / "in", *requests)
    assert outpace("batch", str(tmp_path / "in"), str(tmp_path / "good"), "-m", "toy").exit_code == 0
    step, submit, cursed = LLM.step, LLM.submit, []

    def submitted(self: LLM, prompt: Any, *args: Any) -> int:
        id = submit(self, prompt, *args)
        if self.tokenizer.decode(prompt).rstrip("\n:").endswith("question 7"):
            cursed.append(id)
        return id

    def broken(self: LLM) -> Any:
        events = step(self)
        if set(self.in_step) & set(cursed):
            raise RuntimeError("a curse")
        return events

    monkeypatch.setattr(LLM, "submit", submitted)
    monkeypatch.setattr(LLM, "step", broken)
    result = outpace("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy")
    assert result.exit_code == 1 and "1 of 12 requests" in result.stderr and len(cursed) == 2
    answers, good = by_id(tmp_path / "out"), by_id(tmp_path / "good")
    failed = [a for a in read(tmp_path / "out") if a["error"]]
    assert [a["custom_id"] for a in failed] == ["r7"] and "a curse" in failed[0]["error"]["message"]
    assert failed[0]["response"]["status_code"] == 500
    assert all(answers[id] == good[id] for id in good if id != failed[0]["id"])


def test_an_engine_that_always_fails_ends_the_run(
    outpace: Outpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in", *mixed())
    monkeypatch.setattr(LLM, "step", lambda self: 1 / 0)
    result = outpace("batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", "toy")
    assert result.exit_code == 70 and "ZeroDivisionError" in result.stderr
    assert len(read(tmp_path / "out")) < 4


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from hashing import toy_loaded
from outpace.cli import main
from outpace.engine import llm
from outpace.engine.llm import LLM
from outpace.models import source
source.find = Path
llm.load_model = lambda name, **how: toy_loaded(name, template="{{{{ messages[-1].content }}}}:")
step = LLM.step
LLM.step = lambda self: (time.sleep(0.002), step(self))[1]
main(["batch", *sys.argv[1:], "-m", "toy", "--method", "suffix", "--max-batch", "4"])
"""


@pytest.mark.slow
def test_killed_processes(tmp_path: Path) -> None:
    """SIGKILL at random moments, again and again, until it is through."""
    write(tmp_path / "in", *mixed(), "{bad")
    code = KILLED.format(path=[str(Path(__file__).parents[1])])

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / out)]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    _, told = (process := start("whole")).communicate(timeout=120)
    assert process.returncode == 1, told
    out, rng, kills = tmp_path / "out", random.Random(3), 0
    while kills < 3:
        process = start("out")
        before = out.stat().st_size if out.exists() else 0
        while process.poll() is None and (not out.exists() or out.stat().st_size <= before):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was through before it could be killed"
        kills += 1
    _, told = (process := start("out")).communicate(timeout=120)
    assert process.returncode == 1 and b"are answered already" in told, told
    assert by_id(out) == by_id(tmp_path / "whole")
