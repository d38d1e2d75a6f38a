"""Calls read back from text: each form, cut anywhere; what is no call stays text."""

import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_templates import LLAMA3, TEMPLATES, TOOLS, written

from server.toolcalls import (
    Arguments,
    CallDropped,
    CallReader,
    CallStart,
    Content,
    Reasoning,
    delta,
    detect_form,
    message,
    open_thinking,
    shown_ids,
    thinking_mark,
)
from templates import render_chat
from tokenizer import Tokenizer

FORMS = list(TEMPLATES)
WEATHER = ("get_weather", '{"city": "Zürich", "days": 3}')
MAP = ("get_weather_map", "{}")


def read(form, *texts, **options):
    """The pieces of an answer; ids are a, b, ..."""
    ids = iter("abcdefghijklmnopqrstuvwxyz")
    reader = CallReader(form, TOOLS, new_id=lambda: next(ids), **options)
    pieces = [piece for text in texts for piece in reader.put(text)]
    return pieces + reader.finish()


def joined(pieces):
    """Pieces with neighbours of a kind joined."""
    result = []
    for piece in pieces:
        last = result[-1] if result else None
        if type(piece) is type(last) and isinstance(piece, Content | Reasoning):
            result[-1] = type(piece)(last.text + piece.text)
        elif isinstance(piece, Arguments) and isinstance(last, Arguments) and piece.index == last.index:
            result[-1] = Arguments(piece.index, last.text + piece.text)
        else:
            result.append(piece)
    return result


def calls(*named):
    """The pieces of complete calls."""
    return [
        piece
        for i, (name, arguments) in enumerate(named)
        for piece in (CallStart(i, "abcdefghij"[i], name), Arguments(i, arguments))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Templates and tokens


@pytest.mark.parametrize("form", FORMS)
def test_form_is_seen_in_the_template(form):
    assert detect_form(TEMPLATES[form]) == form


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{{ messages[0].content }}",
        "<tool_call>\n<function={{ name }}>\n<parameter=city>\n</tool_call>",
        "<tool_call>{{ name }}<arg_key>city</arg_key><arg_value></arg_value></tool_call>",
        '<tool_calls>[{"name": "f", "arguments": {}}]</tool_calls>, in <tool_call></tool_call>',
        "<|start_header_id|>{{ messages[0].content }}<|eot_id|>",
    ],
)
def test_other_templates_have_no_form(template):
    assert detect_form(template) is None


@pytest.mark.parametrize("form", FORMS)
def test_what_a_template_renders_is_read_back(form):
    named = [WEATHER] if form == "llama3" else [WEATHER, MAP]
    tool_calls = [
        {"id": "abcdefgh" + str(i), "type": "function", "function": {"name": name, "arguments": json.loads(arguments)}}
        for i, (name, arguments) in enumerate(named)
    ]
    answer = {"role": "assistant", "content": "", "tool_calls": tool_calls}
    question = {"role": "user", "content": "?"}
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    before, after = (
        render_chat(TEMPLATES[form], chat, variables | {"add_generation_prompt": len(chat) == 1})
        for chat in ([question], [question, answer])
    )
    assert after.startswith(before)
    text = after[len(before) :].removesuffix("</s>").removesuffix("<|im_end|>\n").removesuffix("<|eot_id|>")
    assert joined(read(form, text)) == calls(*named)


def test_thinking_is_seen_in_template_and_prompt():
    assert thinking_mark(TEMPLATES["hermes"]) == "<think>"
    assert thinking_mark("[THINK]{{ thought }}[/THINK]") == "[THINK]"
    assert thinking_mark(LLAMA3) is None and thinking_mark(None) is None
    assert open_thinking("<|im_start|>assistant\n<think>\n") == "<think>"
    assert open_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None


def test_marks_that_are_special_tokens_have_to_be_shown():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "</s>", "<|python_tag|>"])
    backend.add_tokens(["<tool_call>", "</tool_call>", "<think>"])
    tokenizer = Tokenizer(backend, {}, None, False)
    assert shown_ids(tokenizer, "mistral_args") == {backend.token_to_id("[TOOL_CALLS]"), backend.token_to_id("[ARGS]")}
    assert shown_ids(tokenizer, "llama3") == {backend.token_to_id("<|python_tag|>")}
    assert shown_ids(tokenizer, "hermes") == shown_ids(tokenizer, None) == set()


