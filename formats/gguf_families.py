"""The architectures of GGUF that can be read, as data: what they are on the hub, and how their tensors are called.

    ARCHITECTURES["llama"].variants                          # {"expert_count": "mixtral", ...}
    PARTS["attention.wqkv"]                                  # ["attn_q", "attn_k", "attn_v"]

An architecture whose model_type is in families.FAMILIES is an entry here, and a line in the tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """What an architecture of GGUF is on the hub. Fields go by the names that Llama's config.json gives them."""

    model_type: str
    # Keys that make it another model_type, unless they are 0 or missing; the first one counts.
    variants: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False  # the pairs of elements that RoPE rotates lie next to each other
    keys: Mapping[str, str] = field(default_factory=dict)  # further ones -> the fields they give; 0 is none
    required: tuple[str, ...] = ()  # those of them without which nothing can be assumed
    fields: Mapping[str, Any] = field(default_factory=dict)  # that no key gives, or in case it is missing
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # that are called otherwise than in PARTS
    yarn_keys: Mapping[str, str] = field(default_factory=dict)  # keys -> fields beside those of YaRN
    yarn: Mapping[str, Any] = field(default_factory=dict)  # such fields that no key gives
    only: Mapping[str, Any] = field(default_factory=dict)  # keys -> the one value that is supported
    ignores: tuple[str, ...] = ()  # keys that do not matter to texts
    # Gemma's 27B, known by its layers, has width / heads in the place of the size of a head.
    layers_scaled_by_width: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Names

PARTS = {
    "tok_embeddings": ["token_embd"], "pos_embeddings": ["position_embd"], "norm": ["output_norm"],
    "output": ["output"], "attention_norm": ["attn_norm"], "post_attention_norm": ["post_attention_norm"],
    "ffn_norm": ["ffn_norm"], "post_ffn_norm": ["post_ffw_norm"],
    "attention.wqkv": ["attn_q", "attn_k", "attn_v"], "attention.wo": ["attn_output"],
    "attention.q_norm": ["attn_q_norm"], "attention.k_norm": ["attn_k_norm"], "attention.sinks": ["=attn_sinks.weight"],
    "feed_forward.w13": ["ffn_gate", "ffn_up"], "feed_forward.w1": ["ffn_up"], "feed_forward.w2": ["ffn_down"],
    "feed_forward.router": ["ffn_gate_inp"],
    "feed_forward.experts.w13": ["ffn_gate_exps.{}", "ffn_up_exps.{}"],
    "feed_forward.experts.w2": ["ffn_down_exps.{}"],
    "feed_forward.shared.w13": ["ffn_gate_shexp", "ffn_up_shexp"], "feed_forward.shared.w2": ["ffn_down_shexp"],
    "feed_forward.shared_gate": ["ffn_gate_inp_shexp"],
}  # fmt: skip
# Other forms of some of them, where layer 0 has the tensor.
FORMS = {
    "attn_qkv.weight": {"attention.wqkv": ["attn_qkv"]},
    "ffn_gate_up_exps.0.weight": {"feed_forward.experts.w13": ["ffn_gate_up_exps.{}"]},
    "ffn_gate.0.weight": {  # the first Mixtral
        "feed_forward.experts.w13": ["ffn_gate.{}", "ffn_up.{}"], "feed_forward.experts.w2": ["ffn_down.{}"],
    },
}  # fmt: skip
GATE_IN_UP = {"feed_forward.w13": ["ffn_up"]}  # the rows of the gate come before those of up
NORMS = (
    "norm", "attention_norm", "post_attention_norm", "ffn_norm", "post_ffn_norm",
    "attention.q_norm", "attention.k_norm",
)  # fmt: skip
LAYER = "blk.{}."

