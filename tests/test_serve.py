"""serve.py by the real openai client, and by sockets where a client has to misbehave.

The model is conftest's, small and random: what it says is compared with transformers.
"""

import json
import random
import re
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import pydantic
import pytest
import tokenizers
import torch
import transformers
from conftest import CHAT_TEMPLATE, CONTEXT, TEXT, greedy, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Server, events
from tool_templates import HERMES, TOOLS

from errors import UserError
from prompts import Target
from serve import listening, refused_address
from server.api import ChatBody, chat_work, make_model
from server.front import Access
from tokenizer import load_tokenizer

openai = pytest.importorskip("openai")

MODEL = "any"
HELLO = [{"role": "user", "content": "def read_lines(path):"}]
EXACT = {"temperature": 0}


@pytest.fixture(scope="module")
def server(chat_folder):
    with Server("--checkpoint_path", chat_folder, "--batch_size", 4) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def hf(chat_folder):
    """transformers' tokenizer of the same folder."""
    return transformers.AutoTokenizer.from_pretrained(chat_folder)


@pytest.fixture(scope="module")
def metaspace_folder(chat_folder):
    """The same weights with a tokenizer that writes spaces as sentencepiece does."""
    folder = chat_folder.parent / "metaspace"
    shutil.copytree(chat_folder, folder)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=390, special_tokens=["<s>", "</s>", "<unk>"])
    backend.train_from_iterator(TEXT.splitlines() * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def narrow(metaspace_folder):
    """With one place, for the request that runs and for the one that waits."""
    flags = ("--batch_size", 1, "--max_waiting", 1, "--merge_system")
    with Server("--checkpoint_path", metaspace_folder, *flags) as server:
        yield server


def with_template(folder, path, template):
    """A copy of a checkpoint with another chat template."""
    shutil.copytree(folder, path)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = path / name
        if file.suffix == ".json":
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
        elif file.exists():
            file.unlink()
    return path


def chat(client, messages=HELLO, **options):
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def expected_text(reference, hf, ids, count):
    return hf.decode(greedy(reference, ids, count, eos_token_id=[1, 2]), skip_special_tokens=True)


def chat_ids(hf, messages):
    return hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


# ---------------------------------------------------------------- chats


def test_chat_is_what_transformers_says(client, reference, hf):
    answer = chat(client, max_tokens=24, **EXACT)
    ids = chat_ids(hf, HELLO)
    choice = answer.choices[0]
    assert choice.message.content == expected_text(reference, hf, ids, 24)
    assert choice.message.role == "assistant" and choice.finish_reason in ("length", "stop")
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == len(ids) + 24
    assert answer.model == client.models.list().data[0].id == "chat"


def test_a_stream_is_the_same_text(client):
    whole = chat(client, max_tokens=40, **EXACT)
    chunks = list(
        chat(client, max_tokens=40, stream=True, stream_options={"include_usage": True}, **EXACT),
    )
    *chunks, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    assert len({chunk.id for chunk in (*chunks, last)}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks].count(None) == len(chunks) - 1
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(chunks) > 10


def test_no_usage_unless_asked_for(server):
    body = {"messages": HELLO, "stream": True, "max_tokens": 3}
    status, _, data = server.request("POST", "/v1/chat/completions", body)
    assert status == 200 and all("usage" not in chunk and chunk["choices"] for chunk in events(data))


def test_the_same_request_twice(client):
    """The second is a full hit of the cache."""
    messages = [{"role": "user", "content": "for number, line in enumerate(file, start=1): " * 4}]
    first, second = (chat(client, messages, max_tokens=16, **EXACT) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content != ""
    details = second.usage.prompt_tokens_details
    assert 0 < details.cached_tokens < second.usage.prompt_tokens == first.usage.prompt_tokens


def test_the_next_turn_after_a_stream_was_dropped(server, client, reference, hf):
    turn = [{"role": "user", "content": "A decoder reads every weight once for each token."}]
    stream = chat(client, turn, max_tokens=400, stream=True, extra_body={"ignore_eos": True}, **EXACT)
    said = "".join(chunk.choices[0].delta.content or "" for _, chunk in zip(range(8), stream, strict=False))
    stream.close()
    server.wait_until_idle()
    turns = [*turn, {"role": "assistant", "content": said}, {"role": "user", "content": "What was read before?"}]
    answer = chat(client, turns, max_tokens=16, **EXACT)
    assert answer.choices[0].message.content == expected_text(reference, hf, chat_ids(hf, turns), 16)
    assert answer.usage.prompt_tokens_details.cached_tokens > 0


def test_many_at_once_each_get_their_own(client, reference, hf):
    """More than there are places."""
    questions = [[{"role": "user", "content": f"line {i}: {'open(path) ' * (i % 5)}"}] for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda messages: chat(client, messages, max_tokens=12, **EXACT), questions))
    for messages, answer in zip(questions, answers, strict=True):
        assert answer.choices[0].message.content == expected_text(reference, hf, chat_ids(hf, messages), 12)


def test_n_choices(client):
    options = dict(max_tokens=12, temperature=1.0, seed=5)
    answer = chat(client, n=3, **options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == chat(client, **options).choices[0].message.content
    assert answer.usage.completion_tokens == 36
    assert answer.usage.prompt_tokens == chat(client, **options).usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_seeds(client):
    options = dict(max_tokens=12, temperature=1.0)
    one, same, other = (chat(client, seed=seed, **options).choices[0].message.content for seed in (-7, -7, 8))
    assert one == same != other
    assert len({chat(client, **options).choices[0].message.content for _ in range(3)}) == 3


def test_content_in_parts(client):
    parts = [{"type": "text", "text": "def read_"}, {"type": "text", "text": "lines(path):"}]
    turns = [{"role": "user", "content": parts}]
    one, two = (chat(client, messages, max_tokens=8, **EXACT) for messages in (turns, HELLO))
    assert one.choices[0].message.content == two.choices[0].message.content
    assert one.usage.prompt_tokens == two.usage.prompt_tokens


def test_the_length_ends_with_the_context(server, client):
    long = [{"role": "user", "content": "x = 1\n" * 320}]
    answer = chat(client, long, max_tokens=10**6, extra_body={"ignore_eos": True}, logit_bias={"300": 100}, **EXACT)
    assert 1 < answer.usage.completion_tokens < 600
    assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == CONTEXT


def test_end_tokens(client):
    answer = chat(client, logit_bias={"2": 1e9}, max_tokens=9)
    assert answer.choices[0].message.content == "" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 1
    least = chat(client, logit_bias={"2": 1e9}, max_tokens=9, extra_body={"min_tokens": 4})
    assert least.usage.completion_tokens == 5 and least.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client, stream):
    whole = chat(client, max_tokens=40, **EXACT).choices[0].message.content
    stop = whole[10:13]
    options = dict(max_tokens=40, stop=["no such text", stop], logprobs=True, **EXACT)
    if stream:
        chunks = [chunk.choices[0] for chunk in chat(client, stream=True, **options)]
        text, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        choice = chat(client, **options).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_a_special_token_as_stop_string(client):
    """It is no part of the text, in which it could be found."""
    options = dict(stop=["no such text", "<s>"], logit_bias={"0": 1e9}, max_tokens=9, logprobs=True)
    choice = chat(client, extra_body={"ignore_eos": True}, **options).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.logprobs.content) == ("", "stop", [])
    done = client.completions.create(model=MODEL, prompt="x", stop="<s>", logit_bias={"0": 1e9}, echo=True)
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("x", "stop")


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, reference, hf, stream):
    options = dict(max_tokens=20, logprobs=True, top_logprobs=4, extra_body={"ignore_eos": True}, **EXACT)
    if stream:
        chunks = [chunk.choices[0] for chunk in chat(client, stream=True, **options)]
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        entries = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    else:
        choice = chat(client, **options).choices[0]
        text, entries = choice.message.content, choice.logprobs.content
    assert len(entries) == 20
    ids = chat_ids(hf, HELLO)
    new = greedy(reference, ids, 20, eos_token_id=None)
    with torch.no_grad():
        values = reference(torch.tensor([ids + new])).logits[0].double().log_softmax(-1)
    for i, (entry, token) in enumerate(zip(entries, new, strict=True)):
        row = values[len(ids) - 1 + i]
        assert abs(entry.logprob - row[token].item()) < 2e-3
        top = row.topk(4)
        for other, value in zip(entry.top_logprobs, top.values, strict=True):
            assert abs(other.logprob - value.item()) < 2e-3
        assert entry.top_logprobs[0].bytes == entry.bytes
    written = [entry for entry, token in zip(entries, new, strict=True) if token not in hf.all_special_ids]
    assert bytes(byte for entry in written for byte in entry.bytes).decode(errors="replace") == text


