"""The shape of a model, read from a Hugging Face config.json: every field is honoured, or refused by name.

config = ModelConfig.from_hf(json.load(open("config.json")))
"""

import math
from dataclasses import dataclass
from typing import Any

from errors import UserError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "minimind")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

# Fields that are read below.
READ = {
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings", "hidden_act",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "qk_norm", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings", "quantization_config",
}  # fmt: skip

# Fields that say nothing about the computation of the logits at inference.
IGNORED = {
    "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range", "attention_dropout",
    "hidden_dropout", "dropout", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "decoder_start_token_id", "pretraining_tp", "auto_map", "tokenizer_class", "max_sequence_length",
    "model_max_length", "flash_attn", "keys_to_ignore_at_inference", "task_specific_params", "id2label", "label2id",
    "problem_type", "finetuning_task", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder",
    "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams",
    "num_beam_groups", "num_return_sequences", "length_penalty", "repetition_penalty", "diversity_penalty",
    "early_stopping", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "max_new_tokens", "output_attentions",
    "output_hidden_states", "output_scores", "suppress_tokens", "bad_words_ids", "prefix", "tie_encoder_decoder",
    "torchscript", "model_name", "unsloth_version", "unsloth_fixed", "gradient_checkpointing",
    # MiniMind writes its mixture-of-experts settings even where use_moe is false (true is refused).
    "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "num_experts", "scoring_func", "aux_loss_alpha",
    "seq_aux", "norm_topk_prob", "moe_intermediate_size", "router_aux_loss_coef",
}  # fmt: skip


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
        model_type = read.model_type()
        layers = read.integer("num_hidden_layers", maximum=10_000)
        dim = read.integer("hidden_size", maximum=2**20)
        heads = read.integer("num_attention_heads", maximum=2**16)
        kv_heads = read.integer("num_key_value_heads", default=heads, maximum=2**16)
        if heads % kv_heads:
            raise read.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
        if read.value("head_dim") is None and dim % heads:
            raise read.error("hidden_size", f"{dim} is not divisible by num_attention_heads {heads}")
        head_dim = read.integer(
            "head_dim", default=128 if model_type == "qwen3" else max(dim // heads, 1), maximum=2**14
        )
        if head_dim % 2:
            raise read.error("head_dim", f"{head_dim} is odd, and RoPE rotates pairs")
        if read.value("hidden_act", "silu") != "silu":
            raise read.error("hidden_act", f"{config['hidden_act']!r} is not supported, only 'silu' is")
        biased = read.flag("attention_bias")
        window, window_layers = read.sliding_window(model_type, layers)
        max_positions = read.integer("max_position_embeddings", maximum=2**31)
        rope = read.rope(max_positions)
        return cls(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_dim=read.integer("intermediate_size", default=read.minimind_ffn_dim(model_type, dim), maximum=2**22),
            vocab_size=read.integer("vocab_size", maximum=2**24),
            context_length=max(max_positions, int(rope.original_length * rope.factor)),
            norm_eps=read.number("rms_norm_eps", default=1e-5 if model_type == "minimind" else 1e-6, maximum=1.0),
            rope=rope,
            qkv_bias=biased or model_type == "qwen2",
            wo_bias=biased,
            mlp_bias=read.flag("mlp_bias"),
            qk_norm=model_type == "qwen3" or read.flag("qk_norm"),
            sliding_window=window,
            window_layers=window_layers,
            tied=read.flag("tie_word_embeddings", default=model_type == "minimind"),
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
            raise self.error(name, f"{value!r} is out of range; it must be more than 0 and at most {maximum:g}")
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

    def model_type(self) -> str:
        """The family, after refusing every field that this program does not know how to honour."""
        model_type = self.value("model_type")
        if model_type not in MODEL_TYPES:
            raise self.error("model_type", f"{model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}")
        # Configs write their class name, and MiniMind had two: MiniMindForCausalLM and MiniMindLM.
        expected = {f"{model_type}forcausallm", f"{model_type}lm"}
        architectures = self.value("architectures", [])
        if not isinstance(architectures, list) or any(str(name).lower() not in expected for name in architectures):
            raise self.error("architectures", f"{architectures!r} is not supported for model_type {model_type!r}")
        if self.value("quantization_config"):
            method = self.config["quantization_config"]
            method = method.get("quant_method") if isinstance(method, dict) else method
            if method not in ("gptq", "awq"):  # which the converter reads; the rest of it does not matter here
                raise self.error(
                    "quantization_config", f"{method!r} weights are not supported; convert the unquantized model"
                )
        for name, value in self.config.items():
            known = name in READ or name in IGNORED or name.startswith("_")
            if not known and value not in (None, False, "", [], {}) and (name, value) != ("partial_rotary_factor", 1):
                raise self.error(
                    name, f"{value!r}: this field is not supported; remove it if it does not change the model"
                )
        if model_type in ("mistral", "qwen2") and self.flag("attention_bias"):
            raise self.error("attention_bias", f"true is not supported for {model_type}")
        if self.flag("mlp_bias") and model_type != "llama":
            raise self.error("mlp_bias", f"true is not supported for {model_type}")
        return model_type

    def minimind_ffn_dim(self, model_type: str, dim: int) -> int | None:
        """MiniMind may leave intermediate_size to a rule: 8/3 of the width, up to the next multiple of 64."""
        return 64 * math.ceil(int(dim * 8 / 3) / 64) if model_type == "minimind" else None

    def sliding_window(self, model_type: str, layers: int) -> tuple[int | None, tuple[bool, ...]]:
        """The window in tokens and the layers that use it."""
        full = (None, (False,) * layers)
        types = self.value("layer_types")
        if types is not None:
            if not isinstance(types, list) or len(types) != layers:
                raise self.error("layer_types", f"must list one type for each of the {layers} layers")
            for name in types:
                if name not in ("full_attention", "sliding_attention"):
                    raise self.error("layer_types", f"{name!r} is not supported")
        if model_type in ("llama", "minimind"):
            if types is not None and "sliding_attention" in types:
                raise self.error("layer_types", f"sliding_attention is not supported for {model_type}")
            return full
        if model_type == "mistral":
            if types is not None and len(set(types)) > 1:
                raise self.error("layer_types", "alternating layers are not supported for mistral")
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
        usual = 1e6 if self.value("model_type") == "minimind" else 1e4
        fields.setdefault("rope_theta", self.value("rope_theta", usual))
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
