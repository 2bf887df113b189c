"""Calls read out of text, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outpace.errors import ParameterError
from outpace.server.protocol import Message
from outpace.server.tools import Call, ToolReader, parse_call, split, template_messages

GOOD = '{"name": "f", "arguments": {"a": 1}}'
CALL = Call("f", '{"a": 1}')


@pytest.mark.parametrize(
    ("text", "plain", "calls"),
    [
        ("Hello", "Hello", []),
        ("", "", []),
        ("a <tool", "a <tool", []),
        (f"<tool_call>{GOOD}</tool_call>", None, [CALL]),
        (f"<tool_call>\n{GOOD}\n</tool_call>\n<tool_call>{GOOD}</tool_call>\n", None, [CALL, CALL]),
        (f"Let me see.\n\n<tool_call>\n{GOOD}", "Let me see.", [CALL]),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
        ("<tool_call>[1]", "<tool_call>[1]", []),
        (f"<tool_call>{GOOD}</tool_call> and more", " and more", [CALL]),
    ],
)
def test_text_and_calls(text: str, plain: str | None, calls: list[Call]) -> None:
    assert split(text) == (plain, calls)


pieces = st.sampled_from(["<tool_call>", "</tool_call>", GOOD, "<tool", "_call>", " ", "\n", "x", "<", ">", "{}"])


@given(st.lists(pieces, max_size=8), st.lists(st.integers(0, 80), max_size=6))
def test_the_cut_of_a_stream_changes_nothing(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    whole = ToolReader()
    expected = merged(whole.push(text) + whole.flush())
    reader, found, at = ToolReader(), [], 0
    for cut in sorted(min(c, len(text)) for c in cuts):
        found += reader.push(text[at:cut])
        at = cut
    found += reader.push(text[at:]) + reader.flush()
    assert merged(found) == expected
    assert all(item for item in found if isinstance(item, str))


def merged(items: list[str | Call]) -> list[str | Call]:
    """Neighbouring texts as one."""
    found: list[str | Call] = []
    for item in items:
        if isinstance(item, str) and found and isinstance(found[-1], str):
            found[-1] += item
        else:
            found.append(item)
    return found


def test_text_is_not_held_back_for_longer_than_needed() -> None:
    reader = ToolReader()
    assert reader.push("Hello <b> there") == ["Hello <b> there"]
    assert reader.push(" <tool") == [] and reader.push("box") == [" <toolbox"]


@pytest.mark.parametrize("text", ["", "1", '{"name": 1}', '{"name": "f", "arguments": 1}', "[" * 100_000])
def test_what_is_no_call(text: str) -> None:
    assert parse_call(text) is None


def test_arguments_as_text_are_taken() -> None:
    assert parse_call('{"name": "f", "arguments": "{}"}') == Call("f", "{}")


def turns(*messages: dict[str, Any]) -> list[Message]:
    return [Message.model_validate(m) for m in messages]


def made(*ids: str, arguments: str = "{}") -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": i, "arguments": arguments}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def test_answers_of_tools_stand_in_the_order_of_the_calls() -> None:
    answers = [{"role": "tool", "tool_call_id": i, "content": i} for i in ("b", "a")]
    found = template_messages(turns(made("a", "b"), *answers, {"role": "user", "content": "x"}))
    assert [m["content"] for m in found] == ["", "a", "b", "x"]
    assert found[0]["tool_calls"][0]["function"] == {"name": "a", "arguments": {}}


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{"role": "tool", "tool_call_id": "a", "content": "x"}], "must name a call"),
        ([made("a"), {"role": "tool", "content": "x"}], "must name a call"),
        ([made("a", arguments="no")], "not the text of a JSON object"),
        ([{"role": "user", "content": "x", "tool_call_id": "a"}], "role tool"),
        ([made("a") | {"role": "user"}], "role assistant"),
        ([{"role": "assistant"}], "content is missing"),
    ],
)
def test_what_does_not_fit_together(messages: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        template_messages(turns(*messages))


def test_a_call_as_clients_see_it() -> None:
    body = CALL.body()
    assert body["id"].startswith("call_") and json.loads(body["function"]["arguments"]) == {"a": 1}
