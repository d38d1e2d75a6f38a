"""OpenAI's messages and tools: what is right reaches the templates, what is wrong is said by its name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_templates import HERMES, LLAMA3, MISTRAL, TEMPLATES, TOOLS

from errors import UserError
from server.messages import check_messages, check_tool_choice, check_tools, template_tools
from templates import render_chat

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}


def user(content="Hi"):
    return {"role": "user", "content": content}


def call(name="get_weather", arguments='{"city": "Zürich"}', id="call_1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(*calls, content=None, **fields):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)} | fields


def tool(content="12 °C", id="call_1"):
    return {"role": "tool", "tool_call_id": id, "content": content}


def refusal(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_messages_become_what_templates_take():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        user() | {"name": "ada"},
        assistant(call(), content=None, reasoning_content="Hm."),
        tool([{"type": "text", "text": "12 °C"}]),
        {"role": "assistant", "content": "It is cool."},
    ]
    assert check_messages(messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi", "name": "ada"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [call() | {"function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "tool", "content": "12 °C", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "It is cool."},
    ]


def test_empty_fields_of_an_answer_may_come_back():
    """The openai client's model_dump() of an answer."""
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None, "name": None}
    assert check_messages([{"role": "assistant", "content": "Hi", **empty}]) == [{"role": "assistant", "content": "Hi"}]
    assert check_messages([{"role": "assistant", "content": None}]) == [{"role": "assistant", "content": ""}]


@pytest.mark.parametrize("arguments", ["", None, "{}", {}])
def test_arguments_may_be_none(arguments):
    checked = check_messages([assistant(call(arguments=arguments))])
    assert checked[0]["tool_calls"][0]["function"]["arguments"] == {}


WRONG = [
    (None, "messages must"),
    ([], "messages must"),
    ("Hi", "messages must"),
    ([5], "messages[0] is 5"),
    ([user(), {"role": "bot", "content": ""}], "messages[1].role is 'bot'"),
    ([{"content": "Hi"}], "messages[0].role is missing"),
    ([{"role": ["user"], "content": "Hi"}], "messages[0].role is a list"),
    ([{"role": "user"}], "messages[0].content is missing"),
    ([user(None)], "messages[0].content is missing"),
    ([user(5)], "messages[0].content is 5"),
    ([user({})], "messages[0].content is an object"),
    ([user(["Hi"])], "messages[0].content[0] is 'Hi'"),
    ([user([{"type": "text"}])], "messages[0].content[0].text is missing"),
    ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "messages[0].content[0] is 'image_url'"),
    ([user() | {"tool_calls": [call()]}], "messages[0].tool_calls is not supported"),
    ([user() | {"mood": "good"}], "messages[0].mood is not supported"),
    ([{"role": "assistant", "content": None, "audio": {"id": "x"}}], "messages[0].audio is not supported"),
    ([user() | {"name": 5}], "messages[0].name is 5"),
    ([{"role": "tool", "content": "12"}], "messages[0].tool_call_id is missing"),
    ([tool() | {"content": None}], "messages[0].content is missing"),
    ([assistant() | {"tool_calls": {"a": 1}}], "messages[0].tool_calls is an object"),
    ([assistant(5)], "messages[0].tool_calls[0] is 5"),
    ([assistant({"type": "custom"})], "messages[0].tool_calls[0].type is 'custom'"),
    ([assistant({"id": "a"})], "messages[0].tool_calls[0].function is missing"),
    ([assistant(call(name=None))], "messages[0].tool_calls[0].function.name is missing"),
    ([user(), assistant(call(), call(arguments='{"city": '))], "messages[1].tool_calls[1].function.arguments is not"),
    ([assistant(call(arguments="[1]"))], "messages[0].tool_calls[0].function.arguments is a list"),
    ([assistant(call(arguments='{"a": NaN}'))], "messages[0].tool_calls[0].function.arguments is not"),
    ([assistant(call(arguments='{"a": ' + "[" * 100_000))], "messages[0].tool_calls[0].function.arguments is not"),
    ([assistant(call(arguments='{"a": ' + "9" * 5000 + "}"))], "messages[0].tool_calls[0].function.arguments is not"),
    ([assistant(call(id=5))], "messages[0].tool_calls[0].id is 5"),
]


@pytest.mark.parametrize(("messages", "said"), WRONG)
def test_what_is_wrong_is_named(messages, said):
    assert refusal(check_messages, messages).startswith(said)


def test_tools_become_what_templates_take():
    assert check_tools(None) == check_tools([]) == []
    bare = {"type": "function", "function": {"name": "now", "description": None, "parameters": None, "strict": None}}
    parameters = {"type": "object", "properties": {}}
    assert check_tools([bare])[0]["function"] == {"name": "now", "description": "", "parameters": parameters}
    strict = {"type": "function", "function": {"name": "now", "strict": True, "parameters": {"properties": {}}}}
    assert check_tools([strict])[0]["function"]["strict"] is True
    assert check_tools(TOOLS[:1]) == TOOLS[:1]
    assert template_tools(check_tools([strict]), "auto") == check_tools([function(name="now")])
    assert template_tools(TOOLS, "none") is template_tools([], "auto") is None


