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

from config import ModelConfig
from errors import UserError
from files import check_memory
from kernels import Int4Linear, Int8Linear
from kernels.packing import allocate
from model import Linear, Transformer, expected_shapes
from rounding import SCALE_DTYPE, ZERO, quantize_int8, stored_int4, to_levels
from tp import ALONE, Group

MODES = ("bf16", "int8", "int4")
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
            bound = (3 / weight.shape[1]) ** 0.5
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
    kinds = {type(module) for module in model.modules()}
    if Int4Linear in kinds:
        return "int4"
    return "int8" if Int8Linear in kinds else UNQUANTIZED[model.tok_embeddings.weight.dtype]


def format_of(model: Transformer) -> str:
    """The mode, and the group sizes if it has groups: "int4-g32"."""
    quantized = [module for module in model.modules() if isinstance(module, (Int8Linear, Int4Linear))]
    groups = sorted({module.groupsize for module in quantized} - {0})
    return "-g".join([mode_of(model), *map(str, groups)])


def quantize_model(model: Transformer, mode: str, groupsize: int) -> Transformer:
    """All layers quantized, the output projection as well; the embedding and the norms are those of `model`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    matrices = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
    if model.output is None:
        matrices["output"] = (model.tok_embeddings.weight, None)
    quantized: dict[str, nn.Module] = {}
    for name, (weight, bias) in matrices.items():
        if mode == "int4" and weight.shape[1] % groupsize:
            raise UserError(f"--groupsize {groupsize} does not divide the {weight.shape[1]} inputs of {name}")
        rows = weight.split(1024)
        if mode == "int8":
            parts = zip(*(quantize_int8(some.float()) for some in rows), strict=True)
            quantized[name] = Int8Linear.from_canonical(*map(torch.cat, parts), bias)
        else:
            parts = zip(*(stored_int4(*round_int4(some.float(), groupsize)) for some in rows), strict=True)
            parts = (torch.cat(part).to(weight.device) for part in parts)
            quantized[name] = Int4Linear.from_canonical(*parts, weight.shape[1], groupsize, bias)
    return rebuild(model, quantized)


def round_int4(weight: Tensor, groupsize: int) -> tuple[Tensor, Tensor]:
    """rounding.quantize_int4 without its search for the best clipping, which takes minutes on a billion weights."""
    groups = weight.unflatten(1, (-1, groupsize))
    low, high = groups.aminmax(dim=-1)
    scales = (torch.where(high > -low, high, low) / -ZERO).to(SCALE_DTYPE).float()
    scales = scales.masked_fill(scales == 0, torch.finfo(torch.float32).tiny)
    return to_levels(groups, scales[..., None]).flatten(1), scales
