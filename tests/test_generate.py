"""The command line, run within this process. What only a process has (signals, streams, terminals): test_process.py."""

import json
import math
import os
import re
import shutil

import pytest
import torch
import transformers
from conftest import assert_refused, greedy, parse

import generate as cli
from checkpoint import load_model


def test_text_to_stdout_the_rest_to_stderr(script, base_folder, reference, tokenizer):
    result = script("--checkpoint_path", base_folder, "--prompt", "def f(x):", "--max_new_tokens", 30)
    assert result.code == 0
    assert result.out == tokenizer.decode(greedy(reference, tokenizer.encode("def f(x):"), 30)) + "\n"
    loaded, speed = result.err.splitlines()
    assert loaded.startswith("loaded ")
    numbers = r"prefill \d+ tokens, [\d.]+ tok/s · decode 30 tokens, [\d.]+ tok/s, [\d.]+ GB/s"
    assert re.fullmatch(numbers + r" · first token after [\d.]+ s · peak memory [\d.]+ GB", speed)


def test_help_names_every_flag(script):
    result = script("--help")
    flags = (
        "checkpoint_path prompt prompt_file interactive max_new_tokens num_samples batch_size temperature top_k top_p"
    )
    flags += " min_p seed compile compile_prefill device dtype max_seq_length profile json repetition_penalty"
    flags += " presence_penalty frequency_penalty logit_bias bad_words min_new_tokens stop ignore_eos logprobs echo"
    flags += " num_beams length_penalty early_stopping num_return_sequences draft_checkpoint_path speculate_k"
    flags += " prompt_lookup skip_bad_lines"
    assert result.code == 0 and result.err == ""
    assert all(f"--{flag} " in result.out for flag in flags.split())


def test_the_weight_file_may_be_named(script, base_folder):
    folder = script("--checkpoint_path", base_folder, "--prompt", "abc", "--max_new_tokens", 5)
    file = script("--checkpoint_path", base_folder / "model.safetensors", "--prompt", "abc", "--max_new_tokens", 5)
    assert file.out == folder.out and file.code == 0


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
    assert [sample["stats"]["new_tokens"] for sample in together] == [12] * 5
    unseeded = [parse(script(*args))[0]["tokens"] for _ in range(3)]
    assert unseeded[0] != unseeded[1] or unseeded[0] != unseeded[2]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_plain_text_of_several_samples(script, base_folder, batch_size):
    args = ("--checkpoint_path", base_folder, "--prompt", "def", "--seed", 3, "--top_k", 50, "--max_new_tokens", 6)
    result = script(*args, "--num_samples", 3, "--batch_size", batch_size)
    samples = parse(script(*args, "--num_samples", 3, "--json"))
    assert result.out == "".join(f"--- {i} of 3\n{sample['text']}\n" for i, sample in enumerate(samples, 1))
    assert "---" not in result.err


def test_a_number_is_a_synthetic_prompt(script, base_folder, prefills, tmp_path):
    """Of random tokens, the same each time; nothing but the length ends the text."""
    folder = shutil.copytree(base_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(400))}))
    args = ("--checkpoint_path", folder, "--json", "--max_new_tokens", 7, "--prompt")
    said = script(*args, 600)
    assert "600 random tokens" in said.err and "--chat" in said.err
    first, second = parse(said)[0], parse(script(*args, 600))[0]
    assert first["prompt_tokens"] == 600 and len(first["tokens"]) == 7 and first["finish_reason"] == "length"
    assert first["tokens"] == second["tokens"]
    row, again = (request.prompt for request in prefills)
    assert len(row) == 600 and len(set(row)) > 200 and max(row) < 400 and again == row
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
# Penalties, bans, what ends a text: against transformers

PROMPT = "def read(x):"
BANNED = ["XW", "ith"]  # the first of several tokens; both are in the text without a ban


@pytest.mark.parametrize(
    "flags, settings",
    [
        ("--repetition_penalty 1.7", {"repetition_penalty": 1.7}),
        ("--repetition_penalty 0.8 --min_new_tokens 30", {"repetition_penalty": 0.8, "min_new_tokens": 30}),
        ("--bad_words XW ith", {"bad_words_ids": True}),
        ("--bad_words XW ith --repetition_penalty 1.3", {"bad_words_ids": True, "repetition_penalty": 1.3}),
        ("--logit_bias 70=3 71=-2.5 1=2", {"sequence_bias": {(70,): 3.0, (71,): -2.5, (1,): 2.0}}),
        ("--ignore_eos --logit_bias 1=9", {"eos_token_id": None, "sequence_bias": {(1,): 9.0}}),
    ],
)
def test_penalties_as_in_transformers(script, base_folder, reference, tokenizer, flags, settings):
    if "bad_words_ids" in settings:
        words = [" " * spaces + word for word in BANNED for spaces in (0, 1)]
        ids = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        settings = settings | {"bad_words_ids": [list(word) for word in {tuple(word) for word in ids}]}
    args = ("--checkpoint_path", base_folder, "--prompt", PROMPT, "--json", "--max_new_tokens", 40)
    (sample,) = parse(script(*args, *flags.split()))
    prompt = tokenizer.encode(PROMPT)
    assert sample["tokens"] == greedy(reference, prompt, 40, **settings) != greedy(reference, prompt, 40)


