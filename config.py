"""The shape of a model, read from a Hugging Face config.json.

    config = ModelConfig.from_hf(json.load(open("config.json")))
    unknown_fields(json.load(open("config.json")))           # ["some_new_field"], which the converter warns of

Of its fields, those in READ are honoured; those in REFUSED would change the result, and any value but the one given
there is refused by name; those in IGNORED are known not to matter. Missing ones have the defaults of transformers.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from errors import UserError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Family:
    """What distinguishes a family: the defaults of its fields, and what its code does, whatever config.json says."""

    defaults: dict[str, Any] = field(default_factory=dict)  # of fields that are missing, as in transformers
    biases: tuple[str, ...] = ()  # fields that add biases here; true is refused where the family does not know them
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_layers: str = "none"  # which layers may have a sliding window: none, all, or some
    ffn_multiple: int = 0  # intermediate_size may be left to a rule: 8/3 of the width, up to a multiple of this


QWEN = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
FAMILIES = {
    "llama": Family(
        defaults={
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        },
        biases=("attention_bias", "mlp_bias"),
    ),
    "mistral": Family(
        defaults={
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6, "sliding_window": 4096,
        },
        sliding_layers="all",
    ),
    "qwen2": Family(defaults=QWEN, qkv_bias=True, sliding_layers="some"),
    "qwen3": Family(
        defaults=QWEN | {"head_dim": 128}, biases=("attention_bias",), qk_norm=True, sliding_layers="some"
    ),
    # MiniMind's own code is not part of transformers; its configs name all else.
    "minimind": Family(
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": True},
        biases=("attention_bias",),
        ffn_multiple=64,
    ),
}  # fmt: skip

READ = {
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings", "max_sequence_length",
    "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias", "qk_norm", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings", "quantization_config", "text_config",
}  # fmt: skip

# Fields of other families, or of transformers itself, that change what is computed: the value with which they do not,
# beside null, false, 0 and what is empty.
REFUSED: dict[str, Any] = {
    "partial_rotary_factor": 1, "rotary_pct": 1, "rotary_dim": None, "rope_interleave": None,
    "rope_local_base_freq": None, "no_rope_layers": None, "no_rope_layer_interval": None,
    "position_embedding_type": "rope", "alibi": None, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "query_pre_attn_scalar": None, "attention_multiplier": None, "embedding_multiplier": 1, "residual_multiplier": 1,
    "logits_scaling": 1, "logit_scale": 1, "lm_head_multiplier": 1, "key_multiplier": 1, "mlp_multipliers": None,
    "scale_emb": 1, "scale_depth": None, "scale_embedding": None, "clip_qkv": None, "attention_chunk_size": None,
    "attn_temperature_tuning": None, "use_qk_norm": None, "qk_layernorm": None, "use_bias": None, "use_qkv_bias": None,
    "parallel_attn": None, "use_parallel_residual": None, "norm_type": "rms_norm", "hidden_activation": "silu",
    "use_moe": None, "num_local_experts": None, "moe_num_experts": None, "first_k_dense_replace": None,
    "kv_lora_rank": None, "q_lora_rank": None, "num_kv_shared_layers": None, "hidden_size_per_layer_input": None,
    "block_configs": None, "per_layer_config": None, "add_cross_attention": None, "pruned_heads": None,
    "vision_config": None, "audio_config": None, "transformers_weights": None,
}  # fmt: skip

# Fields that say nothing about the computation of the logits at inference.
IGNORED = {
    "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range", "attention_dropout",
    "hidden_dropout", "dropout", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "pretraining_tp", "auto_map",
    "tokenizer_class", "model_max_length", "name_or_path", "is_llama_config", "transformers.js_config",
    "attn_implementation", "experts_implementation", "flash_attn", "neftune_noise_alpha",
    "keys_to_ignore_at_inference", "task_specific_params", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "return_dict", "return_dict_in_generate", "chunk_size_feed_forward", "is_encoder_decoder",
    "is_decoder", "cross_attention_hidden_size", "max_length", "min_length", "do_sample", "temperature", "top_k",
    "top_p", "typical_p", "num_beams", "num_beam_groups", "num_return_sequences", "length_penalty",
    "repetition_penalty", "diversity_penalty", "exponential_decay_length_penalty", "early_stopping",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "max_new_tokens", "remove_invalid_values",
    "output_attentions", "output_hidden_states", "output_scores", "output_router_logits", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids", "prefix", "tie_encoder_decoder", "torchscript", "tf_legacy_loss",
    "use_bfloat16", "model_name", "unsloth_version", "unsloth_fixed", "gradient_checkpointing",
    # MiniMind writes its mixture-of-experts settings even where use_moe is false (true is refused).
    "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "num_experts", "scoring_func", "aux_loss_alpha",
    "seq_aux", "norm_topk_prob", "moe_intermediate_size", "router_aux_loss_coef",
}  # fmt: skip


def unknown_fields(config: dict[str, Any]) -> list[str]:
    """The fields of a parsed config.json of which it is not known whether they matter, without those that are empty."""
    fields = text_fields(config)
    known = READ | REFUSED.keys() | IGNORED
    return [name for name in fields if name not in known and not name.startswith("_") and not _is_empty(fields[name])]


def text_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a parsed config.json; those of a nested `text_config` count where the outer ones are silent."""
    nested = config.get("text_config")
    return (nested if isinstance(nested, dict) else {}) | config


