"""The command line, run within this process. What only a process has (signals, streams, terminals): test_process.py."""

import json
import math
import os
import re
import shutil

import conftest
import pytest
import torch
from conftest import GREEDY, assert_refused, converse, ids_of, run_rows

import checkpoint
import generate as cli
from checkpoint import load_model
from engine import Engine


@pytest.fixture
def prefills(monkeypatch):
    """The (rows, starts) of every call of Engine.prefill."""
    calls, prefill = [], Engine.prefill
    monkeypatch.setattr(
        Engine,
        "prefill",
        lambda self, rows, starts, params: calls.append((rows, starts)) or prefill(self, rows, starts, params),
    )
    return calls


def test_text_to_stdout_the_rest_to_stderr(script, base_folder, engine, tokenizer):
    result = script("--checkpoint_path", base_folder, "--prompt", "def f(x):", "--max_new_tokens", 30)
    (row,) = run_rows(engine, tokenizer, [tokenizer.encode("def f(x):")], [GREEDY], 30, eos_ids={1})
    assert result.code == 0
    assert result.out == "".join(token.text for token in row) + "\n"
    loaded, speed = result.err.splitlines()
    assert loaded.startswith("loaded ")
    numbers = r"prefill \d+ tokens, [\d.]+ tok/s · decode 30 tokens, [\d.]+ tok/s, [\d.]+ GB/s"
    assert re.fullmatch(numbers + r" · first token after [\d.]+ s · peak memory [\d.]+ GB", speed)


def test_help_names_every_flag(script):
    result = script("--help")
    flags = (
        "checkpoint_path prompt prompt_file interactive max_new_tokens num_samples batch_size temperature top_k top_p"
    )
    flags += " min_p seed compile compile_prefill device dtype max_seq_length profile json"
    assert result.code == 0 and result.err == ""
    assert all(f"--{flag} " in result.out for flag in flags.split())


def test_the_weight_file_may_be_named(script, base_folder):
    folder = script("--checkpoint_path", base_folder, "--prompt", "abc", "--max_new_tokens", 5)
    file = script("--checkpoint_path", base_folder / "model.safetensors", "--prompt", "abc", "--max_new_tokens", 5)
    assert file.out == folder.out and file.code == 0


def parse(result):
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_json(script, base_folder, tokenizer):
    (sample,) = parse(script("--checkpoint_path", base_folder, "--prompt", "naïve 🙂", "--json", "--max_new_tokens", 9))
    assert set(sample) == {"text", "tokens", "prompt_tokens", "finish_reason", "stats"}
    assert sample["text"] == tokenizer.decode(sample["tokens"]) and len(sample["tokens"]) == 9
    assert sample["prompt_tokens"] == len(tokenizer.encode("naïve 🙂"))
    assert sample["finish_reason"] == "length"
    assert sample["stats"]["prompt_tokens"] == sample["prompt_tokens"] and sample["stats"]["new_tokens"] == 9
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in sample["stats"].values())


def test_several_end_tokens_of_the_model(script, base_folder, tokenizer, tmp_path):
    """generation_config.json names two; the one that comes first ends the text and isn't part of it."""
    args = ("--prompt", "def", "--json", "--max_new_tokens", 20)
    (free,) = parse(script("--checkpoint_path", base_folder, *args))
    folder = shutil.copytree(base_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [399, free["tokens"][6]]}))
    (sample,) = parse(script("--checkpoint_path", folder, *args))
    end = free["tokens"].index(free["tokens"][6])
    assert sample["finish_reason"] == "stop" and sample["tokens"] == free["tokens"][: end + 1]
    assert sample["text"] == tokenizer.decode(free["tokens"][:end])


def test_recommended_settings(script, base_folder, tmp_path):
    """generation_config.json decides where the flags don't, numbers as JSON may write them."""
    folder = shutil.copytree(base_folder, tmp_path / "model")

    def texts(*flags, **fields):
        (folder / "generation_config.json").write_text(json.dumps(fields))
        return script("--checkpoint_path", folder, "--prompt", "def", "--max_new_tokens", 12, "--seed", 1, *flags).out

    greedy, sampled = texts(), texts("--temperature", 0.7, "--top_k", 20, "--top_p", 0.9)
    assert greedy != sampled
    assert texts(do_sample=True, temperature=0.7, top_k=20, top_p=0.9) == sampled
    assert texts(do_sample=True, temperature=0.7, top_k=20.0, top_p=0.9) == sampled
    assert texts("--top_k", 20, do_sample=True, temperature=0.7, top_k=3, top_p=0.9) == sampled
    assert texts("--temperature", 0, do_sample=True, temperature=0.7) == greedy
    assert texts(do_sample=False, temperature=0.7, top_k=20) == greedy
    assert texts(do_sample=True, temperature=1, top_k=1, top_p=1, min_p=0) == greedy
    assert texts("--top_k", 1) == greedy
    assert texts("--top_k", 400) == texts("--temperature", 1)


