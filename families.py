"""The families of models that can be run, as data: what their config.json means, and how their tensors are called.

    FAMILIES["gemma2"].options                               # {"norm": "rms_plus_one", "norm_place": "both", ...}
    FAMILIES["gemma2"].names.parts["ffn_norm"]               # ["pre_feedforward_layernorm"]

A family that needs no new option of config.ModelConfig is an entry here, and a line in the tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Names:
    """How a form of checkpoint calls its tensors and orders their rows.

    A name with {} stands for one tensor for each expert, or for each head. One that begins with "=" is the whole name
    of a weight, whose bias is called NAME_bias; the others have ".weight" and ".bias" behind them.
    """

    parts: Mapping[str, Sequence[str]]  # ours -> those that it is made of, one below the other
    layer: str = "model.layers.{}."  # comes before the names of a layer's tensors
    interleaved: bool = False  # the pairs of elements that RoPE rotates lie next to each other
    # ours -> a function of formats/names.py for its tensors
    transforms: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertFields:
    """The fields of config.json that say what a mixture of experts consists of."""

    count: str = "num_local_experts"
    width: str = "intermediate_size"  # of an expert's feed-forward
    normalized: str | bool = True  # whether the weights of the chosen experts add up to 1, or the field that says so
    shared: str = ""  # the width of a further expert that all tokens go through,
    shared_count: str = ""  # or how many there are, 0 or 1, as wide as the others
    shared_gate: bool = False  # which counts as much as a sigmoid says
    bias: bool = False  # of the experts and of the router


@dataclass(frozen=True)
class Family:
    """What distinguishes a family. Fields go by the names that Llama's config.json gives them."""

    models: str  # for people
    # Llama's name of a field, which then means nothing here -> this family's, "" where it has no such field.
    renamed: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)  # a second name of a field -> the first
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of fields that are missing, as in transformers
    options: Mapping[str, Any] = field(default_factory=dict)  # of ModelConfig, that its code fixes
    # Fields that only some families have -> the options of ModelConfig that they set. "option=value": a flag
    # sets it so.
    reads: Mapping[str, str] = field(default_factory=dict)
    # Which layers have a sliding window where config.json has no layer_types: "none"; "all"; "late", from
    # max_window_layers on; "early", every other one before it; "unrotated", those without RoPE; "pattern", all but
    # every sliding_window_pattern-th. "always": all, and there are no layer_types.
    windows: str = "none"
    window_pattern: int = 0  # of windows "pattern", where no field says so
    window_theta: str = ""  # the field with the base of RoPE in layers with a window, which has a RoPE of its own
    rotated: str = "all"  # layers with RoPE: "all"; "windows", those with one; "listed" in no_rope_layers; "none"
    experts: ExpertFields | None = None
    use_experts: str = ""  # the field that says whether it has them, where one does
    activations: Mapping[str, str] = field(default_factory=dict)  # what `hidden_act` means here and nowhere else
    ignores: tuple[str, ...] = ()  # fields that do not matter here
    architectures: tuple[str, ...] = ()  # classes beside the one that is called like the family
    sees: bool = False  # images, by what `vision_config` says; `text_config` may hold the other fields
    ffn_rule: str = ""  # of intermediate_size where it is missing: "8/3", rounded up to a multiple of 64, or "4"
    names: Names = Names({})


# ---------------------------------------------------------------------------------------------------------------------
# Names

