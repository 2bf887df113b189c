"""The four faults that `outpace audit` is held to: each is injected, and the command ends in 1 and names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from faulty import LeaksWhileShared, Leaky, OneIn500, WrongResidual, registered

from outpace.bench import audit_verifiers, language


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """As many as the command takes by default."""
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{i}", "category": "chat", "turns": [f"{i}abcabcab" * 2]} for i in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


SHARP = "0.3"  # the toy's language is flat: so it has words that are likely enough to be counted


def failed_checks(path: Path) -> list[dict[str, Any]]:
    record = json.loads(path.read_text())
    assert record["holds"] is False
    return [check for section in record["sections"] for check in section["checks"] if not check["holds"]]


def test_one_wrong_token_in_500_is_seen_by_the_tokens_of_a_default_audit(
    outpace: Callable[..., Result], prompts: str, tmp_path: Path
) -> None:
    """With as many prompts, settings and tokens as by default; nothing else looks."""
    path = tmp_path / "a.json"
    args = ("audit", "--prompts", prompts, "--method", "recycling", "--batch", "8", "--check", "tokens")
    with registered(OneIn500) as name:
        done = outpace(*args, "--verifier", name, "--json", str(path))
    assert done.exit_code == 1 and "BROKEN PROMISE of identical tokens" in done.output
    assert "sequences that were promised identical differ" in done.output
    (section,) = json.loads(path.read_text())["sections"]
    wrong = [row["method"] for row in section["rows"] if row["differing"]]
    assert {*wrong} == {"recycling"} and not section["checks"]
    sound = outpace(*args, "--json", str(path))
    assert sound.exit_code == 0 and "the rarest fault that this would have found (95 %)" in sound.output
    (section,) = json.loads(path.read_text())["sections"]
    seen = {c["method"]: c for c in section["coverage"]}
    assert seen["recycling"]["wrong_token_in"] >= 500 and seen["recycling"]["wrong_draft_in"] >= 500
    assert "may have gone unseen" not in sound.output


def test_little_evidence_is_called_so(outpace: Callable[..., Result], prompts: str) -> None:
    args = ("audit", "--prompts", prompts, "--n", "3", "-t", "8", "--check", "tokens", "--temperature", "0")
    done = outpace(*args, "--method", "recycling")
    assert done.exit_code == 0 and "one wrong token in 500 may have gone unseen with" in done.output
    assert "it takes 1,497 tokens" in " ".join(done.output.split())


@pytest.mark.parametrize("kind", ["verifiers", "frequencies"])
def test_a_residual_from_the_wrong_position_is_seen(
    kind: str, outpace: Callable[..., Result], prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model by enumeration, and with one by counting texts: each alone is enough."""
    monkeypatch.setattr(audit_verifiers, "_WALKS", 50)
    monkeypatch.setattr(audit_verifiers, "_TEXTS", 200)
    monkeypatch.setattr(language, "SAMPLERS", {n: language.SAMPLERS[n] for n in ("greedy", "temperature", "penalties")})
    path = tmp_path / "a.json"
    args = ("audit", "--prompts", prompts, "--n", "1", "-t", "8", "--method", "recycling", "--batch", "1")
    with registered(WrongResidual, "distribution") as name:
        more = ("--verifier", name, "--check", kind, "--temperature", SHARP, "--texts", "200", "--json", str(path))
        done = outpace(*args, *more)
    assert done.exit_code == 1 and "FAILED: " in done.output and "checks failed" in done.output
    failed = failed_checks(path)
    assert {c["kind"] for c in failed} <= {"enumeration", "frequencies"}
    assert all(name in c["subject"] for c in failed)


@pytest.mark.parametrize("cls", [Leaky, LeaksWhileShared])
def test_a_drafter_that_leaks_another_owners_text_is_seen(
    cls: type, outpace: Callable[..., Result], prompts: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    args = ("audit", "--prompts", prompts, "--n", "1", "-t", "8", "--batch", "1", "--temperature", "0")
    with registered(cls) as name:
        done = outpace(*args, "--method", name, "--check", "owners", "--json", str(path))
    assert done.exit_code == 1 and "pieces of another owner's text" in " ".join(done.output.split())
    failed = failed_checks(path)
    assert failed and all(c["kind"] == "owners" and c["numbers"]["leaked"] for c in failed)


def test_a_truncated_output_file_is_seen(outpace: Callable[..., Result], tmp_path: Path) -> None:
    out, asked = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    body = {"choices": [{"message": {"content": "text"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    line = {"response": {"status_code": 200, "body": body}, "error": None}
    asked.write_text("".join(json.dumps({"custom_id": f"r{i}", "body": {}}) + "\n" for i in range(3)))
    out.write_text("".join(json.dumps({"custom_id": f"r{i}", **line}) + "\n" for i in range(3)))
    whole = out.read_bytes()
    assert outpace("audit", "--check-file", str(out), "--requests", str(asked)).exit_code == 0
    out.write_bytes(whole[:-1])
    done = outpace("audit", "--check-file", str(out))
    assert done.exit_code == 1 and "cut short" in done.output
    out.write_bytes(whole[: whole[:-1].rindex(b"\n") + 1])  # between two lines: nothing but the requests can tell
    done = outpace("audit", "--check-file", str(out))
    assert done.exit_code == 0 and "cannot be seen without --requests" in " ".join(done.output.split())
    done = outpace("audit", "--check-file", str(out), "--requests", str(asked), "--json", str(tmp_path / "a.json"))
    assert done.exit_code == 1 and "1 of 3 requests have no answer, the first is 'r2'" in " ".join(done.output.split())
    assert json.loads((tmp_path / "a.json").read_text())["holds"] is False


def test_a_truncated_comparison_is_seen(outpace: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    kinds = [
        {"kind": "comparison", "identity": {}},
        {"kind": "model", "model": "toy"},
        {"kind": "measurement", "model": "toy", "place": 0, "heat_size": 2},
        {"kind": "measurement", "model": "toy", "place": 1, "heat_size": 2},
        {"kind": "end", "model": "toy"},
    ]
    lines = [json.dumps(line) + "\n" for line in kinds]
    for kept in range(len(lines) + 1):
        path.write_text("".join(lines[:kept]))
        assert outpace("audit", "--check-file", str(path)).exit_code == (0 if kept == len(lines) else 1), kept
