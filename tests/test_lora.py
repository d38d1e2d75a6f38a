"""Adapters that PEFT trained and saved, read by lora.py and merged by the converter, against PEFT itself."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import CHAT_TEMPLATE, TEXT, assert_refused, make_tokenizer, parse
from fake_hub import SHA, FakeHub
from family_models import make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gguf_convert import Maker as GgufMaker
from test_gptq_awq import Maker
from test_gptq_awq import make as make_gptq

import convert_hf_checkpoint
import formats.packed
import quantize
from checkpoint import load_config, load_model
from convert_hf_checkpoint import convert
from errors import UserError
from lora import read_adapter
from weights import read_safetensors

ROOT = Path(__file__).parent.parent
TOKENS = torch.arange(5, 29)[None] * 13 % 400
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def load_hf(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def base_of(name, folder, dtype=torch.float32, **changes):
    """The folder of a tiny base model of random weights, in this dtype."""
    made = make(name, folder, **changes)
    if dtype != torch.float32:
        file = made.folder / "model.safetensors"
        tensors = {name: tensor.to(dtype) for name, tensor in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
        fields = json.loads((made.folder / "config.json").read_text())
        (made.folder / "config.json").write_text(json.dumps(fields | {"dtype": str(dtype).removeprefix("torch.")}))
    return made.folder


def train(base, adapter, prepare=None, seed=0, **config):
    """Trains an adapter for a few steps and saves it, as PEFT does."""
    torch.manual_seed(seed)
    model = load_hf(base)
    if prepare:
        prepare(model)
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(model, peft.LoraConfig(**dict(task_type="CAUSAL_LM", r=4) | config))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
        for _ in range(3):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(adapter)
    return adapter


def load_peft(base, adapter, dtype=torch.float32, prepare=None):
    model = load_hf(base, dtype)
    if prepare:
        prepare(model)
    with warnings.catch_warnings(action="ignore"):
        return peft.PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def logits_of(model):
    return model(TOKENS, use_cache=False).logits[0]


@torch.no_grad()
def our_logits(folder):
    model = load_model(folder, dtype=torch.float32)
    model.setup_caches(1, 64)
    return model(TOKENS, torch.arange(TOKENS.shape[1])[None])[0]


def read_all(folder):
    return {name: tensor.read() for name, tensor in read_safetensors(folder / "model.safetensors")[0].items()}


def converted(model, base, folder, dtype):
    """Our tensors of a merged model of transformers, cast to this dtype."""
    model.save_pretrained(folder / "hf")
    file = folder / "hf" / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    shutil.copy(base / "config.json", folder / "hf")
    convert(folder / "hf", folder / "out")
    return read_all(folder / "out")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Merged: the same to the last bit

CASES = {
    "llama": dict(
        target_modules="all-linear", use_rslora=True, lora_alpha=3, rank_pattern={"layers.0.mlp.up_proj": 3},
        alpha_pattern={r"layers\.\d\.self_attn\.q_proj": 1, "q_proj": 100},
    ),
    "qwen2": dict(target_modules=r".*layers\.[12]\..*\.(q|down)_proj", bias="all"),
    "qwen3": dict(
        target_modules=["k_proj", "gate_proj"], layers_to_transform=[1, 3], layers_pattern="layers",
        modules_to_save=["norm", "o_proj"],
    ),
    "phi3": dict(target_modules=["qkv_proj", "down_proj"], use_dora=True),
    "gpt2-hub": dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True),
    "gpt-neox": dict(target_modules="all-linear", exclude_modules=["dense"], use_dora=True),
    "cohere-qk-norm": dict(target_modules="all-linear", bias="lora_only"),
    "glm": dict(target_modules=["v_proj", "k_proj", "gate_up_proj"]),
    "gemma2": dict(target_modules=["o_proj"], trainable_token_indices=[3, 399, 7]),
    "mixtral": dict(
        target_modules=["v_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"],
        rank_pattern={"mlp.experts.gate_up_proj": 3, "mlp.gate.weight": 2}, alpha_pattern={"experts.down_proj": 5},
    ),
    "qwen3-moe": dict(target_modules="all-linear"),
    "qwen2-moe": dict(target_modules=["shared_expert.up_proj", "shared_expert_gate"]),
    "gpt-oss": dict(target_modules=["o_proj"], target_parameters=EXPERTS),
    "granite-moe": dict(
        target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj", "router.weight"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_merged_as_by_peft(tmp_path, monkeypatch, name):
    """Bit for bit, read in runs of a few rows; and the logits are those of the adapter beside the base."""
    monkeypatch.setattr(formats.packed, "CHUNK_BYTES", 5000)
    base = base_of(name, tmp_path)
    adapter = train(base, tmp_path / "adapter", **CASES[name])
    convert(base, tmp_path / "out", adapters=[(str(adapter), 1.0)])
    model = load_peft(base, adapter)
    expected = logits_of(model)
    with model.disable_adapter():
        assert (logits_of(model) - expected).abs().max() > 0.1  # it matters
    assert_close(our_logits(tmp_path / "out"), expected)
    assert_same(read_all(tmp_path / "out"), converted(model.merge_and_unload(), base, tmp_path / "peft", torch.float32))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert before == after


def test_stored_as_the_base(tmp_path):
    """A bfloat16 base: what peft makes of it in float32 and, of linear layers, in bfloat16."""
    base = base_of("llama", tmp_path, torch.bfloat16)
    adapter = train(base, tmp_path / "adapter", target_modules="all-linear", use_dora=True)
    convert(base, tmp_path / "out", adapters=[(str(adapter), 1.0)])
    ours = read_all(tmp_path / "out")
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    for dtype in (torch.float32, torch.bfloat16):
        merged = load_peft(base, adapter, dtype).merge_and_unload()
        assert_same(ours, converted(merged, base, tmp_path / str(dtype), torch.bfloat16))


def test_several_with_weights(tmp_path):
    base = base_of("llama", tmp_path)
    first = train(base, tmp_path / "first", target_modules=["q_proj", "up_proj"], use_dora=True)
    second = train(base, tmp_path / "second", seed=1, target_modules=["q_proj", "o_proj"], r=7)
    weights = (0.5, -1.25)
    convert(base, tmp_path / "out", adapters=[(str(first), weights[0]), (str(second), weights[1])])
    model = load_peft(base, first)
    model.load_adapter(second, "second")
    for adapter, weight in zip(("default", "second"), weights, strict=True):
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer) and adapter in module.scaling:
                module.set_scale(adapter, weight)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    assert_same(read_all(tmp_path / "out"), converted(merged, base, tmp_path / "peft", torch.float32))


def test_experts_one_by_one(tmp_path):
    """An adapter of transformers 4, in which experts were modules: peft stacks them, with gate and up in one."""
    base = base_of("qwen3-moe", tmp_path)
    config = peft.LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path / "adapter")
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(4):
        for expert in range(6):
            for part, (inputs, outputs) in dict(gate=(64, 32), up=(64, 32), down=(32, 64)).items():
                module = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
                tensors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(4, inputs, generator=generator)
                tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(outputs, 4, generator=generator)
    safetensors.torch.save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    convert(base, tmp_path / "out", adapters=[(str(tmp_path / "adapter"), 1.0)])
    model = load_peft(base, tmp_path / "adapter")
    expected = logits_of(model)
    with model.disable_adapter():
        assert (logits_of(model) - expected).abs().max() > 0.1
    assert_close(our_logits(tmp_path / "out"), expected)


def test_language_part_of_a_model_with_eyes(tmp_path):
    base = base_of("gemma3-eyes-newer", tmp_path)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_pretrained(base, attn_implementation="eager")
    config = peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    assert any("vision" in name for name in read_safetensors(tmp_path / "adapter" / "adapter_model.safetensors")[0])
    convert(base, tmp_path / "out", adapters=[(str(tmp_path / "adapter"), 1.0)])
    assert_close(our_logits(tmp_path / "out"), logits_of(model.eval()))


def test_quantized_base(tmp_path):
    """Becomes floats, and the last line says so."""
    made = make("gpt-oss-mxfp4", tmp_path)
    floats = tmp_path / "floats"
    made.reference.save_pretrained(floats)
    adapter = train(floats, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=EXPERTS)
    message = convert(made.folder, tmp_path / "out", adapters=[(str(adapter), 1.0)])
    assert "parameters, float32, " in message
    assert re.search(r"; as floats now: feed_forward\.experts\.w13 \(MXFP4\)", message), message
    merged = load_peft(floats, adapter).merge_and_unload()
    assert_same(read_all(tmp_path / "out"), converted(merged, floats, tmp_path / "peft", torch.float32))


def test_gguf_base(tmp_path):
    """Whose q and k have another order, and whose tensors other names, than those that were trained."""
    maker = GgufMaker({"token_embd": "Q8_0", "attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q8_0", "ffn_down": "Q6_K"})
    base = maker.write(tmp_path / "base.gguf")
    floats = tmp_path / "floats"
    maker.transformers().save_pretrained(floats)
    adapter = train(floats, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "up_proj", "down_proj"])
    convert(base, tmp_path / "out", torch.float32, adapters=[(str(adapter), 1.0)])
    merged = load_peft(floats, adapter).merge_and_unload()
    assert_same(read_all(tmp_path / "out"), converted(merged, floats, tmp_path / "peft", torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings, tied and not


def both_logits(base, adapter, out, prepare=None):
    convert(base, out, adapters=[(str(adapter), 1.0)])
    assert_close(our_logits(out), logits_of(load_peft(base, adapter, prepare=prepare)))
    return read_all(out)


@pytest.mark.parametrize("dora", [False, True])
def test_head_of_a_tied_base(tmp_path, dora):
    """The embedding stays as it was: the merged model is untied, in weights and config."""
    base = base_of("gemma", tmp_path)
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"], use_dora=dora)
    ours = both_logits(base, adapter, tmp_path / "out")
    embedding = safetensors.torch.load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(ours["tok_embeddings.weight"], embedding)
    assert not torch.equal(ours["output.weight"], embedding)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert load_config(base).tied and not load_config(tmp_path / "out").tied


@pytest.mark.parametrize(
    "tied, config",
    {
        "embedding": (False, dict(target_modules=["q_proj", "embed_tokens"])),
        "both": (False, dict(target_modules=["embed_tokens", "lm_head"])),
        "both with DoRA": (False, dict(target_modules=["embed_tokens", "lm_head"], use_dora=True)),
        "both, tied": (True, dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)),
        "embedding saved": (False, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
        "head saved": (False, dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
        "both saved": (False, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
        "saved, tied": (
            True, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        ),
        "tokens": (True, dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [9, 3]})),
    }.values(),
    ids=str,
)  # fmt: skip
def test_embeddings_of_a_tied_base(tmp_path, tied, config):
    base = base_of("gemma", tmp_path)
    adapter = train(base, tmp_path / "adapter", **config)
    ours = both_logits(base, adapter, tmp_path / "out")
    assert load_config(tmp_path / "out").tied == tied == ("output.weight" not in ours)
    if not tied:
        assert not torch.equal(ours["output.weight"], ours["tok_embeddings.weight"])


def test_embeddings_of_an_untied_base(tmp_path):
    base = base_of("llama", tmp_path)
    adapter = train(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head", "v_proj"])
    ours = both_logits(base, adapter, tmp_path / "out")
    merged = load_peft(base, adapter).merge_and_unload()
    assert_same(ours, converted(merged, base, tmp_path / "peft", torch.float32))


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=["q_proj", "down_proj"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [400, 415]}),
        dict(target_modules=["q_proj", "lm_head"]),
    ],
    ids=str,
)
def test_resized_vocabulary(tmp_path, name, config):
    """Larger than the base's; PEFT then saves the embeddings whole, with each of their wrappers; of a tied base with an
    adapted head only that."""
    base = base_of(name, tmp_path, num_hidden_layers=2)

    def resize(model):
        torch.manual_seed(3)
        model.resize_token_embeddings(416)

    adapter = train(base, tmp_path / "adapter", resize, **config)
    if name == "llama" and "lm_head" in config["target_modules"]:  # PEFT does not save the new rows of the embedding
        with pytest.raises(UserError, match=r"has 416 rows where .* 400, but 'model\.embed_tokens\.weight' has not"):
            convert(base, tmp_path / "out", adapters=[(str(adapter), 1.0)])
        return
    ours = both_logits(base, adapter, tmp_path / "out", resize)
    found = load_config(tmp_path / "out")
    assert found.vocab_size == 416 == len(ours["tok_embeddings.weight"])
    head_trained = "modules_to_save" in config or "lm_head" in config["target_modules"]
    assert found.tied == (name == "gemma" and not head_trained)


def test_tokens_of_an_untied_base(tmp_path):
    """Single rows of the embedding, whatever their order; the output has its own."""
    base = base_of("llama", tmp_path, torch.bfloat16)
    config = dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [31, 5], "lm_head": [2]})
    adapter = train(base, tmp_path / "adapter", **config)
    convert(base, tmp_path / "out", adapters=[(str(adapter), 1.0)])
    ours, saved = read_all(tmp_path / "out"), safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    before = safetensors.torch.load_file(base / "model.safetensors")
    for name, source, ids in (("tok_embeddings", "model.embed_tokens", [31, 5]), ("output", "lm_head", [2])):
        expected = before[f"{source}.weight"].clone()
        expected[ids] = saved[f"base_model.model.{source}.token_adapter.trainable_tokens_delta"].bfloat16()
        assert torch.equal(ours[f"{name}.weight"], expected)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base and an adapter for it. Not to be written to."""
    folder = tmp_path_factory.mktemp("pair")
    base = base_of("llama", folder, num_hidden_layers=2)
    return base, train(base, folder / "adapter", target_modules=["q_proj", "down_proj"], use_dora=True)


