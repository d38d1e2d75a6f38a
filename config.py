"""The shape of a model, read from a Hugging Face config.json.

    config = ModelConfig.from_hf(json.load(open("config.json")))

families.py says what the fields of each family mean, config_fields.py which fields are known.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from config_fields import ACTIVATIONS, FieldReader
from families import Family

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ROPE_FIELDS = {
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
    "short_factor", "long_factor", "max_position_embeddings", "llama_4_scaling_beta",
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
    short_factors: tuple[float, ...] = ()  # longrope: what divides each frequency, up to original_length ...
    long_factors: tuple[float, ...] = ()  # ... and beyond
    query_beta: float = 0.0  # queries grow by beta * log(1 + position // original_length)
    # Of the pairs so many turn by a token's place in time, so many by that down an image, so many by that across it,
    # and so on by turns; (): all by its place in the text, which is the same three times where there is no image.
    sections: tuple[int, ...] = ()

    def by_length(self, length: int) -> bool:
        """Whether a position's angles depend on how long the text is, up to this length: then the keys of a shorter
        text do not fit, and tokens that are only proposed would change the others."""
        return self.type == "dynamic" or (self.type == "longrope" and length > self.original_length)


@dataclass(frozen=True)
class VisionConfig:
    """What sees the images of a prompt: see vision.py."""

    token: int  # the id that stands for each piece of an image
    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    out_dim: int  # of the language model
    patch: int = 14  # pixels of a side
    frames: int = 2  # that a patch covers
    channels: int = 3
    merge: int = 2  # patches of a side of what becomes one token
    norm: str = "layer"  # or "rms"
    gated: bool = False  # feed-forwards
    activation: str = "quick_gelu"  # or one of config_fields.ACTIVATIONS
    theta: float = 10000.0  # of RoPE
    window: int = 0  # patches of a side that see each other, in the layers without full attention; 0: no windows
    full_layers: tuple[int, ...] = ()  # those with full attention, where there are windows

    @classmethod
    def from_hf(cls, config: dict[str, Any], kind: str, dim: int) -> "VisionConfig":
        """Of the fields of config.json, `vision_config` among them, of a model of this model_type and width."""
        outer = FieldReader(config)
        read = FieldReader(outer.value("vision_config", {}), "config.json: vision_config")
        newer = kind == "qwen2_5_vl"
        width, out = ("hidden_size", "out_hidden_size") if newer else ("embed_dim", "hidden_size")
        own = read.integer(width, default=3584 if newer else 1280, maximum=2**20)
        heads = read.integer("num_heads", default=16, maximum=2**16)
        if own % (4 * heads):
            raise read.error("num_heads", f"{heads} heads of {width} {own} have no pairs to rotate by two places")
        if read.integer(out, default=dim) != dim:
            raise read.error(out, f"{read.value(out)} is not the {dim} of the language model")
        channels = read.integer("in_channels", default=read.integer("in_chans", default=3))
        if channels != 3:
            raise read.error("in_channels", f"{channels} is not supported, only 3 are")
        rope = FieldReader(read.value("rope_parameters", {}), "config.json: vision_config: rope_parameters")
        if rope.value("rope_type", "axial") not in ("axial", "default"):
            raise rope.error("rope_type", f"{rope.value('rope_type')!r} is not supported, only 'axial' is")
        activation = read.value("hidden_act", "silu" if newer else "quick_gelu")
        known = {"quick_gelu": "quick_gelu"} | ACTIVATIONS
        if activation not in known:
            raise read.error("hidden_act", f"{activation!r} is not supported; supported are {', '.join(known)}")
        options: dict[str, Any] = {}
        layers = read.integer("depth", default=32, maximum=10_000)
        patch, merge = read.integer("patch_size", default=14), read.integer("spatial_merge_size", default=2)
        if newer:
            full = read.value("fullatt_block_indexes", [7, 15, 23, 31])
            if not isinstance(full, list) or any(type(i) is not int for i in full):
                raise read.error("fullatt_block_indexes", f"{full!r} is no list of layers")
            window = read.integer("window_size", default=112) // merge // patch * merge
            if not window:
                raise read.error("window_size", f"{read.value('window_size')} is less than {merge} patches of {patch}")
            options = {"norm": "rms", "gated": True, "window": window, "full_layers": tuple(full)}
            ffn = read.integer("intermediate_size", default=3420, maximum=2**22)
        else:
            ffn = int(own * read.number("mlp_ratio", default=4))
        return cls(
            token=outer.integer("image_token_id", default=151655),
            dim=own,
            n_layers=layers,
            n_heads=heads,
            ffn_dim=ffn,
            out_dim=dim,
            patch=patch,
            frames=read.integer("temporal_patch_size", default=2),
            merge=merge,
            activation=known[activation],
            theta=rope.number("rope_theta", default=1e4),
            **options,
        )


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in the place of a feed-forward."""

    count: int
    chosen: int  # of them for each token
    width: int  # of an expert's feed-forward
    normalized: bool = True  # the weights of the chosen ones add up to 1
    bias: bool = False  # of the experts and of the router
    shared_width: int = 0  # of a further expert for all tokens
    shared_gate: bool = False  # which counts as much as a sigmoid says


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
    norm: str = "rms"  # "rms"; "rms_plus_one", whose stored weights are to be added to 1; "layer"
    norm_eps: float = 1e-5
    norm_weight: bool = True
    norm_bias: bool = False
    norm_place: str = "before"  # attention and feed-forward; "after" them, or "both"
    parallel: bool = False  # attention and feed-forward have the same input, and both are added to it
    shared_norm: bool = False  # by way of the same norm
    # Of q and k, before RoPE: "" none; "head", each head; "heads", each with weights of its own; "all" of them at once.
    qk_norm: str = ""
    qk_norm_bias: bool = False
    qkv_bias: bool = False
    wo_bias: bool = False
    mlp_bias: bool = False
    output_bias: bool = False
    activation: str = "silu"  # silu, gelu, gelu_tanh, relu, relu2, or clamped_silu
    activation_limit: float = 0.0  # clamped_silu
    activation_alpha: float = 1.0
    gated: bool = True
    clip_qkv: float = 0.0  # the largest absolute value of q, k and v; 0: any
    attention_scale: float = 0.0  # of the products of queries and keys; 0: head_dim ** -0.5
    attention_scale_falls: bool = False  # in layer i it is divided by i + 1
    attention_softcap: float = 0.0  # scores are bent to stay below it; 0: not
    attention_sinks: bool = False  # one more score for each head, without a value
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a layer adds
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    rope: RopeConfig = RopeConfig()
    window_rope: RopeConfig | None = None  # in layers with a window, if it is another
    rotary_dim: int = 0  # elements of a head that RoPE rotates, the first ones; 0: none
    unrotated_layers: tuple[bool, ...] = ()  # layers without RoPE, if any
    learned_positions: bool = False
    sliding_window: int | None = None  # a query sees itself and the `sliding_window - 1` keys before it ...
    window_layers: tuple[bool, ...] = ()  # ... in the layers that say so
    experts: ExpertsConfig | None = None
    expert_layers: tuple[bool, ...] = ()  # those that have them
    tied: bool = False  # the output projection is the embedding
    vision: VisionConfig | None = None  # what sees images, if it has eyes

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.window_layers and self.window_layers[layer] else None

    @property
    def ropes(self) -> list[RopeConfig]:
        """What layers are rotated by; `rope_of` says which."""
        return [self.rope] if self.window_rope is None else [self.rope, self.window_rope]

    def rope_of(self, layer: int) -> int | None:
        if not self.rotary_dim or (self.unrotated_layers and self.unrotated_layers[layer]):
            return None
        return int(self.window_rope is not None and self.window(layer) is not None)

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and self.expert_layers[layer]

    def by_length(self, length: int) -> bool:
        """As RopeConfig.by_length, of all that is rotated."""
        return self.rotary_dim > 0 and any(rope.by_length(length) for rope in self.ropes)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Reads a parsed config.json, old spelling or new. UserError names what is missing or unsupported."""
        read = FieldReader(config)
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
        options = dict(family.options) | read.options(family)
        if "activation" not in options:
            options["activation"] = read.activation(family)
        elif read.value("hidden_act", "silu") != "silu":
            raise read.error("hidden_act", f"{read.value('hidden_act')!r} is not supported, only 'silu' is")
        if options.pop("scale_embedding", False):
            options["embedding_scale"] = dim**0.5
        if not options.pop("scale_attention", True):
            options["attention_scale"] = 1.0
        max_positions = read.integer("max_position_embeddings", maximum=2**31)
        rotary_dim = 0 if family.rotated == "none" else head_dim
        if factor := options.pop("rotary_factor", None):
            rotary_dim = int(head_dim * factor)
            if rotary_dim < 2 or rotary_dim % 2 or factor > 1:
                raise read.error("partial_rotary_factor", f"{factor} of {head_dim} is no whole number of pairs")
        window, window_layers = read.sliding_window(family, layers)
        rope, window_rope = read_ropes(read, family, max_positions, rotary_dim) if rotary_dim else (RopeConfig(), None)
        multiple = {"": None, "8/3": 64 * math.ceil(int(dim * 8 / 3) / 64), "4": 4 * dim}[family.ffn_rule]
        ffn_dim = read.integer("intermediate_size", default=multiple, maximum=2**22)
        experts, expert_layers = read_experts(read, family, layers, ffn_dim)
        config = cls(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_dim=ffn_dim,
            vocab_size=read.integer("vocab_size", maximum=2**24),
            context_length=max(max_positions, int(rope.original_length * rope.factor)),
            norm_eps=read.number("rms_norm_eps", maximum=1.0),
            rope=rope,
            window_rope=window_rope,
            rotary_dim=rotary_dim,
            unrotated_layers=read.unrotated(family, window_layers, layers),
            sliding_window=window,
            window_layers=window_layers,
            experts=experts,
            expert_layers=expert_layers,
            tied=read.flag("tie_word_embeddings"),
            vision=VisionConfig.from_hf(read.config, read.value("model_type"), dim) if family.sees else None,
            **options,
        )
        if config.learned_positions and config.context_length > 2**20:
            raise read.error("max_position_embeddings", f"{max_positions} learned positions are out of range")
        if config.tied and config.output_bias:
            raise read.error("tie_word_embeddings", "true is not supported where the output projection has a bias")
        return config


# ---------------------------------------------------------------------------------------------------------------------
# Parts of it


def read_experts(
    read: FieldReader, family: Family, layers: int, ffn_dim: int
) -> tuple[ExpertsConfig | None, tuple[bool, ...]]:
    """The mixture of experts and the layers that have it."""
    names = family.experts
    if names is None or (family.use_experts and not read.flag(family.use_experts)):
        return None, ()
    count = read.integer(names.count, maximum=2**16)
    chosen = read.integer("num_experts_per_tok", maximum=2**16)
    if chosen > count:
        raise read.error("num_experts_per_tok", f"{chosen} is more than the {count} experts of {names.count}")
    if read.value("scoring_func", "softmax") != "softmax":
        raise read.error("scoring_func", f"{read.value('scoring_func')!r} is not supported, only 'softmax' is")
    width = read.integer(names.width, default=ffn_dim, maximum=2**22)
    shared = read.integer(names.shared, maximum=2**22) if names.shared and read.value(names.shared) else 0
    if names.shared_count and (shared_count := read.value(names.shared_count)):
        if shared_count != 1:
            raise read.error(names.shared_count, f"{shared_count!r} is not supported, only 0 and 1 are")
        shared = width
    experts = ExpertsConfig(
        count=count,
        chosen=chosen,
        width=width,
        normalized=names.normalized if isinstance(names.normalized, bool) else read.flag(names.normalized),
        bias=names.bias,
        shared_width=shared,
        shared_gate=names.shared_gate and shared > 0,
    )
    with_experts = read.layers_with_experts(family, layers)
    return (experts, with_experts) if any(with_experts) else (None, ())


def read_ropes(
    read: FieldReader, family: Family, max_positions: int, rotary_dim: int
) -> tuple[RopeConfig, RopeConfig | None]:
    """That of all layers, and that of those with a window, if it is another: from `rope_theta` and `rope_scaling` of
    before, or `rope_parameters` of today, where it is nested if there are two."""
    newer, older = read.value("rope_parameters", {}), read.value("rope_scaling", {})
    for name, value in (("rope_parameters", newer), ("rope_scaling", older)):
        if not isinstance(value, dict):
            raise read.error(name, "is not an object")
    where = "rope_scaling" if older else "rope_parameters" if newer else "rope"
    if family.sees:
        given, sections = read_sections(read, older or newer, where, rotary_dim // 2)
        rope = read_rope(read, given, where, "rope_theta", max_positions, rotary_dim)
        if rope.by_length(2**31):
            raise read.error(where, f"rope_type {rope.type!r} is not supported where places are of images")
        return replace(rope, sections=sections), None
    if not family.window_theta:
        return read_rope(read, older or newer, where, "rope_theta", max_positions, rotary_dim), None
    kinds = {"full_attention", "sliding_attention"}
    if newer.keys() - kinds or any(not isinstance(part, dict) for part in newer.values() if part is not None):
        raise read.error("rope_parameters", f"must hold objects {' and '.join(sorted(kinds))}, for the types of layers")
    full, local = (newer.get("full_attention") or {}) | older, newer.get("sliding_attention") or {}
    if not all(part.get("truncate", True) for part in (full, local)):
        raise read.error(where, f"truncate: false is not supported for model_type {read.value('model_type')!r}")
    rope = read_rope(read, full, where, "rope_theta", max_positions, rotary_dim)
    other = read_rope(read, local, where, family.window_theta, max_positions, rotary_dim)
    return rope, None if other == rope else other


def read_sections(
    read: FieldReader, given: dict[str, Any], where: str, pairs: int
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Qwen2-VL's M-RoPE, https://arxiv.org/abs/2409.12191: the other fields, and RopeConfig.sections of its own."""
    fields = {name: value for name, value in given.items() if name != "mrope_section"}
    kinds = {name: "default" for name in ("type", "rope_type") if fields.get(name) == "mrope"}
    sections = given.get("mrope_section") or [16, 24, 24]
    numbers = isinstance(sections, list) and all(type(count) is int and count > 0 for count in sections)
    if not numbers or sum(sections) != pairs:
        raise read.error(f"{where}: mrope_section", f"{sections!r} is no list of numbers that add up to {pairs} pairs")
    return fields | kinds, tuple(sections)


