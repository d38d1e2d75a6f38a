"""The models that bench.py times: made up or loaded, and quantized in memory.

    model = random_model(ModelConfig.from_hf(SHAPES["1b"]), "cpu")
    int4 = quantize_model(model, "int4", groupsize=32)

Models share what they have in common: the embedding and the norms, and where caches alone differ all layers.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import quantized_layer
from config import ModelConfig
from errors import UserError
from files import check_memory
from kernels import Int4Linear, Int8Linear
from kernels.experts import Int4Experts, Int8Experts
from kernels.packing import allocate
from layout import Form, is_quantizable
from model import ExpertsLinear, Linear, Transformer, expected_shapes
from rounding import SCALE_DTYPE, ZERO, quantize_int8, stored_int4, to_levels
from tp import ALONE, Group

MODES = ("bf16", "int8", "int4")
INT8, INT4 = (Int8Linear, Int8Experts), (Int4Linear, Int4Experts)
UNQUANTIZED = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LLAMA: dict[str, Any] = dict(
    model_type="llama", num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, tie_word_embeddings=False
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {  # as config.json; "demo" is the embedded checkpoint
    "1b": LLAMA | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, vocab_size=32000, max_position_embeddings=8192,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0),
    ),
    "1b-151k": LLAMA | dict(  # the same with the vocabulary of Qwen
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, vocab_size=151936, max_position_embeddings=8192,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0),
    ),
    "8b": LLAMA | dict(  # Llama 3.1
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256,
        max_position_embeddings=131072, rope_parameters=dict(
            rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    # Half of Qwen3 30B A3B in each dimension: 1,520,084,480 parameters, of which a step reads 298,231,296: 169,869,312
    # of the chosen experts, 32,768,000 of the output projection and 95,593,984 of attention, routers and norms.
    "moe": dict(
        model_type="qwen3_moe", hidden_size=1024, num_hidden_layers=18, num_attention_heads=16, num_key_value_heads=4,
        head_dim=128, intermediate_size=3072, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=384,
        norm_topk_prob=True, vocab_size=32000, max_position_embeddings=8192, rms_norm_eps=1e-6,
        tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    ),
}  # fmt: skip


@torch.no_grad()
def random_model(
    config: ModelConfig, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, group: Group = ALONE
) -> Transformer:
    """The same model each time: norms of 1, no biases, the rest uniform so that activations keep their size. Each rank
    of a group has parts of the right shapes."""
    whole, config = config, group.slices(config, {}).config
    needed = sum(torch.Size(shape).numel() for shape in expected_shapes(config).values()) * dtype.itemsize
    check_memory(needed, "a model of this shape", device)
    with torch.device("meta"):
        model = Transformer(config)
    weights = {name: allocate(weight.shape, dtype, torch.device(device)) for name, weight in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1)
        else:
            bound = (3 / weight.shape[-1]) ** 0.5
            if config.experts is not None:
                # The mean of all values is in every token. Here it stays small beside what tells tokens apart, or all
                # would choose the same few experts, and each greedy step those of the step before.
                if name == "tok_embeddings.weight":
                    bound *= config.dim**0.5
                elif name.endswith("attention.wo.weight"):
                    bound /= 4
            weight.uniform_(-bound, bound, generator=generator)
    return group.parallelize(model, whole).eval().requires_grad_(False)


def rebuild(model: Transformer, layers: Mapping[str, nn.Module] | None = None) -> Transformer:
    """Another model of the very same tensors, but for the layers that `layers` names; caches are set up for each."""
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name, module in (layers or {}).items():
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, module)
    return twin.eval().requires_grad_(False)


def mode_of(model: Transformer) -> str:
    """What the weights of a model are: "bf16", "fp16", "fp32", "int8" or "int4"."""
    layers = [*model.modules()]
    if any(isinstance(layer, INT4) for layer in layers):
        return "int4"
    if any(isinstance(layer, INT8) for layer in layers):
        return "int8"
    return UNQUANTIZED[model.tok_embeddings.weight.dtype]


def format_of(model: Transformer) -> str:
    """The mode, and the group sizes if it has groups: "int4-g32"."""
    groups = sorted({layer.groupsize for layer in model.modules() if isinstance(layer, INT8 + INT4)} - {0})
    return "-g".join([mode_of(model), *map(str, groups)])


def quantize_model(model: Transformer, mode: str, groupsize: int) -> Transformer:
    """All layers quantized, the output projection as well; what chooses among experts, the embedding and the norms are
    those of `model`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (Linear, ExpertsLinear))}
    matrices = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
    if model.output is None:
        matrices["output"] = (model.tok_embeddings.weight, None)
    quantized = {
        name: quantize_layer(name, weight, bias, mode, groupsize)
        for name, (weight, bias) in matrices.items()
        if is_quantizable(name, tuple(weight.shape))
    }
    return rebuild(model, quantized)


def quantize_layer(name: str, weight: Tensor, bias: Tensor | None, mode: str, groupsize: int) -> nn.Module:
    """The layer with a weight [out, in], or [experts, out, in]."""
    inputs = weight.shape[-1]
    if mode == "int4" and inputs % groupsize:
        raise UserError(f"--groupsize {groupsize} does not divide the {inputs} inputs of {name}")
    rows = weight.flatten(0, -2).split(1024)
    if mode == "int8":
        parts = (quantize_int8(some.float()) for some in rows)
    else:
        parts = (stored_int4(*round_int4(some.float(), groupsize)) for some in rows)
    whole = (torch.cat(part).unflatten(0, weight.shape[:-1]) for part in zip(*parts, strict=True))
    packed, *grid = (part.to(weight.device) for part in whole)
    return quantized_layer(Form(8) if mode == "int8" else Form(4, groupsize), packed, grid, bias, None)


def round_int4(weight: Tensor, groupsize: int) -> tuple[Tensor, Tensor]:
    """rounding.quantize_int4 without its search for the best clipping, which takes minutes on a billion weights."""
    groups = weight.unflatten(1, (-1, groupsize))
    low, high = groups.aminmax(dim=-1)
    scales = (torch.where(high > -low, high, low) / -ZERO).to(SCALE_DTYPE).float()
    scales = scales.masked_fill(scales == 0, torch.finfo(torch.float32).tiny)
    return to_levels(groups, scales[..., None]).flatten(1), scales
