"""bench.py: what it reports is what it measured, and the programs it compares with run the same model.

transformers and llama.cpp are the judges: on our tensors, renamed, split and permuted, they compute our logits.
"""

import dataclasses
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
import bench_peers
import checkpoint
from bench_startup import write_checkpoint
from errors import UserError
from model import ModelConfig, Transformer

HERE = Path(bench.__file__).parent
TINY = bench.LLAMA | dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=4200,
    max_position_embeddings=512,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
MODELS = {
    "plain": TINY,
    "tied": TINY | dict(tie_word_embeddings=True, rms_norm_eps=1e-6),
    "llama3": TINY | dict(rope_parameters=LLAMA3),
    "linear": TINY | dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    "head_dim": TINY | dict(head_dim=64, num_key_value_heads=4),
}
PROMPT = random.Random(0).choices(range(4200), k=40)
needs_llama_cpp = pytest.mark.skipif(
    not all(importlib.util.find_spec(module) for module in ("llama_cpp", "gguf")),
    reason="llama-cpp-python and gguf are not installed",
)


def tiny_model(**fields) -> Transformer:
    """In float32, with weights that make attention look at some positions much more than at others."""
    model = bench.random_model(ModelConfig.from_hf(TINY | fields), "cpu", torch.float32)
    for layer in model.layers:
        layer.attention.wqkv.weight.mul_(2)
    return model


