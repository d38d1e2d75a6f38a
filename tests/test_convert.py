"""convert_hf_checkpoint.py against checkpoints that transformers saved, a hub on loopback, kills and full disks."""

import argparse
import fcntl
import functools
import json
import os
import pickle
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
import transformers
from fake_hub import FakeHub
from hypothesis import given
from test_checkpoint import FUZZ, mutated
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import checkpoint
import convert_hf_checkpoint
from checkpoint import load_config, load_model
from config import ModelConfig
from convert_hf_checkpoint import convert
from errors import UserError
from formats import minimind, names
from quantize import quantize
from weights import StoredTensor, read_header

ROOT = Path(__file__).parent.parent
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
}


def make_model(family: str, **changes: object) -> transformers.PreTrainedModel:
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SMALL | {"tie_word_embeddings": False} | fields | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # norms and biases too, so that no two are the same
    return model


def save(
    folder: Path, family: str = "llama", tokens: int = 300, shards: str = "5GB", **changes: object
) -> transformers.PreTrainedModel:
    """A folder as save_pretrained leaves it, with a tokenizer."""
    model = make_model(family, **changes)
    model.save_pretrained(folder, max_shard_size=shards)
    save_tokenizer(folder, tokens)
    return model


def save_tokenizer(folder: Path, tokens: int) -> None:
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: i for i, token in enumerate(alphabet + [f"#{i}" for i in range(tokens - len(alphabet))])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def fused(state: dict[str, torch.Tensor], tied: bool) -> dict[str, torch.Tensor]:
    """What ours should hold, from the names and tensors of transformers."""
    ours = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.").replace("embed_tokens", "tok_embeddings")
        name = name.replace("self_attn.o_proj", "attention.wo").replace("mlp.down_proj", "feed_forward.w2")
        name = name.replace("input_layernorm", "attention_norm").replace("post_attention_layernorm", "ffn_norm")
        name = re.sub(r"self_attn\.([qk]_norm)", r"attention.\1", name).replace("lm_head", "output")
        if match := re.fullmatch(r"(layers\.\d+\.)(self_attn\.q|mlp\.gate)_proj\.(\w+)", name):
            layer, first, kind = match.groups()
            others = ("self_attn.q", "self_attn.k", "self_attn.v") if first == "self_attn.q" else ("mlp.gate", "mlp.up")
            name = layer + ("attention.wqkv." if first == "self_attn.q" else "feed_forward.w13.") + kind
            tensor = torch.cat([state[f"model.{layer}{other}_proj.{kind}"] for other in others])
        elif re.search(r"[kv]_proj|up_proj", name):
            continue
        if not (tied and name == "output.weight"):
            ours[name] = tensor
    return ours


def same(out: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """`out` holds exactly these tensors, and both the safetensors library and load_model see them."""
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(dtype or tensor.dtype)), name
    state = load_model(out).state_dict()
    assert state.keys() == found.keys() and all(torch.equal(state[name], found[name]) for name in found)


def run_script(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "convert_hf_checkpoint.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line that a user's error is."""
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


# -- what is converted


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    model = save(tmp_path / "in", family)
    message = convert(tmp_path / "in", tmp_path / "out")
    same(tmp_path / "out", fused(model.state_dict(), model.config.tie_word_embeddings))
    for file in (tmp_path / "in").iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"wrote {tmp_path}/out: {parameters / 1e6:.1f} M parameters, float32, " in message
    assert f'generate.py --checkpoint_path {tmp_path}/out --prompt "Hello"' in message
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_minimind_in_hf_form(tmp_path, family):
    """MiniMind's newer versions have Qwen3's names and norms, the older ones Llama's; lm_head is saved though tied."""
    model = save(tmp_path / "in", family)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    config = SMALL | {
        "model_type": "minimind", "architectures": ["MiniMindForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "hidden_act": "silu", "use_moe": False, "flash_attn": True, "dropout": 0.0, "num_experts_per_tok": 2,
        "inference_rope_scaling": False, "rope_scaling": None, "head_dim": model.config.head_dim,
    }  # fmt: skip
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    (tmp_path / "in" / "model.safetensors").unlink()
    state = {"_orig_mod." + name: tensor.half() for name, tensor in state.items()}
    torch.save(state | {"_orig_mod.model.freqs_cos": torch.ones(4, 4)}, tmp_path / "in" / "full_sft_64.pth")
    convert(tmp_path / "in", tmp_path / "out")
    same(tmp_path / "out", fused(model.state_dict(), tied=True), torch.float16)
    assert load_config(tmp_path / "out").qk_norm == ("head" if family == "qwen3" else "")
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"use_moe": True, "n_routed_experts": 4}))
    with pytest.raises(UserError, match=r"mlp\.gate\.weight. is missing"):
        convert(tmp_path / "in", tmp_path / "moe")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype(tmp_path, dtype):
    model = make_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "kept")
    same(tmp_path / "kept", fused(model.state_dict(), tied=False))
    convert(tmp_path / "in", tmp_path / "out", dtype)
    same(tmp_path / "out", fused(model.state_dict(), tied=False), dtype)
    _, metadata = read_header(tmp_path / "out" / "model.safetensors")
    assert metadata == {"format": "gpt-brisk", "version": "1", "dtype": str(dtype).removeprefix("torch.")}


def test_mixed_dtypes_become_that_of_the_config(tmp_path):
    model = save(tmp_path / "in")
    state = {name: t if "norm" in name else t.bfloat16() for name, t in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "in" / "model.safetensors")
    for name, dtype in [("float16", torch.float16), (None, torch.bfloat16)]:
        config = json.loads((tmp_path / "in" / "config.json").read_text())
        (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"dtype": name, "torch_dtype": name}))
        convert(tmp_path / "in", tmp_path / "out")
        same(tmp_path / "out", fused(state, tied=False), dtype)


