"""The fields of a Hugging Face config.json: which are known, and reading them.

    unknown_fields(json.load(open("config.json")))           # ["some_new_field"], which the converter warns of
    read = FieldReader(config)
    family = read.family()                                   # refuses what cannot be honoured
    read.integer("hidden_size")                              # UserError names the field

Those in READ are honoured, and those that the model's family names (families.py); those in REFUSED would change the
result, and any value but the one given there is refused by name; those in IGNORED are known not to matter. Missing ones
have the defaults of transformers.
"""

from collections.abc import Mapping
from typing import Any

from errors import UserError
from families import FAMILIES, WRAPPERS, Family

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip

FLAGS = {  # options that are true or false
    "qkv_bias", "wo_bias", "mlp_bias", "parallel", "shared_norm", "qk_norm_bias", "scale_attention",
    "attention_scale_falls",
}  # fmt: skip
CONVERSIONS = {"logits_scaling": lambda x: 1 / x, "query_pre_attn_scalar": lambda x: x**-0.5}

READ = {
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings", "max_sequence_length",
    "hidden_act", "tie_word_embeddings", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "quantization_config",
    "compression_config", "text_config",
}  # fmt: skip

# The ids of what stands before, behind and for images; chat templates write them.
VISION_TOKENS = (
    "image_token_id", "video_token_id", "vision_token_id", "vision_start_token_id", "vision_end_token_id",
)  # fmt: skip

# Fields of some families, or of transformers itself, that change what is computed: the value with which they do not,
# beside null, false, 0 and what is empty. Families that read them are not concerned.
REFUSED: dict[str, Any] = {
    "attention_bias": None, "mlp_bias": None, "attention_out_bias": None, "qk_norm": None,
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
    "vision_config": None, "audio_config": None, "transformers_weights": None, "scale_attn_by_inverse_layer_idx": None,
    "use_bidirectional_attention": None,
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
    # Dropout and losses of training, GPT-2's heads for other tasks, and what a cache or a kernel is to be.
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "embedding_dropout", "residual_dropout", "classifier_dropout",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "n_ctx", "reorder_and_upcast_attn", "router_jitter_noise", "cache_implementation", "initial_context_length",
    # MiniMind writes its mixture-of-experts settings even where use_moe is false.
    "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "num_experts", "scoring_func", "aux_loss_alpha",
    "seq_aux", "norm_topk_prob", "moe_intermediate_size", "router_aux_loss_coef",
}  # fmt: skip

# Why families are refused that are not in families.py.
LINEAR = "its linear attention or state-space layers have no keys and values to cache"
LATENT = "its latent attention (MLA) keeps compressed keys and values"
REASONS = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "rwkv",
                     "nemotron_h", "recurrent_gemma", "qwen3_next", "lfm2", "granitemoehybrid", "minimax",
                     "kimi_linear", "olmo_hybrid"), LINEAR),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "minicpm3", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("bert", "roberta", "t5", "bart", "whisper", "clip"), "it is no decoder-only language model"),
    "gemma3n": "its layers share caches and have inputs of their own",
    "gemma4": "its layers share caches and have heads of several sizes",
    "llama4": "its attention is cut in chunks",
    "bloom": "its attention is biased by distance (ALiBi)",
    "mpt": "its attention is biased by distance (ALiBi)",
    "falcon": "its attention may be biased by distance (ALiBi)",
}  # fmt: skip


def unknown_fields(config: dict[str, Any]) -> list[str]:
    """The fields of a parsed config.json of which it is not known whether they matter, without those that are empty."""
    fields = text_fields(config)
    family = FAMILIES.get(str(fields.get("model_type")), Family(""))
    known = (READ - family.renamed.keys()) | REFUSED.keys() | IGNORED | read_by(family)
    return [name for name in fields if name not in known and not name.startswith("_") and not _is_empty(fields[name])]


def read_by(family: Family) -> set[str]:
    """The fields beside READ that a family honours."""
    names = {*family.reads, family.window_theta, family.use_experts}
    names |= {*family.renamed.values(), *family.also.keys(), *family.also.values()}
    if family.windows == "pattern" and not family.window_pattern:
        names.add("sliding_window_pattern")
    if family.rotated == "listed":
        names |= {"no_rope_layers", "no_rope_layer_interval"}
    if family.sees:
        names |= {"vision_config", *VISION_TOKENS}
    if family.experts:
        names |= {*vars(family.experts).values(), "num_experts_per_tok", "scoring_func"}
    if "decoder_sparse_step" in family.defaults:
        names |= {"decoder_sparse_step", "mlp_only_layers"}
    return ({family.renamed.get(name, name) for name in names if isinstance(name, str)} | {*family.ignores}) - {""}