def test_samples_and_batches(script, base_folder):
    """Sample i has seed + i, whatever is in the batch; a last batch that is not full says no more than it should."""
    args = ("--checkpoint_path", base_folder, "--prompt", "def", "--temperature", 1, "--max_new_tokens", 12, "--json")
    samples = parse(script(*args, "--num_samples", 5, "--seed", 7))
    assert len({sample["text"] for sample in samples}) == 5
    together = parse(script(*args, "--num_samples", 5, "--seed", 7, "--batch_size", 3))
    assert [sample["tokens"] for sample in together] == [sample["tokens"] for sample in samples]
    assert parse(script(*args, "--seed", 9))[0]["tokens"] == samples[2]["tokens"]
    more = parse(script(*args, "--num_samples", 2, "--seed", 7, "--batch_size", 1000))
    assert [sample["tokens"] for sample in more] == [sample["tokens"] for sample in samples[:2]]
    assert together[0]["stats"]["new_tokens"] == 36 and together[4]["stats"]["new_tokens"] == 24
    unseeded = [parse(script(*args))[0]["tokens"] for _ in range(3)]
    assert unseeded[0] != unseeded[1] or unseeded[0] != unseeded[2]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_plain_text_of_several_samples(script, base_folder, batch_size):
    args = ("--checkpoint_path", base_folder, "--prompt", "def", "--seed", 3, "--top_k", 50, "--max_new_tokens", 6)
    result = script(*args, "--num_samples", 3, "--batch_size", batch_size)
    samples = parse(script(*args, "--num_samples", 3, "--json"))
    assert result.out == "".join(sample["text"] + "\n" for sample in samples)
    assert [line for line in result.err.splitlines() if line.startswith("---")] == [
        f"--- sample {i} of 3" for i in (1, 2, 3)
    ]


def test_prompt_file(script, base_folder, tmp_path, tokenizer):
    """A prompt a line; blank lines are none. What ends a line is a line feed, not what else Unicode calls one."""
    lines = ["first line", "  def indented(self):", "naïve 字 🙂\u2028x\x0cy\x85z", "last"]
    path = tmp_path / "prompts"
    path.write_bytes(("\ufeff" + "\r\n\n \n".join(lines)).encode())
    args = ("--checkpoint_path", base_folder, "--json", "--max_new_tokens", 6)
    from_file = parse(script(*args, "--prompt_file", path, "--batch_size", 2))
    from_stdin = parse(script(*args, "--prompt_file", "-", stdin=path.read_bytes()))
    alone = [parse(script(*args, "--prompt", line))[0] for line in lines]
    assert [sample["prompt_tokens"] for sample in from_file] == [len(tokenizer.encode(line)) for line in lines]
    assert [s["tokens"] for s in from_file] == [s["tokens"] for s in from_stdin] == [s["tokens"] for s in alone]


def test_a_number_is_a_synthetic_prompt(script, base_folder, prefills, tmp_path):
    """Of random tokens, the same each time; nothing but the length ends the text."""
    folder = shutil.copytree(base_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(400))}))
    args = ("--checkpoint_path", folder, "--json", "--max_new_tokens", 7, "--prompt")
    first, second = (parse(script(*args, 600))[0] for _ in range(2))
    assert first["prompt_tokens"] == 600 and len(first["tokens"]) == 7 and first["finish_reason"] == "length"
    assert first["tokens"] == second["tokens"]
    (((row,), starts), again) = prefills
    assert len(row) == 600 and len(set(row)) > 200 and max(row) < 400 and starts == [0] and again == ([row], [0])
    for text in ("-5", "5.0", "5 ", "²", "٣"):  # no numbers of tokens
        (sample,) = parse(script("--checkpoint_path", folder, "--json", f"--prompt={text}"))
        assert sample["finish_reason"] == "stop" and len(sample["tokens"]) == 1


def test_new_tokens_default_to_what_there_is_room_for(script, base_folder):
    lengths = [(10, 200), (2000, 48), (2047, 1)]
    for length, expected in lengths:
        (sample,) = parse(script("--checkpoint_path", base_folder, "--prompt", length, "--json"))
        assert len(sample["tokens"]) == expected