def test_presence_and_frequency(script, base_folder, reference, tokenizer):
    """OpenAI's definition: logit - frequency * count - presence * (count > 0), of the tokens written so far."""
    prompt, ids = tokenizer.encode(PROMPT), []
    counts = torch.zeros(400)
    while len(ids) < 40:
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + ids])).logits[0, -1]
        ids.append(int((logits - 1.9 * counts - 1.1 * (counts > 0)).argmax()))
        counts[ids[-1]] += 1
    args = ("--checkpoint_path", base_folder, "--prompt", PROMPT, "--json", "--max_new_tokens", 40, "--ignore_eos")
    (sample,) = parse(script(*args, "--presence_penalty", 1.1, "--frequency_penalty", 1.9))
    assert sample["tokens"] == ids


def test_recommended_repetition_penalty_counts_when_greedy_too(script, base_folder, reference, tokenizer, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.7, "eos_token_id": 1}))
    args = ("--checkpoint_path", folder, "--prompt", PROMPT, "--json", "--max_new_tokens", 20)
    prompt = tokenizer.encode(PROMPT)
    assert parse(script(*args))[0]["tokens"] == greedy(reference, prompt, 20, repetition_penalty=1.7)
    assert parse(script(*args, "--repetition_penalty", 1))[0]["tokens"] == greedy(reference, prompt, 20)