def test_values_beyond_float16_are_refused(tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(UserError, match=r"'layers\.1\.feed_forward\.w13\.weight' holds values beyond float16"):
        convert(tmp_path / "in", tmp_path / "out", torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_shards(tmp_path):
    model = save(tmp_path / "in", "qwen3-untied", shards="100KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    convert(tmp_path / "in", tmp_path / "one")
    same(tmp_path / "one", fused(model.state_dict(), tied=False))
    convert(tmp_path / "in", tmp_path / "many", shard_bytes=100_000)
    same(tmp_path / "many", fused(model.state_dict(), tied=False))
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[1] == f"model-00002-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_index_of_other_shards(tmp_path, capfd, form):
    """A model that was uploaded again: the index names shards that are gone, those that are there hold every tensor."""
    source = tmp_path / "in"
    model = save(source, shards="100KB")
    name = "model.safetensors"
    if form == "bin":
        name = "pytorch_model.bin"
        for file in sorted(source.glob("model-*")):
            torch.save(safetensors.torch.load_file(file), source / f"pytorch_{file.stem}.bin")
            file.unlink()
        (source / "model.safetensors.index.json").unlink()
    old = dict.fromkeys(model.state_dict(), name.replace(".", "-00001-of-00002."))
    (source / f"{name}.index.json").write_text(json.dumps({"weight_map": old}))
    capfd.readouterr()
    convert(source, tmp_path / "out")
    stem, suffix = name.split(".")
    assert re.fullmatch(
        rf"warning: {name}\.index\.json names {stem}-00001-of-00002\.{suffix}, which is not there;"
        rf" {stem}-00001-of-00005\.{suffix} to {stem}-00005-of-00005\.{suffix} is read instead\n",
        capfd.readouterr().err,
    )
    same(tmp_path / "out", fused(model.state_dict(), tied=False))
    os.rename(source / f"{stem}-00003-of-00005.{suffix}", source / "elsewhere")
    with pytest.raises(UserError, match=f"in has no {stem}-00001-of-00002.{suffix}, though its {name}.index.json"):
        convert(source, tmp_path / "out")
    # Or one that is named holds them all.
    for file in source.glob(f"{stem}-*{suffix}"):
        file.unlink()
    (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(
        model.state_dict(), source / f"{stem}-00002-of-00002.{suffix}"
    )
    both = old | {"lm_head.weight": f"{stem}-00002-of-00002.{suffix}"}
    (source / f"{name}.index.json").write_text(json.dumps({"weight_map": both}))
    capfd.readouterr()
    convert(source, tmp_path / "one")
    assert re.fullmatch(rf"warning: [^\n]+; {stem}-00002-of-00002\.{suffix} is read instead\n", capfd.readouterr().err)
    same(tmp_path / "one", fused(model.state_dict(), tied=False))
    if form == "safetensors":
        model.save_pretrained(source)  # a single file beside the old index, of which it knows nothing
        convert(source, tmp_path / "single")
        same(tmp_path / "single", fused(model.state_dict(), tied=False))


def test_stale_single_file(tmp_path, capfd):
    """Beside complete shards with an index a single file is of an older upload: the index decides."""
    source = tmp_path / "in"
    model = save(source, shards="100KB")
    old = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(old, source / "model.safetensors")
    capfd.readouterr()
    convert(source, tmp_path / "out")
    same(tmp_path / "out", fused(model.state_dict(), tied=False))
    assert re.fullmatch(r"warning: model\.safetensors is not read, but the shards [^\n]+\n", capfd.readouterr().err)
    convert(source / "model.safetensors", tmp_path / "old")  # by its name it is
    same(tmp_path / "old", fused(old, tied=False))


@pytest.mark.parametrize("form", ["bin", "sharded bin", "old bin"])
def test_bin(tmp_path, form):
    model = make_model("qwen2")
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    if form == "sharded bin":
        names = sorted(state)
        files = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
        weight_map = {name: file for file, part in files.items() for name in part}
        index = tmp_path / "in" / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        files = {"pytorch_model.bin": list(state)}
    for file, part in files.items():
        part_state = {name: state[name] for name in part}
        torch.save(part_state, tmp_path / "in" / file, _use_new_zipfile_serialization=form != "old bin")
    convert(tmp_path / "in", tmp_path / "out", torch.bfloat16)
    same(tmp_path / "out", fused(model.state_dict(), tied=False), torch.bfloat16)


def test_safetensors_before_bin_before_pth(tmp_path):
    model = save(tmp_path / "in")
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (tmp_path / "in" / name).write_bytes(b"never opened")
    (tmp_path / "in" / "consolidated.safetensors").write_bytes(b"never opened")
    convert(tmp_path / "in", tmp_path / "out")
    same(tmp_path / "out", fused(model.state_dict(), tied=False))


# -- MiniMind v1


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows in MiniMind v1's order: element i and i + head_dim / 2 of each head side by side."""
    heads = weight.split(head_dim)
    return torch.cat(
        [row for head in heads for pair in zip(*head.chunk(2), strict=True) for row in map(torch.atleast_2d, pair)]
    )


@functools.cache
def minimind_v1(heads: int, kv_heads: int) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    model = make_model("llama-tied", num_attention_heads=heads, num_key_value_heads=kv_heads)
    names = {
        "embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    }  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        if re.search("[qk]_proj", name):
            tensor = interleaved(tensor, model.config.head_dim)
        for theirs, v1 in names.items():
            name = name.removeprefix("model.").replace(theirs, v1)
        state[name] = tensor
    return model, state | {"layers.0.attention.mask": torch.zeros(1, 1, 8, 8)}


@pytest.mark.parametrize(("heads", "kv_heads", "theta"), [(16, 8, 1e4), (8, 2, 1e6)])
def test_minimind_v1(tmp_path, heads, kv_heads, theta):
    model, state = minimind_v1(heads, kv_heads)
    (tmp_path / "in").mkdir()
    torch.save(state, tmp_path / "in" / "full_sft_64.pth")
    convert(tmp_path / "in" / "full_sft_64.pth", tmp_path / "out")
    same(tmp_path / "out", fused(model.state_dict(), tied=True))
    config = load_config(tmp_path / "out")
    assert (config.n_heads, config.n_kv_heads, config.rope.theta, config.tied) == (heads, kv_heads, theta, True)
    assert config.norm_eps == 1e-5
    assert checkpoint.load_generation_config(tmp_path / "out")["eos_token_ids"] == [2]

    # With an LMConfig beside it, its heads and sizes count.
    lm_config = {
        "model_type": "minimind", "architectures": ["Transformer"], "dim": 64, "n_layers": 2, "n_heads": 4,
        "n_kv_heads": 4 * kv_heads // heads, "vocab_size": 300, "hidden_dim": None, "multiple_of": 32, "norm_eps": 1e-6,
        "max_seq_len": 1024, "dropout": 0.0, "flash_attn": True, "use_moe": False,
    }  # fmt: skip
    (tmp_path / "in" / "config.json").write_text(json.dumps(lm_config))
    convert(tmp_path / "in", tmp_path / "out", overwrite=True)  # other heads, so another order of the rows
    config = load_config(tmp_path / "out")
    assert (config.n_heads, config.norm_eps, config.context_length, config.rope.theta) == (4, 1e-6, 1024, 1e4)
    (tmp_path / "in" / "config.json").write_text(json.dumps(lm_config | {"n_layers": 3}))
    with pytest.raises(UserError, match=r"'layers\.2\.attention_norm\.weight' is missing"):
        convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "config.json").write_text(json.dumps(lm_config | {"use_moe": True}))
    with pytest.raises(UserError, match="mixture of experts"):
        convert(tmp_path / "in", tmp_path / "out")


LM_CONFIG = {
    "model_type": "minimind", "dim": 64, "n_layers": 2, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 300,
    "hidden_dim": 96, "norm_eps": 1e-5, "max_seq_len": 512, "rope_theta": 1e4, "use_moe": False,
}  # fmt: skip


@FUZZ
@given(
    mutated(LM_CONFIG) | mutated(SMALL | {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_scaling": {"factor": 2.0}})
)
def test_fuzz_config_beside_weights(tmp_path_factory, config):
    """Whatever stands in the config, the weights either fit it or a UserError says what does not."""
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(config))
    _, state = minimind_v1(16, 8)
    tensors = {name: StoredTensor(path, tensor.dtype, tuple(tensor.shape), 0) for name, tensor in state.items()}
    try:
        read = ModelConfig.from_hf(minimind.read_config(path, tensors))
        if read.n_layers < 100:  # thousands are allowed, and take seconds
            names.plan_tensors(read, {n: t for n, t in tensors.items() if n != "output.weight"}, minimind.V1)
    except UserError as error:
        assert str(error)


def test_minimind_v1_rotates_as_complex_numbers(tmp_path):
    """Scores of q and k under complex RoPE of the stored rows == scores under transformers' RoPE of the converted."""
    _, state = minimind_v1(16, 8)
    torch.save(state, tmp_path / "full_sft_64.pth")
    convert(tmp_path / "full_sft_64.pth", tmp_path / "out")
    wqkv = load_model(tmp_path / "out").layers[1].attention.wqkv.weight
    head_dim, length = 4, 6
    x = torch.randn(1, length, 64)
    angles = torch.outer(torch.arange(length), 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim))  # [S, D / 2]

    def rotated(name: str, heads: int) -> torch.Tensor:
        y = (x @ state[f"layers.1.attention.{name}.weight"].T).view(1, length, heads, -1, 2)
        turned = torch.view_as_complex(y) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(3).transpose(1, 2)

    expected = rotated("wq", 16) @ rotated("wk", 8).repeat_interleave(2, dim=1).transpose(2, 3)
    q, k, _ = (x @ wqkv.T).view(1, length, 32, head_dim).transpose(1, 2).split([16, 8, 8], dim=1)
    cos, sin = (f(torch.cat([angles, angles], dim=1))[None] for f in (torch.cos, torch.sin))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    scores = q @ k.repeat_interleave(2, dim=1).transpose(2, 3)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-2 * float(expected.std()))


def test_minimind_v1_that_cannot_be(tmp_path):
    def refused(state: dict[str, torch.Tensor], match: str) -> None:
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(UserError, match=match):
            convert(tmp_path / "x.pth", tmp_path / "out")

    _, state = minimind_v1(16, 8)
    refused({n: t for n, t in state.items() if "w1" not in n}, r"'layers\.0\.feed_forward\.w1\.weight' is missing")
    refused(state | {"layers.0.feed_forward.experts.0.w1.weight": torch.ones(1)}, "mixture of experts")
    refused(state | {"layers.0.attention.wk.weight": torch.ones(20, 64)}, "put its config.json beside")
    refused(state | {"output.weight": torch.ones(299, 64)}, r"'output.weight' has the shape \[299, 64\]")
    refused(state | {"extra.weight": torch.ones(1)}, r"'extra\.weight' is unexpected")


# -- what is refused


def test_first_wrong_tensor_is_named(tmp_path):
    model = save(tmp_path / "in", "llama")
    state, weights = model.state_dict(), tmp_path / "in" / "model.safetensors"

    def refused(changes: dict[str, torch.Tensor | None], match: str) -> None:
        changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
        safetensors.torch.save_file(changed, weights)
        with pytest.raises(UserError, match=match) as caught:
            convert(tmp_path / "in", tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

    key = "model.layers.1.self_attn.k_proj.weight"
    refused({key: None, "model.norm.weight": None}, f"'{key}' is missing")
    refused({key: torch.ones(64, 64)}, rf"'{key}' has the shape \[64, 64\] where the config means \[32, 64\]")
    refused({"lm_head.weight": torch.ones(299, 64)}, r"'lm_head.weight' has the shape \[299, 64\].* \[300, 64\]")
    refused({key: torch.ones(32, 64, dtype=torch.int8)}, f"'{key}' is torch.int8, not a float")
    refused({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, r"'model.layers.2.mlp.up_proj.weight' is unexpected")
    refused({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "q_proj.bias' is unexpected")
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    safetensors.torch.save_file(state | harmless, weights)
    convert(tmp_path / "in", tmp_path / "out")

    shutil.rmtree(tmp_path / "out")
    config = tmp_path / "in" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    refused({"lm_head.weight": torch.ones(299, 64)}, r"'lm_head.weight' has the shape \[299, 64\].* \[300, 64\]")
    refused({"model.embed_tokens.weight": torch.ones(64)}, r"'model.embed_tokens.weight' has the shape \[64\]")


@pytest.mark.parametrize("nested", [False, True])
def test_tied_embeddings(tmp_path, capfd, nested):
    """What transformers makes of tie_word_embeddings: an output of its own is kept, one that is missing is tied."""
    model = save(tmp_path / "in", "llama")
    state, weights, config = model.state_dict(), tmp_path / "in" / "model.safetensors", tmp_path / "in" / "config.json"
    fields = json.loads(config.read_text())
    del fields["tie_word_embeddings"]
    fields |= {"text_config": {"tie_word_embeddings": True}} if nested else {"tie_word_embeddings": True}
    config.write_text(json.dumps(fields))
    tokens = torch.arange(12)[None]
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    for name, changes, tied in [
        ("differ", {}, False),
        ("same", {head: state[embedding].clone()}, True),
        ("embedding only", {head: None}, True),
        ("output only", {embedding: None}, True),
    ]:
        changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
        safetensors.torch.save_file(changed, weights, {"format": "pt"})
        capfd.readouterr()
        convert(tmp_path / "in", tmp_path / name)
        warnings = capfd.readouterr().err.splitlines()
        assert len(warnings) == (not tied) and all("'lm_head.weight'" in line for line in warnings)
        ours = load_model(tmp_path / name)
        assert load_config(tmp_path / name).tied == tied and (ours.output is None) == tied
        if not nested:  # a Llama of transformers itself has no nested config
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)
            ours.setup_caches(1, 12)
            torch.testing.assert_close(ours(tokens, tokens), theirs(tokens).logits, atol=1e-3, rtol=1e-4)


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, (Harmful.path,)


def test_pickle_that_is_more_than_tensors(tmp_path):
    save(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    weights = tmp_path / "in" / "pytorch_model.bin"
    Harmful.path = str(tmp_path / "harm")

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            convert(tmp_path / "in", tmp_path / "out")
        assert "\n" not in str(caught.value)
        # torch advises to load unsafely
        assert not re.search(r"weights_only|safe_globals|\bFalse\b|trust", str(caught.value)), caught.value
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

    for old in (False, True):
        torch.save({"a": torch.ones(2), "b": Harmful()}, weights, _use_new_zipfile_serialization=not old)
        refused(r"pytorch_model.bin holds more than tensors \(\S*mkdir\), which could run code")
    for value in (torch.nn.Linear(2, 2), {"a": numpy.ones(2)}, argparse.Namespace(a=1)):
        torch.save(value, weights)
        refused(r"pytorch_model.bin holds more than tensors \(\S+\), which could run code; get it as safetensors$")
    for protocol in (2, 5):
        weights.write_bytes(pickle.dumps({"a": [1.0] * 100}, protocol))
        refused("pytorch_model.bin is not a readable PyTorch file")
    torch.jit.script(torch.nn.Linear(2, 2)).save(weights)
    refused("pytorch_model.bin is not a readable PyTorch file .*TorchScript")
    weights.write_bytes(pickle.dumps(Harmful()))
    refused("pytorch_model.bin (holds more than tensors|is not a readable PyTorch file)")
    for value in ({"model": {"a": torch.ones(2)}}, {"a": 3}, {3: torch.ones(2)}):
        torch.save(value, weights)
        refused("holds more than tensors .*save a plain state_dict")
    torch.save([torch.ones(2)], weights)
    refused("holds list, not a table of tensors")
    torch.save(make_model("llama").state_dict(), weights)
    whole = weights.read_bytes()
    for cut in (b"", b"garbage", whole[:1000], whole[:-1], whole[: len(whole) // 2]):
        weights.write_bytes(cut)
        refused("is not a readable PyTorch file")
    weights.write_bytes(whole)
    convert(tmp_path / "in", tmp_path / "out")


def test_what_is_no_checkpoint(tmp_path):
    def refused(match: str, source: Path) -> None:
        with pytest.raises(UserError, match=match):
            convert(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    source = tmp_path / "in"
    refused("in is not there; name the folder", source)
    source.mkdir()
    refused("in has no weights", source)
    (source / "model.gguf").touch()
    refused("model.gguf is not a valid GGUF file", source)
    for name in ("a.pth", "b.pth"):
        (source / name).touch()
    refused(r"several .pth files \(a.pth, b.pth\); name one as", source)
    shutil.rmtree(source)

    save(source, shards="100KB")
    index = source / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = sorted(good["weight_map"])[0]
    for name in ("../model.safetensors", "/etc/passwd", "sub/x.safetensors"):
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {first: name}}))
        refused("which is no plain file name", source)
    index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {first: "gone.safetensors"}}))
    convert(source, tmp_path / "out")  # the shards are complete all the same
    shutil.rmtree(tmp_path / "out")
    os.rename(source / "model-00002-of-00005.safetensors", source / "elsewhere")
    refused(r"in has no gone\.safetensors, though its model\.safetensors\.index\.json names it", source)
    index.write_text("{")
    refused("index.json is not valid JSON", source)
    shutil.rmtree(source)

    save(source)
    os.truncate(source / "model.safetensors", 5000)
    refused("model.safetensors is not a valid safetensors file: .*truncated", source)
    save(source)
    config = json.loads((source / "config.json").read_text())
    for change, match in [({"hidden_act": "quick_gelu"}, "hidden_act"), ({"model_type": "mamba"}, "model_type"),
                          ({"num_attention_heads": 0}, "num_attention_heads")]:  # fmt: skip
        (source / "config.json").write_text(json.dumps(config | change))
        refused(match, source)
    (source / "config.json").unlink()
    refused("config.json is missing", source)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
            "a LoRA adapter .*; name it as --adapter",
        ),
        (["adapter_model.bin"], "a LoRA adapter.*; name it as --adapter"),
        (["model_index.json", "unet/model.safetensors"], "a diffusers pipeline .*; take a language model"),
        (["mmproj-q8_0.gguf", "config.json"], "a projector of pictures.*; name the GGUF file of the language model"),
        (["onnx/model.onnx", "config.json"], "ONNX weights.*safetensors"),
        (["model.onnx"], "ONNX weights.*; get"),
        (["tf_model.h5", "config.json"], "TensorFlow weights .*safetensors"),
        (["flax_model.msgpack", "tokenizer.json"], "Flax weights .*safetensors"),
        (["weights.npz", "config.json"], "weights of mlx .*; convert the original"),
        (
            ["params.json", "consolidated.00.pth", "tokenizer.model"],
            "a model in the form of its authors .*Hugging Face",
        ),
        (["params.json", "consolidated.safetensors"], "a model in the form of its authors .*Hugging"),
        (["checkpoint-500/model.safetensors"], "the checkpoints of a training run .*checkpoint-500.*; name one"),
        (["tokenizer.json", "tokenizer_config.json"], "a tokenizer .*; put the weights beside it"),
    ],
)
def test_other_kinds_are_called_by_their_names(tmp_path, files, said):
    for name in files:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("{}")
    with pytest.raises(UserError, match=f"in has no weights to convert, but {said}"):
        convert(tmp_path / "in", tmp_path / "out")
    if files[0].endswith("onnx") or files == ["adapter_model.bin"]:
        with pytest.raises(UserError, match=f"{files[0]} is {said}"):
            convert(tmp_path / "in" / files[0], tmp_path / "out")


