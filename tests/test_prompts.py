"""--prompt_file: lines of text or of JSON, what each asks for, and what is wrong with which; spellings of bad words."""

import json
import random
import shutil

import pytest
import transformers
from conftest import CHAT_TEMPLATE, assert_refused, converse, parse

import files
import generate as cli
from checkpoint import DEMO
from errors import UserError
from prompts import check_draft, spell
from tokenizer import load_tokenizer


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- lines of text ----


def test_prompt_file(script, base_folder, tmp_path, tokenizer):
    """A prompt a line; blank lines are none. What ends a line is a line feed, not what else Unicode calls one."""
    lines = ["first line", "  def indented(self):", "naïve 字 🙂\u2028x\x0cy\x85z", '["JSON"]', '{"a": 1}', "last"]
    path = tmp_path / "prompts"
    path.write_bytes(("\ufeff" + "\r\n\n \n".join(lines)).encode())
    args = ("--checkpoint_path", base_folder, "--json", "--max_new_tokens", 6)
    from_file = parse(script(*args, "--prompt_file", path, "--batch_size", 2))
    from_stdin = parse(script(*args, "--prompt_file", "-", stdin=path.read_bytes()))
    alone = [parse(script(*args, "--prompt", line))[0] for line in lines]
    assert [sample["prompt_tokens"] for sample in from_file] == [len(tokenizer.encode(line)) for line in lines]
    assert [s["tokens"] for s in from_file] == [s["tokens"] for s in from_stdin] == [s["tokens"] for s in alone]


@pytest.mark.parametrize("data", [b"", b"\n \n\t\r\n", b"abc\xff\n", "é".encode("latin-1"), "é".encode("utf-16")])
def test_bad_prompt_files(script, base_folder, tmp_path, data):
    path = tmp_path / "prompts"
    path.write_bytes(data)
    said = "no prompt" if not data.strip() else "UTF-8"
    assert_refused(script("--checkpoint_path", base_folder, "--prompt_file", path), said, str(path))
    assert_refused(script("--checkpoint_path", base_folder, "--prompt_file", "-", stdin=data), said)


@pytest.mark.parametrize("name", ["missing", ".", "x" * 300, "missing/prompts", "/dev/null"])
def test_unreadable_prompt_files(script, base_folder, tmp_path, name):
    assert_refused(script("--checkpoint_path", base_folder, "--prompt_file", tmp_path / name), "--prompt_file")


def test_one_prompt_of_many_exceeds_the_context(script, base_folder):
    data = b"short\n\n" + b"long " * 3000 + b"\nshort\n"
    args = ("--checkpoint_path", base_folder, "--prompt_file", "-")
    assert_refused(script(*args, stdin=data), "line 3", "context of 2048")
    result = script(*args, "--skip_bad_lines", "--json", "--max_new_tokens", 3, stdin=data)
    assert len(parse(result)) == 2 and result.err.startswith("warning: --prompt_file -, line 3: a prompt of ")


