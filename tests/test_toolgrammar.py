"""Grammars of forced calls, judged by llguidance: what a model may write is a call that fits the tool's schema."""

import json
import random

import pytest
import tokenizers
from tool_templates import TEMPLATES, TOOLS, written

from server.toolcalls import CallReader, message, shown_ids
from server.toolgrammar import tool_grammar
from tokenizer import BYTE_OF, Tokenizer

llguidance = pytest.importorskip("llguidance")

FORMS = list(TEMPLATES)
NAMED = {"type": "function", "function": {"name": "get_weather"}}
WEATHER, MAP = ("get_weather", '{"city": "Zürich", "days": 3}'), ("get_weather_map", '{"zoom":[1, 2.5e3,null]}')
MARKS = ["</s>", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"]


def make_tokenizer(special):
    """A token for each byte, and special ones behind them."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(dict(BYTE_OF), []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    return Tokenizer(backend, {"eos_token": "</s>"}, None, False)


TOKENIZERS = {"special": make_tokenizer(MARKS), "plain": make_tokenizer(["</s>"])}


class Source:
    """What LLTokenizer asks for."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = 256

    def __init__(self, tokenizer):
        self.special_token_ids = sorted(tokenizer.special_ids)
        special = [tokenizer.backend.id_to_token(i).encode() for i in self.special_token_ids]
        self.tokens = [bytes([byte]) for byte in range(256)] + special

    def __call__(self, text):
        raise NotImplementedError(text)


VOCABULARIES = {name: llguidance.LLTokenizer(Source(tokenizer)) for name, tokenizer in TOKENIZERS.items()}


def matcher(form, choice="required", tools=TOOLS, vocabulary="special", **options):
    grammar = tool_grammar(tools, choice, form, TOKENIZERS[vocabulary], **options)
    result = llguidance.LLMatcher(
        VOCABULARIES[vocabulary], grammar + '\n%llguidance {"no_forcing": true}\n', log_level=0
    )
    assert not result.is_error(), result.get_error()
    return result


def accepts(text, form, *args, vocabulary="special", **options):
    """Whether the answer may be exactly this text."""
    result = matcher(form, *args, vocabulary=vocabulary, **options)
    ids = TOKENIZERS[vocabulary].encode(text)
    return result.try_consume_tokens(ids) == len(ids) and result.is_accepting()


def test_nothing_is_forced_where_the_choice_is_free():
    assert tool_grammar(TOOLS, "auto", "hermes", TOKENIZERS["plain"]) is None
    assert tool_grammar(TOOLS, "none", "hermes", TOKENIZERS["plain"]) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_required_is_any_tool(form, vocabulary):
    assert accepts(written(form, WEATHER), form, vocabulary=vocabulary)
    assert accepts(written(form, MAP), form, vocabulary=vocabulary)
    assert not accepts(written(form, ("other", "{}")), form, vocabulary=vocabulary)
    assert not accepts("", form, vocabulary=vocabulary)
    assert not accepts("Hello", form, vocabulary=vocabulary)


@pytest.mark.parametrize("form", FORMS)
def test_a_named_tool_is_that_one(form):
    assert accepts(written(form, WEATHER), form, NAMED)
    assert not accepts(written(form, MAP), form, NAMED)


@pytest.mark.parametrize("form", FORMS)
def test_arguments_fit_the_schema(form):
    for arguments in ('{"city": ""}', '{"city":"\\u001b\\n","days":-3}'):
        assert accepts(written(form, ("get_weather", arguments)), form)
    for arguments in ("{}", '{"days": 3}', '{"city": 3}', '{"city": "a", "days": "3"}', '{"city": "a", "b": 1}', "[]"):
        assert not accepts(written(form, ("get_weather", arguments)), form)


@pytest.mark.parametrize("form", FORMS)
def test_calls_may_be_several(form):
    text = written(form, WEATHER, MAP, WEATHER)
    assert accepts(text, form) == (form != "llama3")
    assert not accepts(text, form, parallel=False)
    assert accepts(written(form, WEATHER), form, parallel=False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("opening", "closing"), [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_model_may_reason_first(form, opening, closing, vocabulary):
    call = written(form, WEATHER)
    thought = f"\nIs it <tool_call> or {{\n{closing}\n\n{call}"
    assert accepts(opening + thought, form, vocabulary=vocabulary, thinking=opening)
    assert accepts(call, form, vocabulary=vocabulary, thinking=opening)
    assert not accepts(opening + thought, form, vocabulary=vocabulary)
    assert accepts(thought, form, vocabulary=vocabulary, thinking=opening, open_mark=opening)
    assert not accepts(call, form, vocabulary=vocabulary, open_mark=opening)


def test_schemas_with_unknown_words_are_refused_for_strict_tools_alone():
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "uniqueItems": True, "items": {"$ref": "#/$defs/x"}}},
    }
    schema |= {"$defs": {"x": {"type": "string", "format": "unheard-of"}}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert accepts(written("hermes", ("f", '{"a": ["b"]}')), "hermes", tools=[tool])
    assert not accepts(written("hermes", ("f", '{"a": [1]}')), "hermes", tools=[tool])
    tool["function"]["strict"] = True
    grammar = tool_grammar([tool], "required", "hermes", TOKENIZERS["plain"])
    assert llguidance.LLMatcher(VOCABULARIES["plain"], grammar, log_level=0).is_error()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_whatever_is_written_under_the_grammar_is_read_back(form, vocabulary):
    """Tokens drawn at random, as a model of random weights would."""
    tokenizer = TOKENIZERS[vocabulary]
    letter = {"type": "string", "maxLength": 3}
    schema = {"type": "object", "properties": {"a": letter, "b": {"type": "array", "items": letter, "maxItems": 2}}}
    schema |= {"required": ["b"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("get", "get_all")]
    shown = shown_ids(tokenizer, form)
    for seed in range(20):
        draw, state, ids = random.Random(seed), matcher(form, tools=tools, vocabulary=vocabulary), []
        while not state.is_stopped() and not (state.is_accepting() and len(ids) > 300):
            mask = int.from_bytes(state.compute_bitmask(), "little")
            allowed = [i for i in range(len(BYTE_OF) + len(tokenizer.special_ids)) if mask >> i & 1]
            assert allowed
            ids.append(draw.choice(allowed))
            state.consume_token(ids[-1])
        written_ids = [i for i in ids if i in shown or i not in tokenizer.special_ids]
        text = tokenizer.decode(written_ids, skip_special_tokens=False)
        reader = CallReader(form, tools)
        answer = message(reader.put(text) + reader.finish())
        assert answer["content"] is None
        for call in answer["tool_calls"]:
            assert call["function"]["name"] in ("get", "get_all")
            arguments = json.loads(call["function"]["arguments"])
            assert {"b"} <= set(arguments) <= {"a", "b"}
            assert len(arguments["b"]) <= 2