def text_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a parsed config.json that concern text: of a nested `text_config` too, where the outer ones are
    silent. Of a model with eyes they are those of the nested one, and outer ones where that is silent; what it sees by
    if that is used."""
    nested, kind = config.get("text_config"), config.get("model_type")
    if not isinstance(nested, dict):
        return dict(config)
    sees = FAMILIES.get(str(kind), Family("")).sees
    if kind not in WRAPPERS and not sees:
        return nested | config
    outer = ("architectures", "tie_word_embeddings", "quantization_config", "eos_token_id", "bos_token_id", "dtype",
             "torch_dtype", "transformers_version")  # fmt: skip
    fields = {name: config[name] for name in outer if name in config}
    if sees:
        own = {name: config[name] for name in ("vision_config", *VISION_TOKENS) if name in config}
        tied = any(part.get("tie_word_embeddings") is True for part in (config, nested))
        return nested | fields | own | {"model_type": kind, "tie_word_embeddings": tied}
    return {"tie_word_embeddings": True} | fields | nested | {"architectures": []}


def _is_empty(value: Any) -> bool:
    return value in (None, False, "", [], {})


class FieldReader:
    """Reads fields of a config.json, which go by the names that Llama gives them; each error names the field."""

    def __init__(self, config: dict[str, Any], where: str = "config.json", renamed: Mapping[str, str] | None = None):
        if not isinstance(config, dict):
            raise UserError(f"{where} holds {type(config).__name__}, not an object; get the model's own config.json")
        self.config, self.where, self.renamed = config, where, renamed or {}

    def error(self, name: str, what: str) -> UserError:
        return UserError(f"{self.where}: {self.renamed.get(name, name)}: {what}")

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
        """The family, by whose names and defaults the fields then go. Refuses what this program cannot honour."""
        if self.value("model_type") in WRAPPERS and not isinstance(self.value("text_config"), dict):
            raise self.error("text_config", "the field is missing; get the model's own config.json")
        self.config = text_fields(self.config)
        family = self._known_family()
        if self.value("quantization"):  # which mlx writes
            raise self.error("quantization", "weights that mlx quantized are not supported; convert the original model")
        own = read_by(family)
        for name, inert in REFUSED.items():
            value = self.value(name)
            if name not in own and not _is_empty(value) and value != inert:
                raise self.error(
                    name, f"{value!r}: this field is not supported; remove it if it does not change the model"
                )
        defaults = dict(family.defaults)
        given = {name: value for name, value in self.config.items() if name not in family.renamed}
        second = {ours: theirs for theirs, ours in family.also.items() if theirs in given and ours not in given}
        self.renamed = dict(family.renamed) | second
        given |= {ours: self.config[theirs] for ours, theirs in self.renamed.items() if theirs in self.config}
        if given.get("rope_parameters") is None:
            given.pop("rope_parameters", None)
        if given.get("rope_scaling"):
            defaults.pop("rope_parameters", None)
        if "partial_rotary_factor" in family.reads:
            nested = given.get("rope_scaling") or given.get("rope_parameters")  # where it may be, and counts more
            if isinstance(nested, dict) and nested.get("partial_rotary_factor") is not None:
                given["partial_rotary_factor"] = nested["partial_rotary_factor"]
        if "max_position_embeddings" not in given and given.get("max_sequence_length"):  # the first LLaMA's
            given["max_position_embeddings"] = given["max_sequence_length"]
        self.config = defaults | given
        return family

    def _known_family(self) -> Family:
        model_type = self.value("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            why = f": {REASONS[model_type]}" if isinstance(model_type, str) and model_type in REASONS else ""
            listing = "`python convert_hf_checkpoint.py --families` lists what is"
            raise self.error("model_type", f"{model_type!r} is not supported{why}; {listing}")
        family = FAMILIES[model_type]
        # Configs write their class name: LlamaForCausalLM, and once LLaMAForCausalLM.
        expected = {f"{model_type}forcausallm".replace("_", "")} | {name.lower() for name in family.architectures}
        architectures = self.value("architectures", [])
        if not isinstance(architectures, list) or any(str(name).lower() not in expected for name in architectures):
            raise self.error("architectures", f"{architectures!r} is not supported for model_type {model_type!r}")
        return family

    def options(self, family: Family) -> dict[str, Any]:
        """The options of ModelConfig that fields which only some families have set."""
        options: dict[str, Any] = {}
        for name, targets in family.reads.items():
            value = self.value(name)
            if value is None:
                continue
            for target in targets.split():
                option, _, chosen = target.partition("=")
                if chosen:
                    options[option] = chosen if self.flag(name) else ""
                elif option in FLAGS:
                    options[option] = self.flag(name)
                else:
                    options[option] = CONVERSIONS.get(name, float)(self.number(name))
        return options

    def activation(self, family: Family) -> str:
        name = self.config.get("hidden_act", "silu")
        known = ACTIVATIONS | dict(family.activations)
        if not isinstance(name, str) or name not in known:
            raise self.error("hidden_act", f"{name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
        return known[name]

    def layer_types(self, family: Family, layers: int) -> list[str] | None:
        types = self.value("layer_types")
        if types is None:
            return None
        if not isinstance(types, list) or len(types) != layers:
            raise self.error("layer_types", f"must list one type for each of the {layers} layers")
        for name in types:
            if name not in ("full_attention", "sliding_attention"):
                raise self.error("layer_types", f"{name!r} is not supported")
        if family.windows == "none" and "sliding_attention" in types:
            raise self.error("layer_types", f"sliding_attention is not supported for {self.config['model_type']}")
        return types

    def sliding_window(self, family: Family, layers: int) -> tuple[int | None, tuple[bool, ...]]:
        """The window in tokens and the layers that use it."""
        types = self.layer_types(family, layers)
        switched_off = "use_sliding_window" in family.defaults and not self.flag("use_sliding_window")
        if family.windows == "none" or switched_off or self.value("sliding_window") is None:
            if types is not None and family.windows == "pattern" and "sliding_attention" in types:
                raise self.error("sliding_window", "layer_types name layers with a window, and this field is missing")
            return None, (False,) * layers
        if family.windows == "always" and types is not None and "full_attention" in types:
            raise self.error("layer_types", f"{self.config['model_type']} has a sliding_window in all layers, or none")
        if types is not None:
            windows = tuple(name == "sliding_attention" for name in types)
        elif family.windows in ("all", "always"):
            windows = (True,) * layers
        elif family.windows == "pattern":
            pattern = family.window_pattern or self.integer("sliding_window_pattern")
            windows = tuple((i + 1) % pattern != 0 for i in range(layers))
        elif family.windows == "unrotated":
            windows = self.unrotated(family, (), layers) or (False,) * layers
        else:
            last = self.value("max_window_layers")
            if isinstance(last, bool) or not isinstance(last, int) or last < 0:
                raise self.error("max_window_layers", f"{last!r} is not a number of layers")
            late = family.windows == "late"
            windows = tuple(i >= last if late else i < last and i % 2 == 0 for i in range(layers))
        return self.integer("sliding_window"), windows

    def unrotated(self, family: Family, window_layers: tuple[bool, ...], layers: int) -> tuple[bool, ...]:
        """The layers without RoPE, () where there are none."""
        unrotated: tuple[bool, ...] = ()
        if family.rotated == "windows":
            unrotated = tuple(not window for window in window_layers)
        elif family.rotated == "listed":
            rotated = self.value("no_rope_layers")  # where they are called 1
            if rotated is None:
                interval = self.integer("no_rope_layer_interval")
                rotated = [int((i + 1) % interval != 0) for i in range(layers)]
            if not isinstance(rotated, list) or len(rotated) != layers or any(value not in (0, 1) for value in rotated):
                raise self.error("no_rope_layers", f"must list a 0 or 1 for each of the {layers} layers")
            unrotated = tuple(not value for value in rotated)
        return unrotated if any(unrotated) else ()

    def layers_with_experts(self, family: Family, layers: int) -> tuple[bool, ...]:
        """All, or by the rules of Qwen: every decoder_sparse_step-th, but for those that are listed."""
        if "decoder_sparse_step" not in family.defaults:
            return (True,) * layers
        step = self.integer("decoder_sparse_step")
        dense = self.value("mlp_only_layers", [])
        if not isinstance(dense, list) or any(type(i) is not int or not 0 <= i < layers for i in dense):
            raise self.error("mlp_only_layers", f"{dense!r} is no list of layers from 0 to {layers - 1}")
        return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