def test_logprobs_of_neighbours(client):
    """Some in a batch want log-probabilities, others do not."""
    with ThreadPoolExecutor(6) as pool:
        options = [{"logprobs": True, "top_logprobs": i} if i % 2 else {} for i in range(6)]
        choices = [a.choices[0] for a in pool.map(lambda o: chat(client, max_tokens=20, **EXACT, **o), options)]
    assert len({choice.message.content for choice in choices}) == 1
    counts = [choice.logprobs and len(choice.logprobs.content[0].top_logprobs) for choice in choices]
    assert counts == [None, 1, None, 3, None, 5]


# ---------------------------------------------------------------- completions


def test_completion_is_what_transformers_says(client, reference, hf):
    prompt = "with open(path"
    answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0)
    ids = hf(prompt)["input_ids"]
    assert answer.choices[0].text == expected_text(reference, hf, ids, 16)  # OpenAI's default
    assert answer.usage.prompt_tokens == len(ids) and answer.object == "text_completion"
    by_ids = client.completions.create(model=MODEL, prompt=ids, temperature=0)
    assert by_ids.choices[0].text == answer.choices[0].text
    streamed = client.completions.create(model=MODEL, prompt=prompt, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_completions_of_several_prompts(client, reference, hf):
    prompts = ["with open(path", "for number, line", "yield"]
    answer = client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=8, temperature=0)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for choice, prompt in zip(answer.choices, [p for p in prompts for _ in range(2)], strict=True):
        assert choice.text == expected_text(reference, hf, hf(prompt)["input_ids"], 8)
    assert answer.usage.prompt_tokens == sum(len(hf(prompt)["input_ids"]) for prompt in prompts)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_echo_with_logprobs(client, reference, hf, count):
    """As evaluations ask for a prompt's log-probabilities."""
    prompt = "yield number, line.rstrip() # 日本語"
    options = dict(temperature=0, extra_body={"ignore_eos": True})
    answer = client.completions.create(model=MODEL, prompt=prompt, echo=True, logprobs=2, max_tokens=count, **options)
    ids = hf(prompt)["input_ids"]
    new = greedy(reference, ids, count, eos_token_id=None) if count else []
    choice = answer.choices[0]
    assert choice.text == prompt + hf.decode(new, skip_special_tokens=True)
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == count
    with torch.no_grad():
        values = reference(torch.tensor([ids + new])).logits[0].double().log_softmax(-1)
    given = choice.logprobs
    assert given.token_logprobs[0] is None and given.top_logprobs[0] is None
    assert len(given.tokens) == len(ids + new) == len(given.text_offset)
    for i, token in enumerate((ids + new)[1:]):
        assert abs(given.token_logprobs[i + 1] - values[i, token].item()) < 2e-3
        assert abs(max(given.top_logprobs[i + 1].values()) - values[i].max().item()) < 2e-3
    assert given.text_offset == sorted(given.text_offset)