# ---------------------------------------------------------------------------------------------------------------------
# Calls


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("named", [[WEATHER], [MAP, WEATHER], [MAP, MAP, WEATHER]])
def test_calls_are_read(form, named):
    text = written(form, *named)
    assert joined(read(form, text)) == joined(read(form, *text)) == calls(*named)


VARIANTS = [
    ("hermes", '<tool_call>{"name":"get_weather_map","arguments":{}}</tool_call>', [MAP]),
    ("hermes", '<tool_call>\n{"name": "get_weather_map"}\n</tool_call>\n', [MAP]),
    ("hermes", '<tool_call>\n{"arguments": {"a": {}}, "name": "other"}\n</tool_call>', [("other", '{"a": {}}')]),
    ("hermes", '<tool_call>\n{"name": "other", "arguments": {}}', [("other", "{}")]),
    ("llama3", '<|python_tag|>{"name": "other", "parameters": {"a": 1}}', [("other", '{"a": 1}')]),
    ("llama3", '\n{"type": "function", "name": "get_weather_map", "parameters": {}}', [MAP]),
    (
        "llama3",
        '<|python_tag|>{"name": "a", "parameters": {}};\n{"name": "b", "parameters": {}}',
        [("a", "{}"), ("b", "{}")],
    ),
    ("mistral", '[TOOL_CALLS][{"name": "get_weather_map", "arguments": {}, "id": "abc123def"}]', [MAP]),
    ("mistral", '[TOOL_CALLS] {"name": "get_weather_map", "arguments": {}}', [MAP]),
    ("mistral", "[TOOL_CALLS]get_weather_map[ARGS]{}", [MAP]),
    ("mistral_args", "[TOOL_CALLS]get_weather_map[CALL_ID]abc123def[ARGS]{}", [MAP]),
    ("mistral_args", "[TOOL_CALLS]get_weather_map{}", [MAP]),
]


@pytest.mark.parametrize(("form", "text", "named"), VARIANTS)
def test_variants_of_the_forms(form, text, named):
    assert joined(read(form, text)) == joined(read(form, *text)) == calls(*named)


@pytest.mark.parametrize("form", ["hermes", "mistral", "mistral_args"])
def test_text_around_calls_is_content(form):
    text = f"I look it up.\n{written(form, WEATHER)}\nThere."
    assert joined(read(form, text)) == [Content("I look it up."), *calls(WEATHER), Content("\nThere.")]


@pytest.mark.parametrize("form", FORMS)
def test_one_call_where_calls_are_not_parallel(form):
    reader = CallReader(form, TOOLS, parallel=False, new_id=lambda: "a")
    pieces = reader.put(written(form, WEATHER, MAP) + "more") + reader.put("more")
    assert joined(pieces) == calls(WEATHER)
    assert reader.finished
    assert reader.finish() == []


def test_without_tools_marks_are_text():
    reader = CallReader("hermes", [])
    text = written("hermes", WEATHER)
    assert reader.put(text) + reader.finish() == [Content(text)]


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_random(form):
    pieces = CallReader(form, TOOLS).put(written(form, WEATHER, MAP))
    ids = [piece.id for piece in pieces if isinstance(piece, CallStart)]
    assert len(set(ids)) == 2
    assert all(call_id.startswith("call_") and len(call_id) >= 25 for call_id in ids)