def changed(pair, folder, fields=None, tensors=None):
    """A copy of the adapter with other fields, and with tensors changed by a function of their dict."""
    adapter = shutil.copytree(pair[1], folder / "changed", dirs_exist_ok=True)
    if fields:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | fields))
    if tensors:
        stored = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
        tensors(stored)
        safetensors.torch.save_file(stored, adapter / "adapter_model.safetensors")
    return adapter


def read_for(pair, adapter, base=None):
    return read_adapter(adapter, json.loads((pair[0] / "config.json").read_text()), base)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"peft_type": "IA3"}, r"peft_type: 'IA3' is not supported, only 'LORA' is; merge it with peft"),
        ({"peft_type": None}, "peft_type: the field is missing"),
        ({"lora_bias": True}, "lora_bias: a bias of its own is not supported"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: an activated LoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: "),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: block-diagonal LoRA"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config: KaSA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changed the base's weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"r": 8}, r"'model\.layers\.\d\.\S+' is adapted with the rank 4, .*json says 8"),
        ({"r": "4"}, "r: '4' is not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: nan is out of range"),
        ({"use_rslora": "yes"}, "use_rslora: 'yes' is neither true nor false"),
        (
            {"rank_pattern": {"q_proj": 3}},
            "'model.layers.0.self_attn.q_proj.weight' is adapted with the rank 4, adapter_config.json says 3",
        ),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern: .*is no regular expression"),
        ({"alpha_pattern": {"(?i)q_proj": 3}}, "alpha_pattern: .*is no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern: is not an object"),
    ],
)
def test_configs_that_are_refused(pair, tmp_path, fields, match):
    with pytest.raises(UserError, match=match) as caught:
        read_for(pair, changed(pair, tmp_path, fields))
    assert "\n" not in str(caught.value)