LLAMA = {
    "tok_embeddings": ["model.embed_tokens"], "norm": ["model.norm"], "output": ["lm_head"],
    "attention_norm": ["input_layernorm"], "ffn_norm": ["post_attention_layernorm"],
    "attention.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.q_norm": ["self_attn.q_norm"], "attention.k_norm": ["self_attn.k_norm"],
    "attention.wo": ["self_attn.o_proj"],
    "feed_forward.w13": ["mlp.gate_proj", "mlp.up_proj"], "feed_forward.w2": ["mlp.down_proj"],
}  # fmt: skip
HF = Names(LLAMA)
FUSED = {"feed_forward.w13": ["mlp.gate_up_proj"]}
UNGATED = {"feed_forward.w1": ["mlp.c_fc"], "feed_forward.w2": ["mlp.c_proj"]}
SANDWICH = Names(LLAMA | {  # norms before and after, as Gemma calls them
    "post_attention_norm": ["post_attention_layernorm"], "ffn_norm": ["pre_feedforward_layernorm"],
    "post_ffn_norm": ["post_feedforward_layernorm"],
})  # fmt: skip
EXPERTS = {  # Qwen's
    "feed_forward.router": ["mlp.gate"],
    "feed_forward.experts.w13": ["mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"],
    "feed_forward.experts.w2": ["mlp.experts.{}.down_proj"],
    "feed_forward.shared.w13": ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
    "feed_forward.shared.w2": ["mlp.shared_expert.down_proj"],
    "feed_forward.shared_gate": ["mlp.shared_expert_gate"],
}
MIXTRAL_EXPERTS = {
    "feed_forward.router": ["block_sparse_moe.gate"],
    "feed_forward.experts.w13": ["block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"],
    "feed_forward.experts.w2": ["block_sparse_moe.experts.{}.w2"],
}
GRANITE_EXPERTS = {
    "feed_forward.router": ["block_sparse_moe.router.layer"],
    "feed_forward.experts.w13": ["block_sparse_moe.input_linear"],
    "feed_forward.experts.w2": ["block_sparse_moe.output_linear"],
    "feed_forward.shared.w13": ["shared_mlp.input_linear"],
    "feed_forward.shared.w2": ["shared_mlp.output_linear"],
}

# ---------------------------------------------------------------------------------------------------------------------
# Families