def test_echo_alone(client):
    echoed, plain = (
        client.completions.create(model=MODEL, prompt="yield", echo=echo, max_tokens=4, temperature=0).choices[0].text
        for echo in (True, False)
    )
    assert echoed == "yield" + plain


def test_a_completion_goes_on_behind_a_space(narrow, metaspace_folder):
    """Sentencepiece's detokenizer leaves out the space that a text begins with, but this is no text's beginning."""
    hf = transformers.AutoTokenizer.from_pretrained(metaspace_folder)
    word, other = hf.encode("path", add_special_tokens=False)[:1], hf.encode("line", add_special_tokens=False)[:1]
    assert len(hf.decode(word + other)) == len(hf.decode(word)) + 1 + len(hf.decode(other))
    options = {"logit_bias": {str(other[0]): 1e9}, "max_tokens": 2, "temperature": 0}
    for stream in (False, True):
        _, _, data = narrow.request("POST", "/v1/completions", {"prompt": word, "stream": stream, **options})
        chunks = events(data) if stream else [json.loads(data)]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert hf.decode(word) + text == hf.decode(word + other * 2)
    begun = hf.decode(other * 2)[0]  # a stop string may begin there, so it is held back
    held = {"prompt": word, "stop": [begun + "?", f" {begun}?"], **options}
    assert narrow.post("/v1/completions", **held)[1]["choices"][0]["text"] == text
    said = chat(narrow.client(), **options).choices[0].message.content
    assert said == hf.decode(other * 2)


# ---------------------------------------------------------------- characters


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_whole_characters(server, endpoint):
    """The model knows these characters as bytes only."""
    text = "żółw 日本語 🙂🙃 نص ไทย"
    body = {"guided_regex": re.escape(text).replace("\\ ", " "), "stream": True, "max_tokens": 200, "logprobs": None}
    if endpoint == "chat":
        _, _, data = server.request("POST", "/v1/chat/completions", body | {"messages": HELLO})
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(data)]
    else:
        _, _, data = server.request("POST", "/v1/completions", body | {"prompt": "x"})
        deltas = [chunk["choices"][0]["text"] for chunk in events(data)]
    assert "".join(deltas) == text and len(deltas) > 10
    assert not any("\ufffd" in part for part in deltas)