Q = "base_model.model.model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(
    "change, match",
    [
        # As DeepSpeed's ZeRO-3 saves it, whose weights lie on other ranks.
        (
            lambda t: t.update({Q + "lora_B.weight": torch.zeros(0)}),
            r"q_proj.lora_B.weight' has the shape \[0\].*ZeRO-3",
        ),
        (lambda t: t.pop(Q + "lora_B.weight"), "q_proj.lora_B' is missing, though lora_A of it is there"),
        (lambda t: t.pop(Q + "lora_A.weight"), "q_proj.lora_A' is missing, though lora_B of it is there"),
        (lambda t: t.update({Q + "lora_A.weight": torch.ones(4, 63)}), "63 inputs and 64 outputs, the base's has 64"),
        (lambda t: t.update({Q + "lora_B.weight": torch.ones(64, 5)}), "has the rank 4, lora_B 5"),
        (lambda t: t.update({Q + "lora_B.weight": torch.ones(64)}), r"has the shape \[64\], not that of a matrix"),
        (lambda t: t.update({Q + "lora_magnitude_vector": torch.ones(63)}), "lora_magnitude_vector' has 63 elements"),
        (lambda t: t.update({Q + "lora_E": torch.ones(4, 1)}), "lora_E' is no part of a plain LoRA"),
        (lambda t: t.update({Q + "lora_A.weight": torch.full((4, 64), torch.nan)}), "holds NaN or infinity"),
        (lambda t: t.update({Q + "lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}), "is torch.int8, not a float"),
        (
            lambda t: t.update({name.replace("q_proj", "c_attn"): t.pop(name) for name in list(t) if "q_proj" in name}),
            "c_attn.lora_A' adapts nothing that the base has",
        ),
        (lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 64)}), "'score.weight' belongs to nothing"),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(60)}),
            r"shape \[60\], the base's \[64\]",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(416, 64)}),
            "'model.embed_tokens.weight' has 416 rows where the base has 400, but 'lm_head.weight' has not",
        ),
        (lambda t: t.clear(), "holds no tensor"),
    ],
)
def test_tensors_that_are_refused(pair, tmp_path, change, match):
    with pytest.raises(UserError, match=match) as caught:
        read_for(pair, changed(pair, tmp_path, tensors=change))
    assert "\n" not in str(caught.value)