# Options of ModelConfig -> the tensors of layer 0, of which one is there if the option is on.
FLAGS = {
    "qkv_bias": ("attn_q.bias", "attn_qkv.bias"), "wo_bias": ("attn_output.bias",), "mlp_bias": ("ffn_down.bias",),
    "qk_norm": ("attn_q_norm.weight",),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Architectures

BY_TURNS = {"interleaved": True}  # as their own code has them, or since the rows were reordered on the way
SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
GRANITE = {
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
    "attention.scale": "attention_multiplier",
}  # fmt: skip
NO_WINDOW = {"sliding_window": None}
SECTIONS = ("rope.dimension_sections", "n_deepstack_layers")  # of pictures; a text has the same position in each
SECOND_NORM = {"ffn_norm": ["post_attention_norm"]}

ARCHITECTURES = {
    "llama": Architecture("llama", {"expert_count": "mixtral", "attention.sliding_window": "mistral"}, **BY_TURNS),
    "mistral3": Architecture(
        "mistral", {"attention.temperature_scale": "ministral3"},
        fields=NO_WINDOW,
        yarn_keys={"attention.temperature_scale": "llama_4_scaling_beta"},
        **BY_TURNS,
    ),
    "ernie4_5": Architecture("llama", **BY_TURNS),
    "internlm2": Architecture("llama", **BY_TURNS),
    "xverse": Architecture("llama", **BY_TURNS),
    "exaone": Architecture("llama"),
    "smollm3": Architecture("smollm3", fields={"no_rope_layer_interval": 4}, **BY_TURNS),
    "qwen2": Architecture("qwen2"),
    "qwen2vl": Architecture("qwen2", ignores=SECTIONS),
    "qwen2moe": Architecture("qwen2_moe", fields={"norm_topk_prob": False}),
    "qwen3": Architecture("qwen3"),
    "qwen3vl": Architecture("qwen3", ignores=SECTIONS),
    "qwen3moe": Architecture("qwen3_moe", fields={"norm_topk_prob": True}),
    "qwen3vlmoe": Architecture("qwen3_moe", fields={"norm_topk_prob": True}, ignores=SECTIONS),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", keys=SOFTCAPS, layers_scaled_by_width=46),
    "gemma3": Architecture(
        "gemma3_text",
        keys={"final_logit_softcapping": "final_logit_softcapping"},
        fields=NO_WINDOW,
        layers_scaled_by_width=62,
    ),
    "phi2": Architecture("phi"),
    "phi3": Architecture("phi3", keys={"rope.scaling.original_context_length": "original_max_position_embeddings"}),
    "olmo": Architecture("olmo", keys={"attention.clamp_kqv": "clip_qkv"}, **BY_TURNS),
    "olmo2": Architecture("olmo2", {"attention.sliding_window": "olmo3"}),
    "olmoe": Architecture("olmoe", keys={"attention.clamp_kqv": "clip_qkv"}, fields={"norm_topk_prob": False}),
    # Granite 4 says so that it has no RoPE.
    "granite": Architecture(
        "granite",
        keys=GRANITE,
        required=("logit_scale",),
        only={"rope.scaling.finetuned": True},
        **BY_TURNS,
    ),
    "granitemoe": Architecture(
        "granitemoe", {"expert_shared_feed_forward_length": "granitemoeshared"},
        keys=GRANITE,
        required=("logit_scale",),
        only={"rope.scaling.finetuned": True},
        **BY_TURNS,
    ),
    "minicpm": Architecture(
        "granite", keys=GRANITE, required=("embedding_scale", "residual_scale", "logit_scale"), **BY_TURNS
    ),
    "command-r": Architecture("cohere", keys={"logit_scale": "logit_scale"}, fields={"logit_scale": 1.0}, **BY_TURNS),
    "cohere2": Architecture(
        "cohere2", keys={"logit_scale": "logit_scale"}, required=("logit_scale",), **BY_TURNS
    ),
    "chatglm": Architecture("glm", **BY_TURNS),
    "glm4": Architecture("glm4", **BY_TURNS),
    "stablelm": Architecture("stablelm"),
    "orion": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2"),
    "seed_oss": Architecture("seed_oss", parts=SECOND_NORM),
    "gpt2": Architecture("gpt2"),
    "gptneox": Architecture(
        "gpt_neox",
        keys={"use_parallel_residual": "use_parallel_residual"},
        required=("use_parallel_residual",),
    ),
    "gpt-oss": Architecture("gpt_oss", parts=SECOND_NORM, yarn={"truncate": False}),
}  # fmt: skip

# Of some that cannot be read the model_type, under which config_fields.REASONS has why.
MODEL_TYPES = {"deepseek2": "deepseek_v2", "qwen3next": "qwen3_next", "granitehybrid": "granitemoehybrid"}

# Names of classes that do not follow from the model_type.
CLASSES = {
    "gemma3_text": "Gemma3ForCausalLM", "gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM", "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "smollm3": "SmolLM3ForCausalLM", "stablelm": "StableLmForCausalLM",
}  # fmt: skip

# Keys that say nothing about the logits, or what the tensors tell.
HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "use_parallel_residual"}
