"""config.py against transformers' own config classes: what they default to, and which of their fields matter."""

import contextlib
import copy
import dataclasses
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from config import ModelConfig
from config_fields import ACTIVATIONS, IGNORED, READ, REASONS, REFUSED, read_by, unknown_fields
from convert_hf_checkpoint import read_planned
from errors import UserError
from families import FAMILIES
from formats.names import plan_tensors
from model import Transformer, expected_shapes
from weights import read_safetensors

CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "ministral": "Ministral", "ministral3": "Ministral3", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "phi": "Phi", "phi3": "Phi3",
    "smollm3": "SmolLM3", "olmo": "Olmo", "olmo2": "Olmo2", "olmo3": "Olmo3", "granite": "Granite", "cohere": "Cohere",
    "cohere2": "Cohere2", "glm": "Glm", "glm4": "Glm4", "stablelm": "StableLm", "starcoder2": "Starcoder2",
    "seed_oss": "SeedOss", "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe", "granitemoe": "GraniteMoe", "granitemoeshared": "GraniteMoeShared",
    "gpt_oss": "GptOss",
}  # fmt: skip
SMALL = {  # by Llama's names
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1,
    "pad_token_id": 0,
}  # fmt: skip
SPECIAL = {  # where the class has them
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "no_rope_layer_interval": 2, "original_max_position_embeddings": 16,
}  # fmt: skip
DEEP = {  # so that some layer has no window
    "cohere2": {"sliding_window_pattern": 2}, "gemma3_text": {"sliding_window_pattern": 2},
    "olmo3": {"num_hidden_layers": 4},
}  # fmt: skip
TOKENS = torch.arange(24)[None]
NESTED = {"model_type", "text_config", "quantization_config"}  # what all other fields mean depends on these
PLAIN = {"rope_type": "default", "rope_theta": 100.0}  # so that few tokens show what it changes
LINEAR = PLAIN | {"rope_type": "linear", "factor": 2.0}
YARN = PLAIN | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA_3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = PLAIN | {"rope_type": "longrope"}
OLDER = {"rope_type": "linear", "factor": 2.0}
OTHERS = {  # other values, where they do not follow from the type
    "architectures": ["LlamaModel"], "attention_dropout": 0.5, "attn_implementation": "eager",
    "attn_logit_softcapping": 2.0, "attn_pdrop": 0.5, "auto_map": {}, "cache_implementation": "static", "clip_qkv": 0.5,
    "dtype": "bfloat16", "embd_pdrop": 0.5, "eos_token_id": 3, "experts_implementation": "eager",
    "final_logit_softcapping": 2.0, "head_dim": 24, "hidden_act": "quick_gelu", "hidden_size": 96,
    "id2label": {"0": "a"}, "initializer_range": 0.5, "intermediate_size": 44, "label2id": {"a": 0},
    "max_position_embeddings": 32, "max_sequence_length": 128, "max_window_layers": 0, "mlp_only_layers": [0],
    "moe_intermediate_size": 28, "no_rope_layers": [0, 1], "num_attention_heads": 2, "num_experts": 5,
    "num_experts_per_tok": 1, "num_hidden_layers": 1, "num_labels": 1, "num_key_value_heads": 4, "num_local_experts": 5,
    "original_max_position_embeddings": 8, "partial_rotary_factor": 0.75, "problem_type": "regression",
    "query_pre_attn_scalar": 20, "resid_pdrop": 0.5, "residual_dropout": 0.5, "rms_norm_eps": 0.5,
    "rope_parameters": YARN, "rope_theta": 3e3, "rope_local_base_freq": 3e3,
    "rope_scaling": {"type": "linear", "factor": 2.0}, "router_jitter_noise": 0.5, "sliding_window": 2,
    "sliding_window_pattern": 1, "summary_activation": "tanh", "summary_type": "first", "temperature": 0.5,
    "torch_dtype": "float16", "transformers_version": "4.0.0", "use_sliding_window": False,
}  # fmt: skip
ROPES = {  # of families that have none of the usual ones
    "ministral3": [YARN | {"llama_4_scaling_beta": 0.3}, YARN | {"llama_4_scaling_beta": 0.1, "truncate": False}],
    "phi3": [LONGROPE | {"short_factor": [1.0, 1.5] * 4, "long_factor": [2.0, 3.5] * 4}],
}
# OLMo 3's older rope_theta is that of all layers, and so it is here; Olmo3Config 5 forgets it for those with a window.
UNLIKE_TRANSFORMERS = {("olmo3", "rope_theta")}
# Fields that families read as Llama does, and those that do not.
AS_LLAMA = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta",
}  # fmt: skip
UNLIKE_LLAMA = {
    "gpt2": {"rope_parameters", "rope_scaling", "rope_theta"},  # it has none
    "gpt_oss": {"max_position_embeddings"},  # its rope_parameters have defaults that count more
    "ministral3": {"max_position_embeddings", "rope_theta"},  # likewise
    "olmo": {"rms_norm_eps"},  # it is fixed
    "olmo3": {"rope_theta"},  # see above
    "phi": {"tie_word_embeddings"},  # refused
}
REFUSED_OF_THEIR_OWN = {"architectures", "tie_word_embeddings", "use_bidirectional_attention", "add_cross_attention"}


