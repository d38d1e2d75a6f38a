"""Tensor parallelism: ranks against transformers, against one process, and which slices they have.

What several ranks do is done in a few launches of torchrun, see ranks_worker.py; the tests look at the results.
"""

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import ranks_worker
import torch
import transformers
from conftest import TEXT, assert_refused, converse, greedy, make_tokenizer
from ranks_worker import ROOT, free_port, run_tasks, torchrun
from test_gptq_awq import Maker, make

import checkpoint
import quantize
import tp
from checkpoint import load_config, load_model
from convert_hf_checkpoint import convert
from errors import UserError
from layout import FORMAT, VERSION
from model import ModelConfig, expected_shapes
from tokenizer import load_tokenizer
from writer import write_safetensors

GENERATE = ROOT / "generate.py"
IDS = torch.randint(5, 380, (2, 40), generator=torch.Generator().manual_seed(3)).tolist()
TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=400,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=1,
)
FAMILIES = {  # 4 ranks: a key-value head is on two or four of them. No ranks divide the first one's other widths.
    "llama": ("Llama", dict(attention_bias=True, mlp_bias=True, vocab_size=401, intermediate_size=127)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=32, num_key_value_heads=1)),
}
SIZES = [
    1,
    2,
    63,
    255,
    257,
    1000,
    65535,
    65536,
    65537,
    131072,
    131073,
    300_001,
]  # a slot has 65536 floats, 131072 halfs


