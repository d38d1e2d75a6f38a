"""The model that a GGUF file holds: its metadata as the config.json of the same model on the hub, and how GGUF calls
its tensors.

    config, names = config_of(open_gguf("model.gguf"))       # a dict for ModelConfig.from_hf, Names for plan_tensors

The keys are described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A fact that a file lacks is what
llama.cpp takes it to be. A key of the architecture that is not read here and may matter is refused by name.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from config_fields import REASONS
from errors import UserError
from families import FAMILIES, Family, Names
from formats.gguf import GgufFile
from formats.gguf_families import (
    ARCHITECTURES,
    CLASSES,
    FLAGS,
    FORMS,
    GATE_IN_UP,
    HARMLESS,
    LAYER,
    MODEL_TYPES,
    NORMS,
    PARTS,
    Architecture,
)
from formats.packed import Packed, Stored


class Keys:
    """Reads the keys of an architecture, and knows which it has read. Each error names the key."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        prefix = f"{architecture}."
        self.prefix = prefix
        self.values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self.read: set[str] = set()

    def error(self, key: str, what: str) -> UserError:
        return UserError(f"GGUF metadata: {self.prefix}{key}: {what}")

    def missing(self, key: str) -> UserError:
        return self.error(key, "the key is missing; get a complete file, or convert the original model")

    def value(self, key: str) -> Any:
        self.read.add(key)
        return self.values.get(key)

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number, which may be given once for each layer if it is the same in all."""
        value = self.value(key)
        if isinstance(value, list) and value:
            if any(other != value[0] for other in value):
                raise self.error(key, "its layers differ in it, which is not supported; choose another model")
            value = value[0]
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(key, f"{value!r} is not a number; get the file again")
        return shortest(value) if isinstance(value, float) else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A size; one without a default has to be there and is not 0."""
        value = self.number(key, default)
        if value is None:
            raise self.missing(key)
        least = 1 if default is None else 0
        if not isinstance(value, int) or not least <= value < 2**31:
            raise self.error(key, f"{value!r} is not a size; get the file again")
        return value

    def refuse(self, key: str, why: str = "is not supported") -> None:
        value = repr(self.values[key])
        value = value if len(value) < 80 else f"{value[:80]}..."
        raise self.error(key, f"{value} {why}; convert the original model, not its GGUF file")

    def refuse_unread(self) -> None:
        """UserError for the first key that may change the logits and was not read."""
        for key, value in self.values.items():
            if key not in self.read | HARMLESS and not is_empty(value):
                self.refuse(key)


def is_empty(value: Any) -> bool:
    return value in (None, False, 0, "", []) or (isinstance(value, list) and all(is_empty(part) for part in value))


def shortest(value: float) -> float:
    """Of a float32 the shortest decimal that stands for it: 1e-6, not 9.99999997e-7. Any other float as it is."""
    if not math.isfinite(value) or abs(value) > 3e38 or as_float32(value) != value:
        return value
    return next(near for digits in range(1, 18) if as_float32(near := float(f"{value:.{digits}g}")) == value)


def as_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


# ---------------------------------------------------------------------------------------------------------------------
# The config