def function(**fields):
    return {"type": "function", "function": {"name": "f"} | fields}


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("f", "tools is 'f'"),
        ([5], "tools[0] is not"),
        ([{"type": "web_search"}], "tools[0] is not"),
        ([{"type": "function"}], "tools[0] is not"),
        ([function(), function(name="a b")], "tools[1].function.name is 'a b'"),
        ([function(name="")], "tools[0].function.name is ''"),
        ([function(name="f\n")], "tools[0].function.name is 'f\\n'"),
        ([function(name="a" * 65)], "tools[0].function.name is"),
        ([function(name=None)], "tools[0].function.name is missing"),
        ([function(), function()], "tools[1].function.name is 'f' like another"),
        ([function(description=5)], "tools[0].function.description is 5"),
        ([function(parameters=[1])], "tools[0].function.parameters must"),
        ([function(parameters={"type": "string"})], "tools[0].function.parameters must"),
        ([function(parameters={"properties": [1]})], "tools[0].function.parameters.properties is not"),
        ([function(strict="yes")], "tools[0].function.strict is 'yes'"),
        ([function(returns={})], "tools[0].function.returns is not supported"),
    ],
)
def test_what_is_wrong_with_tools_is_named(tools, said):
    assert refusal(check_tools, tools).startswith(said)


def test_tool_choice():
    assert check_tool_choice(None, []) == "none"
    assert check_tool_choice(None, TOOLS) == "auto"
    for choice in ("none", "auto", "required"):
        assert check_tool_choice(choice, TOOLS) == choice
    assert check_tool_choice("auto", []) == "auto"
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert check_tool_choice(named, TOOLS) == named
    for choice in ("required", "always", 5, ["auto"], {"type": "function"}, {"type": "allowed_tools"}, named):
        assert refusal(check_tool_choice, choice, []).startswith("tool_choice ")


# ---------------------------------------------------------------------------------------------------------------------
# Templates


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_whole_conversation_renders(form):
    messages = [user(), assistant(call()), tool(), {"role": "assistant", "content": "Cool."}, user("Thanks")]
    rendered = render_chat(TEMPLATES[form], check_messages(messages, form), VARIABLES | {"tools": check_tools(TOOLS)})
    assert '{"city": "Zürich"}' in rendered  # as JSON, not as a string that holds JSON
    assert "12 °C" in rendered


def test_mistral_templates_get_ids_of_nine_letters():
    calls = [call(id="call_1"), call(id="call_2"), call(id="Abc123def")]
    messages = [user(), assistant(*calls), *(tool(id=each["id"]) for each in calls)]
    checked = check_messages(messages, "mistral")
    ids = [each["id"] for each in checked[1]["tool_calls"]]
    assert ids == [message["tool_call_id"] for message in checked[2:]]
    assert len(set(ids)) == 3 and ids[2] == "Abc123def"
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    assert ids == [each["id"] for each in check_messages(messages, "mistral")[1]["tool_calls"]]
    render_chat(MISTRAL, checked, VARIABLES)
    with pytest.raises(UserError, match="9 characters"):
        render_chat(MISTRAL, check_messages(messages), VARIABLES)


def test_llama_templates_get_one_call_a_message():
    first, second = call(id="a"), call(id="b", arguments="{}")
    messages = [
        user(),
        assistant(first, second, content="Both."),
        tool("2", "b"),
        tool("1", "a"),
        tool("0", "z"),
        user(),
    ]
    checked = check_messages(messages, "llama3")
    shape = [
        (message["role"], message["content"], [each["id"] for each in message.get("tool_calls", [])])
        for message in checked
    ]
    assert shape == [
        ("user", "Hi", []),
        ("assistant", "Both.", ["a"]),
        ("tool", "1", []),
        ("assistant", "", ["b"]),
        ("tool", "2", []),
        ("tool", "0", []),
        ("user", "Hi", []),
    ]
    render_chat(LLAMA3, checked, VARIABLES)
    with pytest.raises(UserError, match="one call at a time"):
        render_chat(LLAMA3, check_messages(messages), VARIABLES)


# ---------------------------------------------------------------------------------------------------------------------
# Any body

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
FIELD_NAMES = ["role", "content", "tool_calls", "function", "name", "arguments", "id", "type", "text", "tool_call_id"]
FIELD_NAMES += ["parameters", "properties", "strict", "description", "reasoning_content"]
WORDS = st.sampled_from(["system", "user", "assistant", "tool", "text", "function", "object", "{}", '{"a": 1}', "f"])
BODIES = st.recursive(
    LEAVES | WORDS,
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.sampled_from(FIELD_NAMES), value, max_size=5),
    max_leaves=25,
)
CALLS = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": WORDS, "arguments": BODIES})})
MESSAGES = st.fixed_dictionaries(
    {"role": WORDS, "content": st.text(max_size=5) | BODIES},
    optional={"tool_calls": st.lists(CALLS | BODIES, max_size=3), "tool_call_id": WORDS, "name": WORDS},
)


@settings(max_examples=150, deadline=None)
@given(st.lists(MESSAGES | BODIES, max_size=4) | BODIES, st.sampled_from([*TEMPLATES, None]))
def test_any_messages_are_refused_or_render(messages, form):
    try:
        checked = check_messages(messages, form)
        assert len(checked) >= len(messages)
        assert "Traceback" not in render_chat(TEMPLATES[form or "hermes"], checked, VARIABLES)
    except UserError:
        return


@settings(max_examples=100, deadline=None)
@given(BODIES | st.lists(st.fixed_dictionaries({"type": WORDS, "function": BODIES}), max_size=3), BODIES)
def test_any_tools_are_refused_or_render(tools, choice):
    try:
        checked = check_tools(tools)
        check_tool_choice(choice, checked)
        render_chat(HERMES, [user()], VARIABLES | {"tools": checked})
    except UserError:
        return