def size(vocab: int, dim: int, ffn: int, layers: int, heads: int, kv_heads: int | None, context: int) -> dict[str, Any]:
    """The defaults of the fields that every family has."""
    fields = {
        "vocab_size": vocab, "hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": context,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


TIED = {"tie_word_embeddings": True}
ATTENTION_BIAS = {"attention_bias": "qkv_bias wo_bias"}
BIASES = ATTENTION_BIAS | {"mlp_bias": "mlp_bias"}
BIASED = {"qkv_bias": True, "wo_bias": True, "mlp_bias": True}
LAYER_NORM = {"norm": "layer", "norm_bias": True}
QWEN = size(151936, 4096, 22016, 32, 32, 32, 32768) | {
    "rms_norm_eps": 1e-6, "sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False,
}  # fmt: skip
QWEN_EXPERTS = ("num_experts", "moe_intermediate_size", "norm_topk_prob")
QWEN_VL: dict[str, Any] = {  # of Family
    "defaults": QWEN | size(152064, 8192, 29568, 80, 64, 8, 32768) | {
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80,
    },
    "options": {"qkv_bias": True}, "windows": "late", "sees": True, "names": HF,
}  # fmt: skip
MISTRAL = size(32000, 4096, 14336, 32, 32, 8, 131072) | {"rms_norm_eps": 1e-6, "sliding_window": 4096}
GRANITE = {
    "embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale", "logits_scaling": "logit_scale",
}  # fmt: skip
GRANITE_SIZE = size(32000, 4096, 11008, 32, 32, None, 2048) | {"rms_norm_eps": 1e-6, "attention_multiplier": 1.0}
GEMMA = {"norm": "rms_plus_one", "scale_embedding": True}
GEMMA_SCALES = {"query_pre_attn_scalar": "attention_scale", "final_logit_softcapping": "logit_softcap"}
GEMMA_SIZE = TIED | {"head_dim": 256, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
OLMO_SIZE = size(50304, 4096, 11008, 32, 32, None, 2048) | {"rms_norm_eps": 1e-5}
OLMO_2 = {"norm_place": "after", "qk_norm": "all"}
COHERE_SIZE = size(256000, 8192, 22528, 40, 64, None, 8192) | TIED | {"rms_norm_eps": 1e-5, "logit_scale": 0.0625}
COHERE = {"norm": "layer", "parallel": True, "shared_norm": True}
GLM_SIZE = size(151552, 4096, 13696, 40, 32, 2, 131072) | {
    "head_dim": 128, "rms_norm_eps": 1.5625e-7, "attention_bias": True, "partial_rotary_factor": 0.5,
}  # fmt: skip
GLM_READS = {"attention_bias": "qkv_bias", "partial_rotary_factor": "rotary_factor"}
OWN_KEYS = {"num_key_value_heads": ""}  # each head has its own
LAYER_EPS = {"rms_norm_eps": "layer_norm_eps"}
ROTARY = {"partial_rotary_factor": "rotary_factor"}

FAMILIES = {
    "llama": Family(
        "Llama 1-3, SmolLM 1 and 2, TinyLlama, Yi, DeepSeek-Coder, and fine-tunes",
        defaults=size(32000, 4096, 11008, 32, 32, None, 2048) | {"rms_norm_eps": 1e-6},
        reads=BIASES,
        names=HF,
    ),
    "mistral": Family("Mistral 7B, Nemo and Small, Codestral", defaults=MISTRAL, windows="all", names=HF),
    "ministral": Family("Ministral 8B", defaults=MISTRAL, windows="all", names=HF),
    "ministral3": Family(
        "Ministral 3",
        defaults=size(131072, 4096, 14336, 34, 32, 8, 262144) | {
            "head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None, "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
            },
        },
        windows="always",
        names=HF,
    ),
    "qwen2": Family("Qwen 1.5, 2 and 2.5", defaults=QWEN, options={"qkv_bias": True}, windows="late", names=HF),
    "qwen3": Family(
        "Qwen 3",
        defaults=QWEN | {"head_dim": 128},
        options={"qk_norm": "head"},
        reads=ATTENTION_BIAS,
        windows="late",
        names=HF,
    ),
    "qwen2_vl": Family("Qwen2-VL, with its eyes", architectures=("Qwen2VLForConditionalGeneration",), **QWEN_VL),
    "qwen2_5_vl": Family("Qwen2.5-VL, with its eyes", architectures=("Qwen2_5_VLForConditionalGeneration",), **QWEN_VL),
    "gemma": Family(
        "Gemma 1, CodeGemma",
        defaults=size(256000, 3072, 24576, 28, 16, 16, 8192) | GEMMA_SIZE,
        options=GEMMA,
        reads=ATTENTION_BIAS,
        activations={"gelu": "gelu_tanh"},  # so its first configs say
        ignores=("hidden_activation",),
        names=HF,
    ),
    "gemma2": Family(
        "Gemma 2",
        renamed={"hidden_act": "hidden_activation"},
        defaults=size(256000, 2304, 9216, 26, 8, 4, 8192) | GEMMA_SIZE | {
            "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        options=GEMMA | {"norm_place": "both"},
        reads=ATTENTION_BIAS | GEMMA_SCALES | {"attn_logit_softcapping": "attention_softcap"},
        ignores=("hidden_act", "sliding_window_size"),
        windows="pattern", window_pattern=2,
        names=SANDWICH,
    ),
    "gemma3_text": Family(
        "Gemma 3, of those that see pictures the language part",
        renamed={"hidden_act": "hidden_activation"},
        defaults=size(262208, 2304, 9216, 26, 8, 4, 131072) | GEMMA_SIZE | {
            "sliding_window": 4096, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        options=GEMMA | {"norm_place": "both", "qk_norm": "head"},
        reads=ATTENTION_BIAS | GEMMA_SCALES,
        ignores=("hidden_act", "attn_logit_softcapping"),
        windows="pattern",
        window_theta="rope_local_base_freq",
        architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        names=SANDWICH,
    ),
    "phi": Family(
        "Phi 1, 1.5 and 2",
        renamed=LAYER_EPS,
        defaults=size(51200, 2048, 8192, 24, 32, None, 2048) | {
            "rms_norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5,
        },
        options=LAYER_NORM | BIASED | {"parallel": True, "shared_norm": True, "gated": False, "output_bias": True},
        reads=ROTARY | {"qk_layernorm": "qk_norm=head qk_norm_bias"},
        names=Names(LLAMA | {
            "attention.q_norm": ["self_attn.q_layernorm"], "attention.k_norm": ["self_attn.k_layernorm"],
            "attention.wo": ["self_attn.dense"], "feed_forward.w1": ["mlp.fc1"], "feed_forward.w2": ["mlp.fc2"],
            "norm": ["model.final_layernorm"],
        }),
    ),
    "phi3": Family(
        "Phi 3, 3.5, 4 and 4-mini",
        defaults=size(32064, 3072, 8192, 32, 32, None, 4096) | {
            "rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096,
        },
        reads=ROTARY,
        ignores=("interpolate_factor", "full_attn_mod"),
        windows="always",
        names=Names(LLAMA | FUSED | {"attention.wqkv": ["self_attn.qkv_proj"]}),
    ),
    "smollm3": Family(
        "SmolLM 3",
        defaults=size(128256, 2048, 11008, 36, 16, 4, 32768) | TIED | {
            "rms_norm_eps": 1e-6, "rope_theta": 2e6, "use_sliding_window": False, "no_rope_layer_interval": 4,
        },
        reads=BIASES,
        windows="unrotated",
        rotated="listed",
        names=HF,
    ),
    "olmo": Family(
        "OLMo 1",
        renamed={"rms_norm_eps": ""},
        defaults=OLMO_SIZE,
        options={"norm": "layer", "norm_weight": False},
        reads=ATTENTION_BIAS | {"clip_qkv": "clip_qkv"},
        names=HF,
    ),
    "olmo2": Family("OLMo 2", defaults=OLMO_SIZE, options=OLMO_2, reads=ATTENTION_BIAS, names=SANDWICH),
    "olmo3": Family(
        "OLMo 3",
        defaults=OLMO_SIZE | {"rope_theta": 5e5, "sliding_window": 4096},
        options=OLMO_2,
        reads=ATTENTION_BIAS,
        windows="pattern", window_pattern=4,
        window_theta="rope_theta",
        names=SANDWICH,
    ),
    "granite": Family("Granite 3", defaults=GRANITE_SIZE, reads=GRANITE | BIASES, names=HF),
    "cohere": Family(
        "Command R, Aya",
        renamed=LAYER_EPS,
        defaults=COHERE_SIZE | {"rope_theta": 5e5},
        options=COHERE,
        reads=ATTENTION_BIAS | {"logit_scale": "logit_scale", "use_qk_norm": "qk_norm=heads"},
        names=Names(LLAMA, interleaved=True),
    ),
    "cohere2": Family(
        "Command R7B, Command A",
        renamed=LAYER_EPS,
        defaults=COHERE_SIZE | {"sliding_window": 4096, "sliding_window_pattern": 4},
        options=COHERE,
        reads=ATTENTION_BIAS | {"logit_scale": "logit_scale"},
        ignores=(
            "layer_switch", "order_of_interleaved_layers", "position_embedding_type", "use_embedding_sharing",
            "use_gated_activation", "use_parallel_block", "use_parallel_embedding",
        ),
        windows="pattern",
        rotated="windows",
        names=Names(LLAMA, interleaved=True),
    ),
    "glm": Family("GLM-4 9B", defaults=GLM_SIZE, reads=GLM_READS, names=Names(LLAMA | FUSED, interleaved=True)),
    "glm4": Family(
        "GLM-4-0414",
        defaults=GLM_SIZE,
        options={"norm_place": "both"},
        reads=GLM_READS,
        names=Names(LLAMA | FUSED | {
            "post_attention_norm": ["post_self_attn_layernorm"], "post_ffn_norm": ["post_mlp_layernorm"],
        }, interleaved=True),
    ),
    "stablelm": Family(
        "StableLM 2, StableLM 3B, Stable Code",
        renamed=LAYER_EPS,
        defaults=size(50304, 2560, 6912, 32, 32, 32, 4096) | {"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
        options=LAYER_NORM,
        ignores=("rotary_scaling_factor", "use_norm_bias"),
        reads=ROTARY | {
            "use_qkv_bias": "qkv_bias", "qk_layernorm": "qk_norm=heads",
            "use_parallel_residual": "parallel shared_norm",
        },
        names=Names(LLAMA | {
            "attention.q_norm": ["self_attn.q_layernorm.norms.{}"],
            "attention.k_norm": ["self_attn.k_layernorm.norms.{}"],
        }),
    ),
    "starcoder2": Family(
        "StarCoder 2",
        renamed={"rms_norm_eps": "norm_epsilon"},
        defaults=size(49152, 3072, 12288, 30, 24, 2, 4096) | TIED | {
            "rms_norm_eps": 1e-5, "sliding_window": None, "use_bias": True, "hidden_act": "gelu_pytorch_tanh",
        },
        options=LAYER_NORM | {"gated": False},
        reads={"use_bias": "qkv_bias wo_bias mlp_bias"},
        ignores=("mlp_type", "norm_type", "rms_norm_eps"),
        windows="always",
        names=Names(LLAMA | UNGATED),
    ),
    "seed_oss": Family(
        "Seed-OSS",
        defaults=size(155136, 4096, 27648, 64, 80, 8, 524288) | {
            "head_dim": 128, "rms_norm_eps": 1e-6, "attention_bias": True,
        },
        reads={"attention_bias": "qkv_bias", "attention_out_bias": "wo_bias", "mlp_bias": "mlp_bias"},
        names=HF,
    ),
    "gpt2": Family(
        "GPT-2",
        renamed=OWN_KEYS | {
            "intermediate_size": "n_inner", "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_epsilon",
        },
        also={
            "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
        },
        defaults=size(50257, 768, None, 12, 12, None, 1024) | TIED | {
            "rms_norm_eps": 1e-5, "hidden_act": "gelu_new", "scale_attn_weights": True,
        },
        options=LAYER_NORM | BIASED | {"gated": False, "learned_positions": True},
        reads={"scale_attn_weights": "scale_attention", "scale_attn_by_inverse_layer_idx": "attention_scale_falls"},
        rotated="none",
        architectures=("GPT2LMHeadModel", "GPT2Model"),
        ffn_rule="4",
        names=Names({
            "tok_embeddings": ["transformer.wte"], "pos_embeddings": ["transformer.wpe"],
            "attention.wqkv": ["attn.c_attn"], "attention.wo": ["attn.c_proj"], "attention_norm": ["ln_1"],
            "ffn_norm": ["ln_2"], "norm": ["transformer.ln_f"], "output": ["lm_head"],
        } | UNGATED, layer="transformer.h.{}.", transforms=dict.fromkeys(
            ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2"), "transposed",
        )),
    ),
    "gpt_neox": Family(
        "GPT-NeoX, Pythia, Dolly",
        renamed=OWN_KEYS | LAYER_EPS | {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
        ignores=("partial_rotary_factor", "rope_theta"),  # copies that transformers 4 wrote
        defaults=size(50432, 6144, 24576, 44, 64, None, 2048) | {
            "rms_norm_eps": 1e-5, "hidden_act": "gelu", "partial_rotary_factor": 0.25, "use_parallel_residual": True,
            "attention_bias": True,
        },
        options=LAYER_NORM | {"gated": False, "mlp_bias": True},
        reads=ROTARY | {"use_parallel_residual": "parallel", "attention_bias": "qkv_bias wo_bias"},
        names=Names({
            "tok_embeddings": ["gpt_neox.embed_in"], "attention.wqkv": ["attention.query_key_value"],
            "attention.wo": ["attention.dense"], "attention_norm": ["input_layernorm"],
            "ffn_norm": ["post_attention_layernorm"], "feed_forward.w1": ["mlp.dense_h_to_4h"],
            "feed_forward.w2": ["mlp.dense_4h_to_h"], "norm": ["gpt_neox.final_layer_norm"], "output": ["embed_out"],
        }, layer="gpt_neox.layers.{}.", transforms={"attention.wqkv": "heads_apart"}),
    ),
    "mixtral": Family(
        "Mixtral",
        also={"num_experts": "num_local_experts"},
        defaults=size(32000, 4096, 14336, 32, 32, 8, 131072) | {
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        windows="always",
        experts=ExpertFields(),
        names=Names(LLAMA | MIXTRAL_EXPERTS),
    ),
    "qwen2_moe": Family(
        "Qwen 1.5 and 2 with experts",
        defaults=QWEN | size(151936, 2048, 5632, 24, 16, 16, 32768) | {
            "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "norm_topk_prob": False, "decoder_sparse_step": 1,
        },
        reads={"qkv_bias": "qkv_bias"},
        windows="early",
        experts=ExpertFields(*QWEN_EXPERTS, "shared_expert_intermediate_size", shared_gate=True),
        names=Names(LLAMA | EXPERTS),
    ),
    "qwen3_moe": Family(
        "Qwen 3 with experts",
        also={"num_local_experts": "num_experts"},  # so transformers 5 writes it
        defaults=QWEN | size(151936, 2048, 6144, 24, 32, 4, 32768) | {
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        options={"qk_norm": "head"},
        reads=ATTENTION_BIAS,
        windows="always",
        experts=ExpertFields(*QWEN_EXPERTS),
        names=Names(LLAMA | EXPERTS),
    ),
    "olmoe": Family(
        "OLMoE",
        also={"num_local_experts": "num_experts"},
        defaults=size(50304, 2048, 2048, 16, 16, None, 4096) | {
            "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
        },
        options={"qk_norm": "all"},
        reads=ATTENTION_BIAS | {"clip_qkv": "clip_qkv"},
        experts=ExpertFields("num_experts", "intermediate_size", "norm_topk_prob"),
        names=Names(LLAMA | EXPERTS),
    ),
    "granitemoe": Family(
        "Granite 3 with experts",
        defaults=GRANITE_SIZE | {"num_local_experts": 8, "num_experts_per_tok": 2},
        reads=GRANITE | ATTENTION_BIAS,
        experts=ExpertFields(),
        names=Names(LLAMA | GRANITE_EXPERTS),
    ),
    "granitemoeshared": Family(
        "Granite 3 with experts, one of them shared",
        defaults=GRANITE_SIZE | {"num_local_experts": 8, "num_experts_per_tok": 2},
        reads=GRANITE | ATTENTION_BIAS,
        experts=ExpertFields(shared="shared_intermediate_size"),
        names=Names(LLAMA | GRANITE_EXPERTS),
    ),
    "gpt_oss": Family(
        "gpt-oss",
        also={"num_experts": "num_local_experts"},
        defaults=size(201088, 2880, 2880, 36, 64, 8, 131072) | {
            "head_dim": 64, "rms_norm_eps": 1e-5, "sliding_window": 128, "attention_bias": True,
            "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
            "rope_theta": 150000.0, "rope_parameters": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        options={"attention_sinks": True, "activation": "clamped_silu"},
        reads=ATTENTION_BIAS | {"swiglu_limit": "activation_limit", "swiglu_alpha": "activation_alpha"},
        ignores=("experts_per_token",),
        windows="pattern", window_pattern=2,
        experts=ExpertFields(bias=True),
        names=Names(LLAMA | {
            "attention.sinks": ["=self_attn.sinks"], "feed_forward.router": ["mlp.router"],
            "feed_forward.experts.w13": ["=mlp.experts.gate_up_proj"],
            "feed_forward.experts.w2": ["=mlp.experts.down_proj"],
        }, transforms={"feed_forward.experts.w13": "gate_and_up_by_turns", "feed_forward.experts.w2": "transposed"}),
    ),
    # MiniMind's own code is not part of transformers; its configs name all else.
    "minimind": Family(
        "MiniMind, dense and with experts",
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": True, "norm_topk_prob": True},
        also={"n_routed_experts": "num_experts"},  # in its second version
        reads=ATTENTION_BIAS | {"qk_norm": "qk_norm=head"},
        experts=ExpertFields(*QWEN_EXPERTS, shared_count="n_shared_experts"),
        use_experts="use_moe",
        architectures=("MiniMindLM",),
        ffn_rule="8/3",
        names=Names(LLAMA | EXPERTS | {
            "feed_forward.shared.w13": ["mlp.shared_experts.0.gate_proj", "mlp.shared_experts.0.up_proj"],
            "feed_forward.shared.w2": ["mlp.shared_experts.0.down_proj"],
        }),
    ),
}  # fmt: skip

# Models with eyes that are not used: of these the language part is run, whose config is nested as `text_config`.
WRAPPERS = ("gemma3", "mistral3")
