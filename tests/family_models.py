"""Tiny models of every family, made by transformers with random weights, and saved as the hub's files spell them.

    made = make("gemma2", folder)                            # saves folder/hf
    made.reference(tokens [1, S]).logits                     # what transformers says, float32

A name is a family, and what is special about the entry. Sizes are small, and differ where a mistake could swap them:
heads times their size is not the width, experts are narrower than a dense layer, windows are shorter than the prompts.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
import transformers
from conftest import make_tokenizer
from torch import Tensor, nn

transformers.utils.logging.disable_progress_bar()

Tensors = dict[str, Tensor]
VOCAB = 400
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
WINDOW = 7
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
HEAD_DIM = dict(head_dim=24)  # 4 of them are 96 wide
SHORT = [1.0, 1.1, 1.3, 1.7, 2.2, 2.9, 3.1, 4.0]
LONG = [1.5, 2.3, 3.9, 6.1, 9.0, 14.0, 21.0, 30.0]
ORIGINAL = 64  # tokens up to which SHORT holds
EYES = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


@dataclass(frozen=True)
class Entry:
    """How a tiny model is made. `hub` turns what transformers saved into how published files are spelled."""

    config: Callable[[], transformers.PreTrainedConfig | dict[str, Any]]
    hub: Callable[[dict[str, Any], Tensors], tuple[dict[str, Any], Tensors]] | None = None
    model: str = "AutoModelForCausalLM"


@dataclass
class Made:
    """A saved model: its folder, and the model itself (float32, eval)."""

    folder: Path
    reference: Any

    @torch.no_grad()
    def logits(self, tokens: list[int] | Tensor) -> Tensor:
        """Of one text, ids [S] -> [S, V]; of one forward over all of it, without a cache."""
        return self.reference(torch.as_tensor(tokens).view(1, -1), use_cache=False).logits[0]

    def assert_greedy(self, prompt: list[int], new: list[int]) -> None:
        """Each of the new tokens is the most likely one after those before it."""
        expected = self.logits(prompt + new)[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert new == expected


def entry(name: str, hub: Callable | None = None, model: str = "AutoModelForCausalLM", **fields: Any) -> Entry:
    """A model of the config class NAMEConfig."""
    sizes = dict(SIZES)
    if name == "GPTNeoX":
        del sizes["num_key_value_heads"]
    return Entry(lambda: getattr(transformers, f"{name}Config")(**sizes | fields), hub, model)


# ---------------------------------------------------------------------------------------------------------------------
# How the hub spells it


def older_rope(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """rope_theta, rope_scaling and partial_rotary_factor of before transformers 5."""
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        if config["model_type"].startswith("gemma3"):
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope["rope_type"] == "default":
        rope = None
    else:
        rope["type"] = rope.pop("rope_type")
    return config | {"rope_scaling": rope, "torch_dtype": config.pop("dtype")}, tensors


def without(*fields: str) -> Callable:
    """Fields that older files do not have, and that follow from others."""

    def hub(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
        return {name: value for name, value in older_rope(config, tensors)[0].items() if name not in fields}, tensors

    return hub


def gemma_1(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Its first configs say "gelu" where they mean the approximation by tanh."""
    return older_rope(config, tensors)[0] | {"hidden_act": "gelu", "hidden_activation": None}, tensors