def test_the_length_of_the_cache_changes_nothing(script, base_folder):
    args = ("--checkpoint_path", base_folder, "--prompt", "def f", "--json", "--max_new_tokens", 30)
    free = parse(script(*args))[0]
    for length in (free["prompt_tokens"] + 30, 100, 2048):
        assert parse(script(*args, "--max_seq_length", length))[0]["tokens"] == free["tokens"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(script, base_folder, dtype, monkeypatch, reference, hf_folder):
    models = []
    monkeypatch.setattr(cli, "load_model", lambda *args: models.append(load_model(*args)) or models[-1])
    (sample,) = parse(
        script("--checkpoint_path", base_folder, "--prompt", 40, "--json", "--max_new_tokens", 8, "--dtype", dtype)
    )
    kinds = {tensor.dtype for tensor in (*models[0].parameters(), models[0].layers[0].attention.kv_cache.k)}
    assert kinds == {getattr(torch, dtype)} and len(sample["tokens"]) == 8


def test_profile_is_a_chrome_trace(script, base_folder, tmp_path):
    path = tmp_path / "trace.json"
    result = script("--checkpoint_path", base_folder, "--prompt", "abc", "--max_new_tokens", 4, "--profile", path)
    assert result.code == 0
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["ph"] for event in events} >= {"X"}
    assert sum(event.get("name") == "brisk::decode_attention" for event in events) == 2 * 4
    assert os.listdir(tmp_path) == ["trace.json"]


def test_the_demo_writes_python(script):
    """What runs when no checkpoint is named: the embedded model, on a prompt of its own."""
    result = script("--max_new_tokens", 100, "--seed", 1)
    assert result.code == 0, result.err
    again = script("--prompt", "def read_lines(path):", "--max_new_tokens", 100, "--seed", 1)
    assert again.out == result.out
    text = script("--max_new_tokens", 100, "--temperature", 0).out
    assert text.startswith("\n    ") and re.search(r"\b(return|if|for|with|yield|while|try)\b", text)


# ---------------------------------------------------------------------------------------------------------------------
# --interactive, in process


def chat_ids(tokenizer, *turns):
    """The prompt of a chat of alternating words, as transformers' template engine renders ours in conftest."""
    text = "<s>" + "".join(f"<|{'assistant' if i % 2 else 'user'}|>{turn}<|end|>" for i, turn in enumerate(turns))
    return tokenizer.encode(text + "<|assistant|>", add_special_tokens=False)


def test_a_chat_prefills_only_what_is_new(script, chat_folder, engine, tokenizer, prefills):
    """Each turn's prompt is the whole conversation; what the cache already holds of it is not run again; and the reply
    is the one that the whole conversation gets from scratch."""

    def reply_to(*turns):
        (row,) = run_rows(engine, tokenizer, [chat_ids(tokenizer, *turns)], [GREEDY], 5, eos_ids={1, 2})
        return "".join(token.text for token in row), [token.id for token in row if token.finish_reason != "stop"]

    # The tokens of random weights rarely are the ones that their text has: look for a reply where they are.
    for i in range(1000):
        opening = f"word {i}"
        first, generated = reply_to(opening)
        if tokenizer.encode(first, add_special_tokens=False) == generated and "\n" not in first:
            break
    second, _ = reply_to(opening, first, "and 🙂?")
    third, _ = reply_to(opening, first, "and 🙂?", second, "so")
    prefills.clear()
    result = converse(script, chat_folder, opening, "and 🙂?", "so", args=("--max_new_tokens", 5))
    assert result.code == 0
    assert result.out == f"{first}\n{second}\n{third}\n"
    prompts = [
        chat_ids(tokenizer, opening),
        chat_ids(tokenizer, opening, first, "and 🙂?"),
        chat_ids(tokenizer, opening, first, "and 🙂?", second, "so"),
    ]
    ((row_1,), (start_1,)), ((row_2,), (start_2,)), ((row_3,), (start_3,)) = prefills
    assert (row_1, start_1) == (prompts[0], 0)
    assert start_2 == len(prompts[0]) + 4  # the last of the five tokens was never run
    assert row_2 == prompts[1][start_2:]
    assert start_3 >= len(prompts[1]) and row_3 == prompts[2][start_3:]