# ---------------------------------------------------------------- structured output and tools

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Grace"]}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client, stream):
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = chat(client, response_format=wanted, seed=1, max_tokens=400, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    person = json.loads(text)
    assert person["name"] in ("Ada", "Grace") and 0 <= person["age"] <= 120 and reason == "stop"


class Person(pydantic.BaseModel):
    name: Literal["Ada", "Grace"]
    age: Annotated[int, pydantic.Field(ge=0, le=120)]


def test_the_clients_own_helpers(client):
    """`parse` makes a schema of a class; `stream` gathers what comes."""
    options = dict(model=MODEL, messages=HELLO, response_format=Person, seed=4, max_tokens=400)
    answer = client.chat.completions.parse(**options)
    assert answer.choices[0].message.parsed.name in ("Ada", "Grace")
    with client.chat.completions.stream(**options) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed
    assert "content.done" in kinds and kinds.count("content.delta") > 2


def test_other_formats(server, client):
    answer = chat(client, response_format={"type": "json_object"}, seed=3, max_tokens=400)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    assert answer.choices[0].message.content.lstrip().startswith("{")
    for field, wanted in (("guided_regex", "(yes|no){2}"), ("guided_grammar", 'start: ("yes" | "no")~2')):
        done = client.completions.create(model=MODEL, prompt="x", max_tokens=20, extra_body={field: wanted})
        assert re.fullmatch("(yes|no){2}", done.choices[0].text) and done.choices[0].finish_reason == "stop"
    anything = {"type": "json_schema", "json_schema": {"name": "any", "schema": {}}}
    said = chat(client, response_format=anything, seed=1, max_tokens=400, logit_bias={"1": 100}).choices[0]
    assert said.finish_reason == "length" or json.loads(said.message.content) is not None
    assert chat(client, response_format={"type": "text"}, max_tokens=2).choices[0].message.content
    status, body = server.post("/v1/completions", prompt="x", guided_grammar="nonsense: [")
    assert status == 400 and "grammar" in body["error"]["message"]


@pytest.fixture(scope="module")
def tool_server(chat_folder):
    template = HERMES.replace("<think>", "<muse>")  # a random model would never come to an end of its reasoning
    refusal = "{{ raise_exception('System role not supported') }}"
    template = "{% if strict and messages[0].role == 'system' %}" + refusal + "{% endif %}" + template
    folder = with_template(chat_folder, chat_folder.parent / "tools", template)
    with Server("--checkpoint_path", folder, "--batch_size", 4) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_tool_calls(tool_server, choice, stream):
    client = tool_server.client()
    answer = chat(client, tools=[city_tool()], tool_choice=choice, seed=2, max_tokens=400, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        calls = [call for choice in choices for call in choice.delta.tool_calls or []]
        first = calls[0]
        assert first.id.startswith("call_") and first.function.name == "get_weather" and first.index == 0
        arguments = "".join(call.function.arguments or "" for call in calls if call.index == 0)
        reason = choices[-1].finish_reason
    else:
        message = answer.choices[0].message
        assert message.tool_calls[0].function.name == "get_weather"
        arguments, reason = message.tool_calls[0].function.arguments, answer.choices[0].finish_reason
    assert json.loads(arguments)["city"] in ("Zürich", "東京") and reason == "tool_calls"


def test_marks_that_are_special_tokens(chat_folder, tmp_path):
    """No detokenizer writes them, but the reader of calls has to see them."""
    template = HERMES.replace("<think>", "<muse>")
    folder = with_template(chat_folder, tmp_path / "marks", template)
    make_tokenizer(folder, template, vocab_size=396)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    with Server("--checkpoint_path", folder, "--batch_size", 2) as server:
        options = dict(tools=[city_tool()], tool_choice="required", parallel_tool_calls=False, max_tokens=400, seed=3)
        answer = chat(server.client(), **options)
        message = answer.choices[0].message
        assert message.content is None and answer.choices[0].finish_reason == "tool_calls"
        [call] = message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Zürich", "東京")
        chunks = chat(server.client(), stream=True, **options)
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert "".join(call.function.arguments or "" for call in calls) == call.function.arguments


def city_tool():
    """Whose arguments a random model comes to an end of."""
    tool = json.loads(json.dumps(TOOLS[0]))
    tool["function"]["parameters"]["properties"]["city"] = {"enum": ["Zürich", "東京"]}
    return tool


def test_calls_that_the_model_writes_by_itself(tool_server):
    """Where nothing is forced: here by an expression."""
    client = tool_server.client()
    turns = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    ]  # fmt: skip
    assert chat(client, turns, tools=TOOLS, max_tokens=4).choices[0].finish_reason == "length"
    text = "<think>\nNow what?\n</think>\n\nI see."
    answer = chat(client, max_tokens=100, extra_body={"guided_regex": re.escape(text).replace("\\ ", " ")})
    assert answer.choices[0].message.content == "I see."
    assert answer.choices[0].message.reasoning_content == "Now what?"


def test_tools_that_may_not_be_used(server):
    """Matter to no template."""
    options = dict(messages=HELLO, max_tokens=4, temperature=0)
    texts = []
    for tools in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        status, body = server.post("/v1/chat/completions", **options, **tools)
        assert status == 200
        texts.append(body["choices"][0]["message"]["content"])
    assert texts[0] == texts[1]


def test_tools_that_cannot_be_enforced(tool_server):
    tool = city_tool()
    tool["function"] |= {"strict": True, "parameters": {"type": "object", "properties": {"a": {"type": "nonsense"}}}}
    status, body = tool_server.post("/v1/chat/completions", messages=HELLO, tools=[tool], tool_choice="required")
    assert status == 400 and body["error"]["param"] == "tools", body
    wanted = {"response_format": {"type": "json_object"}, "tools": TOOLS}
    status, body = tool_server.post("/v1/chat/completions", messages=HELLO, **wanted)
    assert status == 400 and body["error"]["param"] == "tools"


def test_broken_json_in_the_history(tool_server):
    call = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": '}}
    turns = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    status, body = tool_server.post("/v1/chat/completions", messages=turns)
    assert status == 400 and body["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


# ---------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    "recommended, expected",
    [
        ({}, (1.0, 1.0, 0, 1.0)),
        ({"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}, (1.0, 1.0, 0, 1.1)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}, (0.6, 0.9, 20, 1.0)),
    ],
)
def test_defaults(chat_folder, recommended, expected):
    """generation_config.json, as generate.py takes it; then OpenAI's."""
    target = Target(load_tokenizer(chat_folder), 400, frozenset({1}), CONTEXT, "context")
    model = make_model("model", target, recommended)

    def work(**fields):
        return chat_work(ChatBody.model_validate({"messages": HELLO} | fields), model)

    [request] = work().requests
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == expected
    assert request.max_new_tokens == CONTEXT - len(request.prompt)
    [request] = work(temperature=0, top_p=0.5, max_completion_tokens=7).requests
    assert (request.params.temperature, request.params.top_p, request.max_new_tokens) == (0, 0.5, 7)


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "no_such_field": ({"no_such_field": 1}, "no_such_field"),
    "audio": ({"audio": {"voice": "a"}}, "audio"),
    "functions": ({"functions": []}, "functions"),
    "temperature": ({"temperature": -1}, "temperature"),
    "temperature of text": ({"temperature": "hot"}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"),
    "top_p true": ({"top_p": True}, "top_p"),
    "min_p": ({"min_p": 2}, "min_p"),
    "top_k": ({"top_k": -4}, "top_k"),
    "penalty": ({"presence_penalty": 3}, "presence_penalty"),
    "n": ({"n": 0}, "n"),
    "n many": ({"n": 10**9}, "n"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens twice": ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    "min_tokens": ({"min_tokens": 7, "max_tokens": 5}, "min_tokens"),
    "stop": ({"stop": ["a", ""]}, "stop"),
    "stops": ({"stop": ["a"] * 17}, "stop"),
    "stop number": ({"stop": 4}, "stop"),
    "seed": ({"seed": 1.5}, "seed"),
    "logit_bias": ({"logit_bias": {"a": 1}}, "logit_bias"),
    "logit_bias id": ({"logit_bias": {"400": 1}}, "logit_bias"),
    "top_logprobs": ({"top_logprobs": 3}, "top_logprobs"),
    "top_logprobs many": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "store": ({"store": True}, "store"),
    "service_tier": ({"service_tier": "flex"}, "service_tier"),
    "stream_options": ({"stream_options": {"extra": 1}}, "stream_options.extra"),
    "messages": ({"messages": []}, "messages"),
    "messages of text": ({"messages": "hello"}, "messages"),
    "role": ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    "surrogates": ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    "tools": ({"tools": TOOLS}, "tools"),
    "tool_choice": ({"tool_choice": "required"}, "tool_choice"),
    "biases": ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    "response_format": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "json_schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        "response_format",
    ),
    "guided_regex": ({"guided_regex": "("}, "guided_regex"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(server, name):
    change, param = REFUSED[name]
    status, body = server.post("/v1/chat/completions", **({"messages": HELLO, "max_tokens": 4} | change))
    error = body["error"]
    assert status == 400 and set(error) == {"message", "type", "param", "code"}, error
    assert error["type"] == "invalid_request_error" and error["param"] == param, error
    assert "\n" not in error["message"] and (param is None or param.split(".")[0] in error["message"])


def test_null_fields_are_absent(server):
    absent = dict.fromkeys(["stop", "n", "audio", "functions", "seed", "logprobs", "stream_options", "response_format"])
    status, body = server.post("/v1/chat/completions", messages=HELLO, max_tokens=2, **absent)
    assert status == 200, body


def test_fields_that_change_nothing(server):
    neutral = {"user": "u", "store": False, "service_tier": "auto", "modalities": ["text"], "metadata": {"a": "b"}}
    neutral |= {"parallel_tool_calls": True, "model": "gpt-4o", "chat_template_kwargs": {"enable_thinking": False}}
    status, body = server.post("/v1/chat/completions", messages=HELLO, max_tokens=2, **neutral)
    assert status == 200, body


def test_a_prompt_that_is_too_long(client):
    with pytest.raises(openai.BadRequestError, match=rf"\d{{4}} tokens.*{CONTEXT}") as caught:
        chat(client, [{"role": "user", "content": "x = 1\n" * 3000}])
    assert caught.value.code == "context_length_exceeded"


def test_a_prompt_of_megabytes_costs_little(server):
    begun = time.perf_counter()
    text = "a b " * 1_900_000
    bodies = {"chat/completions": {"messages": [{"role": "user", "content": text}]}, "completions": {"prompt": text}}
    for path, body in bodies.items():
        status, answer = server.post(f"/v1/{path}", **body)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert time.perf_counter() - begun < 5


BODIES = {
    "no JSON": (b"{", "JSON"),
    "not an object": (b"[1]", "messages|object"),
    "empty": (b"", "body"),
    "nested": (b'{"messages": ' + b"[" * 100000, "pars|JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "pars|JSON"),
    "a long number": (b'{"messages": ' + b"9" * 10000 + b"}", "pars|JSON"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_none(server, name):
    data, words = BODIES[name]
    status, _, answer = server.request("POST", "/v1/chat/completions", data)
    assert status == 400 and re.search(words, json.loads(answer)["error"]["message"])


def test_a_form_is_no_body(server):
    """A page of another site can send one without asking."""
    data = json.dumps({"messages": HELLO}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, _, answer = server.request("POST", "/v1/chat/completions", data, {"Content-Type": kind})
        assert status == 400 and "application/json" in json.loads(answer)["error"]["message"]


def test_a_body_that_is_too_large(server):
    data = json.dumps({"messages": [{"role": "user", "content": "a" * (9 << 20)}]}).encode()
    connection = server.open_stream(messages=HELLO)
    connection.close()
    status, _, answer = server.request("POST", "/v1/chat/completions", data)
    assert status == 413 and "MiB" in json.loads(answer)["error"]["message"]
    chunked = b"".join(b"100000\r\n" + b"a" * (1 << 20) + b"\r\n" for _ in range(9)) + b"0\r\n\r\n"
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunked)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


HOSTILE = {
    "unknown fields": b",".join(b'"a%06d":1' % i for i in range(600_000)),
    "stop": b'"stop":[' + b"0," * 4_000_000 + b"0" + b"]",
    "logit_bias": b'"logit_bias":{' + b",".join(b'"%06d":""' % i for i in range(600_000)) + b"}",
    "messages": b'"messages":[' + b"0," * 4_000_000 + b"0" + b"]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_body_of_many_errors_costs_little(server, name):
    begun, before = time.perf_counter(), server.memory()
    status, _, data = server.request("POST", "/v1/chat/completions", b'{"messages":[],' + HOSTILE[name] + b"}")
    assert status == 400 and len(data) < 1000
    assert time.perf_counter() - begun < 10 and server.memory() - before < 300e6


def test_paths_and_methods(server):
    for method, path, expected in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/x", 404)):
        status, _, data = server.request(method, path)
        assert status == expected and set(json.loads(data)) == {"error"}
    assert "/v1" in server.get("/v2")[1]["error"]["message"]
    assert server.request("GET", "/v1/completions")[1]["allow"] == "POST"


def test_a_template_that_refuses(tool_server, narrow):
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    strict = {"chat_template_kwargs": {"strict": True}}
    status, body = tool_server.post("/v1/chat/completions", messages=messages, max_tokens=4, **strict)
    assert status == 400 and "System role not supported" in body["error"]["message"]
    client = narrow.client()  # with --merge_system
    merged = [{"role": "user", "content": "Be brief.\n\n" + HELLO[0]["content"]}]
    one, two = (chat(client, turns, max_tokens=8, **EXACT) for turns in (messages, merged))
    assert one.choices[0].message.content == two.choices[0].message.content
    assert one.usage.prompt_tokens == two.usage.prompt_tokens


# ---------------------------------------------------------------- any body at all

WORDS = ["auto", "none", "required", "user", "system", "assistant", "tool", "text", "function"]
TEXTS = st.text(max_size=12) | st.sampled_from(WORDS)
NUMBERS = st.integers(-3, 5) | st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 10**400, 1e-320])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(WORDS[3:7]), "content": TEXTS | st.lists(PARTS, max_size=2)},
        optional={"tool_calls": VALUES, "tool_call_id": TEXTS, "name": TEXTS},
    ),
    max_size=3,
)
IDS = st.lists(st.integers(-1, 401), max_size=4)
SENSIBLE = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(0, 50),
    "min_p": st.floats(0, 1),
    "n": st.integers(1, 3),
    "seed": st.integers(),
    "stop": TEXTS | st.lists(TEXTS, max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "logit_bias": st.dictionaries(st.integers(-1, 401).map(str), st.floats(-100, 100), max_size=3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "min_tokens": st.integers(0, 3),
    "ignore_eos": st.booleans(),
    "max_tokens": st.integers(0, 5),
    "echo": st.booleans(),
    "logprobs": st.booleans() | st.integers(0, 20),
    "top_logprobs": st.integers(0, 20),
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object", "json_schema"])}),
    "guided_regex": st.sampled_from(["[a-z]{1,3}", "(", "", "a|b", "日"]),
    "tools": st.just(TOOLS) | st.lists(VALUES, max_size=2),
    "tool_choice": st.sampled_from(["auto", "none", "required"]) | VALUES,
    "chat_template_kwargs": st.dictionaries(TEXTS, VALUES, max_size=2),
}
FIELDS = {name: kind | VALUES for name, kind in SENSIBLE.items()}


def bodies(required):
    sensible = st.fixed_dictionaries(required, optional=SENSIBLE)
    wild = st.fixed_dictionaries(required, optional=FIELDS | {"surprise": VALUES})
    return (sensible | wild).map(lambda body: {"max_tokens": 3} | body)


def check_answer(server, path, body):
    status, _, data = server.request("POST", path, json.dumps(body).encode())
    if status == 200 and body.get("stream"):
        chunks = events(data)
        assert all("error" not in chunk for chunk in chunks)
    elif status == 200:
        assert json.loads(data)["choices"]
    else:
        assert status == 400, data
        error = json.loads(data)["error"]
        assert error["message"] and error["type"] == "invalid_request_error"


ANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@ANY
@given(body=bodies({"messages": MESSAGES | VALUES}))
def test_any_chat(server, body):
    check_answer(server, "/v1/chat/completions", body)


@ANY
@given(body=bodies({"messages": MESSAGES | VALUES}))
def test_any_chat_with_tools(tool_server, body):
    check_answer(tool_server, "/v1/chat/completions", body)


@ANY
@given(body=bodies({"prompt": TEXTS | st.lists(TEXTS, max_size=3) | IDS | st.lists(IDS, max_size=2) | VALUES}))
def test_any_completion(server, body):
    check_answer(server, "/v1/completions", body)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(["/tokenize", "/detokenize"]), body=VALUES)
def test_any_tokens(server, path, body):
    status, _, data = server.request("POST", path, json.dumps(body).encode())
    assert status in (200, 400), data


# ---------------------------------------------------------------- the other endpoints


def test_models(server, client):
    (model,) = server.get("/v1/models")[1]["data"]
    assert model["max_model_len"] == CONTEXT and model["input_modalities"] == ["text"]
    name = client.models.list().data[0].id
    assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_tokens(server, hf):
    text = "def f(x): # 日本語 🙂"
    body = server.post("/tokenize", prompt=text)[1]
    assert body["tokens"] == hf(text)["input_ids"] and body["count"] == len(body["tokens"])
    bare = server.post("/tokenize", prompt=text, add_special_tokens=False)[1]["tokens"]
    assert bare == body["tokens"][1:] and server.post("/detokenize", tokens=bare) == (200, {"prompt": text})
    assert server.post("/tokenize", messages=HELLO)[1]["tokens"] == chat_ids(hf, HELLO)
    assert server.post("/detokenize", tokens=[10**30])[0] == server.post("/tokenize")[0] == 400


def test_page(server):
    status, headers, data = server.request("GET", "/")
    assert status == 200 and data.lstrip().lower().startswith(b"<!doctype html>")
    assert headers["content-type"].startswith("text/html") and headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "frame-ancestors 'none'"


def test_docs(server):
    assert server.request("GET", "/docs")[0] == 200
    assert "/v1/chat/completions" in server.get("/openapi.json")[1]["paths"]


def test_health_and_metrics(server, client):
    assert server.get("/health") == (200, {"status": "ok"})
    before = server.metric("brisk_new_tokens_total")
    secret = "sesame-open-yourself"
    chat(client, [{"role": "user", "content": secret}], max_tokens=5, extra_body={"ignore_eos": True})
    assert server.metric("brisk_new_tokens_total") == before + 5
    assert server.metric("brisk_http_responses_total", path="/v1/chat/completions", status="200") > 0
    assert secret not in server.request("GET", "/metrics")[2].decode() + server.log


# ---------------------------------------------------------------- keys and origins


@pytest.fixture(scope="module")
def locked(chat_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("first-key\n\nzweiter-schlüssel\n")
    origin = "http://editor.example"
    with Server("--checkpoint_path", chat_folder, "--api_key_file", file, "--cors", origin) as server:
        yield server


def test_keys(locked):
    for key in ("first-key", "zweiter-schlüssel"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert locked.request("GET", "/v1/models", headers=headers)[0] == 200
    with pytest.raises(openai.AuthenticationError) as caught:
        locked.client(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key" and "wrong" not in locked.log
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        status, headers, data = locked.request("GET", path)
        assert status == 401 and headers["www-authenticate"] == "Bearer" and json.loads(data)["error"]
    assert locked.request("POST", "/v1/chat/completions", b"{")[0] == 401
    assert locked.request("GET", "/v1/models", headers={"Authorization": "Basic first-key"})[0] == 401
    for path in ("/", "/health"):
        assert locked.request("GET", path)[0] == 200


def test_origins(locked, server):
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    path = "/v1/chat/completions"
    status, headers, _ = locked.request("OPTIONS", path, headers={"Origin": "http://editor.example"} | ask)
    assert status == 200 and headers["access-control-allow-origin"] == "http://editor.example"
    _, headers, _ = locked.request("OPTIONS", path, headers={"Origin": "http://other.example"} | ask)
    assert "access-control-allow-origin" not in headers
    for headers in ({"Origin": "http://editor.example"}, {"Origin": "http://editor.example"} | ask):
        _, answered, _ = server.request("OPTIONS", "/v1/models", headers=headers)
        assert not any(name.startswith("access-control") for name in answered)


def test_hosts(locked, server):
    """A site whose name is made to lead to this machine (DNS rebinding) gets nothing from a server without a key."""
    for host in ("127.0.0.1", "localhost:8000", "brisk.localhost", "[::1]:8000", "192.168.1.7:80"):
        assert server.request("GET", "/v1/models", headers={"Host": host})[0] == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "é"):
        for path in ("/", "/v1/models", "/metrics"):
            status, _, data = server.request("GET", path, headers={"Host": host.encode()})
            assert status == 403 and "host" in json.loads(data)["error"]["message"]
    headers = {"Host": "evil.example", "Authorization": "Bearer first-key"}
    assert locked.request("GET", "/v1/models", headers=headers)[0] == 200


def test_hosts_of_origins():
    access = Access(origins=("https://chat.example",), local=True)
    assert access.expects(b"chat.example") and not access.expects(b"other.example")
    assert Access(origins=("*",), local=True).expects(b"other.example")


def test_head(server):
    for path in ("/", "/health"):
        status, headers, data = server.request("HEAD", path)
        assert status == 200 and int(headers["content-length"]) > 0 and not data


# ---------------------------------------------------------------- clients that leave, or do not read


def endless(**options):
    """Runs until the context is full."""
    return {"messages": HELLO, "ignore_eos": True, "logit_bias": {"300": 100}, "temperature": 0} | options


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_client_that_leaves(server, stream, when):
    cancelled = server.metric("brisk_requests_cancelled_total")
    connections = [server.open_stream(**endless(stream=stream)) for _ in range(6)]  # more than have a place
    if when == "later":
        time.sleep(0.3)
    for connection in connections:
        connection.close()
    server.wait_until_idle(5)
    assert server.metric("brisk_requests_cancelled_total") > cancelled


def test_a_client_that_reads_slowly_stops_nobody(server, client):
    before = server.memory()
    slow = [server.open_stream(**endless(stream=True, logprobs=True, top_logprobs=20), size=2048) for _ in range(3)]
    time.sleep(0.5)
    begun = time.perf_counter()
    answers = [chat(client, max_tokens=20, **EXACT).choices[0].message.content for _ in range(3)]
    assert len(set(answers)) == 1 and time.perf_counter() - begun < 10
    server.wait_until_idle(60)  # they have not been read, and their places are free
    assert server.memory() - before < 150e6
    for connection in slow[:-1]:
        connection.close()
    data = b""
    while b"[DONE]" not in data[-100:]:
        data += slow[-1].recv(1 << 20)
    slow[-1].close()
    assert data.count(b"data: ") > 10


def test_a_full_queue(narrow):
    connections = [narrow.open_stream(**endless(stream=True)) for _ in range(2)]
    connections[0].recv(1000)
    with pytest.raises(openai.RateLimitError) as caught:
        chat(narrow.client())
    assert int(caught.value.response.headers["retry-after"]) >= 1
    for connection in connections:
        connection.close()
    narrow.wait_until_idle(5)
    assert chat(narrow.client(), max_tokens=2).choices[0].message.content is not None
    with pytest.raises(openai.BadRequestError, match="choices"):
        chat(narrow.client(), n=3)
    assert chat(narrow.client(), n=2, max_tokens=2).usage.completion_tokens <= 4


# ---------------------------------------------------------------- the end of the process


# Each of these needs a server of its own, which is another test's, at its end.


def check_that_sigterm_lets_requests_finish(server, code=0):
    connection = server.open_stream(**endless(stream=True, max_tokens=300))
    data = connection.recv(10000)
    server.process.send_signal(signal.SIGTERM)
    while part := connection.recv(1 << 20):
        data += part
    assert data.count(b"data: ") > 100 and b'"finish_reason":"length"' in data and b"[DONE]" in data
    assert server.wait(20) == code
    with pytest.raises(OSError):
        server.get("/health")


def check_that_sigterm_ends_after_the_grace(server):
    streaming = server.open_stream(**endless(stream=True))
    waiting = server.open_stream(**endless())
    data = streaming.recv(10000)
    begun = time.monotonic()
    assert server.end(seconds=15) == 0 and time.monotonic() - begun < 8
    while part := streaming.recv(1 << 20):
        data += part
    assert b'"error"' in data and b"shutting down" in data and b"[DONE]" not in data
    assert waiting.recv(10000).startswith(b"HTTP/1.1 503 ")


def check_that_ctrl_c_is_quiet(server):
    connection = server.open_stream(**endless(stream=True))
    connection.recv(1000)
    assert server.end(signal.SIGINT, 30) == 130


FAILING = """
import engine, time
from server import endpoints
real, work, count = engine.Engine.step, endpoints.chat_work, 0
def step(self, *args):
    global count
    count += 1
    if count == 20:
        raise RuntimeError("the device is on fire")
    return real(self, *args)
def chat_work(body, model):
    if body.seed == 13:
        raise ZeroDivisionError(str(body.messages))
    return work(body, model)
engine.Engine.step, endpoints.chat_work = step, chat_work
end = serve.HttpServer.end
def later(self):
    time.sleep(1.5)
    end(self)
serve.HttpServer.end = later
"""


def test_bugs_here(chat_folder):
    """Of one request, or of the thread that computes: clients are told, and the log, which nothing of theirs gets
    into."""
    with Server("--checkpoint_path", chat_folder, "--batch_size", 2, code=FAILING, clean=False) as server:
        status, body = server.post("/v1/chat/completions", messages=HELLO, seed=13)
        assert status == 500 and body["error"]["type"] == "server_error"
        assert server.get("/health")[0] == 200
        streaming = server.open_stream(**endless(stream=True))
        others = [server.open_stream(**endless()) for _ in range(2)]
        for connection in others:
            assert connection.recv(10000).startswith(b"HTTP/1.1 500 ")
        data = b""
        while b'"error"' not in data:
            part = streaming.recv(1 << 20)
            assert part
            data += part
        status, body = server.get("/health")
        assert status == 503 and "failed" in body["error"]["message"]
        assert server.post("/v1/chat/completions", messages=HELLO)[0] == 500
        assert server.wait(20) == 1
        assert "ZeroDivisionError at /v1/chat/completions" in server.log and "read_lines" not in server.log
        assert "RuntimeError: the device is on fire" in server.log and "Traceback" in server.log


def test_a_port_that_is_taken(server):
    with socket.create_server(("127.0.0.1", 0)) as other:  # by one that began to listen while this one loaded
        port = other.getsockname()[1]
    other = socket.socket()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    other.bind(("127.0.0.1", port))
    with listening("127.0.0.1", port) as listener, pytest.raises(UserError, match=f"--port {port}: .*; choose another"):
        other.listen()
        with refused_address("127.0.0.1", port):
            listener.listen()
    with pytest.raises(UserError, match=rf"--port {server.port}: .*; choose another"):
        listening(server.host, server.port)


# ---------------------------------------------------------------- ranks, the demo, and load


@pytest.mark.slow
def test_ranks(chat_folder, reference, hf):
    """Rank 0 answers, the other one follows: requests that come together, go, want this and that."""
    with Server("--checkpoint_path", chat_folder, "--batch_size", 4, ranks=2, clean=False) as server:
        client = server.client()
        wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        for _ in range(2):
            leaving = server.open_stream(**endless(stream=True))
            with ThreadPoolExecutor(6) as pool:
                texts = [pool.submit(chat, client, max_tokens=12, **EXACT) for _ in range(4)]
                scored = pool.submit(chat, client, max_tokens=12, logprobs=True, **EXACT)
                person = pool.submit(chat, client, response_format=wanted, max_tokens=400, seed=1)
                for answer in (*texts, scored):
                    text = answer.result().choices[0].message.content
                    assert text == expected_text(reference, hf, chat_ids(hf, HELLO), 12)
            assert json.loads(person.result().choices[0].message.content)["name"] in ("Ada", "Grace")
            leaving.close()
            server.wait_until_idle()
            time.sleep(0.5)  # idle
        check_that_sigterm_lets_requests_finish(server, code=1)  # of torchrun, which hands it on to all


@pytest.mark.slow
def test_compiled_steps_that_propose(chat_folder, reference, hf):
    """With and without log-probabilities, and with a grammar, where nothing is proposed."""
    flags = ("--compile", "--prompt_lookup", "--speculate_k", 3, "--grace", 0.2)
    with Server("--checkpoint_path", chat_folder, "--batch_size", 1, *flags) as server:  # each number of rows compiles
        client = server.client()
        with ThreadPoolExecutor(4) as pool:
            several = [{"logprobs": True}, {}, {"n": 2}] * 3
            held = [pool.submit(chat, client, extra_body={"guided_regex": "(yes|no){2}"}) for _ in range(2)]
            for answer in pool.map(lambda options: chat(client, max_tokens=24, **EXACT, **options), several):
                for choice in answer.choices:
                    assert choice.message.content == expected_text(reference, hf, chat_ids(hf, HELLO), 24)
                    assert choice.logprobs is None or len(choice.logprobs.content) == answer.usage.completion_tokens
            assert all(re.fullmatch("(yes|no){2}", a.result().choices[0].message.content) for a in held)
        check_that_sigterm_ends_after_the_grace(server)


def test_the_demo_with_no_argument():
    with Server() as server:
        client = server.client()
        answer = client.completions.create(model=MODEL, prompt="def read_lines(path):", temperature=0, max_tokens=30)
        assert chat(client).usage.completion_tokens <= 200
        said = chat(client, max_tokens=30, **EXACT)  # it has no chat template: the text goes on
        assert said.choices[0].message.content == answer.choices[0].text != ""
        texts = {client.completions.create(model=MODEL, prompt="import", seed=i).choices[0].text for i in range(3)}
        assert len(texts) == 3
        check_that_ctrl_c_is_quiet(server)


def test_load(chat_folder):
    """Clients of all kinds, a third of which leave in the middle."""
    with Server("--checkpoint_path", chat_folder, "--batch_size", 4, "--max_waiting", 64) as server:
        client = server.client()
        questions = [[{"role": "user", "content": f"{i}: {'yield number, line ' * (i % 7)}"}] for i in range(10)]
        right = [chat(client, q, max_tokens=24, **EXACT).choices[0].message.content for q in questions]
        finished, wrong = [], []

        def one(number):
            draw = random.Random(number)
            i, leaves_after = draw.randrange(10), draw.randrange(1, 8) if draw.random() < 0.34 else None
            stream = chat(client, questions[i], max_tokens=24, stream=True, **EXACT)
            text = ""
            for count, chunk in enumerate(stream):
                text += chunk.choices[0].delta.content or ""
                if count == leaves_after:
                    stream.close()
                    return
            finished.append(number)
            if text != right[i]:
                wrong.append((i, text))

        sizes = []
        for part in range(4):
            with ThreadPoolExecutor(32) as pool:
                list(pool.map(one, range(part * 80, part * 80 + 80)))
            server.wait_until_idle(10)
            sizes.append(server.memory())
        assert not wrong and len(finished) > 120
        assert sizes[-1] < 1.02 * sizes[1] + 2e6, sizes
        check_that_sigterm_lets_requests_finish(server)
