"""Calls read out of text, however the text is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outpace.errors import ParameterError
from outpace.server.calls import Begun, Call, Ended, ForcedReader, Item, Piece, ToolReader, parse_call, read
from outpace.server.conversation import template_messages
from outpace.server.protocol import Message

GOOD = '{"name": "f", "arguments": {"a": 1}}'
CALL = Call("f", '{"a": 1}')


OTHER = '{"name": "other", "arguments": {}}'
FENCED = f"```json\n{GOOD}\n```"
TAGGED = f"<tool_call>\n{GOOD}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "plain", "calls"),
    [
        ("Hello", "Hello", []),
        ("", "", []),
        ("a <tool", "a <tool", []),
        (f"<tool_call>{GOOD}</tool_call>", "", [CALL]),
        (f"{TAGGED}\n<tool_call>{GOOD}</tool_call>\n", "", [CALL, CALL]),
        (f"Let me see.\n\n<tool_call>\n{GOOD}", "Let me see.", [CALL]),
        ("so: <tool_call>no json</tool_call>", "so: <tool_call>no json</tool_call>", []),
        ("<tool_call>[1]", "<tool_call>[1]", []),
        (f"<tool_call>{GOOD}</tool_call> and more", " and more", [CALL]),
        (f"<tool_call>{OTHER}</tool_call>", "", [Call("other", "{}")]),
        # as models write it that forget the tags
        (GOOD, "", [CALL]),
        (FENCED, "", [CALL]),
        (f"```\n{GOOD}\n```\n", "", [CALL]),
        (f"Sure:\n\n{FENCED}\nDone.", "Sure:\nDone.", [CALL]),
        (f"{FENCED}\n\n{FENCED}", "", [CALL, CALL]),
        (f"```json\n{GOOD}\n{GOOD}\n```", "", [CALL, CALL]),
        (f"```json\n[\n  {GOOD},\n  {GOOD}\n]\n```\n", "", [CALL, CALL]),
        (f"[{GOOD}, {GOOD}]", "", [CALL, CALL]),
        (f"{GOOD}\n{GOOD}", "", [CALL, CALL]),
        (f"{GOOD}; {GOOD} and more", " and more", [CALL, CALL]),
        (f"{TAGGED}\n{FENCED}", "", [CALL, CALL]),
        ('{"name": "f", "parameters": {"a": 1}}', "", [CALL]),
        ('{"arguments": {"a": 1}, "name": "f"}', "", [CALL]),
        ('{"type": "function", "function": ' + GOOD + "}", "", [CALL]),
        ('{"name": "f", "arguments": {"a": "}\\"{"}}', "", [Call("f", '{"a": "}\\"{"}')]),
        # what only looks like it
        (OTHER, OTHER, []),
        ('{"name": "f"}', '{"name": "f"}', []),
        ('{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": [1]}', []),
        ('{"name": "f", "arguments": {"a": 1,}}', '{"name": "f", "arguments": {"a": 1,}}', []),
        ('```json\n{"a": {"name": "f"}}\n```', '```json\n{"a": {"name": "f"}}\n```', []),
        (f"As in {GOOD}", f"As in {GOOD}", []),
        (f"```json\n{OTHER}\n```", f"```json\n{OTHER}\n```", []),
        ("[1, 2]", "[1, 2]", []),
    ],
)
def test_text_and_calls(text: str, plain: str, calls: list[Call]) -> None:
    assert read(ToolReader(["f", "g"]), text, cut=False) == (plain, calls)


@pytest.mark.parametrize(
    ("text", "plain", "calls"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a', "", [Call("f", '{"a', complete=False)]),
        ('<tool_call>{"name": "f"', "", [Call("f", "", complete=False)]),
        ('Hm. <tool_call>{"na', "Hm.", []),
        ('{"name": "f", "arguments": {"a', "", [Call("f", '{"a', complete=False)]),
        (f'{FENCED}\n```json\n{{"name": "f", "arguments": {{', "", [CALL, Call("f", "{", complete=False)]),
        ('{"name": "f', '{"name": "f', []),  # may still be anything
        (f"```json\n{GOOD}", "", [CALL]),
    ],
)
def test_a_call_that_was_cut_is_no_text(text: str, plain: str, calls: list[Call]) -> None:
    assert read(ToolReader(["f"]), text, cut=True) == (plain, calls)


def test_no_more_than_one_call_where_one_is_wanted() -> None:
    assert read(ToolReader(["f"], single=True), f"Two:\n{GOOD}\n{GOOD}\nthere", cut=False) == ("Two:", [CALL])


PIECES = ["<tool_call>", "</tool_call>", GOOD, "<tool", "_call>", " ", "\n", "x", "<", ">", "{}", "```", "```json\n"]
pieces = st.sampled_from([*PIECES, "[", "]", ",", ";", "{", '{"name"', ': "f', '"', OTHER, GOOD[:-4]])


@settings(max_examples=300)
@given(st.lists(pieces, max_size=8), st.lists(st.integers(0, 120), max_size=6), st.booleans())
def test_the_cut_of_a_stream_changes_nothing(parts: list[str], cuts: list[int], limit: bool) -> None:
    text = "".join(parts)
    whole = ToolReader(["f"])
    expected = merged(whole.push(text) + whole.flush(limit))
    reader, found, at = ToolReader(["f"]), [], 0
    for cut in sorted(min(c, len(text)) for c in cuts):
        found += reader.push(text[at:cut])
        at = cut
    found += reader.push(text[at:]) + reader.flush(limit)
    assert merged(found) == expected
    assert all(item for item in found if isinstance(item, str))


def merged(items: list[Item]) -> list[Item]:
    """Neighbouring texts as one."""
    found: list[Item] = []
    for item in items:
        if isinstance(item, str) and found and isinstance(found[-1], str):
            found[-1] += item
        else:
            found.append(item)
    return found


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_forced_calls_come_in_pieces(size: int) -> None:
    text = f"{GOOD}\n</tool_call>\n<tool_call>\n" + '{"name": "g", "arguments": {"b": "x\\"}"}}\n</tool_call>'
    reader = ForcedReader()
    items = [item for i in range(0, len(text), size) for item in reader.push(text[i : i + size])]
    assert [item for item in items if isinstance(item, Begun)] == [Begun("f"), Begun("g")]
    assert items.count(Ended()) == 2 and reader.flush() == []
    assert "".join(i.arguments for i in items if isinstance(i, Piece)) == '{"a": 1}{"b": "x\\"}"}'
    if size == 1:
        assert items.index(Piece("{")) < items.index(Ended()), "arguments come before the call is whole"
    assert read(ForcedReader(), text, cut=False)[1] == [CALL, Call("g", '{"b": "x\\"}"}')]


def test_a_forced_call_that_was_cut_has_what_there_is() -> None:
    assert read(ForcedReader(), GOOD[:-3], cut=True) == ("", [Call("f", '{"a": ', complete=False)])
    assert read(ForcedReader(), '{"na', cut=True) == ("", [])


def test_text_is_not_held_back_for_longer_than_needed() -> None:
    reader = ToolReader()
    assert reader.push("Hello <b> there") == ["Hello <b> there"]
    assert reader.push(" <tool") == [] and reader.push("box") == [" <toolbox"]


@pytest.mark.parametrize("more", ['"w', '"names', '"name": "fo', '"name": "f", "x', '"name": "f", "arguments": [', "1"])
def test_json_is_held_back_only_as_long_as_it_may_be_a_call(more: str) -> None:
    reader = ToolReader(["f"])
    assert reader.push("{") == [] and reader.push(more[:-1]) == []
    assert reader.push(more[-1]) == ["{" + more]


@pytest.mark.parametrize(
    "text", ["", "1", '{"name": 1}', '{"name": "f", "arguments": 1}', '{"name": "f", "arguments": "x"}', "[" * 100_000]
)
def test_what_is_no_call(text: str) -> None:
    assert parse_call(text) is None


def test_a_name_that_only_begins_one_is_known_at_its_end() -> None:
    reader = ToolReader(["foo"])
    assert reader.push('{"name": "f') == [] and reader.push('"') == ['{"name": "f"']


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
        ([{"role": "user", "content": None}], "content is missing"),
        ([{"role": "user", "content": "x", "refusal": "no"}], "role assistant"),
        ([{"role": "assistant", "content": "x", "refusal": "no"}], "content and refusal cannot go together"),
    ],
)
def test_what_does_not_fit_together(messages: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        template_messages(turns(*messages))


@pytest.mark.parametrize(
    ("message", "turn"),
    [
        ({"role": "assistant", "content": None, "tool_calls": []}, {"content": ""}),
        ({"role": "assistant", "content": None}, {"content": ""}),
        ({"role": "assistant", "content": "", "reasoning_content": ""}, {"content": ""}),
        ({"role": "assistant", "content": None, "refusal": "No."}, {"content": "No."}),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, {"content": "No."}),
        ({"role": "user", "content": "x", "name": "ann"}, {"content": "x", "name": "ann"}),
        ({"role": "user", "content": "x", "name": None, "cache_control": {"type": "ephemeral"}}, {"content": "x"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            {"content": "x"},
        ),
        (
            {"role": "assistant", "content": "x", "audio": None, "annotations": [], "function_call": None, "parsed": 1},
            {"content": "x"},
        ),
    ],
)
def test_messages_as_clients_send_them_back(message: dict[str, Any], turn: dict[str, Any]) -> None:
    (found,) = template_messages(turns(message))
    assert found == {"role": message["role"]} | turn


def test_calls_as_clients_send_them_back() -> None:
    call = {
        "index": 0,
        "id": "a",
        "type": "function",
        "function": {"name": "f", "arguments": "", "parsed_arguments": {}},
    }
    found = template_messages(
        turns(
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": None, "name": "f"},
        )
    )
    assert found[0]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert found[1] == {"role": "tool", "content": "", "name": "f"}
