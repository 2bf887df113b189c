"""Command lines: `llm`, and `lm-eval` with one task that generates and one that scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from shapes import ASK, Person, get_weather, is_ann

TASKS = Path(__file__).parent / "tasks"


def run(command: list[str], **more: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_llm(small: Any, coder: Any, tmp_path: Path) -> None:
    models = [
        f"- model_id: {name}\n  model_name: {server.model}\n  api_base: {server.url}\n  supports_schema: true\n"
        f"  supports_tools: true\n"
        for name, server in (("small", small), ("coder", coder))
    ]
    (tmp_path / "extra-openai-models.yaml").write_text("".join(models))
    llm = [sys.executable, "-m", "llm"]
    at = {"LLM_USER_PATH": str(tmp_path)}
    streamed = run([*llm, "-m", "small", "Say hello.", "-o", "temperature", "0", "-o", "max_tokens", "12"], **at)
    whole = run(
        [*llm, "-m", "small", "Say hello.", "--no-stream", "-o", "temperature", "0", "-o", "max_tokens", "12"], **at
    )
    assert streamed.strip() and streamed == whole
    again = run([*llm, "-c", "And again.", "-o", "max_tokens", "8"], **at)
    assert again.strip()
    schema = json.dumps(Person.model_json_schema())
    typed = run([*llm, "-m", "coder", "--schema", schema, ASK, "-o", "temperature", "0"], **at)
    is_ann(Person.model_validate_json(typed))


def test_llm_calls_tools(coder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    named = f"- model_id: coder\n  model_name: {coder.model}\n  api_base: {coder.url}\n  supports_tools: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(named)
    import llm

    made: dict[str, Any] = dict(tools=[get_weather], temperature=0)
    for stream in (False, True):
        response = llm.get_model("coder").prompt("What is the weather in Bern?", stream=stream, **made)
        first = response.tool_calls()[0]
        assert first.name == "get_weather" and first.arguments == {"city": "Bern"}


@pytest.fixture
def evaluated(small: Any, tmp_path: Path) -> dict[str, Any]:
    """Both tasks, with the server's own tokenizer."""
    where = f"base_url={small.url}/completions,model={small.model},num_concurrent=2,max_retries=1,max_length=2048"
    run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", where),
            *("--tasks", "capitals_scored,capitals_written", "--include_path", str(TASKS), "--batch_size", "2"),
            *("--output_path", str(tmp_path), "--log_samples"),
        ],
        HF_HOME=str(tmp_path / "cache"),
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )
    (results,) = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    (samples,) = tmp_path.rglob("samples_capitals_scored_*.jsonl")
    found["samples"] = [json.loads(line) for line in samples.read_text().splitlines()]
    return found


def test_lm_eval(evaluated: dict[str, Any], small: Any) -> None:
    assert evaluated["capitals_written"]["exact_match,first_word"] >= 0.5
    assert evaluated["capitals_scored"]["acc,none"] >= 0.75
    sample = evaluated["samples"][0]
    context, continuation = sample["arguments"]["gen_args_0"]["arg_0"], sample["arguments"]["gen_args_0"]["arg_1"]
    scored = float(sample["filtered_resps"][0][0])
    body = {"prompt": context + continuation, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
    told = httpx.post(f"{small.url}/completions", json=body, timeout=300).json()["choices"][0]["logprobs"]
    behind = [p for p, at in zip(told["token_logprobs"], told["text_offset"], strict=True) if at >= len(context)]
    assert abs(sum(behind) - scored) < 1e-3
