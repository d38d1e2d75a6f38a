"""config.py against transformers' own config classes: what they default to, and which of their fields matter."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from config import ModelConfig
from config_fields import IGNORED, READ, REFUSED, read_by, unknown_fields
from errors import UserError
from families import FAMILIES, REASONS

CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "ministral": "Ministral", "ministral3": "Ministral3", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "phi": "Phi", "phi3": "Phi3",
    "smollm3": "SmolLM3", "olmo": "Olmo", "olmo2": "Olmo2", "olmo3": "Olmo3", "granite": "Granite", "cohere": "Cohere",
    "cohere2": "Cohere2", "glm": "Glm", "glm4": "Glm4", "stablelm": "StableLm", "starcoder2": "Starcoder2",
    "seed_oss": "SeedOss", "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe", "granitemoe": "GraniteMoe", "granitemoeshared": "GraniteMoeShared",
    "gpt_oss": "GptOss",
}  # fmt: skip
SMALL = {  # by Llama's names; those below the first line where the class has them
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1,
    "pad_token_id": 0,
}  # fmt: skip
SPECIAL = {  # where the class has them
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "no_rope_layer_interval": 2,
}  # fmt: skip
OTHERS = {  # another value of a field that does not follow from its type
    "hidden_act": "quick_gelu", "dtype": "bfloat16", "layer_types": ["full_attention"] * 2,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "architectures": ["LlamaModel"],
    "problem_type": "regression", "id2label": {"0": "a"}, "label2id": {"a": 0}, "transformers_version": "4.0.0",
    "attention_dropout": 0.5, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 1,
    "max_window_layers": 0, "sliding_window": 2, "use_sliding_window": False, "rms_norm_eps": 0.5,
    "max_position_embeddings": 32, "initializer_range": 0.5, "no_rope_layers": [0, 1], "mlp_only_layers": [0],
    "summary_type": "first", "num_experts_per_tok": 1,
}  # fmt: skip
# What older versions of transformers wrote, and today's still read.
LEGACY = {"rope_theta": 3e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16",
          "partial_rotary_factor": 0.75, "attn_implementation": "eager", "temperature": 0.5}  # fmt: skip


def config_class(family: str) -> type[transformers.PreTrainedConfig]:
    return getattr(transformers, f"{CLASSES[family]}Config")


def class_fields(family: str) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class(family)) if not field.name.startswith("_")]


def spelled(family: str, fields: dict[str, object]) -> dict[str, object]:
    """Fields that go by Llama's names, by those of the family."""
    known, renamed = class_fields(family), FAMILIES[family].renamed
    return {name if name in known else renamed.get(name, name): value for name, value in fields.items()}


@functools.cache
def small(family: str) -> dict[str, object]:
    known = class_fields(family)
    return spelled(family, SMALL) | {name: value for name, value in SPECIAL.items() if name in known}


def fields_of(family: str) -> dict[str, object]:
    """Each field of the family's class, with another value than that of the small model."""
    config, others = config_class(family)(**small(family)), spelled(family, OTHERS)
    changed = {}
    for name in class_fields(family):
        value = getattr(config, name)
        if name in others:
            changed[name] = others[name]
        else:
            changed[name] = not value if isinstance(value, bool) else (value or 0) + 1
    return changed | LEGACY


@functools.cache
@torch.no_grad()
def logits(family: str, changes: str) -> torch.Tensor | None:
    """Those of transformers for the small model with these fields (JSON), its weights from one seed for each name and
    shape; None where transformers itself fails with them."""
    try:
        config = config_class(family)(**small(family) | {"attn_implementation": "eager"} | json.loads(changes))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(sum(name.encode())))
        return model(torch.arange(20)[None]).logits
    except Exception:
        return None


@pytest.mark.parametrize("family", CLASSES)
def test_every_field_of_transformers_is_read_or_refused_or_does_not_matter(family):
    """Where a field leaves our config as it is, the logits of transformers stay as they are."""
    plain = {"model_type": family} | small(family)
    ours, theirs = ModelConfig.from_hf(plain), logits(family, "{}")
    assert theirs is not None and theirs.isfinite().all()
    refused, read, harmless = [], [], []
    own = {"partial_rotary_factor", "rotary_pct"} & read_by(FAMILIES[family])
    for name, value in fields_of(family).items():
        changed = plain | {name: value}
        assert unknown_fields(changed) == [], name
        try:
            other = ModelConfig.from_hf(changed)
        except UserError as error:
            assert name in str(error) or name in ("rope_scaling", "rope_parameters")
            refused.append(name)
            continue
        if other != ours:
            read.append(name)
            continue
        harmless.append(name)
        after = logits(family, json.dumps({name: value}))
        assert after is None or torch.equal(after, theirs), name
        assert name in READ | IGNORED | read_by(FAMILIES[family]) | REFUSED.keys()
    print(family, "R", refused, "READ", read, "H", harmless)