def config_of(file: GgufFile) -> tuple[dict[str, Any], Names]:
    """config.json of the model on the hub, and the names of its tensors here. UserError names the architecture, the key
    or the tensor that is missing, malformed or not supported."""
    name = file.metadata.get("general.architecture")
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise UserError(f"the GGUF file holds {str(kind)[:40]!r}, not a model; get the file of the model itself")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        reason = REASONS.get(MODEL_TYPES.get(name, name.replace("-", "_"))) if isinstance(name, str) else None
        why = f": {reason}" if reason else ""
        raise UserError(f"GGUF architecture {name!r} is not supported{why}; supported are {', '.join(ARCHITECTURES)}")
    architecture, keys, tensors = ARCHITECTURES[name], Keys(file.metadata, name), file.tensors
    model_type = next(
        (kind for key, kind in architecture.variants.items() if keys.number(key)), architecture.model_type
    )
    family = FAMILIES[model_type]
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError("tensor 'token_embd.weight' is missing or not a matrix; get the complete GGUF file")

    fields = architecture.fields | sizes(keys, family)
    head_dim, layers, heads = (fields[name] for name in ("head_dim", "num_hidden_layers", "num_attention_heads"))
    fields["vocab_size"] = embedding.shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in tensors
    fields["hidden_act"] = family.defaults.get("hidden_act", "silu")
    fields |= flags(family, tensors)
    if "query_pre_attn_scalar" in family.reads:
        by_width = layers == architecture.layers_scaled_by_width
        fields["query_pre_attn_scalar"] = fields["hidden_size"] // heads if by_width else head_dim
    if "attention_multiplier" in family.reads:
        fields["attention_multiplier"] = head_dim**-0.5
    fields |= further(keys, architecture)
    fields |= windows(keys, family, layers, fields["max_position_embeddings"])
    if family.rotated != "none":
        fields |= rope(keys, family, architecture, tensors, fields)
    if family.experts:
        fields |= experts(keys, family, tensors, fields)
    keys.refuse_unread()
    if "head_dim" not in family.defaults and head_dim * heads == fields["hidden_size"]:
        del fields["head_dim"]
    for token in ("bos", "eos"):
        fields[f"{token}_token_id"] = file.metadata.get(f"tokenizer.ggml.{token}_token_id")
    # What is not quantized keeps its type; quantized weights do not tell what the original had.
    dtype = torch.bfloat16 if isinstance(embedding, Packed) else embedding.dtype
    config = {
        "architectures": [CLASSES.get(model_type, model_type.title().replace("_", "") + "ForCausalLM")],
        "model_type": model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    for ours, value in fields.items():
        if theirs := family.renamed.get(ours, ours):
            config[theirs] = value
    return config, names_of(architecture, family, tensors)


def flags(family: Family, tensors: Mapping[str, Stored]) -> dict[str, bool]:
    """The fields of the family that are true or false, of which the tensors of layer 0 tell."""
    found = {}
    for name, targets in family.reads.items():
        option, *others = [target.partition("=")[0] for target in targets.split()]
        if option in FLAGS:
            found[name] = any(f"blk.0.{tensor}" in tensors for tensor in FLAGS[option])
        elif "shared_norm" in others:
            found[name] = "blk.0.ffn_norm.weight" not in tensors
    return found


def further(keys: Keys, architecture: Architecture) -> dict[str, Any]:
    """The fields that only this architecture has keys for."""
    found: dict[str, Any] = {}
    for key, name in architecture.keys.items():
        value = keys.value(key) if isinstance(keys.value(key), bool) else keys.number(key)
        if value is not None:
            found[name] = value if value or value is False else None
        elif key in architecture.required:
            raise keys.missing(key)
    for key, value in architecture.only.items():
        if keys.value(key) not in (None, value):
            keys.refuse(key)
    keys.read |= {*architecture.ignores}
    return found


def sizes(keys: Keys, family: Family) -> dict[str, Any]:
    """The fields that every family has."""
    width, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", 0)
    if not head_dim and width % heads:
        raise keys.error("attention.head_count", f"{heads} does not divide the embedding_length {width}; get it again")
    head_dim = head_dim or width // heads
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        if keys.integer(key, head_dim) != head_dim:
            keys.refuse(key, f"is not supported beside an attention.key_length of {head_dim}")
    if keys.integer("embedding_length_out", width) not in (0, width):
        keys.refuse("embedding_length_out")
    if keys.value("attention.causal") is False:
        keys.refuse("attention.causal", "is not supported: the model does not generate text")
    context = keys.integer("context_length")
    kind = "layer_norm_epsilon" if family.options.get("norm") == "layer" else "layer_norm_rms_epsilon"
    eps = keys.number(f"attention.{kind}")
    if eps is None:
        raise keys.missing(f"attention.{kind}")
    if family.renamed.get("rms_norm_eps") == "" and eps != family.defaults["rms_norm_eps"]:
        keys.refuse(f"attention.{kind}")
    return {
        "hidden_size": width,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
    }


def windows(keys: Keys, family: Family, layers: int, context: int) -> dict[str, Any]:
    """The sliding window, and the layers that have it."""
    window, pattern = keys.integer("attention.sliding_window", 0), keys.value("attention.sliding_window_pattern")
    if family.windows not in ("all", "always", "pattern") or "use_sliding_window" in family.defaults:
        if 0 < window < context:
            keys.refuse("attention.sliding_window")
        return {}
    if "attention.sliding_window" not in keys.values:
        return {}
    if not window:
        return {"sliding_window": None}
    if family.windows != "pattern":
        if not is_empty(pattern) and pattern != [True] * layers:
            keys.refuse("attention.sliding_window_pattern")
        return {"sliding_window": window}
    if pattern is None:
        pattern = family.window_pattern or family.defaults["sliding_window_pattern"]
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        pattern = [pattern == 0 or (i + 1) % pattern != 0 for i in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers or any(type(part) is not bool for part in pattern):
        raise keys.error(
            "attention.sliding_window_pattern",
            f"must be true or false for each of the {layers} layers; get the file again",
        )
    types = ["sliding_attention" if part else "full_attention" for part in pattern]
    return {"sliding_window": window, "layer_types": types}


def experts(keys: Keys, family: Family, tensors: Mapping[str, Stored], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    known = family.experts
    width, shared = keys.integer("expert_feed_forward_length", 0), keys.integer("expert_shared_feed_forward_length", 0)
    if not width:  # which older files leave to the tensors
        down = tensors.get("blk.0.ffn_down_exps.0.weight")
        width = fields["intermediate_size"] if down is None else down.shape[-1]
    up = tensors.get("blk.0.ffn_up_shexp.weight")
    normalized = keys.value("expert_weights_norm")
    if isinstance(known.normalized, bool) and normalized not in (None, known.normalized):
        keys.refuse("expert_weights_norm")
    # 1 is the softmax of all, 3 that of the chosen ones: the same where these add up to 1.
    if keys.integer("expert_gating_func", 0) not in ((0, 1, 3) if known.normalized is True else (0, 1)):
        keys.refuse("expert_gating_func")
    if keys.number("expert_weights_scale", 0) not in (0, 1):
        keys.refuse("expert_weights_scale")
    found = {
        known.count: keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        known.width: width,
    }
    if known.shared:
        found[known.shared] = shared or (0 if up is None else up.shape[0])
    if isinstance(known.normalized, str) and normalized is not None:
        found[known.normalized] = normalized
    return found


# ---------------------------------------------------------------------------------------------------------------------
# RoPE


def rope(
    keys: Keys, family: Family, architecture: Architecture, tensors: Mapping[str, Stored], fields: dict[str, Any]
) -> dict[str, Any]:
    """The base of RoPE, how much of a head it rotates, and how it is stretched."""
    theta, head_dim = float(keys.number("rope.freq_base", 10000.0)), fields["head_dim"]
    if theta <= 0:
        keys.refuse("rope.freq_base", "is not more than 0")
    found: dict[str, Any] = {"rope_theta": theta}
    local = keys.number("rope.freq_base_swa")
    if family.window_theta not in ("", "rope_theta"):
        found[family.window_theta] = float(local or 10000.0)
    elif local not in (None, theta):
        keys.refuse("rope.freq_base_swa", f"is not supported beside a rope.freq_base of {theta}")
    rotated = keys.integer("rope.dimension_count", head_dim)
    if keys.integer("rope.dimension_count_swa", rotated) != rotated:
        keys.refuse("rope.dimension_count_swa")
    if "partial_rotary_factor" in family.reads:
        factor = rotated / head_dim
        found["partial_rotary_factor"] = factor if int(head_dim * factor) == rotated else math.nextafter(factor, 1)
    elif rotated != head_dim:
        keys.refuse("rope.dimension_count", f"is not supported beside heads of {head_dim}")
    scaling = stretch(keys, tensors, theta, rotated, fields["max_position_embeddings"])
    beside = {ours: keys.number(key) for key, ours in architecture.yarn_keys.items() if keys.number(key)}
    if scaling and scaling["rope_type"] == "yarn":
        scaling |= architecture.yarn | beside
    elif beside:
        keys.refuse(next(key for key in architecture.yarn_keys if keys.number(key)), "is not supported without YaRN")
    if scaling:
        found["rope_scaling"] = scaling
    elif "rope_parameters" in family.defaults:
        found["rope_scaling"] = {"rope_type": "default"}
    return found


def stretch(
    keys: Keys, tensors: Mapping[str, Stored], theta: float, rotated: int, context: int
) -> dict[str, Any] | None:
    """`rope_scaling`: none, linear, yarn, or what the factors in tensors of the file mean."""
    kind = keys.value("rope.scaling.type") or "linear"
    factor = float(keys.number("rope.scaling.factor") or keys.number("rope.scale_linear") or 1.0)
    original = keys.integer("rope.scaling.original_context_length", 0) or context
    by_file = keys.number("rope.scaling.attn_factor", 1.0)
    yarn = {name: keys.number(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow", "attn_factor")}
    extrapolated = keys.number("rope.scaling.yarn_ext_factor", 1.0)
    mscale_all_dim = keys.number("rope.scaling.yarn_log_multiplier")
    if "rope_factors_long.weight" in tensors:
        parts = {part: factors(tensors, f"rope_factors_{part}.weight", rotated // 2) for part in ("short", "long")}
        ratio = context / original
        usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 and original > 1 else 1.0
        scaling = {"rope_type": "longrope", "original_max_position_embeddings": original}
        scaling |= {f"{part}_factor": values for part, values in parts.items()}
        return scaling if math.isclose(by_file, usual, rel_tol=1e-5) else scaling | {"attention_factor": by_file}
    scaled = kind in ("linear", "yarn") and factor != 1
    if "rope_freqs.weight" in tensors:
        if scaled:
            keys.refuse("rope.scaling.factor", "is not supported beside the tensor 'rope_freqs.weight'")
        return llama3(factors(tensors, "rope_freqs.weight", rotated // 2), theta)
    if kind not in ("none", "linear", "yarn"):
        keys.refuse("rope.scaling.type")
    if not scaled:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if extrapolated != 1:
        keys.refuse("rope.scaling.yarn_ext_factor")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    scaling |= {name: yarn[name] for name in ("beta_fast", "beta_slow") if yarn[name] is not None}
    if mscale_all_dim:
        scaling |= {"mscale": 1.0, "mscale_all_dim": mscale_all_dim}
    usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    whole = yarn["attn_factor"] or usual * by_file
    return scaling if math.isclose(whole, usual, rel_tol=1e-6) else scaling | {"attention_factor": whole}


def factors(tensors: Mapping[str, Stored], name: str, count: int) -> list[float]:
    """What divides each frequency. UserError when the tensor does not hold `count` positive numbers."""
    if name not in tensors or tuple(tensors[name].shape) != (count,):
        raise UserError(f"tensor {name!r} is missing or does not hold {count} numbers; get the complete GGUF file")
    values = [shortest(value) for value in tensors[name].read().float().tolist()]
    if any(not 0 < value < math.inf for value in values):
        raise UserError(f"tensor {name!r} holds something else than positive numbers; get the GGUF file again")
    return values


def llama3(found: list[float], theta: float) -> dict[str, Any] | None:
    """The settings of Llama 3.1 that lead to these factors; the trained length is nearly always 8192."""
    factor = max(found)
    if factor == min(found) == 1:
        return None
    frequencies = [theta ** (-i / len(found)) for i in range(len(found))]
    low, high = 1.0, 4.0
    for original in (8192, *(2**k for k in range(5, 21))):
        expected = []
        for frequency in frequencies:
            turns = original * frequency / (2 * math.pi)
            smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
            expected.append(1 / ((1 - smooth) / factor + smooth))
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(found, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise UserError(
        "tensor 'rope_freqs.weight' stretches RoPE otherwise than Llama 3.1 does, which is not supported;"
        " convert the original model, not its GGUF file"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The names


def names_of(architecture: Architecture, family: Family, tensors: Mapping[str, Stored]) -> Names:
    parts: dict[str, Sequence[str]] = dict(PARTS)
    for tensor, other in FORMS.items():
        if f"blk.0.{tensor}" in tensors:
            parts |= other
    if "blk.0.ffn_gate.weight" not in tensors:
        parts |= GATE_IN_UP
    plus_one = family.options.get("norm") == "rms_plus_one"  # then the files have the sum
    return Names(
        parts | architecture.parts,
        layer=LAYER,
        interleaved=architecture.interleaved,
        transforms=dict.fromkeys(NORMS, "less_one") if plus_one else {},
    )
