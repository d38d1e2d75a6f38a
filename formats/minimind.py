"""MiniMind's own forms: its first version's config, and what its newer ones say nowhere but in their code.

config = read_config(folder / "config.json", tensors)    # as our checkpoint gets it
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from families import HF, Names
from files import read_json
from formats.names import Source

V1 = Names(
    {part: [part] for part in HF.parts}
    | {
        "attention.wqkv": ["attention.wq", "attention.wk", "attention.wv"],
        "feed_forward.w13": ["feed_forward.w1", "feed_forward.w3"],
    },
    layer="layers.{}.",
    interleaved=True,
)


def is_v1(tensors: Mapping[str, Source]) -> bool:
    """Whether the tensors have the names of MiniMind's first version."""
    return "tok_embeddings.weight" in tensors


def read_config(path: Path, tensors: Mapping[str, Source]) -> dict[str, Any]:
    """config.json as our checkpoint gets it: as it came, but for what MiniMind leaves to its code."""
    if is_v1(tensors) and not path.exists():
        return v1_config({}, tensors)
    config = read_json(path)
    if is_v1(tensors) and "hidden_size" not in config:
        return v1_config(config, tensors)
    if config.get("model_type") == "minimind" and "model.layers.0.self_attn.q_norm.weight" in tensors:
        config["qk_norm"] = True  # newer versions normalize q and k, and say so nowhere but in the weights
    if "n_routed_experts" in config and config.get("num_experts_per_tok") == 1:
        config["norm_topk_prob"] = False  # in the second version a single expert counts as much as the router says
    return config


def v1_config(config: dict[str, Any], tensors: Mapping[str, Source]) -> dict[str, Any]:
    """MiniMind's LMConfig, or what the shapes tell where there is none, as the Llama config that it amounts to.

    Published were two generations: 16 heads, 8 of them with keys and values, base 1e4; and 8 heads, 2, base 1e6.
    """
    if config.get("use_moe") or any(".experts." in name for name in tensors):
        raise UserError("these weights are a mixture of experts, which is not supported; take the dense MiniMind")
    names = ("tok_embeddings.weight", "layers.0.attention.wk.weight", "layers.0.feed_forward.w1.weight")
    for name in names:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise UserError(f"tensor {name!r} is missing or not a matrix; these are not the weights of a MiniMind")
    (vocab, dim), (kv_rows, _), (ffn_dim, _) = (tensors[name].shape for name in names)
    layers = 1 + max(int(n[1]) for n in (re.match(r"layers\.(\d{1,6})\.", name) for name in tensors) if n)
    older = "rope_theta" not in config if config else 2 * kv_rows == dim
    heads, kv_heads = config.get("n_heads", 16 if older else 8), config.get("n_kv_heads", 8 if older else 2)
    if not config and kv_rows * heads != dim * kv_heads:
        raise UserError("these weights have other heads than the published MiniMind; put its config.json beside them")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.get("dim", dim),
        "intermediate_size": config.get("hidden_dim") or ffn_dim,
        "num_hidden_layers": config.get("n_layers", layers),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": config.get("vocab_size", vocab),
        "rms_norm_eps": config.get("norm_eps", 1e-5),
        "rope_theta": config.get("rope_theta", 1e4 if older else 1e6),
        "max_position_embeddings": config.get("max_seq_len", 512 if older else 8192),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": config.get("bos_token_id", 1),
        "eos_token_id": config.get("eos_token_id", 2),
    }
