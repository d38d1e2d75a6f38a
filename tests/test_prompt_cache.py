"""--prompt_cache: what a run has read, the next one need not read again, and no file of another kind is replaced."""

import os
import shutil

import pytest
import safetensors.torch
import torch
from conftest import GREEDY, assert_refused, converse, ids_of, parse, run_rows
from safetensors import safe_open

from checkpoint import load_model
from engine import Engine, Request
from prompt_cache import load_row, save_row

PROMPT = "def read_lines(path):\n    with open(path) as file:\n"


def ids(length, seed=0):
    return torch.randint(5, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_longer_prompt_is_run_from_where_it_differs(script, base_folder, tmp_path):
    path = tmp_path / "cache"
    args = ("--checkpoint_path", base_folder, "--json", "--max_new_tokens", 12, "--ignore_eos", "--prompt")
    (first,) = parse(script(*args, PROMPT, "--prompt_cache", path))
    assert first["stats"]["cached_tokens"] == 0
    (again,) = parse(script(*args, PROMPT, "--prompt_cache", path))
    assert again["tokens"] == first["tokens"]
    assert again["stats"]["cached_tokens"] == again["prompt_tokens"] - 1  # never all of it
    more = PROMPT + "        for line in file:"
    (plain,) = parse(script(*args, more))
    (longer,) = parse(script(*args, more, "--prompt_cache", path))
    assert longer["tokens"] == plain["tokens"] and longer["stats"]["cached_tokens"] > first["prompt_tokens"] - 5
    (other,) = parse(script(*args, "Naïve words", "--prompt_cache", path))
    assert other["tokens"] == parse(script(*args, "Naïve words"))[0]["tokens"]
    assert os.listdir(tmp_path) == ["cache"]
    with safe_open(path, "pt") as file:  # that of the last text
        assert file.get_tensor("tokens").tolist()[: other["prompt_tokens"]] == other_prompt(file, other)
        assert file.metadata()["format"] == "gpt-brisk prompt cache" and file.metadata()["dtype"] == "float32"


def other_prompt(file, sample):
    held = file.get_tensor("tokens").tolist()
    assert held[sample["prompt_tokens"] :] == sample["tokens"][:-1]
    return held[: sample["prompt_tokens"]]


def test_a_chat_goes_on_in_the_next_run(script, chat_folder, tmp_path):
    path, args = tmp_path / "cache", ("--max_new_tokens", 6, "--system", "read every line of the file, and be brief")
    once = converse(script, chat_folder, "hello", args=args)
    assert converse(script, chat_folder, "hello", args=(*args, "--prompt_cache", path)).out == once.out
    again = converse(script, chat_folder, "hello", args=(*args, "--prompt_cache", path))
    assert again.out == once.out and "of them cached" in again.err and "loaded" in again.err


@pytest.mark.parametrize("first_length, then_length", [(256, 256), (256, 1000), (1000, 160), (300, 128)])
@pytest.mark.parametrize("length", [20, 100])
def test_windows(windowed_folder, tokenizer, tmp_path, length, first_length, then_length):
    """What rings have lost is not taken for there, in a cache of another length as well."""
    first, then, reference = (Engine(load_model(windowed_folder)) for _ in range(3))
    first.setup(2, first_length)
    then.setup(3, then_length)
    reference.setup(1, 1000)
    prompt = ids(length)
    ((*said, _),) = ids_of(run_rows(first, tokenizer, [Request(prompt, GREEDY, 20)]))
    assert first.places.latest == 0
    save_row(first, 0, tmp_path / "cache", ["a"])
    for cut in (length + 19, length + 10, length // 2):
        request = Request((prompt + said)[:cut] + ids(5, 1), GREEDY, 2)
        expected = ids_of(run_rows(reference, tokenizer, [request]))
        then.forget()
        assert load_row(then, 2, tmp_path / "cache", ["a"]) == length + 19
        (row,) = run_rows(then, tokenizer, [request])
        assert ids_of([row]) == expected
        assert row[-1].stats.cached_tokens == (cut if cut > length or length == 20 else 0)


def test_a_file_of_a_longer_text_than_the_cache(windowed_folder, base_folder, tokenizer, tmp_path):
    for name, loaded in ((base_folder, 64), (windowed_folder, 0)):  # a window's first positions are gone
        first, then, reference = (Engine(load_model(name)) for _ in range(3))
        first.setup(1, 512)
        then.setup(1, 64)
        reference.setup(1, 64)
        run_rows(first, tokenizer, [Request(ids(300), GREEDY, 3)])
        save_row(first, 0, tmp_path / "cache", ["a"])
        assert load_row(then, 0, tmp_path / "cache", ["a"]) == loaded
        request = Request(ids(300)[:50], GREEDY, 10)
        assert ids_of(run_rows(then, tokenizer, [request])) == ids_of(run_rows(reference, tokenizer, [request]))


def test_a_draft_has_its_own(base_folder, tokenizer, tmp_path):
    engines = [Engine(load_model(base_folder), draft=load_model(base_folder), speculate_k=4) for _ in range(2)]
    for engine in engines:
        engine.setup(1, 256)
    ((*said, _),) = ids_of(run_rows(engines[0], tokenizer, [Request(ids(60), GREEDY, 31)]))
    save_row(engines[0], 0, tmp_path / "cache", ["a", "b"])
    assert load_row(engines[1], 0, tmp_path / "cache", ["a", "b"]) == 90
    (row,) = run_rows(engines[1], tokenizer, [Request(ids(60) + said + ids(5, 1), GREEDY, 31)])
    stats = row[-1].stats
    assert stats.cached_tokens == 90 and stats.accepted == stats.proposed > 0  # the draft is the model itself


def test_nothing_is_written_where_nothing_was_read(base_folder, tmp_path):
    engine = Engine(load_model(base_folder))
    engine.setup(1, 64)
    save_row(engine, 0, tmp_path / "cache", ["a"])
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def run(script, base_folder, tmp_path):
    """generate.py with a prompt cache in tmp_path."""

    def run(*args, folder=base_folder, path=tmp_path / "cache"):
        return script(
            "--checkpoint_path", folder, "--max_new_tokens", 3, "--prompt", PROMPT, "--prompt_cache", path, *args
        )

    return run


def refuses(run, path, *words, **others):
    """And leaves the file as it is."""
    before = path.read_bytes()
    assert_refused_last(run(**others), "--prompt_cache", str(path), *words)
    assert path.read_bytes() == before


def assert_refused_last(result, *words):
    """As assert_refused, after what was said while the model was loaded."""
    lines = result.err.splitlines(keepends=True)
    result.err = lines[-1]
    assert_refused(result, *words)
    assert not any(line.startswith("error") for line in lines[:-1])


def test_files_of_other_kinds_are_not_replaced(run, base_folder, tmp_path):
    path = tmp_path / "cache"
    for content in (b"", b"notes", b"\0" * 1000, (base_folder / "model.safetensors").read_bytes()):
        path.write_bytes(content)
        refuses(run, path, "no prompt cache", "name another file or delete it")
    path.unlink()
    path.mkdir()
    assert_refused(run(), "cannot be written")
    assert_refused(run(path=tmp_path / "none" / "cache"), "cannot be written")
    assert_refused(run(path="/dev/null"), "/dev/null", "no prompt cache" if os.access("/dev", os.W_OK) else "written")


def test_files_of_other_checkpoints(run, base_folder, chat_folder, tmp_path):
    path = tmp_path / "cache"
    assert run().code == 0
    other = shutil.copytree(base_folder, tmp_path / "other")
    weights = safetensors.torch.load_file(other / "model.safetensors")
    weights["norm.weight"][0] += 1
    with safe_open(base_folder / "model.safetensors", "pt") as file:
        safetensors.torch.save_file(weights, other / "model.safetensors", file.metadata())
    refuses(run, path, "another checkpoint", folder=other)
    before = path.read_bytes()
    assert_refused_last(run("--dtype", "bfloat16"), "another dtype (float32, here bfloat16)")
    assert_refused_last(run("--draft_checkpoint_path", base_folder), "another checkpoint")
    assert path.read_bytes() == before
    assert run().code == 0


def test_damaged_files(run, tmp_path):
    path = tmp_path / "cache"
    assert run().code == 0
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    refuses(run, path, "no prompt cache, or a damaged one")
    path.write_bytes(whole)
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    count = len(tensors["tokens"])
    changes = [
        {"tokens": tensors["tokens"].int()},
        {"tokens": tensors["tokens"][None]},
        {"tokens": tensors["tokens"] + 400},
        {"tokens": tensors["tokens"] - 400},
        {"tokens": tensors["tokens"][:0]},
        {"tokens": tensors["tokens"][:-2]},
        {"model.0.k": tensors["model.0.k"].half()},
        {"model.1.v": tensors["model.1.v"][:, :-1].contiguous()},
        {"model.1.v": tensors["model.1.v"][:1].contiguous()},
        {"model.1.k": torch.zeros(2, 0, 16), "model.1.v": torch.zeros(2, 0, 16)},
        {"model.1.k": torch.zeros(count)},
        {"model.1.v": None},
        {"tokens": None},
    ]
    for change in changes:
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        safetensors.torch.save_file(changed, path, metadata)
        refuses(run, path, "is damaged", "delete it")
    for name, value in (("prompt_length", "x"), ("prompt_length", None)):
        changed = {key: text for key, text in (metadata | {name: value}).items() if text is not None}
        safetensors.torch.save_file(tensors, path, changed)
        refuses(run, path, "is damaged", "delete it")
    safetensors.torch.save_file(tensors, path, metadata | {"version": "2"})
    refuses(run, path, "another version")
    safetensors.torch.save_file(tensors, path, metadata)
    assert run().code == 0


def test_a_run_that_fails_to_write_keeps_the_old_file(run, tmp_path, monkeypatch):
    path = tmp_path / "cache"
    assert run().code == 0
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = run()
    assert result.code == 2 and "No space left on device" in result.err.splitlines()[-1]
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["cache"]


@pytest.mark.parametrize("flags", [["--num_beams", 2]])
def test_what_does_not_go_with_it(run, flags):
    assert_refused(run(*flags), "--num_beams does not go with --prompt_cache")
