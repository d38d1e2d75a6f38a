"""Which tensors a checkpoint of ours holds: names, shapes and dtypes, of floats or quantized.

    quantized = quantized_layers(path, metadata)             # {"layers.0.attention.wqkv": 32, "output": 0, ...}
    shapes = quantized_shapes(config, quantized)             # name -> shape of all that is stored
    check_tensors(config, stored, path, quantized)           # UserError names what does not fit

How a layer is quantized is in the metadata of the file, never guessed from its name.
"""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from config import ModelConfig
from errors import UserError
from model import expected_shapes
from weights import FLOATS, StoredTensor

FORMAT = "gpt-brisk"  # `format` in the metadata of weights in our names
VERSION = "1"
QUANTIZED = {"int8": 0, "int4-g32": 32, "int4-g64": 64, "int4-g128": 128}  # what the metadata calls it: its group size


def quantized_layers(path: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    """The layers of a weight file that are quantized: name -> group size of int4, 0 for int8.

    `quantized` in the metadata says so, in JSON: {"layers.0.attention.wqkv": "int4-g32", ..., "output": "int8"}.
    UserError when it is malformed, or from a newer version of this program.
    """
    if metadata.get("format") == FORMAT and metadata.get("version") != VERSION:
        raise UserError(
            f"{path} has version {metadata.get('version')!r}, this program knows {VERSION!r}; "
            "update the program, or convert again"
        )
    try:
        return {layer: QUANTIZED[form] for layer, form in json.loads(metadata.get("quantized", "{}")).items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: `quantized` in its metadata is malformed; quantize the model again") from error


def quantized_shapes(
    config: ModelConfig, quantized: Mapping[str, int], ordered: Container[str] = ()
) -> dict[str, tuple[int, ...]]:
    """`expected_shapes` where these layers (name -> group size, 0 for int8) are quantized. ValueError if they can't be.

    int8: `.weight` [out, in], `.scales` [out], w = q * scale. int4: `.weight` uint8 [out, in / 2], even inputs in the
    low halves of the bytes, `.scales` and `.zeros` [out, in / group], w = (q - zero) * scale. An int4 layer that is
    among the `ordered` has `.order` int32 [in] as well: its weight is for the inputs x[..., order].
    """
    plain = expected_shapes(config)
    if "output" in quantized and config.tied:  # it gets a weight of its own; the embedding stays as it is
        plain["output.weight"] = plain["tok_embeddings.weight"]
    for layer, group in quantized.items():
        shape = plain.get(f"{layer}.weight", ())
        if layer == "tok_embeddings" or len(shape) != 2 or (group and shape[1] % group):
            raise ValueError(f"{layer!r} is no layer that can be quantized in groups of {group}")
    shapes = {}
    for name, shape in plain.items():
        layer, _, kind = name.rpartition(".")
        group = quantized.get(layer) if kind == "weight" else None
        shapes[name] = (shape[0], shape[1] // 2) if group else shape
        if group is not None:
            shapes[f"{layer}.scales"] = (shape[0], shape[1] // group) if group else shape[:1]
        if group:
            shapes[f"{layer}.zeros"] = shapes[f"{layer}.scales"]
            if layer in ordered:
                shapes[f"{layer}.order"] = shape[1:]
    return shapes


def check_tensors(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    path: Path,
    quantized: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """UserError names the first tensor that is missing, misshapen, of a dtype that cannot be run, or unexpected."""
    if "model.embed_tokens.weight" in stored or "model.layers.0.input_layernorm.weight" in stored:
        raise UserError(
            f"{path} has the tensor names of Hugging Face; "
            f"run `python convert_hf_checkpoint.py --checkpoint_dir {path.parent}` first"
        )
    try:
        ordered = {layer for layer in quantized if f"{layer}.order" in stored}
        shapes = quantized_shapes(config, quantized, ordered)
    except ValueError as error:
        raise UserError(f"{path}: by its metadata {error}; quantize the model again") from error
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        dtypes = FLOATS
        if kind == "weight" and layer in quantized:
            dtypes = (torch.uint8,) if quantized[layer] else (torch.int8,)
        elif kind == "zeros":
            dtypes = (torch.uint8, *FLOATS)
        elif kind == "order":
            dtypes = (torch.int32,)
        if name not in stored:
            raise UserError(f"{path}: tensor {name!r} is missing; convert the model again")
        if stored[name].shape != shape:
            found, meant = list(stored[name].shape), list(shape)
            raise UserError(f"{path}: tensor {name!r} has the shape {found}, config.json means {meant}; convert again")
        if stored[name].dtype not in dtypes:
            found, meant = stored[name].dtype, "a float" if dtypes is FLOATS else dtypes[0]
            raise UserError(f"{path}: tensor {name!r} is {found}, not {meant}; convert the model again")
    for name in stored:
        if name not in shapes:
            raise UserError(
                f"{path}: tensor {name!r} is unexpected; it does not belong to this config.json; convert again"
            )


def check_order(tensor: StoredTensor, name: str) -> None:
    """UserError when it is no permutation."""
    order = tensor.read()
    if not torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype)):
        raise UserError(f"{tensor.path}: tensor {name!r} does not hold each input once; convert the model again")
