"""GGUF files of every architecture: the config and the names that are read from them, against transformers.

The files are written here with the gguf package: its map of tensor names, its keys, and what llama.cpp's converter does
to rows and norms. The models are those of family_models.py, and the published configs there.
"""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from family_models import ENTRIES, HEAD_DIM, PUBLISHED, VOCAB, Entry, entry, make
from gguf.quants import quantize
from transformers import CONFIG_MAPPING

from config import ModelConfig
from config_fields import unknown_fields
from errors import UserError
from formats.gguf import open_gguf
from formats.gguf_config import config_of
from formats.gguf_families import ARCHITECTURES
from formats.names import plan_tensors
from model import Transformer, expected_shapes

LIMIT = 1e-4  # of the largest logit
PERMUTED = {  # whose converter reorders q and k
    "llama", "mistral3", "internlm2", "xverse", "smollm3", "granite", "granitemoe", "minicpm", "olmo",
}  # fmt: skip
ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 5e5,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}


# ---------------------------------------------------------------------------------------------------------------------
# Writing a file


def ropes(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of RoPE, and those of layers with a window, if they have their own."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found), found.get("sliding_attention", {})


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_keys(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    """What llama.cpp's converter says of a model; `config` is that of transformers."""
    c, fields = config, config.to_dict()
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(getattr(c, "intermediate_size", None) or 4 * c.hidden_size)
    writer.add_head_count(c.num_attention_heads)
    if kv := fields.get("num_key_value_heads"):
        writer.add_head_count_kv(kv)
    if fields.get("head_dim"):
        writer.add_key_length(head_dim(c))
        writer.add_value_length(head_dim(c))
    layer_eps = [fields[name] for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon") if name in fields]
    if layer_eps or architecture == "olmo":
        writer.add_layer_norm_eps(layer_eps[0] if layer_eps else 1e-5)
    else:
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)

    rope, local = ropes(c)
    if rope:
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim(c) * rope.get("partial_rotary_factor", 1)))
    if "rope_theta" in local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ("mscale_all_dim", writer.add_rope_scaling_yarn_log_mul),
            ("llama_4_scaling_beta", writer.add_attn_temperature_scale),
        ):
            if rope.get(name) is not None:
                add(rope[name])
    if architecture == "phi3":
        original = c.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        if kind == "longrope":
            scale = c.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))

    window, types = fields.get("sliding_window"), fields.get("layer_types")
    if architecture in ("gemma2", "gemma3", "cohere2", "olmo2", "gpt-oss", "phi3") and "sliding_window" in fields:
        writer.add_sliding_window(window or 0)
        if architecture == "olmo2":
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in types])
    if count := fields.get("num_local_experts", fields.get("num_experts")):
        writer.add_expert_count(count)
        writer.add_expert_used_count(c.num_experts_per_tok)
    for name, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("clip_qkv", writer.add_clamp_kqv),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("attention_multiplier", writer.add_attention_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("logit_scale", writer.add_logit_scale),
        ("use_parallel_residual", writer.add_parallel_residual),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
        ("shared_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if fields.get(name) is not None and (architecture, name) != ("minicpm", "attention_multiplier"):
            add(fields[name])
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(c.intermediate_size)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def by_turns(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head (0, n / 2), (1, n / 2 + 1) ... become neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def heads_together(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """GPT-NeoX: q, k and v of a head lie together -> all q, all k, all v."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def changed(architecture: str, config: Any, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as llama.cpp's converter hands them to its map of names."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if architecture in PERMUTED and stem.endswith(("q_proj", "k_proj")):
            tensor = by_turns(tensor, heads if stem.endswith("q_proj") else kv_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if architecture == "gpt2" and kind == "weight" and stem.endswith(("c_attn", "c_proj", "c_fc")):
            tensor = tensor.t()
        if architecture == "gptneox" and stem.endswith("query_key_value"):
            tensor = heads_together(tensor, heads)
        if ".experts." in stem:  # of one expert
            before, _, after = stem.partition(".experts.")
            part = after.partition(".")[2]
            where = f"layers.{before.split('.')[2]}.feed_forward" if part in ("w1", "w2", "w3") else before  # Mixtral's
            stacks.setdefault(f"{where}.experts.{part}.{kind}", []).append(tensor)
        elif ".norms." in stem:  # of one head
            stacks.setdefault(f"{stem.partition('.norms.')[0]}.{kind}", []).append(tensor)
        elif "experts.gate_up_proj" in name:  # gpt-oss
            suffix = "bias" if name.endswith("bias") else "weight"
            rows = tensor if suffix == "bias" else tensor.transpose(1, 2)
            before = name.partition("gate_up_proj")[0]
            yield f"{before}gate_proj.{suffix}", rows[:, 0::2]
            yield f"{before}up_proj.{suffix}", rows[:, 1::2]
        elif "experts.down_proj" in name:
            suffix = "bias" if name.endswith("bias") else "weight"
            rows = tensor if suffix == "bias" else tensor.transpose(1, 2)
            yield f"{name.partition('down_proj')[0]}down_proj.{suffix}", rows
        elif "input_linear" in name:  # Granite
            gate, up = tensor.chunk(2, -2)
            layer, experts = name.split(".")[2], "exps" if tensor.dim() == 3 else "shexp"
            yield f"=blk.{layer}.ffn_gate_{experts}.weight", gate
            yield f"=blk.{layer}.ffn_up_{experts}.weight", up
        elif name.endswith("sinks"):
            yield f"{name}.weight", tensor
        else:
            yield name, tensor
    for name, stack in stacks.items():
        yield name, torch.stack(stack)


def file_tensors(architecture: str, config: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names that the gguf package has for them; and what RoPE is divided by."""
    name_map = gguf.get_tensor_name_map(ARCHS[architecture], config.num_hidden_layers)
    found = {}
    for name, tensor in changed(architecture, config, tensors):
        own = name[1:] if name[0] == "=" else name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own, f"the gguf package does not know {name}"
        found[own] = tensor
    rope, _ = ropes(config)
    if rope.get("rope_type") == "longrope":
        found |= {f"rope_factors_{part}.weight": torch.tensor(rope[f"{part}_factor"]) for part in ("long", "short")}
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = llama_3_factors(config, rope)
    return found


def llama_3_factors(config: Any, rope: dict[str, Any]) -> torch.Tensor:
    """What transformers divides the frequencies by."""
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** (-torch.arange(0, head_dim(config), 2) / head_dim(config))
    return (plain / scaled).float()


# ---------------------------------------------------------------------------------------------------------------------
# Other forms that files have


def fused_qkv(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As of the converter's --fuse-qkv, and of the first GLM-4."""
    fused = {name: tensor for name, tensor in tensors.items() if not re.search(r"attn_[qkv]\.", name)}
    for name in [name for name in tensors if "attn_q." in name]:
        parts = [tensors[name.replace("attn_q.", f"attn_{part}.")] for part in "qkv"]
        fused[name.replace("attn_q.", "attn_qkv.")] = torch.cat(parts)
    return fused


def fused_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As of the converter's --fuse-gate-up-exps."""
    fused = {name: tensor for name, tensor in tensors.items() if "gate_exps" not in name and "up_exps" not in name}
    for name in [name for name in tensors if "ffn_gate_exps" in name]:
        parts = (tensors[name], tensors[name.replace("ffn_gate_exps", "ffn_up_exps")])
        fused[name.replace("ffn_gate_exps", "ffn_gate_up_exps")] = torch.cat(parts, 1)
    return fused


def experts_apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the first Mixtral had them."""
    apart = {}
    for name, tensor in tensors.items():
        if "_exps." in name:
            apart |= {name.replace("_exps.", f".{i}."): expert for i, expert in enumerate(tensor)}
        else:
            apart[name] = tensor
    return apart


def flat_gate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As files of 2024 have the gate of a shared expert."""
    return {name: tensor.flatten() if "inp_shexp" in name else tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Tiny models


@dataclass(frozen=True)
class Case:
    """A model as a file. `changes` are fields of its config, without which it would have what no file tells."""

    architecture: str
    changes: dict[str, Any] = field(default_factory=dict)
    entry: Entry | None = None  # None: the one of this name in family_models.py
    form: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict
    keys: dict[str, Any] = field(default_factory=dict)  # further ones, by their types in GGUF


def pattern(every: int, layers: int) -> dict[str, Any]:
    types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    return {"num_hidden_layers": layers, "layer_types": types}


DEFAULT_ROPE = dict(rope_type="default", rope_theta=1e4)
SECTIONS, DEEPSTACK = {"rope.dimension_sections": [2, 3, 3, 0]}, {"n_deepstack_layers": 3}
NO_WINDOW = dict(sliding_window=None)
MISTRAL_3_ROPE = YARN | dict(mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1, beta_fast=32.0, beta_slow=1.0)
CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama-403-tokens": Case("llama"),
    "llama-biased": Case("llama", entry=entry("Llama", attention_bias=True, mlp_bias=True)),
    "llama-3": Case("llama", entry=entry("Llama", head_dim=64, rope_parameters=LLAMA_3)),
    "llama-3-small": Case(
        "llama",
        entry=entry(
            "Llama", head_dim=64, rope_parameters=LLAMA_3 | dict(factor=32.0, original_max_position_embeddings=256)
        ),
    ),
    "llama-linear": Case(
        "llama", entry=entry("Llama", rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))
    ),
    "llama-yarn": Case("llama", entry=entry("Llama", rope_parameters=YARN)),
    "llama-yarn-changed": Case(
        "llama", entry=entry("Llama", rope_parameters=YARN | dict(attention_factor=1.0, beta_fast=16.0, beta_slow=2.0))
    ),
    "mistral-nemo": Case("llama"),
    "mixtral-hub": Case("llama"),
    "mistral3": Case("mistral3"),
    "ministral3": Case("mistral3", entry=entry("Ministral3", rope_parameters=MISTRAL_3_ROPE, **HEAD_DIM)),
    "ernie": Case("ernie4_5", entry=entry("Ernie4_5", head_dim=16)),
    "ernie-biased": Case("ernie4_5", entry=entry("Ernie4_5", head_dim=16, use_bias=True, tie_word_embeddings=False)),
    # What llama.cpp makes of these is a Llama, a Granite, a StableLM; those that see pictures read texts as others do.
    "internlm2": Case("internlm2", entry=ENTRIES["llama"]),
    "xverse": Case("xverse", entry=ENTRIES["llama"]),
    "exaone": Case("exaone", entry=entry("Llama", head_dim=64, rope_parameters=LLAMA_3)),
    "minicpm": Case("minicpm", dict(attention_multiplier=0.25), ENTRIES["granite"]),
    "orion": Case("orion", entry=entry("StableLm", rope_parameters=dict(DEFAULT_ROPE, partial_rotary_factor=1.0))),
    "qwen2vl": Case("qwen2vl", entry=entry("Qwen2"), keys=SECTIONS),
    "qwen3vl": Case("qwen3vl", entry=ENTRIES["qwen3"], keys=SECTIONS | DEEPSTACK),
    "qwen3vl-moe": Case("qwen3vlmoe", entry=ENTRIES["qwen3-moe"], keys=SECTIONS | DEEPSTACK),
    "smollm3": Case("smollm3", dict(no_rope_layers=[1, 1, 1, 0], no_rope_layer_interval=4)),
    "qwen2": Case("qwen2", dict(use_sliding_window=False, layer_types=["full_attention"] * 4)),
    "qwen2-moe": Case("qwen2moe"),
    "qwen3": Case("qwen3"),
    "qwen3-moe": Case("qwen3moe"),
    "gemma": Case("gemma"),
    "gemma2": Case("gemma2", dict(query_pre_attn_scalar=24)),
    "gemma3": Case("gemma3", dict(query_pre_attn_scalar=24, **pattern(6, 7))),
    "phi": Case("phi2", dict(num_key_value_heads=4)),
    "phi3": Case("phi3"),
    "phi3-window": Case("phi3"),
    "phi3-longrope": Case("phi3"),
    "phi4-mini": Case("phi3"),
    "olmo": Case("olmo"),
    "olmo-clip": Case("olmo", dict(attention_bias=False)),
    "olmo2": Case("olmo2"),
    "olmo3": Case("olmo2"),
    "olmo3-hub": Case("olmo2"),
    "olmoe": Case("olmoe"),
    "granite": Case("granite"),
    "granite-biased": Case("granite"),
    "granite-moe": Case("granitemoe"),
    "granite-moe-shared": Case("granitemoe"),
    "cohere": Case("command-r"),
    "cohere-qk-norm": Case("command-r"),
    "cohere2": Case("cohere2"),
    "glm": Case("chatglm"),
    "glm-no-bias": Case("chatglm"),
    "glm4": Case("glm4"),
    "glm4-hub": Case("glm4"),
    "stablelm": Case("stablelm"),
    "stablelm-parallel": Case("stablelm"),
    "stablelm-qk-norm": Case("stablelm"),
    "starcoder2": Case("starcoder2", NO_WINDOW),
    "starcoder2-no-bias": Case("starcoder2"),
    "seed-oss": Case("seed_oss"),
    "seed-oss-biased": Case("seed_oss"),
    "gpt2": Case("gpt2"),
    "gpt-neox": Case("gptneox"),
    "gpt-neox-sequential": Case("gptneox"),
    "llama-fused": Case("llama", entry=entry("Llama", attention_bias=True), form=fused_qkv),
    "glm-fused": Case("chatglm", entry=ENTRIES["glm"], form=fused_qkv),
    "qwen3-moe-fused": Case("qwen3moe", entry=ENTRIES["qwen3-moe"], form=fused_experts),
    "mixtral-apart": Case("llama", entry=ENTRIES["mixtral-hub"], form=experts_apart),
    "qwen2-moe-older": Case("qwen2moe", entry=ENTRIES["qwen2-moe"], form=flat_gate),
    "gpt-oss": Case("gpt-oss", dict(swiglu_limit=7.0)),
}


def close(ours: Any, theirs: Any) -> bool:
    """Equal, but for the rounding of floats to float32."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    if dataclasses.is_dataclass(ours) and dataclasses.is_dataclass(theirs):
        return not differences(ours, theirs)
    return ours == theirs


def differences(ours: Any, theirs: Any) -> dict[str, Any]:
    pairs = {part.name: (getattr(ours, part.name), getattr(theirs, part.name)) for part in dataclasses.fields(ours)}
    return {name: pair for name, pair in pairs.items() if not close(*pair)}


@pytest.fixture(scope="module", params=CASES, ids=str)
def written(request, tmp_path_factory):
    """A model of transformers as a GGUF file -> the case, made, the opened file."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if case.entry:
            patch.setitem(ENTRIES, request.param, case.entry)
        made = make(request.param, folder, **copy.deepcopy(case.changes))
    config = made.reference.config
    config = getattr(config, "text_config", None) or config
    tensors = safetensors.torch.load_file(made.folder / "model.safetensors")
    tensors = {
        name.replace("language_model.", ""): tensor
        for name, tensor in tensors.items()
        if not name.startswith(("vision_tower", "multi_modal_projector"))
    }
    writer = gguf.GGUFWriter(folder / "model.gguf", case.architecture)
    add_keys(writer, case.architecture, config)
    for key, value in case.keys.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{case.architecture}.{key}", value)
    for name, tensor in case.form(file_tensors(case.architecture, config, tensors)).items():
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return case, made, open_gguf(folder / "model.gguf")


def test_config(written):
    """As the config.json of the model has it, in fields that are all known."""
    case, made, file = written
    config, _ = config_of(file)
    assert unknown_fields(config) == []
    ours, original = ModelConfig.from_hf(config), json.loads((made.folder / "config.json").read_text())
    if case.architecture == "ernie4_5":
        bias = original.pop("use_bias")
        original |= dict(model_type="llama", architectures=[], attention_bias=bias, mlp_bias=bias)
    assert differences(ours, ModelConfig.from_hf(original)) == {}
    assert config["torch_dtype"] == "float32" and (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert all(value is None or type(value) in (str, int, float, bool, list, dict) for value in config.values())
    assert json.loads(json.dumps(config)) == config


def load(file: Any) -> Transformer:
    fields, names = config_of(file)
    config = ModelConfig.from_hf(fields)
    weights = {}
    shapes = expected_shapes(config)
    for name, pieces in plan_tensors(config, file.tensors, names, keep_quantized=False).items():
        rows = [rows.float() for piece in pieces for rows in piece.read("weight")]
        weights[name] = torch.cat([part.flatten() for part in rows]).view(shapes[name])
    model = Transformer(config)
    model.load_state_dict(weights)
    model.requires_grad_(False)
    return model


@torch.no_grad()
def test_logits(written):
    """Those of transformers; and no tensor of the file is left over."""
    _, made, file = written
    model = load(file)
    model.setup_caches(max_batch_size=1, max_seq_length=64)
    text = torch.randint(5, VOCAB, (1, 50), generator=torch.Generator().manual_seed(0))
    expected = made.logits(text)
    error = (model(text, torch.arange(50)[None])[0] - expected).abs().max()
    assert error <= LIMIT * expected.abs().max()


def test_layers_that_stay_quantized(written, tmp_path):
    """They hold what is read of the same file as floats: heads turned, experts stacked, parts fused alike."""
    case, made, file = written
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", case.architecture)
    config = made.reference.config
    add_keys(writer, case.architecture, getattr(config, "text_config", None) or config)
    for key, value in case.keys.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{case.architecture}.{key}", value)
    kind = gguf.GGMLQuantizationType.Q8_0
    for tensor in gguf.GGUFReader(file.path).tensors:
        data = np.array(tensor.data)
        layer = re.fullmatch(r"(blk\.\d+\.(attn|ffn)_(?!gate_inp|.*norm).*|token_embd|output)\.weight", tensor.name)
        quantized = layer and data.ndim > 1 and data.shape[-1] % 32 == 0
        data = quantize(data, kind) if quantized else data
        writer.add_tensor(tensor.name, data, raw_dtype=kind if quantized else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantized = open_gguf(tmp_path / "model.gguf")
    fields, names = config_of(quantized)
    config = ModelConfig.from_hf(fields)
    kept, floats = (plan_tensors(config, quantized.tensors, names, keep_quantized=keep) for keep in (True, False))
    layers = [name for name in floats if kept[name][0].form is not None]
    assert len(layers) >= 3 * config.n_layers
    for name in layers:
        levels, scales = (
            torch.cat([rows.flatten(0, -2).float() for piece in kept[name] for rows in piece.read(part)])
            for part in ("weight", "scales")
        )
        expected = torch.cat([rows.flatten(0, -2) for piece in floats[name] for rows in piece.read("weight")])
        assert torch.equal(levels * scales.repeat_interleave(32, 1), expected), name


# ---------------------------------------------------------------------------------------------------------------------
# Published models

FILES = {  # the architecture of the GGUF file
    "google/gemma-2b": "gemma", "google/gemma-2-9b": "gemma2", "google/gemma-3-1b-it": "gemma3",
    "google/gemma-3-4b-it": "gemma3", "google/gemma-3-27b-it": "gemma3",
    "microsoft/Phi-3-mini-4k-instruct": "phi3", "microsoft/phi-4": "phi3", "microsoft/Phi-4-mini-instruct": "phi3",
    "microsoft/phi-2": "phi2", "HuggingFaceTB/SmolLM2-1.7B-Instruct": "llama", "HuggingFaceTB/SmolLM3-3B": "smollm3",
    "allenai/OLMo-7B-0424-hf": "olmo", "allenai/OLMo-2-1124-7B-Instruct": "olmo2",
    "allenai/Olmo-3-7B-Instruct": "olmo2", "ibm-granite/granite-3.1-2b-base": "granite",
    "mistralai/Mistral-Nemo-Instruct-2407": "llama", "mistralai/Mistral-Small-3.1-24B-Instruct-2503": "mistral3",
    "CohereForAI/c4ai-command-r-v01": "command-r", "CohereForAI/c4ai-command-r7b-12-2024": "cohere2",
    "THUDM/glm-4-9b-chat-hf": "chatglm", "THUDM/GLM-4-32B-0414": "glm4", "stabilityai/stablelm-3b-4e1t": "stablelm",
    "stabilityai/stablelm-2-12b": "stablelm", "ByteDance-Seed/Seed-OSS-36B-Instruct": "seed_oss",
    "openai-community/gpt2": "gpt2", "EleutherAI/pythia-160m": "gptneox",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "llama", "Qwen/Qwen1.5-MoE-A2.7B": "qwen2moe",
    "Qwen/Qwen3-30B-A3B": "qwen3moe", "allenai/OLMoE-1B-7B-0924": "olmoe",
    "ibm-granite/granite-3.0-1b-a400m-instruct": "granitemoe", "openai/gpt-oss-20b": "gpt-oss",
}  # fmt: skip


def published_file(name: str, **changes: Any) -> SimpleNamespace:
    """What config_of needs of the file of a published model: the keys, and shapes of what layer 0 and the ends have."""
    fields = copy.deepcopy(PUBLISHED[name])
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields | changes)
    config = getattr(config, "text_config", None) or config
    writer = gguf.GGUFWriter(None, FILES[name])
    add_keys(writer, FILES[name], config)
    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    metadata = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in metadata.items()}
    one_layer = copy.deepcopy(config)
    one_layer.num_hidden_layers = 1
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(one_layer, dtype=torch.bfloat16)
    in_experts = re.compile(r".*\.(block_sparse_moe|mlp\.(experts|shared_expert\w*|router|gate))\..*")  # or beside them
    stored = {name: tensor for name, tensor in model.state_dict().items() if not in_experts.fullmatch(name)}
    if config.tie_word_embeddings:
        stored = {name: tensor for name, tensor in stored.items() if "lm_head" not in name}
    tensors: dict[str, Any] = file_tensors(FILES[name], one_layer, stored)
    # What is read by config_of is not on the meta device.
    tensors = {
        name: tensor if tensor.is_meta else SimpleNamespace(shape=tensor.shape, read=tensor.clone)
        for name, tensor in tensors.items()
    }
    return SimpleNamespace(metadata=metadata, tensors=tensors)


@pytest.mark.parametrize("name", FILES)
def test_published_models(name):
    """But for the output projection, of which the weights tell whether it is another than the embedding."""
    file = published_file(name)
    config, _ = config_of(file)
    expected = dataclasses.replace(ModelConfig.from_hf(PUBLISHED[name]), tied="output.weight" not in file.tensors)
    assert differences(ModelConfig.from_hf(config), expected) == {}
    assert config["torch_dtype"] == "bfloat16" and unknown_fields(config) == []


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def altered(name: str, **changes: Any) -> SimpleNamespace:
    """The file of a published model with other keys, those of its architecture without it; None leaves one out."""
    file = published_file(name)
    for key, value in changes.items():
        key = key.replace("__", ".")
        key = key if key.startswith("general.") else f"{FILES[name]}.{key}"
        file.metadata.pop(key, None)
        if value is not None:
            file.metadata[key] = value
    return file


def refusal(file: Any) -> str:
    with pytest.raises(UserError) as error:
        config_of(file)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    return message


SMALL, QWEN_3 = "HuggingFaceTB/SmolLM2-1.7B-Instruct", "Qwen/Qwen3-30B-A3B"
GRANITE, GPT_OSS, MISTRAL_3 = (
    "ibm-granite/granite-3.1-2b-base",
    "openai/gpt-oss-20b",
    next(n for n in FILES if "3.1-24B" in n),
)


@pytest.mark.parametrize("name", ["mamba", "deepseek2", "llama4", "clip", "", None, 7, ["llama"]])
def test_other_architectures(name):
    message = refusal(altered(SMALL, general__architecture=name))
    assert repr(name) in message and all(known in message for known in ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "why"),
    [("mamba", "state-space"), ("falcon-h1", "state-space"), ("deepseek2", "latent"), ("bert", "decoder")],
)
def test_the_reason_is_told(name, why):
    assert why in refusal(altered(SMALL, general__architecture=name))


def test_tensors_are_refused_by_name():
    missing = altered(SMALL)
    del missing.tensors["token_embd.weight"]
    assert "token_embd.weight" in refusal(missing)
    name = "microsoft/Phi-4-mini-instruct"
    for tensor in ("rope_factors_short.weight", "rope_factors_long.weight"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            file = altered(name)
            file.tensors[tensor] = stored(torch.full((48,), value))
            assert tensor in refusal(file)
        file.tensors[tensor] = stored(torch.ones(47))
        assert tensor in refusal(file)
    del file.tensors["rope_factors_short.weight"]
    file.tensors["rope_factors_long.weight"] = stored(torch.ones(48))
    assert "rope_factors_short.weight" in refusal(file)


def stored(tensor: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(shape=tuple(tensor.shape), read=lambda: tensor)


def test_factors_that_are_not_llama_3s():
    factors = torch.ones(32)
    file = altered(SMALL)
    file.tensors["rope_freqs.weight"] = stored(factors)
    assert ModelConfig.from_hf(config_of(file)[0]).rope.type == "default"
    for factors[20:] in (2.0, torch.linspace(1, 8, 12), torch.linspace(8, 1, 12)):
        assert "rope_freqs.weight" in refusal(file)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix", 3])
def test_other_files(kind):
    assert str(kind) in refusal(altered(SMALL, general__type=kind))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        # Not supported.
        (SMALL, "attention.max_alibi_bias", 8.0),
        (SMALL, "attention.causal", False),
        (SMALL, "attention.value_length", 32),
        (SMALL, "attention.scale", 0.5),
        (SMALL, "attention.kv_lora_rank", 512),
        (SMALL, "attention.clamp_kqv", 8.0),
        (SMALL, "embedding_scale", 2.0),
        (SMALL, "final_logit_softcapping", 30.0),
        (SMALL, "rope.dimension_count", 32),
        (SMALL, "rope.dimension_sections", [16, 24, 24, 0]),
        (SMALL, "rope.freq_base_swa", 500.0),
        (SMALL, "rope.scaling.type", "longrope"),
        (SMALL, "rope.scaling.type", ["yarn"]),
        (SMALL, "something_new", 1),
        (SMALL, "something_new", "gelu"),
        (SMALL, "pooling_type", 3),
        (SMALL, "leading_dense_block_count", 1),
        (SMALL, "nextn_predict_layers", 1),
        (QWEN_3, "expert_gating_func", 2),
        (QWEN_3, "expert_weights_scale", 2.5),
        (QWEN_3, "expert_group_count", 4),
        (QWEN_3, "attention.sliding_window", 4096),
        (GPT_OSS, "expert_gating_func", 2),
        (GPT_OSS, "expert_weights_norm", False),
        (GPT_OSS, "rope.scaling.yarn_ext_factor", 0.5),
        (GRANITE, "rope.scaling.finetuned", False),
        (MISTRAL_3, "attention.temperature_scale", 0.1),  # without YaRN
        (GRANITE, "logit_scale", None),
        ("EleutherAI/pythia-160m", "use_parallel_residual", None),
        ("allenai/OLMo-7B-0424-hf", "attention.layer_norm_epsilon", 1e-6),
        ("google/gemma-2-9b", "attention.sliding_window_pattern", [True]),
        ("google/gemma-2-9b", "attention.sliding_window_pattern", ["yes"] * 42),
        # Different from layer to layer.
        (SMALL, "attention.head_count", [32] * 23 + [16]),
        (SMALL, "attention.head_count_kv", [32] * 23 + [16]),
        (SMALL, "feed_forward_length", [8192] * 23 + [4096]),
        (QWEN_3, "expert_used_count", [8] * 47 + [4]),
        # Malformed.
        (SMALL, "block_count", "24"),
        (SMALL, "block_count", 2**40),
        (SMALL, "block_count", 24.0),
        (SMALL, "block_count", -1),
        (SMALL, "embedding_length", True),
        (SMALL, "attention.head_count", 0),
        (SMALL, "attention.head_count", []),
        (SMALL, "rope.freq_base", 0.0),
        (SMALL, "rope.freq_base", float("nan")),
        (SMALL, "rope.freq_base", "10000"),
        (SMALL, "rope.scaling.factor", [[2.0]]),
        # Missing.
        (SMALL, "block_count", None),
        (SMALL, "context_length", None),
        (SMALL, "embedding_length", None),
        (SMALL, "feed_forward_length", None),
        (SMALL, "attention.head_count", None),
        (SMALL, "attention.layer_norm_rms_epsilon", None),
        (QWEN_3, "expert_count", None),
        (QWEN_3, "expert_used_count", None),
    ],
)
def test_keys_are_refused_by_name(name, key, value):
    message = refusal(altered(name, **{key.replace(".", "__"): value}))
    assert f"{FILES[name]}.{key}" in message


ODD = (
    None,
    "",
    "x",
    0,
    -1,
    1.5,
    -0.5,
    float("nan"),
    float("inf"),
    1e300,
    True,
    False,
    [],
    [1],
    [[1]],
    ["x"],
    2**31,
    2**70,
)


@pytest.mark.parametrize(
    "name",
    [SMALL, QWEN_3, GRANITE, GPT_OSS, "google/gemma-3-1b-it", "microsoft/Phi-4-mini-instruct", "microsoft/phi-2"],
)
def test_odd_values_lead_to_a_config_or_an_error_in_one_line(name):
    published = published_file(name)
    for key in [*published.metadata, "general.architecture", "general.type"]:
        for value in ODD:
            file = SimpleNamespace(metadata=published.metadata | {key: value}, tensors=published.tensors)
            if value is None:
                del file.metadata[key]
            try:
                ModelConfig.from_hf(config_of(file)[0])
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 700