def test_other_folders(pair, tmp_path):
    """None, an empty one, that of the training run, one without weights."""
    run = tmp_path / "run"
    with pytest.raises(UserError, match="run is not there; name the folder of an adapter, or its ORG/NAME"):
        read_for(pair, run)
    shutil.copytree(pair[1], run / "checkpoint-3")
    with pytest.raises(UserError, match=r"run has no adapter_config.json, but checkpoint-3 in it have"):
        read_for(pair, run)
    (run / "checkpoint-3" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors or adapter_model.bin; save"):
        read_for(pair, run / "checkpoint-3")
    with pytest.raises(UserError, match=r"a LoRA adapter \(adapter_config.json\); name it as --adapter, and its base"):
        convert(pair[1], tmp_path / "out")


def test_another_base(pair, tmp_path, capsys):
    """A name that differs is a warning, a shape that does an error."""
    adapter = changed(pair, tmp_path, {"base_model_name_or_path": "org/Tiny-Llama"})
    read_for(pair, adapter, "other/tiny-llama")
    assert capsys.readouterr().err == ""
    read_for(pair, adapter, "other/llama")
    assert "was trained on 'org/Tiny-Llama', not on 'other/llama'" in capsys.readouterr().err
    qwen = base_of("qwen3", tmp_path)
    with pytest.raises(UserError, match=r"tensor 'model\.layers\.0\.self_attn.q_proj.lora_A' and lora_B adapt a layer"):
        convert(qwen, tmp_path / "out", adapters=[(str(adapter), 1.0)])
    assert not (tmp_path / "out").exists()


def test_two_adapters_that_replace_the_same(tmp_path):
    base = base_of("llama", tmp_path, num_hidden_layers=2)
    for name in "ab":
        train(base, tmp_path / name, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"the adapters a and b both replace 'output.weight'; merge one of them"):
        convert(base, tmp_path / "out", adapters=[(str(tmp_path / "a"), 1.0), (str(tmp_path / "b"), 1.0)])


def test_pickled(pair, tmp_path):
    adapter = changed(pair, tmp_path)
    torch.save(safetensors.torch.load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    found, expected = read_for(pair, adapter), read_for(pair, pair[1])
    assert found.deltas.keys() == expected.deltas.keys() and found.is_dora
    for ours, parts in expected.deltas.items():
        assert torch.equal(found.deltas[ours][0].b, parts[0].b)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config(pair, tmp_path, data):
    """Whatever adapter_config.json says: an adapter, or one line."""
    names = list(json.loads((pair[1] / "adapter_config.json").read_text()))
    fields = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    try:
        read_for(pair, changed(pair, tmp_path, fields), "org/llama")
    except UserError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# The command line, the hub, and LLaMA-Factory's folders


@pytest.fixture
def convert_script(monkeypatch, tmp_path, script):
    """Runs `convert_hf_checkpoint.py ARGS...` in this process, in a folder of its own."""

    def run(*args):
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            return script(*args, main=convert_hf_checkpoint.main)

    return run


def test_where_it_is_written(pair, tmp_path, convert_script):
    """Never to the base's folder by itself, and never over another model."""
    base, adapter = shutil.copytree(pair[0], tmp_path / "hf"), tmp_path / "saves" / "sft"
    shutil.copytree(pair[1], adapter)
    shutil.copytree(pair[1], adapter / "checkpoint-3")
    places = {
        (): "hf",
        ("--adapter", adapter): "hf+sft",
        ("--adapter", f"{adapter}=0.5", "--adapter", adapter / "checkpoint-3"): "hf+sft=0.5+sft-checkpoint-3",
    }
    for args, name in places.items():
        done = convert_script("--checkpoint_dir", base, *args)
        assert done.code == 0 and f"wrote checkpoints/local/{name}:" in done.err, done.err
    weights = [read_all(tmp_path / "checkpoints" / "local" / name) for name in places.values()]
    q = [tensors["layers.0.attention.wqkv.weight"] for tensors in weights]
    assert not torch.equal(q[0], q[1]) and not torch.equal(q[1], q[2])
    folder = tmp_path / "checkpoints" / "local" / "hf"
    done = convert_script("--checkpoint_dir", base, "--adapter", adapter, "--out", folder)
    assert_refused(done, "holds another model", "--overwrite")
    for args, words in (
        (("--adapter", f"{adapter}=much"), "'much' is not a number"),
        (("--adapter", adapter, "--out", adapter), "which no conversion wrote"),
        (("--adapter", adapter, "--out", base), "is the source itself"),
        (("--adapter", tmp_path / "none"), "is not there"),
    ):
        assert_refused(convert_script("--checkpoint_dir", base, *args), words)


def test_from_the_hub(pair, tmp_path):
    """What of an adapter is needed is fetched, and found again offline."""
    repo = shutil.copytree(pair[1], tmp_path / "hub" / "org" / "sft")
    (repo / "optimizer.pt").write_bytes(b"x" * 1000)
    make_tokenizer(repo, CHAT_TEMPLATE)
    code = """
from huggingface_hub import constants
from lora import find_adapter
for constants.HF_HUB_OFFLINE in (False, True):
    print(find_adapter("org/sft"))
"""
    with FakeHub(tmp_path / "hub") as hub:
        environment = os.environ | hub.env(tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        first, again = map(Path, done.stdout.splitlines())
    assert first == again and first.name == SHA and hub.fetched().count("adapter_config.json") == 1
    assert "optimizer.pt" not in hub.fetched() and (first / "tokenizer.json").is_file()
    assert read_for(pair, first).rank == 4


def as_llama_factory(adapter):
    """What its training leaves beside the adapter."""
    for name in ("train_results.json", "all_results.json", "trainer_state.json"):
        (adapter / name).write_text("{}")
    (adapter / "trainer_log.jsonl").write_text("{}\n")
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    (adapter / "training_loss.png").write_bytes(b"\x89PNG")
    torch.save({"learning_rate": 1e-4}, adapter / "training_args.bin")
    last = adapter / "checkpoint-3"
    last.mkdir()
    for file in [file for file in adapter.iterdir() if file.is_file()]:
        shutil.copy(file, last)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, last / name)


def chat(script, folder):
    (sample,) = parse(
        script(
            "--checkpoint_path", folder, "--chat", "--prompt", "hi", "--json", "--max_new_tokens", 4, "--temperature", 0
        )
    )
    return sample["text"]


def test_adapter_of_llama_factory(tmp_path, convert_script, script):
    """Converted, chatted with by the template that was trained, with a token that was added for it, and quantized."""
    base, adapter = base_of("llama", tmp_path, num_hidden_layers=2), tmp_path / "sft"

    def resize(model):
        torch.manual_seed(3)
        model.resize_token_embeddings(448)

    train(base, adapter, resize, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
    make_tokenizer(adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|turn|>")
    tokenizer.save_pretrained(adapter)
    as_llama_factory(adapter)
    out = tmp_path / "checkpoints" / "local" / "hf+sft"
    done = convert_script("--checkpoint_dir", base, "--adapter", adapter)
    assert done.code == 0, done.err
    assert sorted(path.name for path in out.iterdir() if "token" in path.name or "template" in path.name) == sorted(
        path.name for path in adapter.iterdir() if path.is_file() and ("token" in path.name or "template" in path.name)
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    model = load_peft(base, adapter, prepare=resize)
    new = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=2)[0, prompt.shape[1] :]
    assert chat(script, out) == tokenizer.decode(new, skip_special_tokens=True)
    last = convert_script("--checkpoint_dir", base, "--adapter", adapter / "checkpoint-3")
    assert last.code == 0 and "local/hf+sft-checkpoint-3" in last.err, last.err
    chat(script, quantize.quantize(out, "int8"))


def test_exports_of_llama_factory(tmp_path, convert_script, script):
    """A merged model in shards, and one that was quantized by GPTQ, each with its template."""
    base = base_of("qwen2", tmp_path)
    merged = load_peft(base, train(base, tmp_path / "adapter", target_modules="all-linear")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", max_shard_size="200KB")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    make_gptq(tmp_path / "gptq", Maker("v1", 32, symmetric=True), "Qwen2")
    for name in ("merged", "gptq"):
        make_tokenizer(tmp_path / name, CHAT_TEMPLATE, vocab_size=300)
        (tmp_path / name / "Modelfile").write_text("FROM .\n")  # ollama's
        done = convert_script("--checkpoint_dir", tmp_path / name)
        assert done.code == 0, done.err
        assert re.search(r"int4-g32 \(gptq\)" if name == "gptq" else "parameters, float32", done.err)
        chat(script, tmp_path / "checkpoints" / "local" / name)
    (tmp_path / "calibration.txt").write_text(TEXT * 3)
    for mode in ("int4", "int4-gptq"):
        folder = tmp_path / "checkpoints" / "local" / "merged"
        chat(script, quantize.quantize(folder, mode, calibration=tmp_path / "calibration.txt"))
