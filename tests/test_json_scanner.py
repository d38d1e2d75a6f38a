"""The scanner against json.loads: what is JSON, what could become it, and where an object ends."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.json_scanner import JsonScanner

OBJECTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=5), value, max_size=3),
        max_leaves=8,
    ),
)


def end_of_object(text):
    """How many characters the object has that a text begins with; None if there is none."""
    scanner = JsonScanner()
    for i, char in enumerate(text):
        try:
            scanner.put(char)
        except ValueError:
            return None
        if scanner.depth == 0 and char == "}":
            return i + 1
    return None


def is_object(text):
    def no_constant(name):
        raise ValueError(name)

    try:
        return isinstance(json.loads(text, parse_constant=no_constant), dict)
    except ValueError:
        return False


@settings(max_examples=60, deadline=None)
@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]))
def test_json_is_accepted_to_its_end(value, ensure_ascii, indent):
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
    assert end_of_object(text) == end_of_object(text + '}"') == len(text)


@settings(max_examples=150, deadline=None)
@given(OBJECTS, st.data())
def test_damaged_json_is_judged_as_json_loads_does(value, data):
    text = json.dumps(value, ensure_ascii=False)
    at = data.draw(st.integers(1, len(text)))
    new = data.draw(st.text(st.sampled_from('{}[],:"\\u0123456789.eE+-truefalsn \n\x01\x7f'), max_size=3))
    text = text[:at] + new + text[at + data.draw(st.integers(0, 3)) :]
    end = end_of_object(text)
    assert is_object(text) == (end == len(text.rstrip(" \n")) if end is not None else False)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 01}',
        '{"a": 1.}',
        '{"a": .5}',
        '{"a": +1}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": tru}',
        '{"a": "\\x"}',
        '{"a": "\\u12g4"}',
        '{"a": "\n"}',
        '{"a" 1}',
        "{a: 1}",
        '{"a": 1,}',
        '{"a": [1,]}',
        "{,}",
        '{"a": 1 2}',
        '{"a": [1}',
        "{'a': 1}",
        '{"a": }',
        '{"a":: 1}',
        '{"a": 1]',
        "[1]}",
        "5",
        '""',
    ],
)
def test_what_is_no_object(text):
    assert end_of_object(text) is None


def test_deep_nesting_costs_no_recursion():
    text = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert end_of_object(text) == len(text)
