"""A checkpoint is a folder with config.json, tokenizer files and model.safetensors in our names.

    config = load_config("checkpoints/org/name")                  # ModelConfig
    model = load_model("checkpoints/org/name", device="cpu")      # Transformer, weights mapped rather than copied
    load_generation_config("checkpoints/org/name")                # {"eos_token_ids": [2], "temperature": 0.6, ...}

Weights are loaded tensor by tensor, so there is never a second copy of a model in memory.
"""

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import ModelConfig
from config_fields import text_fields
from errors import UserError
from files import check_memory, read_json
from kernels import Int4Linear, Int8Linear
from kernels.experts import Int4Experts, Int8Experts
from kernels.packing import allocate
from layout import Form, check_order, check_tensors, quantized_layers
from model import Transformer
from tp import ALONE, Group
from weights import read_safetensors

CHECKPOINTS = Path("checkpoints")  # where conversions go, as ORG/NAME
DEMO = Path(__file__).parent / "demo" / "target"  # the small trained model that is used when none is named


# ---------------------------------------------------------------------------------------------------------------------
# JSON files


def load_config(folder: Path | str) -> ModelConfig:
    """Reads `folder`/config.json. UserError names the file and the field that is missing, absurd or unsupported."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    try:
        return ModelConfig.from_hf(config)
    except UserError as error:
        raise UserError(str(error).replace("config.json", str(path), 1)) from error


def load_generation_config(folder: Path | str) -> dict[str, Any]:
    """How the model's authors want it sampled, and where it stops.

    Returns `eos_token_ids` (a list, maybe empty: those of generation_config.json or, where it names none, of
    config.json; the tokenizer may have one more) and, where generation_config.json has them, `do_sample`,
    `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty`. UserError names a field of the wrong type.
    """
    path = Path(folder) / "generation_config.json"
    stored = read_json(path) if path.exists() else {}
    settings: dict[str, Any] = {}
    for name in ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        value = stored.get(name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9
        if not (isinstance(value, bool) if name == "do_sample" else is_number):
            raise UserError(f"{path}: {name}: {value!r} is not a valid value; correct it or remove the field")
        settings[name] = value
    source, ids = path, stored.get("eos_token_id")
    config_path = Path(folder) / "config.json"
    if ids in (None, []) and config_path.exists():
        source, ids = config_path, text_fields(read_json(config_path)).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise UserError(f"{source}: eos_token_id: {ids!r} is not a list of token ids; correct it")
    return {"eos_token_ids": ids, **settings}


# ---------------------------------------------------------------------------------------------------------------------
# Reading weights


def weights_path(path: Path | str) -> Path:
    """The weight file, or index, that a `--checkpoint_path` means: a folder stands for its model.safetensors, and
    ORG/NAME for checkpoints/ORG/NAME."""
    path = Path(path)
    if not path.exists() and (CHECKPOINTS / path).exists():
        path = CHECKPOINTS / path
    if path.is_file():
        if not path.name.endswith((".safetensors", ".safetensors.index.json")):
            if path.suffix == ".gguf":
                raise not_converted(path)
            raise UserError(f"{path} is no safetensors file; name the folder of a converted checkpoint")
        return path
    if not path.is_dir():
        raise UserError(f"{path} is not there; run {conversion_of(path)} first")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (path / name).is_file():
            return path / name
    if any(entry.suffix in (".bin", ".pth", ".gguf") for entry in path.iterdir()):
        raise not_converted(path)
    raise UserError(f"{path} holds no model.safetensors; run {conversion_of(path)} first")


def not_converted(path: Path) -> UserError:
    command = f"python convert_hf_checkpoint.py --checkpoint_dir {shlex.quote(str(path))}"
    return UserError(f"{path} is not converted; run `{command}` first")


def conversion_of(path: Path) -> str:
    """The command that makes the checkpoint at a path, as far as the path tells."""
    script = "python convert_hf_checkpoint.py"
    parts = path.relative_to(CHECKPOINTS).parts if path.is_relative_to(CHECKPOINTS) else path.parts
    if len(parts) == 2 and parts[0] != "local" and all(re.fullmatch(r"[\w-][\w.-]*", part) for part in parts):
        return f"`{script} --repo {'/'.join(parts)}`"
    return f"`{script} --checkpoint_dir DIR` (or --repo ORG/NAME)"


# ---------------------------------------------------------------------------------------------------------------------
# Loading a model


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    group: Group = ALONE,
    cache_dtype: torch.dtype | None = None,
) -> Transformer:
    """Loads a checkpoint, a folder or one weight file in it, for inference (eval mode, no gradients); of the ranks of
    a group each its slices.

    `dtype` None keeps what is stored. On a CPU an embedding of which only rows are read stays mapped from the file, and
    so does what sees images, which is read where there are some; the other weights are copied into huge pages, where a
    decode step reads them faster. Quantized layers are packed for the device; `dtype` is then that of all the rest.
    `cache_dtype` is that of the KV cache: int8, or None for the weights' own.
    UserError when a file or tensor is missing, unexpected or misshapen, or when the memory does not suffice.
    """
    path, device = weights_path(path), torch.device(device)
    config = load_config(path.parent)
    stored, metadata = read_safetensors(path)
    quantized = quantized_layers(path, metadata)
    check_tensors(config, stored, path, quantized)
    groupsizes = {layer: form.groupsize for layer, form in quantized.items()}
    group.check(config, groupsizes)
    slices = group.slices(config, groupsizes)

    dtype = dtype or stored["tok_embeddings.weight"].dtype
    parts = {layer: [f"{layer}.{part}" for part in form.parts] for layer, form in quantized.items()}
    orders = {layer: f"{layer}.order" for layer in quantized if f"{layer}.order" in stored}
    packed = {name for names in parts.values() for name in names} | set(orders.values())
    sizes = (
        slices.numel(name, tensor.shape) * (tensor.dtype if name in packed else dtype).itemsize
        for name, tensor in stored.items()
    )
    check_memory(sum(sizes) * group.sharing, f"the weights of {path.parent}", device)

    def part(name: str) -> Tensor:
        return slices.slice(name, stored[name].read())

    mapped = ("tok_embeddings.weight",) if "output" in quantized or not config.tied else ()
    state = {}
    for name in stored:
        if name in packed:
            continue
        source = part(name)
        if device.type != "cpu":
            state[name] = source.to(device, dtype)
        elif source.dtype == dtype and (name in mapped or name.startswith("vision.")):
            state[name] = source
        else:
            state[name] = allocate(source.shape, dtype, device).copy_(source)
    with torch.device("meta"):
        model = Transformer(slices.config)
    model.cache_dtype = cache_dtype
    model.load_state_dict(state, assign=True, strict=False)  # check_tensors was strict; what lacks here comes next
    for layer, form in quantized.items():
        weight, *grid = (part(name).to(device) for name in parts[layer])  # packing copies them
        bias, order = state.get(f"{layer}.bias"), None
        if layer in orders:
            check_order(stored[orders[layer]], orders[layer])
            order = part(orders[layer]).to(device)
        parent, _, child = layer.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized_layer(form, weight, grid, bias, order))
    return group.parallelize(model, config).eval().requires_grad_(False)


def quantized_layer(
    form: Form, weight: Tensor, grid: list[Tensor], bias: Tensor | None, order: Tensor | None
) -> nn.Module:
    """A layer, or that of all experts, of a form: from the tensors of the file, see layout.quantized_shapes."""
    scales, zeros = grid[0], grid[1] if len(grid) > 1 else None
    inputs = weight.shape[-1] * 8 // form.bits
    if weight.ndim == 3:
        if form.bits == 4:
            return Int4Experts.from_canonical(weight, scales, zeros, inputs, form.groupsize, bias)
        return Int8Experts.from_canonical(weight, scales, bias)
    if form.bits == 4:
        return Int4Linear.from_canonical(weight, scales, zeros, inputs, form.groupsize, bias, order)
    return Int8Linear.from_canonical(weight, scales, bias, order)


def checksum(path: Path | str) -> str:
    """A short hash of a checkpoint: of its JSON files, and of the header and the beginning of each tensor."""
    path = weights_path(path)
    stored, metadata = read_safetensors(path)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for file in sorted(path.parent.glob("*.json")):
        digest.update(file.read_bytes())
    for name, tensor in stored.items():
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(bytes(tensor.read().flatten()[:256].view(torch.uint8).tolist()))
    return digest.hexdigest()[:12]