BROKEN = [
    ("hermes", "<tool_call>\n"),
    ("hermes", '<tool_call>\n{"name": "get_weather", "argum'),
    ("hermes", "<tool_call>\nget_weather(city)\n</tool_call> and more"),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": [1]}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": "{}"}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"arguments": {}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "no tool\\n", "arguments": {}}\n</tool_call>'),
    ("hermes", "The mark <tool_call> begins a call; < and <tool and </tool_call> are text."),
    ("llama3", '{"city": "Zürich"}'),
    ("llama3", '{"name": "Ada", "parameters": {}}'),
    ("llama3", '{"name": "get_weather"}'),
    ("llama3", "{ is a brace"),
    ("llama3", '{"name": "get_weather", "parameters": 7}'),
    ("llama3", 'It is {"name": "get_weather", "parameters": {}}'),
    ("llama3", "<|python_tag|>print(1)"),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", "[TOOL_CALLS] I call get_weather {}"),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", '),
    ("mistral_args", "[TOOL_CALLS]get_weather[ARGS]"),
    ("mistral_args", "[TOOL_CALLS]get_weather[ARGS]Zürich"),
    ("mistral_args", "[TOOL_CALLS]" + "a" * 500 + "{}"),
    ("mistral_args", "[TOOL_CALLS]get_weather[CALL_ID]" + "a" * 500 + "[ARGS]{}"),
]


@pytest.mark.parametrize(("form", "text"), BROKEN)
def test_what_is_no_call_is_content(form, text):
    assert joined(read(form, text)) == joined(read(form, *text)) == [Content(text)]


STARTED = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a" 1}}\n</tool_call>', '{"a" '),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": [1, 2', '{"a": [1, 2'),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": "line\nbreak"}}\n</tool_call>', '{"a": "line'),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {}, "arguments": {}}\n</tool_call>', "{}"),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>', '{"a": '),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": 01}}', '{"a": 01'),
    ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a": "\\x"}', '{"a": "\\'),
]


@pytest.mark.parametrize(("form", "text", "sent"), STARTED)
def test_a_call_that_breaks_after_it_started_is_dropped_and_given_back(form, text, sent):
    pieces = joined(read(form, text))
    assert pieces == joined(read(form, *text))
    assert pieces == [CallStart(0, "a", "f"), Arguments(0, sent), CallDropped(0), Content(text)]
    assert message(pieces) == {"role": "assistant", "content": text}


def test_good_calls_beside_broken_ones():
    broken, good = '<tool_call>\n{"name": "f", }\n</tool_call>', written("hermes", WEATHER)
    assert joined(read("hermes", f"{broken}\n{good}")) == [Content(broken), *calls(WEATHER)]
    text = written("mistral", WEATHER)[:-1] + ", {broken}]"
    assert joined(read("mistral", text)) == [*calls(WEATHER), Content(", {broken}]")]


# ---------------------------------------------------------------------------------------------------------------------
# Reasoning


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize(("opening", "closing"), [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_reasoning_stands_before_the_answer(form, opening, closing):
    thought = "Is it\n<tool_call> or [TOOL_CALLS]?"
    text = f"{opening}\n{thought}\n{closing}\n\n  Yes\n"
    wanted = [Reasoning(thought), Content("  Yes\n")]
    assert joined(read(form, text)) == joined(read(form, *text)) == wanted
    assert joined(read(form, *text.removeprefix(opening), open_mark=opening)) == wanted


@pytest.mark.parametrize("form", FORMS)
def test_calls_follow_reasoning(form):
    text = f"<think>\nHm.\n</think>\n\n{written(form, WEATHER)}"
    assert joined(read(form, text)) == joined(read(form, *text)) == [Reasoning("Hm."), *calls(WEATHER)]


def test_reasoning_that_is_empty_or_never_ends():
    assert read("hermes", "<think>\n\n</think>\n\nYes") == [Content("Yes")]
    assert joined(read("hermes", *"<think>On and on </th")) == [Reasoning("On and on </th")]
    assert read("hermes", "<thi") == [Content("<thi")]


def test_marks_of_reasoning_within_an_answer_are_text():
    text = "Write <think> and </think>."
    assert read("hermes", text) == [Content(text)]


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def test_only_what_may_begin_a_mark_is_held_back():
    reader = CallReader("hermes", TOOLS, new_id=lambda: "a")
    assert reader.put("a < b") == [Content("a < b")]
    assert reader.put(" <tool") == []
    assert reader.put("box>") == [Content(" <toolbox>")]
    assert reader.put("\n") == []
    assert reader.put('<tool_call>\n{"name": "get_weather", "arg') == []
    assert reader.put('uments": {"ci') == [CallStart(0, "a", "get_weather"), Arguments(0, '{"ci')]
    assert reader.put('ty": "Zü') == [Arguments(0, 'ty": "Zü')]
    assert reader.put('rich"}}\n</tool') == [Arguments(0, 'rich"}')]
    assert reader.put("_call>") == []
    assert reader.put("\n") == []
    assert reader.finish() == []


@pytest.mark.parametrize("form", FORMS)
def test_arguments_come_with_each_character(form):
    before, after = written(form, WEATHER).split("Zürich")
    reader = CallReader(form, TOOLS)
    reader.put(before)
    for char in "Zürich, {[\\u00fc\\n]}<tool_call> and </tool_call> and </think>":
        assert reader.put(char) == [Arguments(0, char)]
    reader.put(after)
    assert reader.finish() == []
    assert reader.complete == 1


def test_json_answers_are_not_held_back_once_they_are_no_call():
    reader = CallReader("llama3", TOOLS)
    assert reader.put('{"na') == []
    assert reader.put('me": "Ada"') == [Content('{"name": "Ada"')]
    assert reader.put("}") == [Content("}")]


def test_deltas_make_the_message():
    pieces = read("hermes", "<think>Hm.</think>I look.\n" + written("hermes", WEATHER, MAP))
    deltas = [delta(piece) for piece in pieces]
    assert {"reasoning_content": "Hm."} in deltas and {"content": "I look."} in deltas
    start = {"name": "get_weather", "arguments": ""}
    assert {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": start}]} in deltas
    assert {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]} in deltas
    assert delta(CallDropped(0)) == {}
    assert message(pieces) == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": WEATHER[0], "arguments": WEATHER[1]}},
            {"id": "b", "type": "function", "function": {"name": MAP[0], "arguments": MAP[1]}},
        ],
    }
    assert message(calls(MAP))["content"] is None
    assert message([]) == {"role": "assistant", "content": ""}