def test_a_base_model_continues_the_text(script, base_folder, engine, tokenizer, prefills):
    result = converse(script, base_folder, "def f(x):", "class A:", args=("--max_new_tokens", 6))
    assert result.code == 0 and "no chat template" in result.err
    (first, start_1), (second, start_2) = prefills.copy()
    prompt_1 = tokenizer.encode("def f(x):")
    (row_1,) = run_rows(engine, tokenizer, [prompt_1], [GREEDY], 6)
    prompt_2 = prompt_1 + ids_of([row_1])[0] + tokenizer.encode("\nclass A:", add_special_tokens=False)
    (row_2,) = run_rows(engine, tokenizer, [prompt_2], [GREEDY], 6)
    assert result.out == "".join(token.text for token in row_1) + "\n" + "".join(token.text for token in row_2) + "\n"
    assert (first, start_1) == ([prompt_1], [0])
    assert start_2 == [len(prompt_1) + 5] and second == [prompt_2[start_2[0] :]]


@pytest.mark.parametrize("name", ["chat_folder", "base_folder"])
def test_clear_and_the_ways_to_end(script, request, name, prefills):
    folder = request.getfixturevalue(name)
    once = converse(script, folder, "hello", args=("--max_new_tokens", 5))
    result = converse(script, folder, "hello", "", "   ", "/clear", "hello", "/exit", "x", args=("--max_new_tokens", 5))
    assert once.code == result.code == 0
    assert result.out == once.out * 2
    assert [starts for _, starts in prefills] == [[0]] * 3
    args = ("--checkpoint_path", folder, "--interactive", "--max_new_tokens", 5)
    assert script(*args, stdin=b"hello").out == once.out  # no newline at the end
    assert script(*args, stdin=b"hello\r\n").out == once.out
    nothing = script(*args, stdin=b"")
    assert (nothing.code, nothing.out) == (0, "")


def test_a_full_context_is_said_and_clear_helps(script, chat_folder):
    result = converse(
        script, chat_folder, "hello", "x" * 60, "/clear", "hello", args=("--max_seq_length", 24, "--max_new_tokens", 20)
    )
    assert result.code == 0
    replies = converse(script, chat_folder, "hello", args=("--max_seq_length", 24, "--max_new_tokens", 20))
    assert result.out == replies.out * 2
    assert len([line for line in result.err.splitlines() if "no room left in 24 tokens; /clear" in line]) == 1


def test_a_chat_says_how_fast_it_was(script, chat_folder):
    assert "tok/s" in converse(script, chat_folder, "hello", args=("--max_new_tokens", 5)).err


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


FLAGS = {
    "--temperature nan": "temperature",
    "--temperature inf": "temperature",
    "--temperature -1": "temperature",
    "--temperature hot": "temperature",
    "--top_k -1": "top_k",
    "--top_k 5.5": "top_k",
    "--top_k 99999999999": "top_k",
    "--top_p 0": "top_p",
    "--top_p 1.5": "top_p",
    "--top_p nan": "top_p",
    "--min_p -0.1": "min_p",
    "--min_p 2": "min_p",
    "--seed -1": "seed",
    "--seed 99999999999999999999": "seed",
    "--seed x": "seed",
    "--max_new_tokens 0": "max_new_tokens",
    "--max_new_tokens -3": "max_new_tokens",
    "--max_new_tokens 1e3": "max_new_tokens",
    "--max_new_tokens 9999999999": "max_new_tokens",
    "--num_samples 0": "num_samples",
    "--batch_size 0": "batch_size",
    "--max_seq_length 0": "max_seq_length",
    "--max_seq_length 2049": "context of 2048",
    "--dtype int8": "dtype",
    "--device tpu": "device",
    "--profile": "profile",
    "--nonsense": "nonsense",
    "stray": "stray",
    "--prompt_file x": "prompt_file",
    "--interactive": "--interactive",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_out_of_range(script, base_folder, flag):
    assert_refused(script("--checkpoint_path", base_folder, "--prompt", "a", *flag.split()), FLAGS[flag])


@pytest.mark.parametrize("flag", ["--json", "--num_samples 2", "--batch_size 2", "--prompt_file x", "--prompt hello"])
def test_what_does_not_go_with_interactive(script, base_folder, flag):
    assert_refused(script("--checkpoint_path", base_folder, "--interactive", *flag.split()), "--interactive")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_such_device(script, base_folder):
    assert_refused(script("--checkpoint_path", base_folder, "--prompt", "a", "--device", "cuda"), "cuda", "cpu")


def test_nothing_to_continue(script, base_folder):
    assert_refused(script("--checkpoint_path", base_folder), "--prompt")


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "the prompt is empty"),
        ("0", "--prompt"),
        ("000", "--prompt"),
        ("\udcff\udcfe", "UTF-8"),
        ("a \udc80", "UTF-8"),
    ],
)
def test_bad_prompts(script, base_folder, text, said):
    """Lone surrogates are what Python makes of arguments that are not UTF-8."""
    assert_refused(script("--checkpoint_path", base_folder, "--prompt", text), said)


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