def gemma_3(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    config = without("layer_types", "_sliding_window_pattern")(config, tensors)[0]
    return config | {"sliding_window_pattern": 3}, tensors


def phi_3(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """The first ones call it "su"; the trained length is beside it, not in it."""
    config = older_rope(config, tensors)[0]
    del config["rope_scaling"]["original_max_position_embeddings"]
    config["rope_scaling"]["type"] = "su"
    return config, tensors


def mistral_with_types(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    return config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, tensors


def newer_nesting(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """The names that models with eyes have in memory since transformers 4.52, and some files."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("language_model.lm_head."):
            name = name.removeprefix("language_model.")
        elif name.startswith("language_model.model."):
            name = "model.language_model." + name.removeprefix("language_model.model.")
        else:
            name = "model." + name
        renamed[name] = tensor
    return config, renamed


def gpt_2(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Without the prefix, and with masks that are called like biases."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    positions = config["n_positions"]
    for layer in range(config["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(positions, positions).tril().view(1, 1, positions, positions)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    del config["tie_word_embeddings"]
    return config | {"n_ctx": positions, "task_specific_params": {"text-generation": {"do_sample": True}}}, tensors


def pythia(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    rope = config.pop("rope_parameters")
    positions = config["max_position_embeddings"]
    for layer in range(config["num_hidden_layers"]):
        stem = f"gpt_neox.layers.{layer}.attention."
        tensors[stem + "bias"] = torch.ones(1, 1, positions, positions, dtype=torch.bool).tril()
        tensors[stem + "masked_bias"] = torch.tensor(-1e9)
        tensors[stem + "rotary_emb.inv_freq"] = torch.ones(2)
    del config["attention_bias"]
    return config | {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}, tensors


def qwen_3_experts(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    config = older_rope(config, tensors)[0]
    return config | {"num_experts": config.pop("num_local_experts"), "max_window_layers": 4}, tensors


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[..., K] -> blocks uint8 [..., K / 32, 16] and scales uint8 [..., K / 32] of the OCP Microscaling format, and
    what they stand for, float32 [..., K]. A byte has the earlier element in its low half."""
    groups = weight.unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil().clamp(min=-126)
    scaled = groups / exponent.exp2()
    level = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    code = level + 8 * (scaled < 0)
    value = torch.where(scaled < 0, -1, 1) * E2M1[level] * exponent.exp2()
    blocks = (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8)
    return blocks, (exponent[..., 0] + 127).to(torch.uint8), value.flatten(-2)


def mxfp4(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """The experts' matrices in blocks, [E, out, in] where the floats are [E, in, out]."""
    packed = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name + "_blocks"], packed[name + "_scales"], _ = to_mxfp4(tensor.transpose(1, 2))
        else:
            packed[name] = tensor
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    more = {"quantization_config": method, "initial_context_length": 4096, "experts_per_token": 2}
    return older_rope(config, tensors)[0] | more, packed


# ---------------------------------------------------------------------------------------------------------------------
# The table

GEMMA_3 = dict(
    **HEAD_DIM,
    sliding_window=WINDOW,
    query_pre_attn_scalar=20,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
)
GEMMA_2 = dict(**HEAD_DIM, query_pre_attn_scalar=20, sliding_window=WINDOW)
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "rope_theta": 1e4}
GRANITE = dict(embedding_multiplier=7.0, residual_multiplier=0.6, attention_multiplier=0.4, logits_scaling=3.0)
PARTIAL = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25))
QWEN_EXPERTS = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32)
GPT_OSS = dict(
    **HEAD_DIM,
    num_local_experts=6,
    num_experts_per_tok=2,
    sliding_window=WINDOW,
    swiglu_limit=1.5,
    rope_parameters={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 128, "rope_theta": 150000.0,
    },
)  # fmt: skip


def gemma_3_with_eyes() -> transformers.PreTrainedConfig:
    text = transformers.Gemma3TextConfig(**SIZES | GEMMA_3).to_dict()
    eyes = EYES | {"model_type": "siglip_vision_model"}
    return transformers.Gemma3Config(text_config=text, vision_config=eyes, image_token_index=399, mm_tokens_per_image=4)


def mistral_3(tied: bool) -> Callable[[], transformers.PreTrainedConfig]:
    text = transformers.MistralConfig(**SIZES | HEAD_DIM, sliding_window=None, tie_word_embeddings=tied).to_dict()
    eyes = EYES | {"model_type": "pixtral", "head_dim": 8}
    return lambda: transformers.Mistral3Config(
        text_config=dict(text), vision_config=eyes, image_token_index=399, tie_word_embeddings=tied
    )


def gpt_2_config(**fields: Any) -> Callable[[], transformers.PreTrainedConfig]:
    sizes = dict(n_embd=64, n_layer=4, n_head=4, n_positions=1024, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1)
    return lambda: transformers.GPT2Config(**sizes | fields)


