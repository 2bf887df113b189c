"""Quality: the sandbox holds what it says, answers are judged as they should be, losses are seen."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
from hashing import toy_loaded

from outpace import LLM, ParameterError
from outpace.bench.quality import gsm8k, humaneval
from outpace.bench.quality.likelihood import build_text, of_answers
from outpace.bench.quality.run import Answers, Suite, answer, gsm8k_suite, score
from outpace.bench.quality.sandbox import Limits, possible, run_program
from outpace.bench.teacher import perplexity

sandboxed = pytest.mark.skipif(not possible(), reason="the limits are Linux's")
QUICK = Limits(seconds=4, memory_mb=256, file_mb=1)
TASK = humaneval.Task(
    "T/0",
    'import math\n\n\ndef add(a: int, b: int) -> int:\n    """Sum."""\n',
    "add",
    "def check(candidate):\n    assert candidate(2, 3) == 5\n",
)


@sandboxed
@pytest.mark.parametrize(
    "source, passed, why",
    [
        ("print('x' * 100)", True, ""),
        ("assert 1 == 2, 'no'", False, "AssertionError: no"),
        ("import sys; sys.exit(0)", False, "before its tests were through"),
        ("import os; os._exit(0)", False, "before its tests were through"),
        ("raise SystemExit(3)", False, "exit code 3"),
        ("x = bytearray(1 << 30)", False, "MemoryError"),
        ("open('big', 'wb').write(bytes(4 << 20))", False, ""),
        ("import os; print(os.environ['HOME'])", False, "KeyError"),
        ("import sys; assert sys.stdin.read() == ''", True, ""),
        ("this is no program", False, "SyntaxError"),
    ],
)
def test_programs_end_as_they_should(source: str, passed: bool, why: str) -> None:
    verdict = run_program(source, QUICK)
    assert verdict.passed == passed and why in verdict.why


@sandboxed
def test_what_does_not_end_is_ended_with_its_children() -> None:
    verdict = run_program("while True: pass", Limits(seconds=1))
    assert not verdict.passed
    verdict = run_program("import time; time.sleep(60)", Limits(seconds=1))
    assert not verdict.passed and "more than 1 s" in verdict.why


@sandboxed
def test_the_network_is_shut_off_where_it_says_so() -> None:
    source = "import socket; s = socket.socket(); s.settimeout(2); s.connect(('127.0.0.1', PORT))"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        verdict = run_program(source.replace("PORT", str(server.getsockname()[1])), QUICK)
    assert verdict.passed == ("network" in verdict.open)


@sandboxed
@pytest.mark.parametrize(
    "what, source",
    [
        ("processes", "import os\nif os.fork() == 0: os._exit(0)\nos.wait()"),
        ("processes", "import subprocess; subprocess.run(['/bin/true'], check=True)"),
        ("processes", "import os; os.kill(os.getppid(), 0)"),
        ("files", "open(OUTSIDE, 'w').write('mine')"),
        ("files", "import os; os.unlink(OUTSIDE)"),
        ("files", "print(open(OUTSIDE).read())"),
        ("files", "open('here', 'w').write('mine')"),
    ],
)
def test_what_a_program_has_no_need_of_is_shut_off_where_it_says_so(what: str, source: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("yours")
    verdict = run_program(source.replace("OUTSIDE", repr(str(outside))), QUICK)
    assert verdict.passed == (what in verdict.open), verdict
    assert what in verdict.open or outside.read_text() == "yours"


@sandboxed
def test_this_system_is_told_apart_by_what_it_can_shut_off() -> None:
    """Where the kernel has the means, all of it is shut off; threads are not."""
    from outpace.bench.quality.confine import CALLS

    verdict = run_program("import threading; t = threading.Thread(target=print); t.start(); t.join()", QUICK)
    assert verdict.passed, verdict
    if platform.machine() in CALLS and Path("/proc/sys/kernel/seccomp").is_dir():
        assert "processes" not in verdict.open and "network" not in verdict.open


@sandboxed
@pytest.mark.parametrize(
    "text, chat, right",
    [
        ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", True, True),
        ("```\ndef add(a, b):\n    return math.fsum([a, b])\n```", True, True),  # the prompt's import stays
        ("def add(a, b):\n    return a - b", True, False),
        ("I do not know.", True, False),
        ("    return a + b\n\n\ndef other():\n    broken(", False, True),
        ("    return a * b\n", False, False),
    ],
)
def test_answers_to_humaneval(text: str, chat: bool, right: bool) -> None:
    assert humaneval.grade(TASK, text, chat, QUICK).passed == right


def test_task_files(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    item = {"task_id": "T/0", "prompt": TASK.prompt, "entry_point": "add", "test": TASK.test}
    path.write_text(json.dumps(item) + "\n")
    assert humaneval.load_tasks(path) == [TASK] and "```python\nimport math" in TASK.question
    path.write_text(json.dumps({**item, "entry_point": "os.system('x')"}))
    with pytest.raises(ParameterError, match="line 1"):
        humaneval.load_tasks(path)
    for bad in ("", "{}", "nothing"):
        path.write_text(bad)
        for load in (humaneval.load_tasks, gsm8k.load_problems):
            with pytest.raises(ParameterError):
                load(path)
    path.write_text(json.dumps({"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 1,004.50"}))
    assert str(gsm8k.load_problems(path)[0].answer) == "1004.50"


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("The answer is: $1,234.", 1234),
        ("She has 12 eggs and then 3.5 left.", 3.5),
        ("\\boxed{-18} of 20", -18),
        ("The answer is **42** because of 6 * 7 = 42, not 43", 42),
        ("no number", None),
    ],
)
def test_numbers_in_answers(text: str, number: float | None) -> None:
    found = gsm8k.number_in(text)
    assert (None if found is None else float(found)) == number


def test_scores_compare_pair_by_pair(tmp_path: Path) -> None:
    llm = LLM(toy_loaded(), method="plain", kv_tokens=4096)
    texts = tuple(f"{c}{c}{c}abcabc" for c in "uvwxyz")
    good = Suite("toy", texts, texts, 10, lambda place, text, chat: place != 2)
    quiet = lambda what, done, total: None  # noqa: E731
    plain = answer(llm, good, "plain", "auto", 0.0, quiet)
    assert plain.right == [True, True, False, True, True, True]
    worse = answer(llm, good, "suffix", "topk:k=20", 0.0, quiet)
    assert all(r.exactness == "approximate" for r in worse.results)
    found = score(llm, llm, good, "suffix", "topk:k=20", Answers(worse.results, [False] * 3 + [True] * 3), plain)
    assert (found.right, found.lost, found.won, found.questions) == (3, 2, 0, 6)
    assert found.cut == sum(len(r.token_ids) == 10 for r in worse.results) > 0
    assert found.p == 0.5 and found.same_text < 6 and found.exactness == "approximate"
    same = score(llm, llm, good, "plain", "auto", plain, plain)
    assert same.same_text == 6 and same.lost == same.won == 0
    # greedy text is what the target finds likeliest; what topk lets pass is less so
    assert same.perplexity < found.perplexity


def test_likelihood_of_answers_is_that_of_their_tokens() -> None:
    llm = LLM(toy_loaded(), method="plain", kv_tokens=4096)
    prompt = llm.tokens("hello")
    (result,) = llm.generate("hello", None)[:1]
    read = of_answers(llm, [prompt], [result])
    *_, whole = perplexity(llm.decoder, [*prompt, *result.token_ids])
    *_, head = perplexity(llm.decoder, prompt)
    assert read.tokens == len(result.token_ids) == whole.tokens - head.tokens
    assert read.nll == pytest.approx(whole.nll - head.nll, rel=1e-9)


def test_suites_and_text(tmp_path: Path) -> None:
    problems = [gsm8k.Problem("g1", "2+2?", gsm8k.Decimal(4))]
    suite = gsm8k_suite(problems)
    assert suite.grade is not None and suite.grade(0, "#### 4", True) and not suite.grade(0, "#### 5", True)
    assert len(build_text(5000)) == 5000 and build_text(5000) == build_text(5000)