def test_unreadable_checkpoints(script, base_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (
        tmp_path / "missing",
        tmp_path / "empty",
        tmp_path / ("x" * 300),
        base_folder / "config.json",
        base_folder / "config.json" / "x",
        "/dev/null",
        "",
    ):
        assert_refused(script("--checkpoint_path", path, "--prompt", "a"))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        folder = shutil.copytree(base_folder, tmp_path / f"no {name}")
        (folder / name).unlink()
        assert_refused(script("--checkpoint_path", folder, "--prompt", "a"), str(folder))


@pytest.mark.parametrize(
    "args",
    [
        ("--prompt", "2040", "--max_new_tokens", "9"),
        ("--prompt", "2048"),
        ("--prompt", "2049"),
        ("--prompt", "999999999"),  # nor is it made up first
        ("--prompt", "9" * 5000),
        ("--prompt", "x" * 5000),
        ("--prompt", "a", "--max_new_tokens", "2048"),
        ("--prompt", "a", "--max_new_tokens", "2147483647"),
        ("--prompt", "10", "--max_seq_length", "16", "--max_new_tokens", "7"),
        ("--prompt", "16", "--max_seq_length", "16"),
        ("--interactive", "--max_new_tokens", "2048"),
        ("--interactive", "--max_seq_length", "16", "--max_new_tokens", "17"),
    ],
    ids=lambda args: " ".join(args)[:40],
)
def test_what_exceeds_the_context_is_refused_before_any_work(script, base_folder, args, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the weights are loaded"))
    assert_refused(script("--checkpoint_path", base_folder, *args))


def test_one_prompt_of_many_exceeds_the_context(script, base_folder):
    data = b"short\n" + b"long " * 3000 + b"\nshort\n"
    assert_refused(script("--checkpoint_path", base_folder, "--prompt_file", "-", stdin=data), "context of 2048")


def test_a_tokenizer_that_is_larger_than_the_model(script, base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "model")
    conftest.make_tokenizer(folder, vocab_size=401)
    assert_refused(script("--checkpoint_path", folder, "--prompt", "a"), "401", "400")


def test_a_prompt_that_the_tokenizer_makes_nothing_of(script, base_folder, tmp_path):
    """Without bos, byte fallback or unk, what is not in the vocabulary has no tokens."""
    folder = shutil.copytree(base_folder, tmp_path / "model")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["post_processor"] = None
    for byte in range(128, 256):  # UTF-8's
        character = next(c for c, b in tokenizer_bytes().items() if b == byte)
        state["model"]["vocab"].pop(character, None)
    state["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert_refused(script("--checkpoint_path", folder, "--prompt", "字🙂"), "prompt")
    assert_refused(script("--checkpoint_path", folder, "--prompt_file", "-", stdin="abc\n字\n".encode()), "prompt")
    result = script("--checkpoint_path", folder, "--interactive", "--max_new_tokens", 3, stdin="字\nabc\n".encode())
    assert result.code == 0 and "Traceback" not in result.err


def tokenizer_bytes():
    """GPT-2's characters of bytes, from transformers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def test_a_cache_larger_than_the_memory(script, base_folder, tmp_path):
    """2^30 positions of a model that claims to have them: 550 GB, said before anything is allocated."""
    folder = shutil.copytree(base_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2**30}
    (folder / "config.json").write_text(json.dumps(config))
    result = script("--checkpoint_path", folder, "--prompt", "a", "--max_seq_length", 2**30)
    assert_refused(result, "KV cache", "549.8 GB", "are free")


def test_weights_larger_than_the_memory(script, base_folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 400_000)
    assert_refused(script("--checkpoint_path", base_folder, "--prompt", "a"), "the weights", "0.4 MB are free")


@pytest.mark.parametrize("name", ["missing/trace.json", ".", "/dev/null"])
def test_a_trace_that_cannot_be_written(script, base_folder, tmp_path, name, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the weights are loaded"))
    assert_refused(script("--checkpoint_path", base_folder, "--prompt", "a", "--profile", tmp_path / name), "--profile")


def test_bad_recommended_settings(script, base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "model")
    for fields in ({"top_p": 2}, {"temperature": "hot"}, {"top_k": -1}, {"eos_token_id": "x"}):
        (folder / "generation_config.json").write_text(json.dumps({"do_sample": True} | fields))
        assert_refused(script("--checkpoint_path", folder, "--prompt", "a"), next(iter(fields)))