def _is_empty(value: Any) -> bool:
    return value in (None, False, "", [], {})


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, with the ways to stretch it that config.json names in `rope_type`."""

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 0  # the context the model was trained on, in tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cos and sin


@dataclass(frozen=True)
class ModelConfig:
    """What the architecture needs to know; sizes are numbers of elements, lengths are in tokens."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    wo_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before RoPE
    sliding_window: int | None = None  # a query sees itself and the `sliding_window - 1` keys before it ...
    window_layers: tuple[bool, ...] = ()  # ... in the layers that say so
    tied: bool = False  # the output projection is the embedding

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Reads a parsed config.json, old spelling or new. UserError names what is missing or unsupported."""
        read = _FieldReader(config)
        family = read.family()
        layers = read.integer("num_hidden_layers", maximum=10_000)
        dim = read.integer("hidden_size", maximum=2**20)
        heads = read.integer("num_attention_heads", maximum=2**16)
        kv_heads = read.integer("num_key_value_heads", default=heads, maximum=2**16)
        if heads % kv_heads:
            raise read.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
        if read.value("head_dim") is None and dim % heads:
            raise read.error("hidden_size", f"{dim} is not divisible by num_attention_heads {heads}")
        head_dim = read.integer("head_dim", default=max(dim // heads, 1), maximum=2**14)
        if head_dim % 2:
            raise read.error("head_dim", f"{head_dim} is odd, and RoPE rotates pairs")
        if read.value("hidden_act", "silu") != "silu":
            raise read.error("hidden_act", f"{read.value('hidden_act')!r} is not supported, only 'silu' is")
        biased = read.flag("attention_bias")
        window, window_layers = read.sliding_window(family, layers)
        max_positions = read.integer("max_position_embeddings", maximum=2**31)
        rope = read.rope(max_positions)
        multiple = family.ffn_multiple
        ffn_dim = multiple * math.ceil(int(dim * 8 / 3) / multiple) if multiple else None
        return cls(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_dim=read.integer("intermediate_size", default=ffn_dim, maximum=2**22),
            vocab_size=read.integer("vocab_size", maximum=2**24),
            context_length=max(max_positions, int(rope.original_length * rope.factor)),
            norm_eps=read.number("rms_norm_eps", maximum=1.0),
            rope=rope,
            qkv_bias=biased or family.qkv_bias,
            wo_bias=biased,
            mlp_bias=read.flag("mlp_bias"),
            qk_norm=family.qk_norm or read.flag("qk_norm"),
            sliding_window=window,
            window_layers=window_layers,
            tied=read.flag("tie_word_embeddings"),
        )


class _FieldReader:
    """Reads fields of a config.json; each error names the field."""

    def __init__(self, config: dict[str, Any], where: str = "config.json"):
        if not isinstance(config, dict):
            raise UserError(f"{where} holds {type(config).__name__}, not an object; get the model's own config.json")
        self.config, self.where = config, where

    def error(self, name: str, what: str) -> UserError:
        return UserError(f"{self.where}: {name}: {what}")

    def value(self, name: str, default: Any = None) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def number(self, name: str, default: float | None = None, maximum: float = 1e12) -> float:
        value = self.value(name, default)
        if value is None:
            raise self.error(name, "the field is missing; get the model's own config.json")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"{value!r} is not a number")
        if not 0 < value <= maximum:  # NaN is refused here as well
            raise self.error(name, f"{value!r} is out of range; it must be more than 0 and at most {maximum:.10g}")
        return float(value)

    def integer(self, name: str, default: int | None = None, maximum: int = 2**31) -> int:
        value = self.number(name, default, maximum)
        if value != int(value) or isinstance(self.value(name), float):
            raise self.error(name, f"{self.value(name)!r} is not a whole number")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"{value!r} is neither true nor false")
        return value

    def family(self) -> Family:
        """The family, whose defaults the missing fields then have. Refuses what this program cannot honour."""
        self.config = text_fields(self.config)
        model_type = self.value("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise self.error("model_type", f"{model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
        family = FAMILIES[model_type]
        # Configs write their class name (LlamaForCausalLM, once LLaMAForCausalLM), and MiniMind had MiniMindLM as well.
        expected = {f"{model_type}forcausallm", f"{model_type}lm"}
        architectures = self.value("architectures", [])
        if not isinstance(architectures, list) or any(str(name).lower() not in expected for name in architectures):
            raise self.error("architectures", f"{architectures!r} is not supported for model_type {model_type!r}")
        if self.value("quantization"):  # which mlx writes
            raise self.error("quantization", "weights that mlx quantized are not supported; convert the original model")
        if self.value("quantization_config"):
            method = self.config["quantization_config"]
            method = method.get("quant_method") if isinstance(method, dict) else method
            if method not in ("gptq", "awq"):  # which the converter reads; the rest of it does not matter here
                raise self.error(
                    "quantization_config", f"{method!r} weights are not supported; convert the unquantized model"
                )
        for name, inert in REFUSED.items():
            value = self.value(name)
            if not _is_empty(value) and value != inert:
                raise self.error(
                    name, f"{value!r}: this field is not supported; remove it if it does not change the model"
                )
        for name in ("attention_bias", "mlp_bias"):
            if self.flag(name) and name not in family.biases:
                raise self.error(name, f"true is not supported for {model_type}")
        if "max_position_embeddings" not in self.config and self.value("max_sequence_length"):  # the first LLaMA's
            self.config["max_position_embeddings"] = self.config["max_sequence_length"]
        self.config = family.defaults | self.config
        return family

    def sliding_window(self, family: Family, layers: int) -> tuple[int | None, tuple[bool, ...]]:
        """The window in tokens and the layers that use it."""
        full = (None, (False,) * layers)
        types = self.value("layer_types")
        if types is not None:
            if not isinstance(types, list) or len(types) != layers:
                raise self.error("layer_types", f"must list one type for each of the {layers} layers")
            for name in types:
                if name not in ("full_attention", "sliding_attention"):
                    raise self.error("layer_types", f"{name!r} is not supported")
        if family.sliding_layers == "none":
            if types is not None and "sliding_attention" in types:
                raise self.error("layer_types", f"sliding_attention is not supported for {self.config['model_type']}")
            return full
        if family.sliding_layers == "all":
            if types is not None and len(set(types)) > 1:
                raise self.error("layer_types", f"alternating is not supported for {self.config['model_type']}")
            if self.value("sliding_window") is None:
                return full
            return self.integer("sliding_window"), (True,) * layers
        if not self.flag("use_sliding_window") or self.value("sliding_window") is None:
            return full
        if types is None:
            first = self.value("max_window_layers", 28)
            if isinstance(first, bool) or not isinstance(first, int) or first < 0:
                raise self.error("max_window_layers", f"{first!r} is not a number of layers")
            windows = tuple(i >= first for i in range(layers))
        else:
            windows = tuple(name == "sliding_attention" for name in types)
        return self.integer("sliding_window"), windows

    def rope(self, max_positions: int) -> RopeConfig:
        """`rope_parameters` of today, or `rope_theta` and `rope_scaling` of before."""
        fields = (
            dict(self.value("rope_scaling", {}) or {}) if isinstance(self.value("rope_scaling", {}), dict) else None
        )
        newer = self.value("rope_parameters", {})
        if fields is None or not isinstance(newer, dict):
            raise self.error("rope_parameters" if fields is not None else "rope_scaling", "is not an object")
        fields.update(newer)
        fields.setdefault("rope_theta", self.value("rope_theta", 1e4))
        fields.setdefault("original_max_position_embeddings", self.value("original_max_position_embeddings"))
        where = "rope_parameters" if newer else "rope_scaling" if self.value("rope_scaling") else "rope"
        read = _FieldReader(fields, f"{self.where}: {where}")
        kind = read.value("rope_type", read.value("type", "default"))
        if kind not in ROPE_TYPES:
            raise read.error("rope_type", f"{kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
        known = {
            "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "low_freq_factor",
            "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
        }  # fmt: skip
        for name, value in fields.items():
            if name not in known and value is not None and (name, value) != ("partial_rotary_factor", 1):
                raise read.error(name, f"{value!r}: this field is not supported")
        theta = read.number("rope_theta")
        if kind == "default":
            return RopeConfig(theta=theta)
        if theta <= 1:
            raise read.error("rope_theta", f"{theta} must be more than 1 for rope_type {kind!r}")
        original = read.integer("original_max_position_embeddings", default=max_positions)
        if kind == "yarn" and fields.get("factor") is None:
            fields["factor"] = max_positions / original
        factor = read.number("factor", maximum=2**16)
        if kind == "linear" or kind == "dynamic":
            return RopeConfig(kind, theta, factor, max_positions)
        if kind == "llama3":
            low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
            if low >= high:
                raise read.error("low_freq_factor", f"{low} must be less than high_freq_factor {high}")
            return RopeConfig(kind, theta, factor, original, low, high)
        # YaRN, https://arxiv.org/abs/2309.00071: the temperature of the softmax, moved into cos and sin.
        mscale, mscale_all = read.value("mscale"), read.value("mscale_all_dim")
        attention_factor = _yarn_mscale(factor, 1.0)
        if mscale and mscale_all:
            mscale, mscale_all = read.number("mscale"), read.number("mscale_all_dim")
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
        return RopeConfig(
            kind,
            theta,
            factor,
            original,
            beta_fast=read.number("beta_fast", default=32.0),
            beta_slow=read.number("beta_slow", default=1.0),
            truncate=read.flag("truncate", default=True),
            attention_factor=read.number("attention_factor", default=attention_factor),
        )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