def test_a_prompt_that_the_tokenizer_makes_nothing_of(script, base_folder, tmp_path):
    """Without bos, byte fallback or unk, what is not in the vocabulary has no tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # GPT-2's characters of bytes

    folder = shutil.copytree(base_folder, tmp_path / "model")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["post_processor"] = None
    for byte in range(128, 256):  # UTF-8's
        state["model"]["vocab"].pop(bytes_to_unicode()[byte], None)
    state["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(state))
    args = ("--checkpoint_path", folder)
    assert_refused(script(*args, "--prompt", "字🙂"), "prompt")
    assert_refused(script(*args, "--prompt_file", "-", stdin="abc\n字\n".encode()), "line 2", "prompt")
    assert_refused(script(*args, "--prompt", "abc", "--bad_words", "字"), "bad_words", "字")
    result = script(*args, "--interactive", "--max_new_tokens", 3, stdin="字\nabc\n".encode())
    assert result.code == 0 and "Traceback" not in result.err


# ---- lines of JSON ----

ROWS = [  # settings, and the flags that say the same
    ({}, ()),
    ({"temperature": 0.9, "seed": 5, "top_k": 50, "id": "a"}, ("--temperature", 0.9, "--seed", 5, "--top_k", 50)),
    ({"top_p": 0.8, "min_p": 0.01, "seed": 6, "id": 7}, ("--top_p", 0.8, "--min_p", 0.01, "--seed", 6)),
    ({"repetition_penalty": 1.9, "id": None}, ("--repetition_penalty", 1.9)),
    ({"presence_penalty": 1.5, "frequency_penalty": 2}, ("--presence_penalty", 1.5, "--frequency_penalty", 2)),
    ({"logit_bias": {"70": 5, "71": -3.5}}, ("--logit_bias", "70=5", "71=-3.5")),
    ({"bad_words": ["e", "字"]}, ("--bad_words", "e", "字")),
    ({"logit_bias": {"1": 100}, "min_new_tokens": 4}, ("--logit_bias", "1=100", "--min_new_tokens", 4)),
    ({"logit_bias": {"1": 100}, "ignore_eos": True}, ("--logit_bias", "1=100", "--ignore_eos")),
    ({"max_new_tokens": 2}, ("--max_new_tokens", 2)),
    ({"stop": "e"}, ("--stop", "e")),
    ({"stop": ["e", "\n"], "id": {"any": ["thing"]}}, ("--stop", "e", "\n")),
]


@pytest.mark.parametrize("batch_size, default", [(1, ()), (3, ("--temperature", 0.7, "--seed", 1))])
def test_settings_of_a_line(script, base_folder, tmp_path, batch_size, default):
    """Each line is what a run of its own with these flags is; results come in the order of the lines."""
    args = ("--checkpoint_path", base_folder, "--json", "--max_new_tokens", 14, *default)
    path = jsonl(tmp_path / "rows.jsonl", *({"prompt": f"def f{i}"} | row for i, (row, _) in enumerate(ROWS)))
    together = parse(script(*args, "--prompt_file", path, "--batch_size", batch_size))
    for i, ((row, flags), sample) in enumerate(zip(ROWS, together, strict=True)):
        (alone,) = parse(script(*args, "--prompt", f"def f{i}", *flags))
        for field in ("text", "tokens", "prompt_tokens", "finish_reason"):
            assert sample[field] == alone[field], row
        assert sample.get("id", "none") == row.get("id", "none")
    assert together[8]["finish_reason"] == "length" and together[7]["finish_reason"] == "stop"
    assert len(together[7]["tokens"]) == 5 and len(together[9]["tokens"]) == 2


def test_json_lines_are_recognized(script, base_folder, tmp_path):
    """By the name, or by the first line that is not blank; in a file of text no later line is."""
    args = ("--checkpoint_path", base_folder, "--json", "--max_new_tokens", 3, "--prompt_file")
    row = b'{"prompt": "abc", "id": 1}\n'
    assert [sample["id"] for sample in parse(script(*args, "-", stdin=b"\xef\xbb\xbf\n \r\n" + row))] == [1]
    assert ["id" in sample for sample in parse(script(*args, "-", stdin=b"text\n" + row))] == [False, False]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"text\n" + row)
    assert_refused(script(*args, path), "line 1", "not JSON")


def test_messages_go_through_the_chat_template(script, chat_folder, tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    path = jsonl(tmp_path / "chat.jsonl", {"messages": messages})
    (sample,) = parse(script("--checkpoint_path", chat_folder, "--json", "--max_new_tokens", 5, "--prompt_file", path))
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert theirs.chat_template == CHAT_TEMPLATE and sample["prompt_tokens"] == len(ids)
    assert sample["text"] + "\n" == converse(script, chat_folder, "hello", args=("--max_new_tokens", 5)).out


def test_content_in_parts(script, chat_folder, tmp_path):
    """Lists of text parts are what the text would be; a part of another kind is named."""
    args = ("--checkpoint_path", chat_folder, "--json", "--max_new_tokens", 5, "--prompt_file")
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    rows = [{"messages": [{"role": "user", "content": content}]} for content in ("hello", parts)]
    whole, joined = parse(script(*args, jsonl(tmp_path / "rows.jsonl", *rows)))
    assert whole["tokens"] == joined["tokens"] and whole["prompt_tokens"] == joined["prompt_tokens"]
    rows = [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}]
    assert_refused(script(*args, jsonl(tmp_path / "rows.jsonl", *rows)), "line 1", "messages")


def test_chat_renders_a_prompt(script, chat_folder, tmp_path):
    """--chat makes a user's message of --prompt, of a file and of each line, and --system one before it."""
    args = ("--checkpoint_path", chat_folder, "--json", "--max_new_tokens", 5)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "12"}]
    path = jsonl(tmp_path / "rows.jsonl", {"messages": messages})
    (expected,) = parse(script(*args, "--prompt_file", path))
    chat = ("--chat", "--system", "be brief")
    text = tmp_path / "text"
    text.write_text("12")
    for source in (("--prompt", "12"), ("--prompt_text_file", text), ("--prompt_file", text)):
        (sample,) = parse(script(*args, *chat, *source))
        assert sample["tokens"] == expected["tokens"] and sample["prompt_tokens"] == expected["prompt_tokens"]
    (raw,) = parse(script(*args, "--prompt_text_file", text))
    assert raw["prompt_tokens"] < expected["prompt_tokens"]
    assert_refused(script(*args, "--prompt", "a", "--system", "x"), "--system", "--chat")


