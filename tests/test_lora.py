"""Adapters that PEFT trained and saved, read by lora.py and merged by the converter, against PEFT itself."""

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from family_models import make

import formats.packed
from checkpoint import load_config, load_model
from convert_hf_checkpoint import convert
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
    "mixtral": dict(target_modules=["v_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"]),
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
    assert "; as floats now: feed_forward.experts.w13" in message and "(mxfp4)" in message
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
def test_resized_vocabulary(tmp_path, name):
    """Larger than the base's; PEFT then saves the embeddings whole."""
    base = base_of(name, tmp_path)

    def resize(model):
        torch.manual_seed(3)
        model.resize_token_embeddings(416)

    adapter = train(base, tmp_path / "adapter", resize, target_modules=["q_proj", "down_proj"])
    ours = both_logits(base, adapter, tmp_path / "out", resize)
    assert load_config(tmp_path / "out").vocab_size == 416 == len(ours["tok_embeddings.weight"])
    assert load_config(tmp_path / "out").tied == (name == "gemma")