ENTRIES: dict[str, Entry] = {
    # Those that were here before the others.
    "llama": entry("Llama", older_rope),
    "llama-403-tokens": entry("Llama", vocab_size=403),
    "mistral": entry("Mistral", sliding_window=WINDOW, **HEAD_DIM),
    "qwen2": entry("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": entry("Qwen3", **HEAD_DIM),
    # Gemma
    "gemma": entry("Gemma", **HEAD_DIM),
    "gemma-hub": entry("Gemma", gemma_1, **HEAD_DIM, attention_bias=True),
    "gemma2": entry("Gemma2", attn_logit_softcapping=1.5, final_logit_softcapping=2.0, **GEMMA_2),
    "gemma2-hub": entry(
        "Gemma2", without("layer_types"), attn_logit_softcapping=None, final_logit_softcapping=None, **GEMMA_2
    ),
    "gemma3": entry("Gemma3Text", **GEMMA_3),
    "gemma3-hub": entry("Gemma3Text", gemma_3, final_logit_softcapping=2.0, tie_word_embeddings=False, **GEMMA_3),
    "gemma3-eyes": Entry(gemma_3_with_eyes, model="Gemma3ForConditionalGeneration"),
    "gemma3-eyes-newer": Entry(gemma_3_with_eyes, newer_nesting, "Gemma3ForConditionalGeneration"),
    # Phi
    "phi3": entry("Phi3"),
    "phi3-window": entry("Phi3", older_rope, sliding_window=WINDOW),
    "phi3-longrope": entry(
        "Phi3", phi_3, original_max_position_embeddings=ORIGINAL, rope_parameters=dict(LONGROPE), sliding_window=200
    ),
    "phi4-mini": entry(
        "Phi3",
        older_rope,
        original_max_position_embeddings=ORIGINAL,
        tie_word_embeddings=True,
        rope_parameters=LONGROPE | dict(short_factor=SHORT[:6], long_factor=LONG[:6], partial_rotary_factor=0.75),
    ),
    "phi": entry("Phi", older_rope),
    "phi-qk-norm": entry("Phi", qk_layernorm=True),
    # SmolLM 3, OLMo, Granite
    "smollm3": entry("SmolLM3", without("no_rope_layers", "layer_types"), no_rope_layer_interval=3),
    "smollm3-window": entry(
        "SmolLM3", no_rope_layers=[1, 0, 0, 1], use_sliding_window=True, sliding_window=WINDOW, attention_bias=True
    ),
    "olmo": entry("Olmo"),
    "olmo-clip": entry("Olmo", older_rope, clip_qkv=0.8, attention_bias=True),
    "olmo2": entry("Olmo2", older_rope),
    "olmo3": entry("Olmo3", sliding_window=WINDOW, layer_types=MIXED),
    "olmo3-hub": entry(
        "Olmo3",
        without("layer_types"),
        sliding_window=WINDOW,
        rope_parameters={
            "full_attention": YARN | {"rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
    "granite": entry("Granite", older_rope, tie_word_embeddings=True, **GRANITE),
    "granite-biased": entry("Granite", attention_bias=True, mlp_bias=True, **GRANITE),
    # Mistral's later ones
    "ministral": entry("Ministral", sliding_window=WINDOW, layer_types=MIXED, **HEAD_DIM),
    "mistral-layer-types": entry("Ministral", mistral_with_types, sliding_window=WINDOW, layer_types=MIXED, **HEAD_DIM),
    "mistral-nemo": entry("Mistral", older_rope, sliding_window=None, **HEAD_DIM),
    "mistral3": Entry(mistral_3(tied=False), model="Mistral3ForConditionalGeneration"),
    "mistral3-newer": Entry(mistral_3(tied=True), newer_nesting, "Mistral3ForConditionalGeneration"),
    # Cohere
    "cohere": entry("Cohere", older_rope, logit_scale=0.3),
    "cohere-qk-norm": entry("Cohere", use_qk_norm=True, attention_bias=True, logit_scale=0.3),
    "cohere2": entry("Cohere2", sliding_window=WINDOW, logit_scale=0.3),
    "cohere2-hub": entry("Cohere2", without("layer_types"), sliding_window=WINDOW, logit_scale=0.3),
    # GLM-4
    "glm": entry("Glm", older_rope, **HEAD_DIM),
    "glm-no-bias": entry("Glm", attention_bias=False, head_dim=16),
    "glm4": entry("Glm4", **HEAD_DIM),
    "glm4-hub": entry("Glm4", older_rope, attention_bias=False, **HEAD_DIM),
    # StableLM, StarCoder 2, Seed
    "stablelm": entry("StableLm", older_rope, use_qkv_bias=True, **PARTIAL),
    "stablelm-parallel": entry("StableLm", use_parallel_residual=True, qk_layernorm=True, **PARTIAL),
    "stablelm-qk-norm": entry("StableLm", qk_layernorm=True, use_qkv_bias=True),
    "starcoder2": entry("Starcoder2", older_rope, sliding_window=WINDOW),
    "starcoder2-no-bias": entry("Starcoder2", use_bias=False, tie_word_embeddings=False),
    "seed-oss": entry("SeedOss", **HEAD_DIM),
    "seed-oss-biased": entry(
        "SeedOss", older_rope, attention_bias=False, attention_out_bias=True, mlp_bias=True, **HEAD_DIM
    ),
    # GPT-2, GPT-NeoX
    "gpt2": Entry(gpt_2_config()),
    "gpt2-hub": Entry(gpt_2_config(n_inner=96), gpt_2),
    "gpt2-scaled": Entry(gpt_2_config(scale_attn_by_inverse_layer_idx=True)),
    "gpt2-unscaled": Entry(gpt_2_config(scale_attn_weights=False, tie_word_embeddings=False)),
    "gpt-neox": entry("GPTNeoX", rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "gpt-neox-hub": entry("GPTNeoX", pythia, **PARTIAL),
    "gpt-neox-sequential": entry("GPTNeoX", use_parallel_residual=False, attention_bias=False, **PARTIAL),
    # Mixtures of experts
    "mixtral": entry("Mixtral", num_local_experts=6, num_experts_per_tok=2, sliding_window=WINDOW),
    "mixtral-hub": entry("Mixtral", without("head_dim"), num_local_experts=5, num_experts_per_tok=3),
    "qwen2-moe": entry("Qwen2Moe", shared_expert_intermediate_size=64, **QWEN_EXPERTS),
    "qwen2-moe-some": entry(
        "Qwen2Moe",
        older_rope,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        qkv_bias=False,
        **QWEN_EXPERTS,
    ),
    "qwen2-moe-window": entry(
        "Qwen2Moe",
        shared_expert_intermediate_size=64,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=3,
        **QWEN_EXPERTS,
    ),
    "qwen3-moe": entry("Qwen3Moe", qwen_3_experts, norm_topk_prob=True, **HEAD_DIM, **QWEN_EXPERTS),
    "qwen3-moe-some": entry(
        "Qwen3Moe", norm_topk_prob=False, mlp_only_layers=[0, 2], attention_bias=True, **HEAD_DIM, **QWEN_EXPERTS
    ),
    "olmoe": entry("Olmoe", older_rope, num_experts=6, num_experts_per_tok=3, clip_qkv=0.9),
    "olmoe-normalized": entry("Olmoe", num_experts=6, num_experts_per_tok=2, norm_topk_prob=True),
    "granite-moe": entry("GraniteMoe", older_rope, num_local_experts=6, num_experts_per_tok=3, **GRANITE),
    "granite-moe-shared": entry(
        "GraniteMoeShared", num_local_experts=6, num_experts_per_tok=2, shared_intermediate_size=64, **GRANITE
    ),
    "gpt-oss": entry("GptOss", **GPT_OSS),
    "gpt-oss-mxfp4": entry("GptOss", mxfp4, attention_bias=True, layer_types=MIXED, **GPT_OSS),
    "minimind-moe-2": Entry(
        lambda: (
            MINIMIND
            | dict(
                n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, norm_topk_prob=True, rms_norm_eps=1e-5
            )
            | dict(
                scoring_func="softmax", aux_loss_alpha=0.01, seq_aux=True, num_key_value_heads=2, intermediate_size=None
            )
        )
    ),
    "minimind-moe-3": Entry(
        lambda: (
            MINIMIND
            | dict(
                num_experts=6, num_experts_per_tok=1, norm_topk_prob=True, moe_intermediate_size=32, rms_norm_eps=1e-6
            )
            | dict(router_aux_loss_coef=5e-4, num_key_value_heads=4, head_dim=24, tie_word_embeddings=True)
        )
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# MiniMind, whose code is not part of transformers

MINIMIND = dict(
    SIZES,
    model_type="minimind",
    architectures=["MiniMindForCausalLM"],
    hidden_act="silu",
    use_moe=True,
    rope_theta=1e6,
    rope_scaling=None,
    dropout=0.0,
    flash_attn=True,
    inference_rope_scaling=False,
    max_position_embeddings=1024,
)


class MiniMind(nn.Module):
    """MiniMind's mixture of experts, of its second and its third version, in float32 and without a cache.

    A token's experts are those with the largest softmax; their weights are divided by their sum, which version 2 leaves
    out when there is but one. Version 2 has experts that all tokens go through, version 3 norms of q and k.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        dim, heads = config["hidden_size"], config["num_attention_heads"]
        self.head_dim = config.get("head_dim") or dim // heads
        self.third = "num_experts" in config
        self.experts = config["num_experts" if self.third else "n_routed_experts"]
        width = config.get("moe_intermediate_size") or config["intermediate_size"]
        self.width = width or 64 * math.ceil(int(dim * 8 / 3) / 64)
        kv = config["num_key_value_heads"] * self.head_dim
        shapes = {"self_attn.q_proj": (heads * self.head_dim, dim), "self_attn.k_proj": (kv, dim)}
        shapes |= {"self_attn.v_proj": (kv, dim), "self_attn.o_proj": (dim, heads * self.head_dim)}
        shapes |= {"input_layernorm": (dim,), "post_attention_layernorm": (dim,), "mlp.gate": (self.experts, dim)}
        if self.third:
            shapes |= {"self_attn.q_norm": (self.head_dim,), "self_attn.k_norm": (self.head_dim,)}
        feeders = [f"experts.{i}" for i in range(self.experts)]
        feeders += [f"shared_experts.{i}" for i in range(config.get("n_shared_experts", 0))]
        for feeder in feeders:
            shapes |= {f"mlp.{feeder}.{part}_proj": (self.width, dim) for part in ("gate", "up")}
            shapes[f"mlp.{feeder}.down_proj"] = (dim, self.width)
        names = {"model.embed_tokens": (config["vocab_size"], dim), "model.norm": (dim,)}
        for layer in range(config["num_hidden_layers"]):
            names |= {f"model.layers.{layer}.{part}": shape for part, shape in shapes.items()}
        self.weights = nn.ParameterDict({name.replace(".", "/"): torch.empty(shape) for name, shape in names.items()})

    def tensors(self) -> Tensors:
        """As a file of MiniMind has them: the output projection too, though it is the embedding."""
        tensors = {f"{name.replace('/', '.')}.weight": weight.detach() for name, weight in self.weights.items()}
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    def feed(self, x: Tensor, stem: str) -> Tensor:
        gate, up, down = (self.weights[f"{stem}/{part}_proj"] for part in ("gate", "up", "down"))
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def norm(self, x: Tensor, name: str) -> Tensor:
        variance = x.float().square().mean(-1, keepdim=True)
        normed = (x.float() * (variance + self.config["rms_norm_eps"]).rsqrt()).to(x.dtype)
        return normed * self.weights[name]

    def mixture(self, x: Tensor, stem: str) -> Tensor:
        shares = (x @ self.weights[f"{stem}/gate"].T).float().softmax(-1)
        k = self.config["num_experts_per_tok"]
        value, index = shares.topk(k)
        if self.config["norm_topk_prob"] and (self.third or k > 1):
            value = value / value.sum(-1, keepdim=True)
        each = torch.stack([self.feed(x, f"{stem}/experts/{i}") for i in range(self.experts)], -2)
        chosen = each.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))
        y = (chosen * value[..., None].to(x.dtype)).sum(-2)
        for i in range(self.config.get("n_shared_experts", 0)):
            y = y + self.feed(x, f"{stem}/shared_experts/{i}")
        return y

    def forward(self, tokens: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.weights["model/embed_tokens"][tokens]
        B, S = tokens.shape
        half = self.head_dim // 2
        turns = self.config["rope_theta"] ** (-torch.arange(half).float() / half)
        angles = (torch.arange(S)[:, None] * turns)[None, :, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        groups = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        for layer in range(self.config["num_hidden_layers"]):
            stem = f"model/layers/{layer}"
            y = self.norm(x, f"{stem}/input_layernorm")
            q, k, v = (
                (y @ self.weights[f"{stem}/self_attn/{part}_proj"].T).view(B, S, -1, self.head_dim) for part in "qkv"
            )
            if self.third:
                q, k = self.norm(q, f"{stem}/self_attn/q_norm"), self.norm(k, f"{stem}/self_attn/k_norm")
            q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (z.chunk(2, -1) for z in (q, k)))
            k, v = (z.repeat_interleave(groups, 2) for z in (k, v))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.head_dim)
            scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf).float().softmax(-1)
            y = torch.einsum("bhqk,bkhd->bqhd", scores.to(x.dtype), v).flatten(2)
            x = x + y @ self.weights[f"{stem}/self_attn/o_proj"].T
            x = x + self.mixture(self.norm(x, f"{stem}/post_attention_layernorm"), f"{stem}/mlp")
        x = self.norm(x, "model/norm")
        return SimpleNamespace(logits=x @ self.weights["model/embed_tokens"].T)


# ---------------------------------------------------------------------------------------------------------------------
# Making one


@torch.no_grad()
def randomize(model: nn.Module, plus_one: bool) -> None:
    """Weights large enough that a mistake shows in the logits. `plus_one`: norms multiply by 1 plus their weight."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.normal_(0.5, 1.0, generator=generator)
        elif parameter.dim() == 1 or "norm" in name:
            is_norm = ("norm" in name or "ln_" in name) and not name.endswith("bias")
            parameter.normal_(1.0 if is_norm and not plus_one else 0.0, 0.3, generator=generator)
        else:
            parameter.normal_(0.0, 0.12, generator=generator)


def two_layers(name: str) -> dict[str, Any]:
    """Changes of the config that leave one layer of each kind: for tests that take as long as the layers are many."""
    changes: dict[str, Any] = {"num_hidden_layers": 2}
    if types := getattr(ENTRIES[name].config(), "layer_types", None):
        kinds = sorted(set(types), reverse=True)
        changes["layer_types"] = [kinds[0], kinds[-1]]
    return changes


def make(name: str, folder: Path, **changes: Any) -> Made:
    """Saves the model to folder/hf, with a tokenizer. `changes` are fields of the config."""
    made = ENTRIES[name]
    config = made.config()
    hf = folder / "hf"
    hf.mkdir(parents=True)
    if isinstance(config, dict):
        config |= changes
        reference: Any = MiniMind(config).eval()
        randomize(reference, plus_one=False)
        (hf / "config.json").write_text(json.dumps(config))
        tensors = reference.tensors()
    else:
        for field, value in changes.items():
            setattr(config, field, value)
        config._attn_implementation = "eager"  # the only one that knows sinks and soft caps
        kind = getattr(transformers, made.model)
        build = kind.from_config if made.model.startswith("Auto") else kind._from_config
        reference = build(config, dtype=torch.float32, attn_implementation="eager").eval()
        randomize(reference, plus_one="gemma" in config.model_type)
        if name.endswith("mxfp4"):
            round_to_mxfp4(reference)
        reference.save_pretrained(hf)
        tensors = safetensors.torch.load_file(hf / "model.safetensors")
    fields = json.loads((hf / "config.json").read_text())
    if made.hub:
        fields, tensors = made.hub(fields, tensors)
        (hf / "config.json").write_text(json.dumps(fields))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    make_tokenizer(hf)
    return Made(hf, reference)


@torch.no_grad()
def round_to_mxfp4(reference: nn.Module) -> None:
    """The experts' weights become such as the format can hold."""
    for name, parameter in reference.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parameter.copy_(to_mxfp4(parameter.transpose(1, 2))[2].transpose(1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Published config.json files, without what says nothing about the model (ids of tokens, dtypes, versions)

PHI_4_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215,
    18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64,
    32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
PHI_3 = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0, "hidden_act": "silu",
    "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 262144, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
STABLE_LM = {
    "architectures": ["StableLmForCausalLM"], "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
    "intermediate_size": 6912, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "model_type": "stablelm",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.25,
    "rope_theta": 10000, "tie_word_embeddings": False, "use_cache": True, "use_qkv_bias": False, "vocab_size": 50304,
}  # fmt: skip
STARCODER_2 = {
    "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1, "embedding_dropout": 0.1,
    "residual_dropout": 0.1, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "initializer_range": 0.018042,
    "intermediate_size": 12288, "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2",
    "norm_epsilon": 1e-05, "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2,
    "rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": True, "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "google/gemma-2b": {
        "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 256,
        "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 10000.0, "use_cache": True, "vocab_size": 256000,
    },
    "google/gemma-2-9b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "model_type": "gemma2", "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "sliding_window_size": 4096, "use_cache": True, "vocab_size": 256000,
    },
    "google/gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "use_cache": True, "vocab_size": 262144,
    },
    "google/gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    },
    "google/gemma-3-27b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": {
            "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
            "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27},
    },
    "microsoft/Phi-3-mini-4k-instruct": PHI_3 | {
        "max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047,
    },
    "microsoft/phi-4": PHI_3 | {
        "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384, "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 10, "original_max_position_embeddings": 16384,
        "rope_scaling": None, "rope_theta": 250000, "sliding_window": None, "vocab_size": 100352,
    },
    "microsoft/Phi-4-mini-instruct": PHI_3 | {
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
        "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": PHI_4_LONG, "short_factor": [1.0] * 48, "type": "longrope"},
        "tie_word_embeddings": True, "vocab_size": 200064,
    },
    "microsoft/phi-2": {
        "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "gelu_new",
        "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": False, "resid_pdrop": 0.1,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 51200,
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 8192,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 24,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 130000, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 49152,
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
    },
    "HuggingFaceTB/SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
        "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pretraining_tp": 2,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
        "use_cache": False, "use_sliding_window": False, "vocab_size": 128256,
    },
    "allenai/OLMo-7B-0424-hf": {
        "architectures": ["OlmoForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": 8.0,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "olmo", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 50304,
    },
    "allenai/OLMo-2-1124-7B-Instruct": {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
        "tie_word_embeddings": False, "use_cache": False, "vocab_size": 100352,
    },
    "allenai/Olmo-3-7B-Instruct": {
        "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8, "max_position_embeddings": 65536,
        "model_type": "olmo3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn",
        },
        "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 100278,
    },
    "ibm-granite/granite-3.1-2b-base": {
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "granite", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 5000000.0, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 49152,
    },
    "mistralai/Ministral-8B-Instruct-2410": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 100000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 131072,
    },
    "mistralai/Mistral-Nemo-Instruct-2407": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 1024000,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 131072,
    },
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
        "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
            "initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None, "use_cache": True,
            "vocab_size": 131072,
        },
        "vision_config": {
            "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "image_size": 1540, "intermediate_size": 4096,
            "model_type": "pixtral", "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
            "rope_theta": 10000.0,
        },
        "vision_feature_layer": -1,
    },
    "CohereForAI/c4ai-command-r-v01": {
        "architectures": ["CohereForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 22528,
        "layer_norm_eps": 1e-05, "logit_scale": 0.0625, "max_position_embeddings": 8192, "model_max_length": 131072,
        "model_type": "cohere", "num_attention_heads": 64, "num_hidden_layers": 40, "num_key_value_heads": 64,
        "rope_theta": 8000000.0, "use_cache": True, "vocab_size": 256000,
    },
    "CohereForAI/c4ai-command-r7b-12-2024": {
        "architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "cache_implementation": "hybrid", "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "layer_norm_eps": 1e-05, "layer_switch": 4,
        "logit_scale": 0.25, "max_position_embeddings": 8192, "model_type": "cohere2", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0,
        "sliding_window": 4096, "sliding_window_pattern": 4, "use_cache": True, "use_embedding_sharing": True,
        "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": True,
        "vocab_size": 256000,
    },
    "THUDM/glm-4-9b-chat-hf": {
        "architectures": ["GlmForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 13696,
        "max_position_embeddings": 131072, "model_type": "glm", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 151552,
    },
    "THUDM/GLM-4-32B-0414": {
        "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 23040,
        "max_position_embeddings": 32768, "model_type": "glm4", "num_attention_heads": 48, "num_hidden_layers": 61,
        "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 151552,
    },
    "stabilityai/stablelm-3b-4e1t": STABLE_LM,
    "stabilityai/stablelm-2-12b": STABLE_LM | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "qk_layernorm": True, "rotary_scaling_factor": 1.0, "use_norm_bias": False, "use_parallel_residual": True,
        "vocab_size": 100352,
    },
    "bigcode/starcoder2-3b": STARCODER_2,
    "bigcode/starcoder2-15b": STARCODER_2 | {
        "hidden_size": 6144, "intermediate_size": 24576, "norm_type": "layer_norm", "num_attention_heads": 48,
        "num_hidden_layers": 40, "num_key_value_heads": 4, "rms_norm_eps": 1e-05, "rope_theta": 100000,
        "tie_word_embeddings": False,
    },
    "ByteDance-Seed/Seed-OSS-36B-Instruct": {
        "architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.1,
        "attention_out_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 27648, "max_position_embeddings": 524288, "mlp_bias": False,
        "model_type": "seed_oss", "num_attention_heads": 80, "num_hidden_layers": 64, "num_key_value_heads": 8,
        "residual_dropout": 0.1, "rms_norm_eps": 1e-06, "rope_scaling": {"rope_type": "default"},
        "rope_theta": 10000000.0, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 155136,
    },
    "openai-community/gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "EleutherAI/pythia-160m": {
        "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
        "num_attention_heads": 12, "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
    },
    "EleutherAI/gpt-neox-20b": {
        "architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0, "hidden_act": "gelu_fast",
        "hidden_dropout_prob": 0, "hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 24576,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 64,
        "num_hidden_layers": 44, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 50432,
    },
    "mistralai/Mixtral-8x7B-Instruct-v0.1": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 32000,
    },
    "Qwen/Qwen1.5-MoE-A2.7B": {
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "decoder_sparse_step": 1,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
        "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen/Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "allenai/OLMoE-1B-7B-0924": {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024,
        "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 50304,
    },
    "ibm-granite/granite-3.0-1b-a400m-instruct": {
        "architectures": ["GraniteMoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 4096,
        "model_type": "granitemoe", "num_attention_heads": 16, "num_experts_per_tok": 8, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.0,
        "tie_word_embeddings": True, "use_cache": True, "vocab_size": 49155,
    },
    "openai/gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
    },
    "jingyaogong/MiniMind2-MoE": {
        "architectures": ["MiniMindForCausalLM"], "aux_loss_alpha": 0.1, "dropout": 0.0, "flash_attn": True,
        "hidden_act": "silu", "hidden_size": 640, "intermediate_size": 1728, "max_position_embeddings": 32768,
        "model_type": "minimind", "n_routed_experts": 4, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 8, "num_experts_per_tok": 2, "num_hidden_layers": 8, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "scoring_func": "softmax", "seq_aux": True, "use_moe": True,
        "vocab_size": 6400,
    },
}  # fmt: skip