def test_end_tokens_of_generation_config_and_tokenizer(script, base_folder, tmp_path):
    """Both end a text: many a chat model's config names only the one that ends a document."""
    args = ("--prompt", PROMPT, "--json", "--max_new_tokens", 40, "--ignore_eos", "--seed", 1, "--temperature", 1)
    free = parse(script("--checkpoint_path", base_folder, *args))[0]["tokens"]
    folder = shutil.copytree(base_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": free[9]}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.eos_token = theirs.convert_ids_to_tokens(free[5])
    theirs.save_pretrained(folder)
    args = tuple(arg for arg in args if arg != "--ignore_eos")
    (sample,) = parse(script("--checkpoint_path", folder, *args))
    first = min(free.index(free[5]), free.index(free[9]))
    assert sample["tokens"] == free[: first + 1] and sample["finish_reason"] == "stop"


def test_threads(script, base_folder):
    before = torch.get_num_threads()
    try:
        assert (
            script("--checkpoint_path", base_folder, "--prompt", "a", "--threads", 1, "--max_new_tokens", 1).code == 0
        )
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("extra", [(), ("--batch_size", 2, "--num_samples", 2), ("--prompt_lookup",)])
def test_stop_strings(script, base_folder, tokenizer, extra):
    """The text ends before whichever is complete first; a backslash and an n are no line break."""
    args = ("--checkpoint_path", base_folder, "--prompt", PROMPT, "--json", "--max_new_tokens", 40, *extra)
    free = parse(script(*args))[0]
    stop = free["text"][12:15]
    at = free["text"].index(stop)
    for sample in parse(script(*args, "--stop", "\\n", "nowhere", stop)):
        assert sample["text"] == free["text"][:at] and sample["finish_reason"] == "stop"
        count = len(sample["tokens"])
        assert sample["tokens"] == free["tokens"][:count]
        assert stop in tokenizer.decode(free["tokens"][:count]) and stop not in tokenizer.decode(
            free["tokens"][: count - 1]
        )
    text = script(*args[:4], "--max_new_tokens", 40, "--stop", stop)
    assert text.out == free["text"][:at] + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# What else is told: log-probabilities, the prompt


def test_logprobs(script, base_folder, reference, tokenizer):
    """Of the model's own distribution, whatever the temperature is."""
    args = ("--checkpoint_path", base_folder, "--prompt", PROMPT, "--json", "--max_new_tokens", 12, "--temperature", 2)
    (sample,) = parse(script(*args, "--logprobs", 3, "--echo", "--seed", 1))
    prompt = tokenizer.encode(PROMPT)
    with torch.no_grad():
        expected = reference(torch.tensor([prompt + sample["tokens"]])).logits[0].log_softmax(-1)
    first, *told = [*sample["prompt_logprobs"], *sample["logprobs"]]
    assert first == {"token": prompt[0], "text": "<s>", "logprob": None, "top": []}
    assert [entry["token"] for entry in told] == prompt[1:] + sample["tokens"]
    for i, entry in enumerate(told):
        assert entry["logprob"] == pytest.approx(float(expected[i, entry["token"]]), abs=1e-4)
        values, ids = expected[i].topk(3)
        assert [likely["token"] for likely in entry["top"]] == ids.tolist()
        assert [likely["logprob"] for likely in entry["top"]] == pytest.approx(values.tolist(), abs=1e-4)
        for named in (entry, *entry["top"]):
            assert named["text"] == tokenizer.decode([named["token"]], skip_special_tokens=False)
    assert sample["text"] == tokenizer.decode(sample["tokens"])  # of the prompt nothing
    (plain,) = parse(script(*args, "--seed", 1))
    assert plain["tokens"] == sample["tokens"] and "logprobs" not in plain
    (none,) = parse(script(*args, "--seed", 1, "--logprobs", 0))
    assert [entry["top"] for entry in none["logprobs"]] == [[]] * 12
    (echo,) = parse(script(*args, "--seed", 1, "--echo"))
    assert [entry["logprob"] for entry in echo["prompt_logprobs"]] == pytest.approx(
        [entry["logprob"] for entry in sample["prompt_logprobs"]], abs=1e-4
    )
    assert "logprobs" not in echo


@pytest.mark.parametrize("batch_size", [1, 3])
def test_echo(script, base_folder, batch_size):
    args = ("--checkpoint_path", base_folder, "--prompt", PROMPT, "--max_new_tokens", 6, "--num_samples", 2)
    text = script(*args).out.splitlines()[1]
    result = script(*args, "--echo", "--batch_size", batch_size)
    assert result.out == "".join(f"--- {i} of 2\n{PROMPT}{text}\n" for i in (1, 2))


def test_echo_keeps_the_space_that_sentencepiece_would_drop(script):
    """The demo's tokenizer is sentencepiece's: a text's first word has no space, but this one goes on."""
    result = script("--prompt", "import os\n\ndef", "--max_new_tokens", 8, "--echo", "--temperature", 0)
    assert re.match(r"import os\n\ndef \w", result.out), result


# ---------------------------------------------------------------------------------------------------------------------
# Beams, speculation


@pytest.mark.parametrize("count, flags", [(3, ()), (4, ("--length_penalty", 2, "--early_stopping", "true"))])
def test_beams_as_in_transformers(script, base_folder, reference, tokenizer, count, flags):
    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        num_beams=count,
        num_return_sequences=2,
        length_penalty=2.0 if flags else 1.0,
        early_stopping=bool(flags),
        repetition_penalty=1.2,
        eos_token_id=1,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    args = ("--checkpoint_path", base_folder, "--prompt", PROMPT, "--max_new_tokens", 20, "--repetition_penalty", 1.2)
    args += ("--num_beams", count, "--num_return_sequences", 2, *flags)
    samples = parse(script(*args, "--json"))
    for sample, ids, score in zip(samples, expected.sequences, expected.sequences_scores, strict=True):
        assert sample["tokens"] == ids[prompt.shape[1] :][: len(sample["tokens"])].tolist()
        assert sample["score"] == pytest.approx(float(score), abs=1e-4)
        assert sample["text"] == tokenizer.decode(sample["tokens"]) and sample["finish_reason"] in ("length", "stop")
    result = script(*args)
    assert result.out == "".join(f"--- {i} of 2\n{sample['text']}\n" for i, sample in enumerate(samples, 1))


@pytest.mark.parametrize("k", ["auto", 0, 1, 3])
@pytest.mark.parametrize("sampled", [(), ("--temperature", 0.8, "--seed", 5, "--repetition_penalty", 1.2)])
def test_speculation_changes_nothing(script, base_folder, k, sampled):
    args = ("--checkpoint_path", base_folder, "--prompt", PROMPT, "--json", "--max_new_tokens", 30, *sampled)
    (plain,) = parse(script(*args))
    assert "acceptance_rate" not in plain["stats"]
    for how in (("--draft_checkpoint_path", base_folder), ("--prompt_lookup",)):
        (sample,) = parse(script(*args, *how, "--speculate_k", k))
        assert sample["tokens"] == plain["tokens"] and sample["text"] == plain["text"]
    if k in (1, 3):
        result = script(*args, "--draft_checkpoint_path", base_folder, "--speculate_k", k)
        stats = parse(result)[0]["stats"]
        assert 0.9 < stats["acceptance_rate"] <= 1 and stats["mean_accepted_length"] > 0.8 * k  # it is the model itself
        assert re.search(r"accepted \d+%, [\d.]+ a step$", result.err.splitlines()[-1])


def test_a_draft_with_another_tokenizer(script, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the weights are loaded"))
    folder = shutil.copytree(base_folder, tmp_path / "draft")
    state = json.loads((folder / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    args = ("--checkpoint_path", base_folder, "--prompt", "a", "--draft_checkpoint_path", folder)
    assert_refused(script(*args), "draft", "tokenizer", "same family")


def test_a_draft_of_a_shorter_context(script, base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config))
    args = ("--checkpoint_path", base_folder, "--draft_checkpoint_path", folder)
    assert_refused(script(*args, "--prompt", "a", "--max_new_tokens", 300), "256")
    assert_refused(script(*args, "--prompt", "a", "--max_seq_length", 300), "256")
    assert script(*args, "--prompt", "a", "--max_new_tokens", 30).code == 0