def test_template_variables(script, chat_folder, tmp_path):
    """Of the flag, and of a line, which comes first; as transformers passes them on."""
    folder = shutil.copytree(chat_folder, tmp_path / "model")
    template = "{{ mode | default('none') }}:{{ style | default('none') }}:{{ messages[0]['content'] }}"
    for name in folder.glob("chat_template*"):
        name.unlink()
    (folder / "chat_template.jinja").write_text(template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "x"}]
    rows = [{"messages": messages}, {"messages": messages, "template_vars": {"mode": "deep"}}]
    args = ("--checkpoint_path", folder, "--json", "--max_new_tokens", 2, "--logprobs", 0, "--echo")
    args += ("--template_vars", '{"mode": "slow", "style": 7}')
    samples = parse(script(*args, "--prompt_file", jsonl(tmp_path / "rows.jsonl", *rows)))
    for sample, mode in zip(samples, ("slow", "deep"), strict=True):
        expected = theirs.apply_chat_template(messages, mode=mode, style=7, return_dict=False)
        assert [entry["token"] for entry in sample["prompt_logprobs"]] == expected
    assert_refused(script(*args[:2], "--chat", "--prompt", "a", "--template_vars", "[1]"), "--template_vars", "JSON")


def test_a_seed_of_its_own_for_each_prompt(script, base_folder, tmp_path):
    """Without --seed lines differ, with it each is what it would be alone."""
    path = tmp_path / "lines.txt"
    path.write_text("abc\n" * 4)
    args = ("--checkpoint_path", base_folder, "--json", "--temperature", 3, "--max_new_tokens", 9)
    args += ("--prompt_file", path)
    assert len({tuple(sample["tokens"]) for sample in parse(script(*args))}) == 4
    assert len({tuple(sample["tokens"]) for sample in parse(script(*args, "--seed", 1))}) == 1


def test_what_is_no_file_of_prompts(script, base_folder, tmp_path, monkeypatch):
    args = ("--checkpoint_path", base_folder, "--max_new_tokens", 2)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1))
    assert_refused(script(*args, "--prompt_file", path), "JSON array", "line")
    path.write_text("[a list] of words\n")
    assert script(*args, "--prompt_file", path).code == 0
    path.write_text(json.dumps({"prompt": "a"}, indent=1))
    assert_refused(script(*args, "--prompt_file", path), "JSON object of several lines")
    row = b'{"prompt": "a", "template_vars": {}}'
    assert_refused(script(*args, "--prompt_file", "-", stdin=row), "line 1", "template_vars")
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 1000)
    for flag in ("--prompt_file", "--prompt_text_file"):
        assert_refused(script(*args, flag, "/dev/zero"), "/dev/zero", "more than")
        assert_refused(script(*args, flag, tmp_path / "none"), "none", "No such file")
    path.write_bytes(b"abc\xff")
    assert_refused(script(*args, "--prompt_text_file", path), str(path), "UTF-8 (byte 4)")
    assert script(*args, "--prompt_text_file", "-", stdin=b"one\ntwo\n").code == 0


