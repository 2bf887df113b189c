"""JSON from outside: keys that stand twice, misspelt keywords of schemas, and what is no JSON."""

from __future__ import annotations

from typing import Any

import pytest

from outpace import ParameterError, SamplingParams
from outpace.json_text import KEYWORDS, check_schema, read_json


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', "has the key 'c' twice in one object"),
        ('{"a": 1, "\\u0061": 1}', "the key 'a' twice"),
        ('[{"a": NaN}]', "NaN is no number there"),
        ("[-Infinity]", "-Infinity is no number"),
        ('{"a": ', "no JSON: Expecting value at line 1, column 7"),
        (b'{"\xff": 1}', "not text in utf-8"),
        ("[" * 200_000, "nested too deeply"),
        ("[" + "1" * 10_000 + "]", "cannot be read: .*digits"),
        ("{" + ", ".join(f'"{i}": 1' for i in [*range(200_000), 199_999]) + "}", "the key '199999' twice"),  # at once
    ],
)
def test_what_is_no_sound_json_is_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(ParameterError, match=f"^the body.*{why}"):
        read_json(text, "the body")


def test_sound_json_is_read_as_it_is() -> None:
    assert read_json('{"a": [{"a": 1}, {"a": 2}], "b": null, "c": 1e3}', "it") == {
        "a": [{"a": 1}, {"a": 2}],
        "b": None,
        "c": 1000.0,
    }
    assert read_json(b"\xef\xbb\xbf[1]".removeprefix(b"\xef\xbb\xbf"), "it") == [1]


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "objct"}, r"'objct'; did you mean 'object'\? there are: object, array, "),
        ({"properties": {"a": {"type": ["null", "strng"]}}}, r"'strng' in properties.a; did you mean 'string'\?"),
    ],
)
def test_unknown_types_are_refused_with_the_nearest(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(ParameterError, match=f"^json_schema has the unknown type {why}"):
        check_schema(schema)
    check_schema({"properties": {"type": {"type": ["string", "null"]}}, "enum": [{"type": "objct"}]})


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "object", "requird": ["a"]}, r"keyword 'requird': did you mean 'required'\?"),
        ({"properties": {"a": {"typ": "string"}}}, r"'typ' in properties.a: did you mean 'type'\?"),
        (
            {"anyOf": [True, {"items": {"min_length": 3}}]},
            r"'min_length' in anyOf\[1\].items: did you mean 'minLength'",
        ),
        ({"items": [{"maxItem": 3}]}, r"in items\[0\]: did you mean 'maxItems'"),
        ({"$defs": {"x": {"ref": "#/$defs/y"}}}, r"in \$defs.x: did you mean '\$ref'"),
        ({"additionalProperties": {"Enum": [1]}}, "'enum'"),
        ({"dependencies": {"a": {"propertys": {}}, "b": ["a"]}}, "in dependencies.a: did you mean 'properties'"),
        ({"properties": {"p": {"properties": {"q": {"patern": "x"}}}}}, "in properties.p.properties.q: .*'pattern'"),
    ],
)
def test_misspelt_keywords_are_refused_with_the_nearest(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(ParameterError, match=f"^json_schema has the unknown {why}|{why}"):
        check_schema(schema)
    with pytest.raises(ParameterError, match=r"^json_schema has the unknown keyword"):
        SamplingParams(json_schema=schema)


def test_what_is_no_misspelt_keyword_passes() -> None:
    check_schema(dict.fromkeys(KEYWORDS, True))
    data = {"requird": 1, "typ": 2}  # in a value it is no keyword, nor as the name of a property
    check_schema(
        {
            "properties": {"requird": {"type": "string"}, "typ": {"enum": [data]}},
            "const": data, "default": data, "examples": [data], "enum": [data], "required": ["requird"],
            "dependentRequired": {"typ": ["requird"]}, "x-requird": True, "enumNames": ["a"], "propertyOrdering": ["a"],
            "markdownDescription": "text",
        }
    )  # fmt: skip
    check_schema(True)


def test_keys_that_stand_twice_in_a_schema() -> None:
    with pytest.raises(ParameterError, match=r"^json_schema has the key 'type' twice"):
        SamplingParams(json_schema='{"type": "object", "properties": {"a": {"type": "string", "type": "number"}}}')
    assert SamplingParams(json_schema='{"type":  "string"}').json_schema == '{"type":  "string"}'  # kept as it was