def test_pointers_of_git_lfs(tmp_path):
    save(tmp_path / "in")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"
    (tmp_path / "in" / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match=r"model\.safetensors is no more than a pointer of git-lfs; run `git lfs pull`"):
        convert(tmp_path / "in", tmp_path / "out")


def test_weights_that_mlx_quantized(tmp_path):
    save(tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    form = {"group_size": 64, "bits": 4}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization": form, "quantization_config": form}))
    with pytest.raises(UserError, match="mlx quantized are not supported; convert the original model"):
        convert(tmp_path / "in", tmp_path / "out")


def test_warnings(tmp_path, capfd):
    """What can be converted, but one should know of."""

    def warnings(files: dict[str, object]) -> list[str]:
        for name, content in files.items():
            (source / name).write_text(content if isinstance(content, str) else json.dumps(content))
        capfd.readouterr()
        convert(source, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        for name in files:
            (source / name).unlink()
        config.write_text(json.dumps(fields))
        return capfd.readouterr().err.splitlines()

    source = tmp_path / "in"
    save(source)
    config = source / "config.json"
    fields = json.loads(config.read_text())
    (source / "generation_config.json").unlink(missing_ok=True)
    assert warnings({}) == []
    assert warnings({"chat_template.jinja": "{% generation %}{{ messages }}{% endgeneration %}"}) == []
    (line,) = warnings({"chat_template.jinja": "{% for m in messages %}"})
    assert re.match("warning: the model's chat template is broken: .*; get another or correct it", line)
    (line,) = warnings({"generation_config.json": {"eos_token_id": [2, 300, 301]}})
    assert re.match("warning: the end token 300, 301 is beyond the vocabulary of 300; correct eos_token_id in", line)
    (line,) = warnings({"config.json": fields | {"eos_token_id": 300}})
    assert "the end token 300 is beyond" in line
    (line,) = warnings({"generation_config.json": {"eos_token_id": "</s>"}})
    assert re.match("warning: .*generation_config.json: eos_token_id: .*correct it", line)
    (line,) = warnings({"adapter_config.json": {}})
    assert re.match("warning: the LoRA adapter in .* is not applied; name it as --adapter", line)
    (line,) = warnings({"config.json": fields | {"is_llama_config": True, "swirl": 3, "eddy": None}})
    assert re.match("warning: config.json: swirl: this field is unknown", line)


def test_tokenizer_larger_than_the_vocabulary(tmp_path, capsys):
    save(tmp_path / "in", tokens=301)
    with pytest.raises(UserError, match="has 301 tokens, the model only 300"):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        convert(tmp_path / "in", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / name).unlink()
    capsys.readouterr()
    convert(tmp_path / "in", tmp_path / "out")
    assert re.fullmatch(r"warning: \S+/in has no tokenizer; [^\n]+\n", capsys.readouterr().err)


# -- where it is written


def test_only_our_own_checkpoints_are_replaced(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    save(source)
    for name in ("notes.txt", "model.safetensors", "config.json", "tokenizer.json", "model.bin"):
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(UserError, match="name another folder as --out"):
            convert(source, out)
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine"
        shutil.rmtree(out)
    out.write_text("mine")
    with pytest.raises(UserError, match="out is a file"):
        convert(source, out)
    out.unlink()
    with pytest.raises(UserError, match="is the source itself"):
        convert(source, tmp_path / "x" / ".." / "in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

    out.mkdir()  # an empty one is fine
    convert(source, out, shard_bytes=100_000)
    convert(source, out, torch.bfloat16)  # of the old shards none is left
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    with pytest.raises(UserError, match="is already converted"):
        convert(out, tmp_path / "again")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which no conversion wrote"):
        convert(source, out)


def test_another_model_is_not_replaced_in_silence(tmp_path, capfd):
    """Nor what was quantized from it; of the same model both stay."""
    for name, family in [("a", "llama"), ("b", "qwen3")]:
        save(tmp_path / name / "final", family)
    first, second, out = tmp_path / "a" / "final", tmp_path / "b" / "final", tmp_path / "out"
    convert(first, out)
    with pytest.raises(UserError, match=r"out holds another model; name another folder as --out, or .*--overwrite"):
        convert(second, out)
    int8 = quantize(out, "int8")
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in out.glob("*.safetensors")}
    assert len(before) == 2

    # Converted again: the weights and what was quantized from them stay, the other files are renewed.
    tokenizer_config = json.loads((first / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (first / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    capfd.readouterr()
    message = convert(first, out)
    warning = f"warning: tokenizer_config.json in {out} differed from the source, and is now as there\n"
    assert capfd.readouterr().err == warning
    assert f"unchanged, so kept: {int8.name}, model.safetensors" in message
    assert {path.name: (path.read_bytes(), path.stat().st_ino) for path in out.glob("*.safetensors")} == before
    assert (out / "tokenizer_config.json").read_text() == json.dumps(tokenizer_config)
    # In another dtype or other shards as well.
    assert f"unchanged, so kept: {int8.name})" in convert(first, out, torch.bfloat16)
    assert load_model(out).norm.weight.dtype == torch.bfloat16 and int8.read_bytes() == before[int8.name][0]
    convert(first, out, torch.float32, shard_bytes=100_000)
    assert len(list(out.glob("model-0*.safetensors"))) > 2 and int8.read_bytes() == before[int8.name][0]
    load_model(out), load_model(int8)

    # One number of one tensor differs.
    state = safetensors.torch.load_file(first / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][95, 63] += 1
    safetensors.torch.save_file(state, first / "model.safetensors")
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    for source in (first, second):
        with pytest.raises(UserError, match=f"out holds another model and {int8.name}, quantized from it; .*overwrite"):
            convert(source, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
    capfd.readouterr()
    convert(first, out, overwrite=True)
    assert f"warning: removing {int8.name}, quantized from the model that is replaced" in capfd.readouterr().err
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    same(out, fused(state, tied=False))

    int8 = quantize(out, "int8")
    (out / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"out holds {int8.name}, quantized from weights that are not there any more; "):
        convert(first, out)


# At each line of its input, forks a process that converts two folders in turns to a third, and tells when it has begun.
FORKS = """
import itertools, os, sys
from pathlib import Path
import torch
from convert_hf_checkpoint import convert, load_tokenizer
from checkpoint import load_config
from model import expected_shapes
torch.set_num_threads(1)
first, second, out = map(Path, sys.argv[1:])
load_tokenizer(first), expected_shapes(load_config(first))  # what is imported on first use
for _ in sys.stdin:
    if child := os.fork():
        os.waitpid(child, 0)
        print("ended", flush=True)
    for source in [] if child else itertools.cycle([first, second]):
        convert(source, out, overwrite=True)
        print(os.getpid(), flush=True)
"""


@pytest.mark.slow
def test_kill_leaves_the_old_checkpoint_or_the_new_or_none(tmp_path):
    sources, states = [tmp_path / "a", tmp_path / "b"], []
    for source, family in zip(sources, ["llama", "qwen3"], strict=True):
        states.append(fused(save(source, family).state_dict(), tied=family == "qwen3"))
    out, left, rng = tmp_path / "out", set(), random.Random(0)
    command = [sys.executable, "-c", FORKS, *sources, out]
    forks = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for _ in range(15):
        forks.stdin.write("again\n")
        forks.stdin.flush()
        child = int(forks.stdout.readline())  # one is done, from here on each is replaced by the next
        time.sleep(rng.random() * 0.2)
        os.kill(child, signal.SIGKILL)
        while forks.stdout.readline() != "ended\n":
            pass
        if out.exists():
            which = int(bool(load_config(out).qk_norm))
            same(out, states[which])
        left |= {path.name for path in tmp_path.iterdir()} - {"a", "b", "out"}
    forks.communicate(timeout=60)
    assert ".out.converting" in left  # the kills did strike while a conversion was under way
    convert(sources[0], out, overwrite=True)  # clears away what the killed runs left
    same(out, states[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_killed_between_the_renames(tmp_path):
    """The old checkpoint, already moved aside, comes back even if the next conversion fails."""
    model = save(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.old")
    (tmp_path / ".out.converting").mkdir()
    (tmp_path / ".out.converting" / "half").touch()
    with pytest.raises(RuntimeError):
        convert_hf_checkpoint.replace_folder(tmp_path / "out", convert_hf_checkpoint.check_replaceable, fail)
    same(tmp_path / "out", fused(model.state_dict(), tied=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def fail(folder: Path) -> None:
    assert list(folder.iterdir()) == []
    raise RuntimeError


def test_two_conversions_at_a_time(tmp_path):
    save(tmp_path / "in")

    def write(folder: Path) -> None:
        with pytest.raises(UserError, match="another run is writing"):
            convert(tmp_path / "in", tmp_path / "out")
        (folder / "x").touch()

    convert_hf_checkpoint.replace_folder(tmp_path / "out", convert_hf_checkpoint.check_replaceable, write)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_full_disk(tmp_path):
    """One line, exit code 2, and nothing is left."""
    save(tmp_path / "in")
    done = run_script(
        "--checkpoint_dir", tmp_path / "in", "--out", tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert "File too large" in error_line(done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_full_disk_mounted(tmp_path, monkeypatch):
    save(tmp_path / "in")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(UserError, match=r"out needs [\d.]+ MB, [\d.]+ MB are free there; free some space"):
            convert(tmp_path / "in", disk / "out")
        monkeypatch.setattr(
            convert_hf_checkpoint, "check_disk", lambda *_: None
        )  # as if somebody else filled it meanwhile
        with pytest.raises(OSError, match="No space left on device"):
            convert(tmp_path / "in", disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_resident_memory(tmp_path):
    """Peak resident memory above the start stays a small part of the weights, for safetensors and for .bin."""
    fields = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 8000}
    with torch.device("meta"):
        model = make_model("llama", **fields)
    state = {name: torch.ones(p.shape, dtype=torch.bfloat16) for name, p in model.state_dict().items()}
    size = sum(tensor.nbytes for tensor in state.values())
    for name in ("safe", "bin"):
        model.config.save_pretrained(tmp_path / name)
    safetensors.torch.save_file(state, tmp_path / "safe" / "model.safetensors")
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    del state
    code = """
import resource, sys
from pathlib import Path
from convert_hf_checkpoint import convert
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
start = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - start)
"""
    assert size > 550e6
    for name in ("safe", "bin"):
        command = [sys.executable, "-c", code, tmp_path / name, tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert int(done.stdout) < 0.45 * size, name
        shutil.rmtree(tmp_path / name)


# -- the command line and the hub


def test_command_line(tmp_path, monkeypatch, capsys):
    def refused(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", *arguments])
        with pytest.raises(UserError) as caught:
            convert_hf_checkpoint.main()
        return str(caught.value)

    assert "one of the arguments --repo --checkpoint_dir --families is required" in refused()
    assert "not allowed with argument" in refused("--repo", "a/b", "--checkpoint_dir", "c")
    assert "--revision goes with --repo" in refused("--checkpoint_dir", "c", "--revision", "main")
    assert "invalid choice: 'int8'" in refused("--checkpoint_dir", "c", "--dtype", "int8")
    assert "unrecognized arguments" in refused("--checkpoint_dir", "c", "--foo")
    for repo in ("gpt2", "../x", "a/b/c", "a/..", "/a/b", "a/b?", ""):
        assert "is not of the form ORG/NAME" in refused("--repo", repo)

    monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", "--help"])
    with pytest.raises(SystemExit):
        convert_hf_checkpoint.main()
    options = re.split(r"\n  (?=-)", capsys.readouterr().out.partition("options:")[2])[2:]
    assert [text.split()[0] for text in options if "default: " not in text] == []

    monkeypatch.chdir(tmp_path)
    save(Path("some model"))
    run_main(monkeypatch, "--checkpoint_dir", "some model", "--dtype", "bfloat16")
    assert load_model("checkpoints/local/some model").norm.weight.dtype == torch.bfloat16
    out, err = capsys.readouterr()
    assert out == "" and "--checkpoint_path 'checkpoints/local/some model'" in err.splitlines()[-1]


def hub_folder(folder: Path, **options: object) -> transformers.PreTrainedModel:
    """A repo with all that the hub's repos have and nobody needs twice."""
    model = save(folder, **options)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "original").mkdir()
    (folder / "onnx").mkdir()
    unneeded = (
        "pytorch_model.bin", "README.md", "model-q4.gguf", "consolidated.safetensors", "original/tokenizer.model",
        "original/consolidated.00.pth", "onnx/model.onnx", "flax_model.msgpack", "model.fp16.safetensors",
    )  # fmt: skip
    for name in unneeded:
        (folder / name).write_text("not needed")
    return model


def test_repo(tmp_path):
    """The whole command: a connection dropped half way is resumed, only what is needed is fetched, and that once."""
    repo = tmp_path / "hub" / "org" / "private-name"
    model = hub_folder(repo, shards="24MB", intermediate_size=30_000)
    shard = sorted(repo.glob("model-0*"))[0]
    assert shard.stat().st_size > 22e6  # the client counts what it has in steps of 10 MB
    with FakeHub(tmp_path / "hub") as hub:
        hub.drops[shard.name] = 1
        env = os.environ | hub.env(tmp_path / "home") | {"HF_TOKEN": hub.token}
        done = run_script("--repo", "org/private-name", "--revision", "main", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "" and re.fullmatch("wrote checkpoints/org/private-name: [^\n]+\n", done.stderr)
        out = tmp_path / "checkpoints" / "org" / "private-name"
        same(out, fused(model.state_dict(), tied=False))
        assert checkpoint.load_generation_config(out)["eos_token_ids"] == [2, 5]
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
        needed = {path.name for path in repo.glob("model-0*.safetensors")} | {
            "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "model.safetensors.index.json",
        }  # fmt: skip
        assert set(hub.fetched()) == needed
        asked = [
            headers.get("Range") for method, path, headers in hub.requests if method == "GET" and shard.name in path
        ]
        assert asked == [None, f"bytes={10 * 2**20}-"]

        hub.requests.clear()
        done = run_script("--repo", "org/private-name", cwd=tmp_path, env=env)  # again: all is in the cache
        assert done.returncode == 0 and hub.fetched() == []
    done = run_script("--repo", "org/private-name", cwd=tmp_path, env=env)  # and now there is nobody
    assert "cannot download org/private-name" in error_line(done) and "check the network" in done.stderr
    same(out, fused(model.state_dict(), tied=False))


def test_repo_that_was_uploaded_again(tmp_path):
    """The shards that are there are fetched, whatever the index names; one warning."""
    repo = tmp_path / "hub" / "org" / "name"
    model = hub_folder(repo, shards="100KB")
    (repo / "pytorch_model.bin").unlink()
    index = {"weight_map": dict.fromkeys(model.state_dict(), "model-00001-of-00002.safetensors")}
    (repo / "model.safetensors.index.json").write_text(json.dumps(index))
    with FakeHub(tmp_path / "hub") as hub:
        done = run_script("--repo", "org/name", cwd=tmp_path, env=os.environ | hub.env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"warning: model\.safetensors\.index\.json names [^\n]+\nwrote [^\n]+\n", done.stderr)
    same(tmp_path / "checkpoints" / "org" / "name", fused(model.state_dict(), tied=False))


def test_progress_on_a_terminal(tmp_path):
    """Bars for the download and the conversion. (That a pipe gets none, the exact stderr of the tests above shows.)"""
    hub_folder(tmp_path / "hub" / "org" / "name")
    with FakeHub(tmp_path / "hub") as hub:
        terminal, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        command = [sys.executable, ROOT / "convert_hf_checkpoint.py", "--repo", "org/name"]
        env = os.environ | hub.env(tmp_path / "home")
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=end, stderr=end)
        os.close(end)
        shown = b""
        try:
            while part := os.read(terminal, 65536):
                shown += part
        except OSError:
            pass  # Linux says so that the other end was closed
        assert process.wait() == 0
    assert re.search(rb"(Fetching|Download)[^\r]*100%", shown) and re.search(rb"converting: 100%", shown), shown
    assert b"wrote checkpoints/org/name" in shown


def cache_folder(tmp_path: Path, repo: str = "org/some--name") -> Path:
    """models--ORG--NAME of a cache, as the client leaves it: links to blobs, of the branch main and an older commit."""
    folder = tmp_path / "hub" / ("models--" + repo.replace("/", "--"))
    for sha, family in (("a" * 40, "qwen3"), ("b" * 40, "llama")):
        save(folder / "blobs" / family, family)
        (folder / "snapshots" / sha).mkdir(parents=True)
        for file in (folder / "blobs" / family).iterdir():
            (folder / "snapshots" / sha / file.name).symlink_to(file)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40)
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", *map(str, arguments)])
    convert_hf_checkpoint.main()


def test_folders_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = cache_folder(tmp_path, "org/name")
    out = tmp_path / "checkpoints" / "org" / "name"
    run_main(monkeypatch, "--checkpoint_dir", folder)
    assert not load_config(out).qk_norm  # the branch main
    run_main(monkeypatch, "--checkpoint_dir", folder / "snapshots" / ("a" * 40), "--overwrite")
    assert load_config(out).qk_norm
    run_main(monkeypatch, "--checkpoint_dir", folder, "--out", "elsewhere")
    assert not load_config(tmp_path / "elsewhere").qk_norm
    (folder / "refs" / "main").unlink()
    with pytest.raises(UserError, match=r"does not hold the branch main; name one of its snapshots \(a{40}, b{40}\)"):
        run_main(monkeypatch, "--checkpoint_dir", folder)
    shutil.rmtree(folder / "snapshots" / ("b" * 40))
    run_main(monkeypatch, "--checkpoint_dir", folder)
    shutil.rmtree(folder / "snapshots" / ("a" * 40))
    with pytest.raises(UserError, match=r"snapshots \(none\)"):
        run_main(monkeypatch, "--checkpoint_dir", folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "elsewhere", "hub"]


FETCH = """
import sys
from convert_hf_checkpoint import fetch_checkpoint
from errors import run
run(lambda: print(fetch_checkpoint(*sys.argv[1:])))
"""


def test_fetch_checkpoint(tmp_path, monkeypatch):
    """Converts on first use, once for all processes that ask; a revision that is another model is refused."""
    model = hub_folder(tmp_path / "hub" / "org" / "name")
    out = tmp_path / "checkpoints" / "org" / "name"
    with FakeHub(tmp_path / "hub") as hub:
        env = os.environ | hub.env(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", FETCH, "org/name"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, cwd=tmp_path, env=env, **pipes) for _ in range(2)]
        answers = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], answers
        assert [stdout for stdout, _ in answers] == ["checkpoints/org/name\n"] * 2
        assert sorted(bool(re.fullmatch(r"wrote [^\n]+\n", err)) for _, err in answers) == [False, True], answers
        same(out, fused(model.state_dict(), tied=False))
        assert [path.name for path in out.parent.iterdir()] == ["name"]
        save(tmp_path / "hub" / "org" / "name", "qwen3")
        done = subprocess.run([*command, "main"], cwd=tmp_path, env=env | {"HF_HOME": "other"}, **pipes)
        assert "checkpoints/org/name holds another model; name another folder" in error_line(done)
    monkeypatch.chdir(tmp_path)
    assert convert_hf_checkpoint.fetch_checkpoint("org/name") == Path("checkpoints/org/name")  # nobody is asked
    with pytest.raises(UserError, match="'name' is not of the form ORG/NAME"):
        convert_hf_checkpoint.fetch_checkpoint("name")


CASES = """
import json, sys
from formats import hub
from errors import UserError
for repo, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps(str(hub.download(repo, revision))))
    except UserError as error:
        print(json.dumps("error: " + str(error)))
"""


def download_all(hub: FakeHub, home: Path, *cases: tuple[str, str | None], offline: str = "0") -> list[str]:
    """What download() answers to each repo and revision: a folder, or "error: ..."."""
    command = [sys.executable, "-c", CASES, json.dumps(cases)]
    env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | hub.env(home)
    env |= {"HF_HUB_OFFLINE": offline}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_the_hub_refuses(tmp_path):
    org = tmp_path / "hub" / "org"
    for name in ("name", "gated", "private", "unsupported", "incomplete"):
        hub_folder(org / name, shards="100KB")
    config = json.loads((org / "unsupported" / "config.json").read_text())
    (org / "unsupported" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    next((org / "incomplete").glob("model-00003*")).unlink()
    (org / "gguf").mkdir()
    for name in ("model-Q4_K_M.gguf", "model-Q8_0.gguf", "mmproj-F16.gguf"):
        (org / "gguf" / name).touch()
    hub_folder(org / "lora")
    for file in (org / "lora").glob("model*"):
        file.unlink()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "flax_model.msgpack"):
        (org / "lora" / name).unlink()
    (org / "lora" / "adapter_model.safetensors").touch()
    expected = {
        ("org/none", None): "org/none is not a model on the hub, or a private one; .*HF_TOKEN",
        ("org/private", None): "org/private is not a model on the hub, or a private one; .*HF_TOKEN",
        ("org/na--me", None): "org/na--me is not a model on the hub",
        ("org/name", "v9"): "org/name has no revision 'v9'; see its branches",
        ("org/gated", None): "org/gated is gated; ask for access at https://huggingface.co/org/gated, .*HF_TOKEN",
        ("org/gguf", None): r"org/gguf holds several GGUF files \(model-Q4_K_M.gguf, model-Q8_0.gguf\); name one of",
        ("org/lora", None): r"org/lora has no weights to convert, but a LoRA adapter \(adapter_model.safetensors\)",
        ("org/unsupported", None): "config.json: model_type: 'mamba'",
        ("org/incomplete", None): "org/incomplete has no model-00003-of-",
    }
    with FakeHub(tmp_path / "hub") as hub:
        for answer, error in zip(download_all(hub, tmp_path / "home", *expected), expected.values(), strict=True):
            assert re.match("error: " + error, answer), answer
        # The config was looked at before the weights were fetched.
        assert set(hub.fetched()) <= {"config.json", "model.safetensors.index.json", "generation_config.json",
                                     "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip


def test_offline(tmp_path):
    """HF_HUB_OFFLINE=1: what the cache holds is converted, nobody is asked."""
    for name in ("name", "other"):
        hub_folder(tmp_path / "hub" / "org" / name)
    with FakeHub(tmp_path / "hub") as hub:
        online = download_all(hub, tmp_path / "home", ("org/name", None), ("org/other", None))
        (Path(online[1]) / "model.safetensors").unlink()
        hub.requests.clear()
        cases = [("org/name", None), ("org/name", "main"), ("org/none", None), ("org/name", "v9"), ("org/other", None)]
        answers = download_all(hub, tmp_path / "home", *cases, offline="1")
        assert answers[:2] == [online[0]] * 2
        assert re.match("error: the cache in .* does not hold org/none; unset HF_HUB_OFFLINE", answers[2])
        assert re.match("error: the cache in .* does not hold org/name at 'v9'; unset HF_HUB_OFFLINE", answers[3])
        assert re.match("error: the cache does not hold all of org/other .*; unset HF_HUB_OFFLINE", answers[4])
        env = os.environ | hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}
        done = run_script("--repo", "org/name", cwd=tmp_path, env=env)
        assert done.returncode == 0 and re.fullmatch("wrote checkpoints/org/name: [^\n]+\n", done.stderr), done.stderr
        assert hub.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("reset", [False, True])
def test_connection_that_always_drops(tmp_path, reset):
    """Closed or reset at the same place whatever is tried: one clear line, and nothing is converted."""
    save(tmp_path / "hub" / "org" / "name")
    with FakeHub(tmp_path / "hub") as hub:
        hub.drops["model.safetensors"], hub.reset = -1, reset
        done = run_script("--repo", "org/name", cwd=tmp_path, env=os.environ | hub.env(tmp_path / "home"))
        assert "cannot download org/name (" in error_line(done)
        assert "check the network and run the same again" in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "hub"]


def test_connection_reset_once(tmp_path):
    """A reset is not among what the client itself tries again."""
    save(tmp_path / "hub" / "org" / "name")
    with FakeHub(tmp_path / "hub") as hub:
        hub.drops["model.safetensors"], hub.reset = 1, True
        (folder,) = download_all(hub, tmp_path / "home", ("org/name", None))
        original = tmp_path / "hub" / "org" / "name" / "model.safetensors"
        assert (Path(folder) / "model.safetensors").read_bytes() == original.read_bytes()