def make_model(folder, family, changes):
    """A converted checkpoint of random weights, and transformers' model."""
    (folder / "hf").mkdir(parents=True)
    make_tokenizer(folder / "hf")
    config = getattr(transformers, f"{family}Config")(**TINY | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.dim() == 1 else 0.2, generator=generator)
    model.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "ours")
    return folder / "ours", model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (path, transformers' model)."""
    return {name: make_model(tmp_path_factory.mktemp(name), *made) for name, made in FAMILIES.items()}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """name -> path. A rank of two has whole groups of 32 and of 128 (the activations of int8) of the inputs.

    Two ranks do not divide the groups of feed-forward inputs of "uneven" (5) and "ordered" (3), and the first one's
    vocabulary; the 3 groups of heads end inside of heads.
    """
    folder = tmp_path_factory.mktemp("quantized")
    path, _ = make_model(folder, "Llama", dict(head_dim=64, intermediate_size=256, attention_bias=True, mlp_bias=True))
    forms = {"int8": ("int8", None), "int8-g32": ("int8", 32), "int4": ("int4", 32)}
    paths = {name: quantize.quantize(path, *form) for name, form in forms.items()}
    widths = dict(head_dim=24, intermediate_size=160, vocab_size=401)
    uneven, _ = make_model(folder / "uneven", "Llama", widths | dict(attention_bias=True, mlp_bias=True))
    paths["uneven"] = quantize.quantize(uneven, "int4", 32)
    ordered = folder / "ordered"
    ordered.mkdir()
    make(ordered, Maker("v1", 32, act_order=True), intermediate_size=96)
    convert(ordered, folder / "ordered-ours")
    return paths | {"ordered": folder / "ordered-ours" / "model.safetensors"}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 200 MB, of tensors that are small beside that, as those of real models are."""
    folder = tmp_path_factory.mktemp("large")
    fields = TINY | dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=4)
    config = transformers.LlamaConfig(**fields | dict(num_hidden_layers=24, vocab_size=4096, dtype="bfloat16"))
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    text = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(text))
    tensors = {name: (torch.bfloat16, shape) for name, shape in expected_shapes(load_config(folder)).items()}
    chunks = {name: [torch.ones(shape, dtype=torch.bfloat16)] for name, (_, shape) in tensors.items()}
    metadata = {"format": FORMAT, "version": VERSION}
    write_safetensors(folder / "model.safetensors", tensors, chunks.__getitem__, metadata)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Every way to decode, as command lines

LINES = [
    {"id": "a", "prompt": "def f(x):"},
    {"id": "b", "prompt": "A decoder reads every weight " * 9, "max_new_tokens": 30, "temperature": 1.0, "seed": 4},
    {"id": "c", "prompt": "x", "max_new_tokens": 3},
    {"id": "d", "prompt": "日本語 and 🙂", "top_k": 7, "seed": 1, "presence_penalty": 1.0},
    {"id": "e", "prompt": "for number, line in", "max_new_tokens": 25, "stop": ["e", "n"]},
    {"id": "f", "prompt": "x", "temperature": 1.0, "seed": 3, "regex": "[a-z]{2,5}=[0-9a-f]{3,9}"},
]
SAMPLED = "--temperature 0.8 --top_k 50 --top_p 0.95 --min_p 0.01 --repetition_penalty 1.2 --presence_penalty 0.5"
SAMPLED += " --frequency_penalty -0.3 --logit_bias 9=2 20=-1 --bad_words the line --min_new_tokens 9 --seed 3"
WAYS = {
    "greedy": "--prompt {text} --max_new_tokens 60",
    "sampled": f"--prompt {{text}} --max_new_tokens 60 {SAMPLED}",
    "a long prompt": "--prompt 700 --max_new_tokens 12 --temperature 1 --seed 1",
    "compiled prefill's shapes": "--prompt 40 --max_new_tokens 12 --max_seq_length 64",
    "samples": "--prompt {text} --max_new_tokens 20 --num_samples 5 --batch_size 2 --temperature 1 --seed 8",
    "a file": "--prompt_file {file} --batch_size 3 --max_new_tokens 18 --seed 2",
    "beams": "--prompt {text} --num_beams 4 --num_return_sequences 3 --max_new_tokens 20 --repetition_penalty 1.1",
    "a draft": "--prompt {text} --max_new_tokens 40 --draft_checkpoint_path {itself} --speculate_k 3",
    "a draft, sampled": f"--prompt {{text}} --max_new_tokens 40 --draft_checkpoint_path {{draft}} {SAMPLED}",
    "a whole draft": "--prompt_file {file} --batch_size 2 --draft_checkpoint_path {draft} --draft_tp 1 --speculate_k 2 "
    "--seed 2",
    "lookup": "--prompt {text} --max_new_tokens 60 --prompt_lookup --speculate_k 4 --temperature 1 --seed 1 "
    "--logit_bias 20=90 21=90",  # a text of two tokens, so it repeats
    "an int8 cache": "--prompt {text} --max_new_tokens 40 --cache_dtype int8 --prompt_lookup --speculate_k 3",
    "lookup as it pays": "--prompt {text} --max_new_tokens 60 --prompt_lookup",
    "a draft as it pays": "--prompt {text} --max_new_tokens 60 --draft_checkpoint_path {itself}",
    "lookup and a draft": "--prompt {text} --max_new_tokens 40 --prompt_lookup --draft_checkpoint_path {draft}",
    "logprobs": "--prompt {text} --max_new_tokens 12 --logprobs 3 --echo",
    "stop strings": "--prompt {text} --max_new_tokens 60 --temperature 1 --seed 5 --stop x yz q",
}


@pytest.fixture(scope="module")
def ways(models, base_folder, tmp_path_factory):
    """name -> arguments of generate.py. The draft has another shape than the model, and agrees in nothing with it."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    names = {"text": TEXT[:60], "file": str(file), "draft": str(models["qwen3"][0]), "itself": str(models["llama"][0])}
    base = ["--checkpoint_path", str(models["llama"][0]), "--dtype", "float32", "--json"]
    return {name: base + [word.format(**names) for word in words.split()] for name, words in WAYS.items()}


def untimed(text):
    """JSON objects without what a clock told."""
    objects = [json.loads(line) for line in text.splitlines()]
    for sample in objects:
        del sample["stats"]
    return objects


def check_ways(ways, printed, script):
    for (name, args), texts in zip(ways.items(), printed, strict=True):
        found, *others = map(untimed, texts)
        assert all(other == found for other in others), name
        expected = untimed(script(*args).out)
        numbers = [[take_floats(sample) for sample in samples] for samples in (found, expected)]
        assert found == expected, name
        assert numbers[0] == [pytest.approx(row, abs=1e-4) for row in numbers[1]], name


def take_floats(sample):
    """Scores and log-probabilities, which may differ by a rounding; of the latter the tokens are left."""
    floats = [sample.pop("score", 0)]
    for chance in sample.get("logprobs", []) + sample.get("prompt_logprobs", []):
        floats += [entry.pop("logprob") or 0 for entry in (chance, *chance["top"])]
    return floats


# ---------------------------------------------------------------------------------------------------------------------
# The launches


def logits_tasks(models, out, dtype="float32"):
    return [("logits", [str(path), IDS, dtype, str(out / f"{name}.pt")]) for name, (path, _) in models.items()]


class Results:
    """What the tasks of the ranks returned, to be asked for in the order of the tasks."""

    def __init__(self, out, ranks, tasks, **others):
        self.out, self.ranks, self.found = out, ranks, {}
        returned = run_tasks(ranks, out, [task for alike in tasks.values() for task in alike], **others)
        by_task = zip(*returned, strict=True)
        for name, alike in tasks.items():
            self.found[name] = [next(by_task) for _ in alike]

    def __getitem__(self, name):
        """[task][rank]."""
        return self.found[name]


ARITHMETIC = [("sums", ["float32", SIZES]), ("sums", ["bfloat16", SIZES]), ("sums", ["float16", SIZES])]


@pytest.fixture(scope="module")
def two(models, quantized, ways, large, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    tasks = {
        "odd": [("odd_sums", [])],
        "memory": [("memory", [str(large)])],
        "backend": [("backend", [])],
        "told": [("told", [])],
        "sums": ARITHMETIC,
        "many": [("many_sums", [400])],
        "logits": logits_tasks(models, out),
        "layers": [("layers", [str(path)]) for path in quantized.values()],
        "quantized": [
            ("logits", [str(path), [[i % 300 for i in row] for row in IDS], "float32", str(out / f"{name}.pt")])
            for name, path in quantized.items()
        ],
        "cli": [("cli", [args]) for args in ways.values()],
        "compiled": [("cli", [[*ways["sampled"], "--compile"]])],
    }
    return Results(out, 2, tasks)


@pytest.fixture(scope="module")
def four(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("four")
    lines = [("cli", [greedy_line(path)]) for path, _ in models.values()]
    return Results(out, 4, {"logits": logits_tasks(models, out), "cli": lines})


def greedy_line(path):
    words = "--dtype float32 --json --prompt def --ignore_eos --max_new_tokens 60"
    return ["--checkpoint_path", str(path), *words.split()]


# ---------------------------------------------------------------------------------------------------------------------
# Logits and tokens


def assert_logits(results, models):
    """All ranks have the same bits, and they are transformers' logits; `max_logit` is the largest of them."""
    for (name, (_, reference)), ranks in zip(models.items(), results["logits"], strict=True):
        assert all(rank == ranks[0] for rank in ranks), name
        assert ranks[0][1:] == [True, True], name
        found = torch.load(results.out / f"{name}.pt")
        with torch.inference_mode():
            expected = reference(torch.tensor(IDS)).logits
        assert expected.std() > 0.5
        assert (found - expected).abs().max() < 1e-4, name


def test_logits_of_two_ranks(two, models):
    assert_logits(two, models)


def test_logits_of_four_ranks(four, models):
    assert_logits(four, models)


def test_greedy_tokens_of_four_ranks(four, models):
    for (name, (path, reference)), ranks in zip(models.items(), four["cli"], strict=True):
        (sample,) = untimed(ranks[0])
        prompt = load_tokenizer(path).encode("def")
        expected = greedy(reference, prompt, 60, eos_token_id=None)
        assert sample["tokens"] == expected, name


def test_every_way_to_decode(two, ways, script):
    """Two ranks write what one process writes."""
    check_ways(ways, two["cli"], script)


def test_proposals_were_accepted(two, ways):
    """Otherwise the test above would say little of speculation."""
    rates = {}
    for name, ranks in zip(ways, two["cli"], strict=True):
        rates[name] = json.loads(ranks[0].splitlines()[0])["stats"].get("acceptance_rate")
    assert rates["a draft"] > 0.95 and 0.1 < rates["lookup"] < 0.9
    assert rates["greedy"] is None and rates["a draft, sampled"] is not None


# ---------------------------------------------------------------------------------------------------------------------
# Quantized


def test_quantized_layers_in_slices(two, quantized):
    """A layer's slices compute what the whole one does but for the order of a sum: groups of inputs stay whole."""
    for name, ranks in zip(quantized, two["layers"], strict=True):
        for found in ranks:
            assert len(found) >= 8, name
            assert max(found.values()) < 1e-5, (name, found)


def test_quantized_models(two, quantized):
    """As one process, but for a last bit here and there that makes an activation round to the next of 255 steps."""
    ids = torch.tensor(IDS) % 300
    positions = torch.arange(ids.shape[1]).expand(2, -1)
    for (name, path), ranks in zip(quantized.items(), two["quantized"], strict=True):
        assert ranks[0] == ranks[1], name
        model = load_model(path, dtype=torch.float32)
        model.setup_caches(2, ids.shape[1])
        with torch.inference_mode():
            expected = model(ids, positions)
        error = torch.load(two.out / f"{name}.pt") - expected
        assert error.square().mean().sqrt() < 0.005 * expected.std(), name
        assert (error.abs() < 1e-4 * expected.std()).all(-1).any(), name  # where none did


# ---------------------------------------------------------------------------------------------------------------------
# Ranks that are threads of this process


class AllReduceOfThreads(torch.nn.Module):
    """What tp.AllReduce is between processes."""

    def __init__(self, rank, shared, barrier):
        super().__init__()
        self.rank, self.shared, self.barrier = rank, shared, barrier

    def forward(self, x):
        self.shared[self.rank] = x
        self.barrier.wait(30)
        result = sum(each.double() for each in self.shared).to(x.dtype)
        self.barrier.wait(30)
        return result


def threads(ranks, work):
    """What `work(group)` returns for each rank."""
    shared, barrier = [None] * ranks, threading.Barrier(ranks)
    groups = [tp.Group(rank, ranks, all_reduce=AllReduceOfThreads(rank, shared, barrier)) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, groups))


def logits_of(path, ids, dtype, group):
    model = load_model(path, dtype=dtype, group=group)
    model.setup_caches(*ids.shape)
    with torch.inference_mode():
        hidden = model.hidden(ids, torch.arange(ids.shape[1]).expand(*ids.shape))
        logits, (largest, token) = model.logits(hidden), model.max_logit(hidden)
    assert torch.equal(token, logits.argmax(-1)) and torch.equal(largest, logits.amax(-1).to(largest.dtype))
    return logits.float()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """name -> (path, ranks, error allowed as a share of the logits' standard deviation)."""
    folder = tmp_path_factory.mktemp("uneven")
    tied = dict(num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True, intermediate_size=200)
    # Groups of 32: 5 of heads, which end inside of heads, and 7 of feed-forward inputs.
    widths = dict(head_dim=40, intermediate_size=224)
    biased, _ = make_model(
        folder / "biased", "Llama", widths | dict(vocab_size=401, attention_bias=True, mlp_bias=True)
    )
    (folder / "ordered").mkdir()
    make(folder / "ordered", Maker("v1", 32, act_order=True), **widths)
    convert(folder / "ordered", folder / "ordered-ours")
    return {
        "tied": (make_model(folder / "tied", "Qwen2", tied | dict(head_dim=16, vocab_size=401))[0], 3, 1e-5),
        "biased": (biased, 4, 1e-5),
        "bf16": (biased, 4, 0.02),
        # Activations are rounded to int8: another last bit may round one differently, another group of 128 rounds all.
        "int8": (quantize.quantize(biased, "int8", 32), 4, 0.05),
        "int4": (quantize.quantize(biased, "int4", 32), 4, 0.005),
        "ordered": (folder / "ordered-ours" / "model.safetensors", 4, 0.005),
    }


@pytest.mark.parametrize("name", ["tied", "biased", "bf16", "int8", "int4", "ordered"])
def test_ranks_in_one_process(uneven, name):
    """The whole model's logits, of ranks that divide neither the vocabulary nor the feed-forward or its groups."""
    path, ranks, allowed = uneven[name]
    ids = torch.tensor(IDS) % 300
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    expected = logits_of(path, ids, dtype, tp.ALONE)
    for logits in threads(ranks, partial(logits_of, path, ids, dtype)):
        assert logits.shape == expected.shape
        assert (logits - expected).square().mean().sqrt() < allowed * expected.std()


def test_memory_that_ranks_need(uneven, monkeypatch):
    """It is counted from the shapes, before anything is loaded, for all ranks of a machine."""
    needed = []
    monkeypatch.setattr(checkpoint, "check_memory", lambda count, *_: needed.append(count))
    model = load_model(uneven["biased"][0], group=tp.Group(3, 4, sharing=4))
    assert needed == [4 * sum(parameter.nbytes for parameter in model.parameters())]


# ---------------------------------------------------------------------------------------------------------------------
# Sums


def assert_sums(results):
    for ranks in results["sums"]:
        hashes, errors = zip(*ranks, strict=True)
        assert all(of_rank == hashes[0] for of_rank in hashes)
        assert max(errors) <= 1
    assert results["many"] == [(400,) * results.ranks]
    (odd,) = results["odd"]
    for numbers, view, empty, half, refused in odd:
        assert numbers[0] == f"{results.ranks}.0" and numbers[1:4] == ["inf", "nan", "-inf"]
        assert view and empty == [0, 4] and half == "inf"
        assert len(refused) == 3 and all("all_reduce: expected" in line for line in refused)


def test_sums_of_two_ranks(two):
    """Within what float32 arithmetic and one rounding allow, the same bits on both."""
    assert_sums(two)


# ---------------------------------------------------------------------------------------------------------------------
# What a rank holds


def test_memory_of_a_rank(two):
    """A rank never holds more than its slices, and what it reads at a time."""
    for (own_peak, whole_peak), (own_bytes, whole_bytes) in two["memory"][0]:
        assert whole_bytes > 195e6 and own_bytes < 0.501 * whole_bytes
        assert whole_peak > 0.98 * whole_bytes  # it has been measured
        assert own_peak < 0.53 * whole_peak


# ---------------------------------------------------------------------------------------------------------------------
# What can't be


SMALL = ModelConfig(64, 1, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=400, context_length=64)


@pytest.mark.parametrize(
    ("ranks", "changes", "words"),
    [
        (3, dict(n_heads=4), ("3 ranks", " 4 ", "attention heads")),
        (4, dict(n_heads=24, n_kv_heads=6), ("4 ranks", " 6 ", "key-value heads")),
    ],
)
def test_heads_that_cannot_be_shared(ranks, changes, words):
    with pytest.raises(UserError) as caught:
        tp.Group(0, ranks).check(replace(SMALL, **changes), {})
    assert all(word in str(caught.value) for word in words)


def test_fewer_groups_than_ranks():
    group = tp.Group(0, 2)
    wo, w2 = "layers.0.attention.wo", "layers.0.feed_forward.w2"
    group.check(replace(SMALL, ffn_dim=126, vocab_size=401), {})
    group.check(SMALL, {wo: 32, w2: 32, "output": 64, "layers.0.attention.wqkv": 64})
    with pytest.raises(UserError, match=f"2 ranks .*96 inputs of {w2} in groups of 64"):
        group.check(SMALL, {w2: 64})
    with pytest.raises(UserError, match=f"2 ranks .*64 inputs of {wo} in groups of 64"):
        group.check(SMALL, {wo: 64})


@pytest.mark.parametrize(
    ("backend", "nodes", "words"),
    [("nccl", 1, ["nccl", "cpu", "gloo"]), ("shm", 2, ["shm", "one machine", "gloo"]), ("mpi", 1, ["mpi", "gloo"])],
)
def test_backends_that_cannot_be(script, base_folder, monkeypatch, backend, nodes, words):
    ranks = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2 // nodes, TORCHELASTIC_RUN_ID="x")
    ranks |= dict(MASTER_ADDR="localhost", MASTER_PORT=1)
    monkeypatch.setattr(os, "_exit", sys.exit)  # what a rank ends by
    for name, value in ranks.items():
        monkeypatch.setenv(name, str(value))
    result = script("--checkpoint_path", base_folder, "--prompt", "x", "--device", "cpu", "--backend", backend)
    assert_refused(result, "error: rank 0 of 2: ", *words)


# ---------------------------------------------------------------------------------------------------------------------
# Between ranks


def test_rank_0_tells(two):
    rank_0, rank_1 = two["told"][0]
    failed = "UserError: no such thing; try another"
    assert rank_0 == [0, failed, 0, None, False]
    assert rank_1[:3] == [0, failed, 0]
    assert re.fullmatch("UserError: --top_k is 11 here and 10 on rank 0; .*", rank_1[3])
    assert rank_1[4] is False


def test_shared_memory_is_what_cpus_use(two):
    ranks = two["backend"][0]
    assert [rank[:3] for rank in ranks] == [[0, 2, "shm"], [1, 2, "shm"]]
    cores = [set(rank[3]) for rank in ranks]
    if len(os.sched_getaffinity(0)) > 1:
        assert not cores[0] & cores[1]


@pytest.mark.parametrize(
    ("variable", "threads", "chosen"),
    [
        (None, None, True),
        ("1", None, True),  # as torchrun sets it
        ("3", None, False),
        ("1", 2, False),
        ("3", 1, False),
    ],
)
def test_threads_of_a_rank(monkeypatch, variable, threads, chosen):
    """One a physical core, unless the user has said how many."""
    set_to = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: set_to.append(cores), raising=False)
    monkeypatch.setattr(tp, "core_location", lambda core: (0, core // 2, core))  # two threads a core
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    tp.take_cores(1, 2, threads)
    assert set_to == [[2, 3], *([1] if chosen else [])]


def test_join_alone(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    with tp.join("cpu", threads=3) as group:
        assert (group.size, group.device) == (1, torch.device("cpu"))
    with tp.join("cpu"):
        pass
    assert set_to == [3]
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"--device cuda is not available here; use one of .*cpu"), tp.join("cuda"):
            pass


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_a_prompt_file_from_stdin(models, script):
    """Only rank 0 reads stdin and writes stdout, each text once."""
    path = models["llama"][0]
    args = ("--checkpoint_path", path, "--json", "--batch_size", 2, "--seed", 7, "--prompt_file", "-")
    stdin = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    with torchrun(2, GENERATE, *args, stdin=subprocess.PIPE) as launch:
        code, out, err = launch.finish(stdin)
    assert code == 0, err
    assert untimed(out) == untimed(script(*args, stdin=stdin).out)
    loaded = [line for line in err.splitlines() if line.startswith("loaded ")]
    assert len(loaded) == 1 and "2 x cpu by shm" in loaded[0]
    assert "error" not in err and "Traceback" not in err


def test_a_chat(chat_folder, script):
    args = ("--temperature", 1, "--seed", 3, "--max_new_tokens", 9)
    lines = ("hello", "/set temperature 0", "and 🙂?", "/set top_k x", "/clear", "so", "/exit", "no more")
    with torchrun(
        2, GENERATE, "--checkpoint_path", chat_folder, "--interactive", *args, stdin=subprocess.PIPE
    ) as launch:
        code, out, err = launch.finish("".join(line + "\n" for line in lines).encode())
    assert code == 0, err
    assert out == converse(script, chat_folder, *lines, args=args).out
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        'error: top_k "x" is not a whole number; correct it'
    ]


def test_compiled(two, ways, script):
    check_ways({"sampled": ways["sampled"]}, two["compiled"], script)


@pytest.mark.slow
def test_two_machines(ways, script, tmp_path):
    """Two torchruns that meet at an address, so no memory is shared: gloo."""
    names = ("greedy", "samples")
    outs, port = [tmp_path / "a", tmp_path / "b"], free_port()
    tasks = [("backend", []), ("sums", ["float32", SIZES[:8]]), ("told", [])] + [
        ("cli", [ways[name]]) for name in names
    ]
    for out in outs:
        out.mkdir()
    specs = [{"out": str(out), "tasks": tasks, "threads": 2} for out in outs]
    with (
        torchrun(1, ranks_worker.__file__, specs[0], nodes=(2, port)) as one,
        torchrun(1, ranks_worker.__file__, specs[1], nodes=(2, port)) as other,
    ):
        for launch in (one, other):
            code, _, err = launch.finish()
            assert code == 0, err
    (file_0,), (file_1,) = (list(out.glob("*.json")) for out in sorted(outs, key=lambda out: (out / "1.json").exists()))
    assert (file_0.name, file_1.name) == ("0.json", "1.json")
    ranks = [json.loads(file.read_text()) for file in (file_0, file_1)]
    assert [(rank[0][2], rank[0][4]) for rank in ranks] == [("gloo", 2), ("gloo", 2)]
    assert ranks[0][1][0] == ranks[1][1][0] and max(rank[1][1] for rank in ranks) <= 1
    assert ranks[1][2][3].startswith("UserError: --top_k")
    check_ways({name: ways[name] for name in names}, list(zip(*(rank[3:] for rank in ranks), strict=True)), script)


# ---------------------------------------------------------------------------------------------------------------------
# The other scripts


@pytest.mark.slow
def test_perplexity(models, monkeypatch, capsys):
    import eval as evaluation

    args = ["--perplexity", str(ROOT / "demo" / "README.md"), "--checkpoint_path", str(models["llama"][0]), "--json"]
    args += ["--max_seq_length", "256", "--dtype", "float32"]
    with torchrun(2, ROOT / "eval.py", *args) as launch:
        code, out, err = launch.finish()
    assert code == 0, err
    monkeypatch.setattr(sys, "argv", ["eval.py", *args])
    evaluation.main()
    found, expected = json.loads(out), json.loads(capsys.readouterr().out)
    assert found.keys() == expected.keys()
    assert found["tokens"] == expected["tokens"]
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_bench(tmp_path):
    """Not compiled, which test_compiled is about."""
    args = f"--out {tmp_path} --mode bf16 --prompt_length 32 --new_tokens 8 --rounds 1".split()
    with torchrun(2, ROOT / "bench.py", "--shape", "demo", *args, env={"TORCHDYNAMO_DISABLE": "1"}) as launch:
        code, _, err = launch.finish()
    assert code == 0, err
    assert len(list(tmp_path.glob("*.json"))) == 1
