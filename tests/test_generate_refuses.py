"""What the command line refuses: one line that says so, before any work."""

import importlib
import json
import re
import shutil
import sys

import conftest
import pytest
import torch
from conftest import assert_refused

import files
import generate as cli

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
    "--repetition_penalty 0": "repetition_penalty",
    "--repetition_penalty nan": "repetition_penalty",
    "--presence_penalty 3": "presence_penalty",
    "--frequency_penalty nan": "frequency_penalty",
    "--logit_bias 5": "--logit_bias",
    "--logit_bias x=5": "logit_bias",
    "--logit_bias 5=x": "--logit_bias",
    "--logit_bias 5=nan": "logit_bias",
    "--logit_bias -5=1": "logit_bias",
    "--logit_bias 400=1": "no token 400",
    "--bad_words": "--bad_words",
    "--min_new_tokens -1": "min_new_tokens",
    "--min_new_tokens 9 --max_new_tokens 8": "max_new_tokens 8",
    "--stop": "--stop",
    "--logprobs 21 --json": "between 0 and 20",
    "--logprobs -1 --json": "between 0 and 20",
    "--logprobs 2": "--json",
    "--num_beams 0": "num_beams",
    "--num_beams 9999": "num_beams",
    "--num_beams 2 --length_penalty nan": "length_penalty",
    "--num_beams 2 --early_stopping maybe": "early_stopping",
    "--num_beams 2 --num_return_sequences 3": "num_return_sequences",
    "--length_penalty 2": "--num_beams",
    "--early_stopping never": "--num_beams",
    "--num_return_sequences 2": "--num_beams",
    "--speculate_k 4": "--draft_checkpoint_path or --prompt_lookup",
    "--prompt_lookup --speculate_k -1": "speculate_k",
    "--prompt_lookup --speculate_k 2.5": "--speculate_k",
    "--draft_checkpoint_path missing": "missing",
    "--skip_bad_lines": "--prompt_file",
}
NO_BEAMS = "--temperature 1,--top_k 5,--top_p 0.5,--min_p 0.1,--seed 1,--stop x,--num_samples 2,--batch_size 2,--echo"
NO_BEAMS += ",--prompt_lookup,--draft_checkpoint_path x,--logprobs 1 --json"
FLAGS |= {f"--num_beams 2 {flag}": flag.split()[0] for flag in NO_BEAMS.split(",")}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_out_of_range(script, base_folder, flag, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the weights are loaded"))
    assert_refused(script("--checkpoint_path", base_folder, "--prompt", "a", *flag.split()), FLAGS[flag])


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


def test_a_tokenizer_that_is_larger_than_the_model(script, base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "model")
    conftest.make_tokenizer(folder, vocab_size=401)
    assert_refused(script("--checkpoint_path", folder, "--prompt", "a"), "401", "400")


def test_a_cache_larger_than_the_memory(script, base_folder, tmp_path):
    """2^30 positions of a model that claims to have them: 550 GB, said before anything is allocated."""
    folder = shutil.copytree(base_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2**30}
    (folder / "config.json").write_text(json.dumps(config))
    result = script("--checkpoint_path", folder, "--prompt", "a", "--max_seq_length", 2**30)
    assert_refused(result, "KV cache", "549.8 GB", "are free")


@pytest.mark.parametrize("name", ["generate", "eval", "quantize", "convert_hf_checkpoint", "bench"])
def test_help_names_every_default(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    options = re.split(r"(?m)^  (?=-)", capsys.readouterr().out.partition("options:")[2])[1:]
    without = [option.split()[0] for option in options if "default" not in option and "show this help" not in option]
    assert set(without) <= {"--mode", "--perplexity", "--tasks", "--repo", "--checkpoint_dir"}


def test_a_misspelt_argument_is_explained(script, base_folder):
    args = ("--checkpoint_path", base_folder, "--prompt", "a")
    for flags, *words in (
        (("--temperature", "inf"), "temperature inf", "finite"),
        (("--temperature", "nan"), "temperature nan", "finite"),
        (("--logit_bias", "5"), "'5'", "ID=VALUE"),
        (("--threads", "0"), "--threads", "1"),
        (("--batch_size", "x"), "--batch_size", "'x'"),
        (("--revision", "main"), "--revision", "--repo"),
        (("--repo", "a/b"), "--repo", "--checkpoint_path"),
    ):
        assert_refused(script(*args, *flags), *words)


def test_weights_larger_than_the_memory(script, base_folder, monkeypatch):
    monkeypatch.setattr(files, "free_memory", lambda: 400_000)
    assert_refused(script("--checkpoint_path", base_folder, "--prompt", "a"), "the weights", "0.4 MB are free")


@pytest.mark.parametrize("name", ["missing/trace.json", ".", "/dev/null"])
def test_a_trace_that_cannot_be_written(script, base_folder, tmp_path, name, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the weights are loaded"))
    assert_refused(script("--checkpoint_path", base_folder, "--prompt", "a", "--profile", tmp_path / name), "--profile")


def test_bad_recommended_settings(script, base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "model")
    wrong = {"top_p": 2}, {"temperature": "hot"}, {"top_k": -1}, {"eos_token_id": "x"}, {"repetition_penalty": 0}
    for fields in wrong:
        (folder / "generation_config.json").write_text(json.dumps({"do_sample": True} | fields))
        assert_refused(script("--checkpoint_path", folder, "--prompt", "a"), next(iter(fields)))