def config_class(family: str) -> type[transformers.PreTrainedConfig]:
    return getattr(transformers, f"{CLASSES[family]}Config")


@functools.cache
def class_fields(family: str) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class(family)) if not field.name.startswith("_")]


def spelled(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields that go by Llama's names, by those of the family's class."""
    known, names = class_fields(family), FAMILIES[family]
    second = {ours: theirs for theirs, ours in names.also.items()}
    return {
        name if name in known else names.renamed.get(name) or second.get(name, name): value
        for name, value in fields.items()
    }


@functools.cache
def small(family: str) -> dict[str, Any]:
    special = {name: value for name, value in SPECIAL.items() if name in class_fields(family)}
    return spelled(family, SMALL) | special | DEEP.get(family, {})


def changed(family: str) -> dict[str, Any]:
    """Each field of the family's class, and each that we know of any, with another value than the small model's."""
    config, others = config_class(family)(**small(family)), OTHERS | spelled(family, OTHERS)
    others["layer_types"] = ["full_attention"] * config.num_hidden_layers
    if FAMILIES[family].window_theta:
        others |= {"rope_parameters": {"full_attention": YARN, "sliding_attention": LINEAR}, "rope_scaling": OLDER}
    if family in ROPES:
        others |= dict.fromkeys(("rope_parameters", "rope_scaling"), ROPES[family][0])
    fields = {}
    for name in (*class_fields(family), *sorted(read_by(FAMILIES[family]) | READ | IGNORED | REFUSED.keys())):
        value = getattr(config, name) if name in class_fields(family) else None
        if name in others:
            fields[name] = others[name]
        elif name not in NESTED:
            fields[name] = 3 if value is None else not value if isinstance(value, bool) else value + 1
    if "head_dim" not in class_fields(family):  # then parts of its code follow it nevertheless
        del fields["head_dim"]
    return fields


def with_change(family: str, name: str, value: Any) -> dict[str, Any]:
    """The fields of the small model, one of them with another value; what it is also called is left out."""
    also = FAMILIES[family].also
    meaning = also.get(name, name)
    return {other: kept for other, kept in small(family).items() if also.get(other, other) != meaning} | {name: value}


@torch.no_grad()
def theirs(family: str, fields: dict[str, Any]) -> tuple[transformers.PreTrainedModel, torch.Tensor]:
    """The model of transformers with these fields and its logits. Weights come from a seed for each name and shape."""
    kind = "ministral" if family == "mistral" and fields.get("layer_types") else family  # as AutoConfig has it
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = config_class(kind)(**eager | copy.deepcopy(fields))
    config.return_dict = True
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(sum(name.encode())))
    return model, model(TOKENS).logits


@torch.no_grad()
def ours(family: str, config: ModelConfig, model: transformers.PreTrainedModel, folder: Path) -> torch.Tensor:
    """The logits of our model with the weights of theirs, as transformers saves them."""
    model.save_pretrained(folder)
    plan = plan_tensors(config, read_safetensors(folder / "model.safetensors")[0], FAMILIES[family].names)
    shapes = expected_shapes(config)
    loaded = Transformer(config)
    loaded.load_state_dict({name: torch.cat([*read_planned(plan, name)]).view(shapes[name]) for name in shapes})
    loaded.setup_caches(1, 32)
    return loaded.eval()(TOKENS, torch.arange(TOKENS.shape[1])[None])


def compare(family: str, changes: Iterable[tuple[str, Any]], folder: Path) -> dict[str, set[str]]:
    """Changes the small model's fields, one at a time -> the names of those that are refused, those that are read,
    which change our logits as they do those of transformers, and those that leave both as they are."""
    config = ModelConfig.from_hf({"model_type": family} | small(family))
    model, logits = theirs(family, small(family))
    assert_close(ours(family, config, model, folder), logits, "")
    found, harmless = {"refused": set(), "read": set()}, []
    for name, value in changes:
        fields = with_change(family, name, value)
        full = {"model_type": family} | fields
        assert unknown_fields(full) in ([], [name] if name in FAMILIES[family].renamed else [])
        try:
            other = ModelConfig.from_hf(full)
        except UserError as error:
            assert re.search(name if name not in ("rope_scaling", "rope_parameters") else "rope", str(error))
            found["refused"].add(name)
            continue
        if other == config:
            harmless.append((name, value))
        elif (family, name) not in UNLIKE_TRANSFORMERS:
            found["read"].add(name)
            model, after = theirs(family, fields)
            assert_close(ours(family, other, model, folder), after, name)
    at_once = dict(harmless)
    if len(at_once) < len(harmless) or not torch.equal(theirs(family, small(family) | at_once)[1], logits):
        for name, value in harmless:
            assert torch.equal(theirs(family, with_change(family, name, value))[1], logits), name
    return found | {"harmless": {name for name, _ in harmless}}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    error, limit = (ours - theirs).abs().max().item(), 1e-4 * theirs.abs().max().item()
    assert error <= limit, f"{what}: {error} is more than {limit}"


@pytest.mark.parametrize("family", CLASSES)
def test_every_field_of_transformers_is_read_or_refused_or_does_not_matter(family, tmp_path):
    found = compare(family, changed(family).items(), tmp_path)
    own = read_by(FAMILIES[family])
    as_llama = AS_LLAMA - UNLIKE_LLAMA.get(family, set())
    (activation,) = spelled(family, {"hidden_act": "quick_gelu"})
    assert {"architectures", activation, *REFUSED.keys() - own} <= found["refused"]
    assert found["refused"] & {*class_fields(family)} <= {activation, *REFUSED_OF_THEIR_OWN}
    assert {*spelled(family, FAMILIES[family].reads | dict.fromkeys(as_llama))} <= found["read"]
    assert (IGNORED - own) | {*FAMILIES[family].ignores} <= found["harmless"]


@pytest.mark.parametrize("family", CLASSES)
def test_activations(family, tmp_path):
    (name,) = spelled(family, {"hidden_act": "silu"})
    every = ACTIVATIONS if family == "llama" else ("gelu", "relu")
    found = compare(family, [(name, activation) for activation in every], tmp_path)
    assert found["read"] == ({name} if family != "gpt_oss" else set())
    assert bool(found["refused"]) == (family == "gpt_oss")


@pytest.mark.parametrize("family", CLASSES)
def test_fields_that_are_null(family, tmp_path):
    """Where transformers accepts that, it means the same here."""
    changes = []
    for name in class_fields(family):
        with contextlib.suppress(Exception):
            theirs(family, with_change(family, name, None))
            changes.append((name, None))
    assert changes and not compare(family, changes, tmp_path)["refused"]


@pytest.mark.parametrize("family", CLASSES)
def test_ropes(family, tmp_path):
    """Where they are now and where they were, for all of each head and for a part, one for all layers or nested."""
    named, part = FAMILIES[family], "partial_rotary_factor"
    ropes = ROPES.get(family, [LINEAR, LLAMA_3, YARN, YARN | {"truncate": False}, PLAIN])
    ropes = ropes + [
        {name: value[:6] if isinstance(value, list) else value for name, value in rope.items()} | {part: 0.75}
        for rope in ropes
    ]
    changes = [(place, rope) for place in ("rope_parameters", "rope_scaling") for rope in ropes]
    if named.window_theta:
        nested = [{"full_attention": rope, "sliding_attention": LINEAR} for rope in ropes]
        changes += [("rope_parameters", rope) for rope in nested]

    def is_supported(place: str, rope: dict[str, Any]) -> bool:
        if named.window_theta:  # transformers overlooks `truncate` here, and what is not nested
            if place == "rope_parameters" and "full_attention" not in rope:
                return False
            rope = rope.get("full_attention", rope)
            return part not in rope and "truncate" not in rope
        return part not in rope or part in named.reads or named.rotated == "none"

    supported = [change for change in changes if is_supported(*change)]
    assert not compare(family, supported, tmp_path)["refused"]
    found = compare(family, [change for change in changes if change not in supported], tmp_path)
    assert not found["read"] and not found["harmless"]


@pytest.mark.parametrize("family", ["llama", "stablelm", "gemma3_text"])
def test_an_older_rope_counts_more_than_a_newer_one(family, tmp_path):
    newer = {"full_attention": YARN, "sliding_attention": PLAIN} if FAMILIES[family].window_theta else YARN
    fields = small(family) | {"rope_theta": 1e3, "rope_parameters": newer, "rope_scaling": OLDER}
    model, logits = theirs(family, fields)
    config = ModelConfig.from_hf({"model_type": family} | fields)
    assert_close(ours(family, config, model, tmp_path), logits, "")
    assert config.rope.type == "linear"


@pytest.mark.parametrize("family", CLASSES)
def test_missing_fields_have_the_defaults_of_transformers(family):
    """A config of nothing but the family is that which transformers writes out in full, and so without each field."""
    full = json.loads(config_class(family)().to_json_string(use_diff=False)) | {"architectures": None}
    assert ModelConfig.from_hf({"model_type": family}) == ModelConfig.from_hf(full)
    assert unknown_fields(full) == []
    # The other sizes are divisible by all numbers of heads that are a default.
    wide = small(family) | spelled(family, {"hidden_size": 1536, "num_attention_heads": 32})
    wide |= {name: 16 for name in ("num_experts", "num_local_experts") if name in small(family)}
    read = set()
    for changes in (small(family), wide):
        for left_out in (*changes, *spelled(family, {"rms_norm_eps": 0, "rope_theta": 0})):
            given = {name: value for name, value in changes.items() if name != left_out}
            written = json.loads(config_class(family)(**given).to_json_string(use_diff=False)) | {"architectures": None}
            assert unknown_fields(written) == []
            try:
                theirs = ModelConfig.from_hf(written)
            except UserError:
                continue  # 32 key heads, and 4 queries
            assert ModelConfig.from_hf({"model_type": family} | given) == theirs, left_out
            read.add(left_out)
    assert read >= wide.keys()


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


def test_copies_of_fields_that_transformers_4_wrote():
    config = {"model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 10000}
    copies = {"partial_rotary_factor": 0.25, "rope_theta": 10000}
    assert ModelConfig.from_hf(config | copies) == ModelConfig.from_hf(config)
    assert unknown_fields(config | copies) == []


def test_fields_that_would_matter_are_refused():
    """Each is a field of a config class of transformers, or of the public code of MiniCPM, ChatGLM, Falcon or MPT."""
    files = Path(transformers.__file__).parent.glob("models/*/configuration_*.py")
    known = set(re.findall(r"\w+", " ".join(file.read_text() for file in files)))
    elsewhere = {"scale_emb", "scale_depth", "block_configs", "per_layer_config", "pruned_heads", "add_cross_attention",
                 "transformers_weights", "norm_type", "use_moe", "qk_norm"}  # fmt: skip
    assert REFUSED.keys() - known <= elsewhere
    assert not REFUSED.keys() & (READ | IGNORED)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refused_field_may_have_the_value_with_which_it_does_not_matter(family):
    base = {"model_type": family} | (SMALL if family == "minimind" else {})
    for name in REFUSED.keys() - read_by(FAMILIES[family]):
        with pytest.raises(UserError, match=f"config.json: {name}: 0.25: this field is not supported"):
            ModelConfig.from_hf(base | {name: 0.25})
        assert ModelConfig.from_hf(base | {name: REFUSED[name]}) == ModelConfig.from_hf(base)


def test_families_are_complete():
    assert set(FAMILIES) == {*CLASSES, "minimind", "qwen2_vl", "qwen2_5_vl"}
    assert not REASONS.keys() & FAMILIES.keys()
    with pytest.raises(UserError, match="num_hidden_layers: the field is missing"):
        ModelConfig.from_hf({"model_type": "minimind"})
    config = {"model_type": "minimind", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    config |= {"vocab_size": 6400, "max_position_embeddings": 32768, "num_key_value_heads": 2}
    read = ModelConfig.from_hf(config)
    assert (read.ffn_dim, read.norm_eps, read.rope.theta, read.tied) == (1408, 1e-5, 1e6, True)
    with pytest.raises(UserError, match=r"quantization: weights that mlx quantized .*; convert the original"):
        ModelConfig.from_hf({"model_type": "llama", "quantization": {"bits": 4}, "quantization_config": {"bits": 4}})