def read_rope(
    outer: FieldReader, given: dict[str, Any], where: str, theta_name: str, max_positions: int, rotary_dim: int
) -> RopeConfig:
    """From the fields `given`, and where these are silent from config.json's own."""
    fields = dict(given)
    if "rope_theta" not in fields:
        fields["rope_theta"] = outer.number("rope_theta" if outer.value(theta_name) is None else theta_name, 1e4)
    if outer.value("original_max_position_embeddings") is not None:
        fields["original_max_position_embeddings"] = outer.value("original_max_position_embeddings")
    read = FieldReader(fields, f"{outer.where}: {where}")
    kind = read.value("rope_type", read.value("type", "default"))
    if kind in ("su", "yarn") and "short_factor" in fields:  # Phi 3's older names
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise read.error("rope_type", f"{kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    part = outer.value("partial_rotary_factor", 1)  # what the family makes of it
    for name, value in fields.items():
        if name not in ROPE_FIELDS and value is not None and (name, value) != ("partial_rotary_factor", part):
            raise read.error(name, f"{value!r}: this field is not supported")
    theta = read.number("rope_theta")
    if kind == "default":
        return RopeConfig(theta=theta)
    if theta <= 1:
        raise read.error("rope_theta", f"{theta} must be more than 1 for rope_type {kind!r}")
    original = read.integer("original_max_position_embeddings", default=max_positions)
    if kind in ("yarn", "longrope") and fields.get("factor") is None:
        fields["factor"] = max_positions / original
    factor = read.number("factor", maximum=2**16)
    if kind == "linear" or kind == "dynamic":
        return RopeConfig(kind, theta, factor, max_positions)
    if kind == "llama3":
        low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
        if low >= high:
            raise read.error("low_freq_factor", f"{low} must be less than high_freq_factor {high}")
        return RopeConfig(kind, theta, factor, original, low, high)
    if kind == "longrope":  # https://arxiv.org/abs/2402.13753
        by_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        return RopeConfig(
            kind,
            theta,
            factor,
            original,
            attention_factor=read.number("attention_factor", default=by_factor),
            short_factors=read_factors(read, "short_factor", rotary_dim // 2),
            long_factors=read_factors(read, "long_factor", rotary_dim // 2),
        )
    for name in ("beta_fast", "beta_slow"):
        if read.number(name, default=1.0) < 1e-6:
            raise read.error(name, f"{read.value(name)} is out of range; it must be at least 1e-6")
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
        query_beta=read.number("llama_4_scaling_beta") if read.value("llama_4_scaling_beta") else 0.0,
    )


def read_factors(read: FieldReader, name: str, count: int) -> tuple[float, ...]:
    """What divides each of `count` frequencies."""
    factors = read.value(name)
    if not isinstance(factors, list) or len(factors) != count:
        length = f", not {len(factors)}" if isinstance(factors, list) else ""
        raise read.error(name, f"must list {count} numbers, one for each rotated pair{length}")
    if any(
        isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1e6 for factor in factors
    ):
        raise read.error(name, "holds something else than numbers above 0 and up to 1e6")
    return tuple(map(float, factors))


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