def test_samples_share_a_prefill(script, base_folder, prefills, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", {"prompt": "abc", "seed": 4, "id": 1}, {"prompt": "xyz", "id": 2})
    args = ("--checkpoint_path", base_folder, "--json", "--max_new_tokens", 8, "--temperature", 1, "--seed", 9)
    samples = parse(script(*args, "--prompt_file", path, "--num_samples", 3, "--batch_size", 4))
    assert [sample["id"] for sample in samples] == [1, 1, 1, 2, 2, 2]
    assert len({id(request.prompt) for request in prefills}) == 2
    assert [prefill.request.params.seed for prefill in prefills] == [4, 5, 6, 9, 10, 11]
    assert len({tuple(sample["tokens"]) for sample in samples}) == 6


GOOD = {"prompt": "abc"}
BAD = [
    ("text", "not JSON"),
    ("{", "not JSON"),
    ('{"prompt": "abc"', "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "not JSON"),
    ('"prompt"', '"prompt" or "messages"'),
    ("[1]", '"prompt" or "messages"'),
    ("{}", '"prompt" or "messages"'),
    ({"prompt": "a", "messages": []}, '"prompt" or "messages"'),
    ({"prompt": 5}, "prompt is not a string"),
    ({"prompt": None}, "prompt is not a string"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "\ud800"}, "UTF-8"),
    ({"messages": "hello"}, "messages is not"),
    ({"messages": []}, "messages is not"),
    ({"messages": [{"role": "user"}]}, "messages is not"),
    ({"messages": [{"role": 1, "content": "x"}]}, "messages is not"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no chat template"),
    (GOOD | {"volume": 11}, "volume"),
    (GOOD | {"Temperature": 1}, "Temperature"),
    (GOOD | {"temperature": "hot"}, 'temperature "hot" is not a number'),
    (GOOD | {"temperature": True}, "temperature true is not a number"),
    (GOOD | {"temperature": None}, "temperature null is not a number"),
    (GOOD | {"temperature": float("nan")}, "temperature nan"),
    (GOOD | {"temperature": float("inf")}, "temperature inf"),
    (GOOD | {"temperature": 10**400}, "temperature"),
    (GOOD | {"temperature": -1}, "temperature"),
    (GOOD | {"top_k": 1.5}, "top_k 1.5 is not a whole number"),
    (GOOD | {"top_k": -1}, "top_k"),
    (GOOD | {"top_p": 0}, "top_p"),
    (GOOD | {"min_p": 2}, "min_p"),
    (GOOD | {"repetition_penalty": 0}, "repetition_penalty"),
    (GOOD | {"presence_penalty": 2.5}, "presence_penalty"),
    (GOOD | {"frequency_penalty": "2"}, "frequency_penalty"),
    (GOOD | {"logit_bias": [[5, 1]]}, "logit_bias"),
    (GOOD | {"logit_bias": {"x": 1}}, "logit_bias"),
    (GOOD | {"logit_bias": {"5": "1"}}, "logit_bias"),
    (GOOD | {"logit_bias": {"-1": 1}}, "logit_bias"),
    (GOOD | {"logit_bias": {"٥": 1}}, "logit_bias"),
    (GOOD | {"logit_bias": {"5": float("nan")}}, "logit_bias"),
    (GOOD | {"logit_bias": {"400": 1}}, "no token 400"),
    (GOOD | {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    (GOOD | {"bad_words": "e"}, "bad_words"),
    (GOOD | {"bad_words": [1]}, "bad_words"),
    (GOOD | {"bad_words": [""]}, "bad_words"),
    (GOOD | {"min_new_tokens": -1}, "min_new_tokens"),
    (GOOD | {"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9"),
    (GOOD | {"max_new_tokens": 0}, "max_new_tokens"),
    (GOOD | {"max_new_tokens": 2048}, "context of 2048"),
    (GOOD | {"max_new_tokens": 1e3}, "max_new_tokens"),
    (GOOD | {"stop": 5}, "stop"),
    (GOOD | {"stop": ["a", 5]}, "stop"),
    (GOOD | {"stop": ""}, "stop"),
    (GOOD | {"stop": ["a", ""]}, "stop"),
    (GOOD | {"seed": -1}, "seed"),
    (GOOD | {"seed": 2**63}, "seed"),
    (GOOD | {"ignore_eos": 1}, "ignore_eos"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    (b"\x00\x01\x02", "not JSON"),
]


@pytest.mark.parametrize("row, said", BAD, ids=[str(row)[:50] for row, _ in BAD])
def test_bad_lines_are_named_before_any_work(script, base_folder, row, said, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the weights are loaded"))
    line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    data = json.dumps(GOOD).encode() + b"\n\n" + line + b"\n" + json.dumps(GOOD).encode()
    args = ("--checkpoint_path", base_folder, "--prompt_file", "-")
    assert_refused(script(*args, stdin=data), "--prompt_file -, line 3: ", said)


def test_bad_lines_are_skipped(script, base_folder):
    """A line of warning each, and the others run; one is still needed."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row, _ in BAD if not isinstance(row, bytes)]
    data = "".join(f'{line}\n{{"prompt": "abc", "id": {i}}}\n' for i, line in enumerate(lines)).encode()
    data = json.dumps(GOOD).encode() + b"\n" + data + b"\n".join(row for row, _ in BAD if isinstance(row, bytes))
    args = ("--checkpoint_path", base_folder, "--prompt_file", "-", "--skip_bad_lines", "--json")
    result = script(*args, "--max_new_tokens", 7, "--batch_size", 8, stdin=data)
    # With --max_new_tokens 7 there is nothing else wrong with any of them.
    assert [sample.get("id") for sample in parse(result)] == [None, *range(len(lines))]
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: --prompt_file -, line ")]
    assert len(warnings) == len(BAD)
    assert [int(line.split("line ")[1].split(":")[0]) for line in warnings[: len(lines)]] == [
        2 * i + 2 for i in range(len(lines))
    ]
    nothing = script(*args, stdin=b'{"prompt": 1}\n')
    assert nothing.code == 2 and nothing.err.splitlines()[-1].startswith("error: --prompt_file - has no prompt")


@pytest.mark.parametrize("name, value", [("temperature", 0), ("top_k", 5), ("seed", 1), ("stop", "x")])
def test_lines_that_do_not_go_with_beams(script, base_folder, name, value):
    data = json.dumps(GOOD | {name: value}).encode()
    args = ("--checkpoint_path", base_folder, "--prompt_file", "-", "--num_beams", 2)
    assert_refused(script(*args, stdin=data), "line 1", name, "--num_beams")


# ---- the way out ----


def test_results_come_in_order_as_soon_as_they_can(script, base_folder, monkeypatch):
    """A short text behind a long one waits for it; nothing else waits."""
    written, generate, tokens = [], cli.generate, []
    monkeypatch.setattr(cli, "write", lambda text: written.append((len(tokens), json.loads(text)["id"])))
    monkeypatch.setattr(cli, "generate", lambda *args: (tokens.append(token) or token for token in generate(*args)))
    lengths = [9, 2, 4, 20, 3]
    rows = [{"prompt": "abc", "max_new_tokens": n, "id": i, "ignore_eos": True} for i, n in enumerate(lengths)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    args = ("--checkpoint_path", base_folder, "--prompt_file", "-", "--json", "--batch_size", 2)
    assert script(*args, stdin=data).code == 0
    assert [number for _, number in written] == [0, 1, 2, 3, 4]
    last = {token.request: i + 1 for i, token in enumerate(tokens)}
    assert [count for count, _ in written] == [max(last[j] for j in range(i + 1)) for i in range(5)]


@pytest.mark.parametrize("terminals, bar", [((), 0), (("stderr",), 1), (("stdout", "stderr"), 0), (("stdout",), 0)])
def test_a_progress_bar_where_it_disturbs_nothing(script, base_folder, terminals, bar):
    args = ("--checkpoint_path", base_folder, "--prompt", "abc", "--max_new_tokens", 3)
    several = script(*args, "--num_samples", 3, terminals=terminals)
    assert several.code == 0 and bool("0/3" in several.err) == bool(bar)
    assert several.out.startswith("--- 1 of 3\n") and "\n--- 3 of 3\n" in several.out and "/3" not in several.out
    assert "0/1" not in script(*args, terminals=terminals).err


# ---- tokens ----


def test_spellings_of_bad_words_keep_them_out(script, base_folder, tokenizer):
    """Whatever the temperature is, where it can come about as one of its spellings."""
    words = random.Random(0).sample([chr(c) for c in range(97, 123)], 8)
    args = ("--checkpoint_path", base_folder, "--prompt", "def", "--json", "--temperature", 3, "--num_samples", 6)
    args += ("--max_new_tokens", 60)
    banned = {ids[0] for word in words for ids in spell(word, tokenizer) if len(ids) == 1}
    assert len(banned) >= 8
    seen = [set(sample["tokens"]) for sample in parse(script(*args, "--bad_words", *words))]
    assert not banned & set().union(*seen)
    assert banned & set().union(*(set(sample["tokens"]) for sample in parse(script(*args))))


def test_spellings_as_transformers_recommends():
    """With and without add_prefix_space; sentencepiece, which puts a space before a text, has a third: inside a line
    that goes on without one."""
    mine = load_tokenizer(DEMO)
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO)
    for word in ("return", "字", "the end"):
        spellings = set(spell(word, mine))
        assert tuple(theirs(word, add_special_tokens=False).input_ids) in spellings
        assert tuple(theirs(" " + word, add_special_tokens=False).input_ids) in spellings
        assert {mine.decode([*mine.encode("x\n"), *ids]).lstrip("x\n ") for ids in spellings} == {word}
    with pytest.raises(UserError, match="bad_words"):
        spell("", mine)


def test_a_draft_needs_the_same_tokens(tokenizer, chat_folder):
    check_draft(tokenizer, load_tokenizer(chat_folder))  # a chat template makes no difference
    with pytest.raises(UserError, match="same family"):
        check_draft(tokenizer, load_tokenizer(DEMO))