# ---------------------------------------------------------------------------------------------------------------------
# Any text, cut anywhere

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=5), value, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.builds(
    json.dumps,
    st.dictionaries(st.text(max_size=8) | st.sampled_from(["name", "arguments", "</tool_call>"]), JSON, max_size=4),
    ensure_ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
NAMES = st.sampled_from(["get_weather", "get_weather_map"])
FRAGMENTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<think>",
            "</think>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[CALL_ID]",
            "<|python_tag|>",
        ),
        *(
            "{",
            "}",
            "[",
            "]",
            ",",
            ";",
            ":",
            '"',
            "\\",
            "\n",
            " ",
            "name",
            "arguments",
            "parameters",
            "get_weather",
            "1",
        ),
        *('{"name": "get_weather", ', '"arguments": {"a": ', '"parameters": {', "}}", "null", "-", "é", "<", "</"),
    ]
)
SOUP = st.lists(FRAGMENTS, max_size=25).map("".join)


def cut(text, points):
    edges = [0, *sorted(point % (len(text) + 1) for point in points), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*FORMS, None]), SOUP, st.lists(st.integers(0, 500), max_size=8), st.booleans(), st.booleans())
def test_cutting_changes_nothing(form, text, points, is_open, parallel):
    options = {"open_mark": "<think>" if is_open else None, "parallel": parallel}
    assert joined(read(form, *cut(text, points), **options)) == joined(read(form, text, **options))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMS), st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3), st.data())
def test_arguments_are_the_models_text(form, named, data):
    text = written(form, *named)
    points = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert joined(read(form, *cut(text, points))) == calls(*named)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*FORMS, None]), SOUP)
def test_no_text_is_lost(form, text):
    """Every character but white space is in a piece, in order, or is part of a mark or call that was understood."""
    pieces = read(form, text)  # as they came: what two marks separate is not one text
    result = message(pieces)
    for call in result.get("tool_calls", []):
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
    if not result.get("tool_calls") and "reasoning_content" not in result and "<think>" not in text:
        assert result["content"] == text
    rest = text
    for piece in pieces:
        for part in getattr(piece, "text", "").split() if isinstance(piece, Content | Reasoning) else []:
            _, found, rest = rest.partition(part)
            assert found


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_plain_text_is_content(text, points):
    content = "".join(piece.text for piece in read("hermes", *cut(text, points)))
    assert content == text