@pytest.mark.parametrize("family", CLASSES)
def test_missing_fields_have_the_defaults_of_transformers(family):
    """A config of nothing but the family is that which transformers writes out in full, and so without each field."""
    full = json.loads(config_class(family)().to_json_string(use_diff=False)) | {"architectures": None}
    assert ModelConfig.from_hf({"model_type": family}) == ModelConfig.from_hf(full)
    assert unknown_fields(full) == []
    for changes in (small(family), small(family) | spelled(family, {"num_attention_heads": 32, "hidden_size": 64})):
        for left_out in (*changes, *spelled(family, {"rms_norm_eps": 0, "rope_theta": 0})):
            given = {name: value for name, value in changes.items() if name != left_out}
            written = json.loads(config_class(family)(**given).to_json_string(use_diff=False)) | {"architectures": None}
            try:
                theirs = ModelConfig.from_hf(written)
            except UserError:
                continue  # 32 key heads, and 4 queries
            assert ModelConfig.from_hf({"model_type": family} | given) == theirs, left_out


def test_the_first_llama():
    """The config of the first 7B repos: its own spelling of the class and of the context."""
    config = {
        "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1,
        "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True,
        "vocab_size": 32000,
    }  # fmt: skip
    read = ModelConfig.from_hf(config)
    assert read == ModelConfig.from_hf({"model_type": "llama"}) and unknown_fields(config) == []
    assert ModelConfig.from_hf(config | {"max_sequence_length": 512}).context_length == 512
    assert ModelConfig.from_hf(config | {"max_position_embeddings": 1024}).context_length == 1024


def test_unknown_fields_are_named_and_known_ones_not():
    config = {"model_type": "llama"} | {
        "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "attn_implementation": "sdpa",
        "neftune_noise_alpha": 5.0, "_flash_attn_2_enabled": True, "pretraining_tp": 2, "rotary_pct": 1.0,
        "text_config": {"newer": 1}, "newest": [1], "empty": [], "off": False,
    }  # fmt: skip
    assert ModelConfig.from_hf(config) == ModelConfig.from_hf({"model_type": "llama"})
    assert unknown_fields(config) == ["newer", "newest"]


def test_fields_that_would_matter_are_refused():
    """Each is a field of a config class of transformers, or of the public code of MiniCPM, ChatGLM, Falcon or MPT."""
    files = Path(transformers.__file__).parent.glob("models/*/configuration_*.py")
    known = set(re.findall(r"\w+", " ".join(file.read_text() for file in files)))
    elsewhere = {"scale_emb", "scale_depth", "block_configs", "per_layer_config", "pruned_heads", "add_cross_attention",
                 "transformers_weights", "norm_type", "use_moe",
                 "qk_norm"}  # fmt: skip
    assert REFUSED.keys() - known <= elsewhere
    assert not REFUSED.keys() & (READ | IGNORED)
    for name, inert in REFUSED.items():
        with pytest.raises(UserError, match=f"config.json: {name}: 0.25: this field is not supported"):
            ModelConfig.from_hf({"model_type": "llama", name: 0.25})
        ModelConfig.from_hf({"model_type": "llama", name: inert})


def test_families_are_complete():
    assert set(FAMILIES) == {*CLASSES, "minimind"}
    assert not REASONS.keys() & FAMILIES.keys()
    with pytest.raises(UserError, match="num_hidden_layers: the field is missing"):
        ModelConfig.from_hf({"model_type": "minimind"})
    config = {"model_type": "minimind", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    config |= {"vocab_size": 6400, "max_position_embeddings": 32768, "num_key_value_heads": 2}
    read = ModelConfig.from_hf(config)
    assert (read.ffn_dim, read.norm_eps, read.rope.theta, read.tied) == (1408, 1e-5, 1e6, True)
    with pytest.raises(UserError, match=r"quantization: weights that mlx quantized .*; convert the original"):
        ModelConfig.from_hf({"model_type": "llama", "quantization": {"bits": 4}, "quantization_config": {"bits": 4}})