def our_tokens(model: Transformer, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens without a cache that lasts, and the logits after the prompt, float32 [V]."""
    tokens, first = list(prompt), None
    for _ in range(steps):
        model.setup_caches(1, len(tokens))
        with torch.inference_mode():
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0, -1].float()
        first = logits if first is None else first
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], first


def their_tokens(peer, prompt: list[int], steps: int) -> list[int]:
    peer.prefill(prompt[: len(prompt) // 2])  # what a prefill must forget
    first = peer.prefill(prompt)
    return [first, *peer.decode(first, len(prompt), steps - 1)]


def run_bench(*args, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "bench.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


# ---------------------------------------------------------------------------------------------------------------------
# The peers


@pytest.mark.parametrize("name", MODELS)
def test_transformers_runs_our_model(name):
    model = tiny_model(**MODELS[name])
    peers = bench_peers.transformers_peers(MODELS[name], model, max_length=64)
    expected, logits = our_tokens(model, PROMPT, 8)
    eager = peers["transformers, eager"]
    assert their_tokens(eager, PROMPT, 8) == expected
    assert (eager.last_logits - logits).abs().max() < 1e-3
    assert bench.logits_error(eager, model, PROMPT) < 1e-5


def test_transformers_runs_our_model_compiled():
    model = tiny_model()
    peer = bench_peers.transformers_peers(TINY, model, max_length=64)["transformers, static cache, compiled"]
    assert their_tokens(peer, PROMPT, 8) == our_tokens(model, PROMPT, 8)[0]


def test_transformers_shares_our_tensors():
    model = tiny_model()
    ours = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    hf = bench_peers.transformers_peers(TINY, model, 64)["transformers, eager"].forward.__self__
    assert {tensor.untyped_storage().data_ptr() for tensor in hf.parameters()} == ours


@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_runs_our_model(name, tmp_path):
    model = tiny_model(**MODELS[name])
    (peer,) = bench_peers.llama_cpp_peers(model, tmp_path, max_length=64, threads=1).values()
    assert their_tokens(peer, PROMPT, 8) == our_tokens(model, PROMPT, 8)[0]
    assert bench.logits_error(peer, model, PROMPT) < 1e-2  # its cache is float16
    # The file is kept, and belongs to these weights alone.
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    assert bench_peers.write_gguf(model, tmp_path) == path and path.stat().st_mtime_ns == written
    model.norm.weight.mul_(2)
    assert bench_peers.write_gguf(model, tmp_path) != path


@needs_llama_cpp
def test_gguf_says_what_it_holds(tmp_path):
    from gguf import GGUFReader

    model = bench.random_model(ModelConfig.from_hf(TINY), "cpu")
    reader = GGUFReader(bench_peers.write_gguf(model, tmp_path))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.1.attn_v.weight"].tensor_type.name == "BF16"
    assert list(tensors["blk.1.attn_v.weight"].shape) == [128, 64]
    values = torch.from_numpy(tensors["blk.1.attn_v.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(values, model.layers[1].attention.wqkv.weight[-64:])
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert sum(tensor.n_elements for tensor in reader.tensors) == sum(p.numel() for p in model.parameters())


@needs_llama_cpp
@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"qk_norm": True}, "qk-norm"),
        ({"qkv_bias": True}, "biases"),
        ({"sliding_window": 8, "window_layers": (True, True)}, "sliding window"),
        ({"rope": {"type": "yarn"}}, "yarn"),
    ],
)
def test_what_gguf_cannot_hold_is_skipped(fields, what, tmp_path):
    config = ModelConfig.from_hf(TINY)
    if "rope" in fields:
        fields = {"rope": dataclasses.replace(config.rope, **fields["rope"])}
    model = Transformer(dataclasses.replace(config, **fields))
    with pytest.raises(bench_peers.Unavailable, match=what):
        bench_peers.write_gguf(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "package", "peers"),
    [
        ("transformers", "transformers", lambda m, p: bench_peers.transformers_peers(TINY, m, 64)),
        ("llama_cpp", "llama-cpp-python", lambda m, p: bench_peers.llama_cpp_peers(m, p, 64, 1)),
        ("gguf", "gguf", lambda m, p: bench_peers.write_gguf(m, p)),
    ],
)
def test_what_is_not_installed_says_how_to(module, package, peers, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(bench_peers.Unavailable) as error:
        peers(tiny_model(), tmp_path)
    assert str(error.value) == f"{package} is not installed (pip install {package})"


def test_a_family_that_transformers_lacks_is_skipped():
    config = {**TINY, "model_type": "minimind"}
    with pytest.raises(bench_peers.Unavailable, match="minimind"):
        bench_peers.transformers_peers(config, tiny_model(), 64)


# ---------------------------------------------------------------------------------------------------------------------
# The report


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory) -> Path:
    model = bench.random_model(ModelConfig.from_hf(TINY), "cpu")
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), TINY, model)


@pytest.mark.slow
def test_report(tiny_checkpoint, tmp_path):
    """A whole run, as a process."""
    done = run_bench(
        "--checkpoint_path", tiny_checkpoint, "--against", "transformers", "llama.cpp", "--out", tmp_path,
        "--prompt_length", 24, "--new_tokens", 5, "--rounds", 3, "--device", "cpu", "--threads", 1, "--long_cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    report = json.loads((tmp_path / f"bench-{tiny_checkpoint.name}-bf16.json").read_text())
    assert (tmp_path / f"bench-{tiny_checkpoint.name}-bf16.md").read_text() == done.stdout
    contenders, bandwidth = report["contenders"], report["read_bandwidth"]

    names = ["gpt-brisk", "transformers, eager", "transformers, static cache, compiled"]
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        names.append("llama.cpp")
        assert report["skipped"] == {}
    else:
        assert "is not installed (pip install" in report["skipped"]["llama.cpp"]
        assert "skipped: llama.cpp: " in done.stdout
    assert list(contenders) == names

    config = report["settings"]
    weights = checkpoint.load_model(tiny_checkpoint)
    read = sum(p.nbytes for p in weights.parameters()) - weights.tok_embeddings.weight.nbytes
    assert config["weight_bytes_per_step"] == read
    assert config["bytes_per_step"] == read + 2 * 2 * 2 * 32 * 2 * (24 + 2)  # layers, K and V, heads, head_dim, bf16
    assert len(bandwidth["rounds_gb_s"]) == 3 and bandwidth["gb_s"] == statistics.median(bandwidth["rounds_gb_s"]) > 0
    for values in contenders.values():
        assert len(values["prefill_s"]) == len(values["decode_s"]) == 3
        assert len(values["tokens"]) == 1 + 5
        step = statistics.median(values["decode_s"]) / 5
        assert values["decode_ms"] == pytest.approx(step * 1e3)
        assert values["decode_tok_s"] == pytest.approx(1 / step)
        assert values["prefill_tok_s"] == pytest.approx(24 / statistics.median(values["prefill_s"]))
        assert values["gb_s"] == pytest.approx(config["bytes_per_step"] / step / 1e9)
        assert values["roofline_share"] == pytest.approx(values["gb_s"] / bandwidth["gb_s"])
    for key in ("decode", "prefill"):
        theirs = max(contenders[name][f"{key}_tok_s"] for name in names[1:3])
        ratio = contenders["gpt-brisk"][f"{key}_tok_s"] / theirs
        assert report["ratios"]["transformers"][key] == pytest.approx(ratio)
    assert all(error < 0.05 for error in report["logits_error"].values())  # bfloat16
    assert list(report["logits_error"]) == names[1:]

    cache = report["long_cache"]
    assert cache["max_seq_length"] == [256, 512]
    short, long = (statistics.median(cache["decode_s"][length]) for length in ("256", "512"))
    assert cache["ratio"] == pytest.approx(long / short)
    assert report["machine"]["threads"] == 1 and report["machine"]["versions"]["torch"] == torch.__version__
    assert [line.count("|") for line in done.stdout.splitlines()[2 : 5 + len(names)]] == [7] * (3 + len(names))


@pytest.mark.slow
def test_demo_and_startup(tmp_path):
    done = run_bench(
        "--shape", "demo", "--startup", "--out", tmp_path, "--prompt_length", 16, "--new_tokens", 2, "--rounds", 1,
        "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    startup = json.loads((tmp_path / "bench-demo-bf16.json").read_text())["startup"]
    size = (checkpoint.DEMO / "model.safetensors").stat().st_size
    assert startup["weights_gb"] == pytest.approx(size / 1e9, rel=0.01)
    assert 0 < startup["warm_median_s"] < startup["cold_median_s"]
    before, loaded, used = (startup[f"resident_{when}_gb"] for when in ("before", "loaded", "used"))
    assert 0.05 < before <= loaded < before + 0.1  # mapped, not read
    assert loaded + 0.8 * startup["weights_gb"] < used < 1
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".md"]


def test_random_weights_are_the_same_each_time():
    config = ModelConfig.from_hf(TINY)
    first, second = (bench.random_model(config, "cpu").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["norm.weight"].dtype == torch.bfloat16 and (first["norm.weight"] == 1).all()
    scale = first["layers.0.feed_forward.w2.weight"].float().std() * 256**0.5
    assert scale == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("shape", "parameters"), [("1b", 1.10e9), ("8b", 8.03e9)])
def test_shapes_have_their_size(shape, parameters):
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_hf(bench.SHAPES[shape]))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--against", "vllm"], "invalid choice: 'vllm'"),
        (["--shape", "3b"], "invalid choice: '3b'"),
        (["--shape", "1b", "--checkpoint_path", "x"], "not allowed with"),
        (["--rounds", "0"], "--rounds 0 is out of range"),
        (["--new_tokens", "-1"], "--new_tokens -1 is out of range"),
        (["--prompt_length", "0"], "--prompt_length 0 is out of range"),
        (["--threads", "0"], "--threads 0 is out of range"),
        (["--prompt_length", "8190"], "exceed the limit of 8192"),
        (["--max_seq_length", "520"], "exceed the limit of 520"),
        (["--max_seq_length", "9000"], "more than the model's context of 8192"),
        (["--checkpoint_path", "nowhere"], "nowhere is not there"),
    ],
)
def test_bad_input(args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", *args])
    with pytest.raises(UserError) as error:
        bench.main()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_too_large_is_refused_in_gigabytes(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 2_000_000_000)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--shape", "8b", "--device", "cpu", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"16\.1 GB, 2\.0 GB are free"):
        bench.main()
    assert not list(tmp_path.iterdir())


def test_the_peers_need_memory_too(monkeypatch, tmp_path, tiny_checkpoint):
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 500_000_000)
    args = ["--checkpoint_path", str(tiny_checkpoint), "--prompt_length", "8", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *args, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"needs 1\.1 GB, 0\.5 GB are free"):
        bench.main()
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_line_and_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_bench("--shape", "demo", "--out", tmp_path / "file")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: --out {tmp_path / 'file'} is a file; name a folder\n"
