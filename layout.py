"""Which tensors a checkpoint of ours holds: names, shapes and dtypes, of floats or quantized.

    quantized = quantized_layers(path, metadata)             # {"layers.0.attention.wqkv": Form(4, 32), ...}
    shapes = quantized_shapes(config, quantized)             # name -> shape of all that is stored
    check_tensors(config, stored, path, quantized)           # UserError names what does not fit

How a layer is quantized is in the metadata of the file, never guessed from its name.
"""

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from config import ModelConfig
from errors import UserError
from kernels.packing import GROUPSIZES
from model import expected_shapes
from weights import FLOATS, StoredTensor

FORMAT = "gpt-brisk"  # `format` in the metadata of weights in our names
VERSION = "1"


@dataclass(frozen=True)
class Form:
    """How a layer is quantized."""

    bits: int  # 8 or 4
    groupsize: int = 0  # inputs that share a scale; 0: all of a row do
    floats: bool = False  # 4-bit floats, see kernels/packing.py

    @property
    def name(self) -> str:
        """What the metadata calls it: "int8", "int4-g32", "mxfp4"."""
        if self.floats:
            return "mxfp4"
        return f"int{self.bits}-g{self.groupsize}" if self.groupsize else f"int{self.bits}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of a layer, beside its bias and its order."""
        return ("weight", "scales", "zeros") if self.bits == 4 and not self.floats else ("weight", "scales")

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits == 4 else torch.int8


MXFP4 = Form(4, 32, floats=True)
FORMS = {form.name: form for form in (Form(8), *(Form(bits, size) for bits in (8, 4) for size in GROUPSIZES), MXFP4)}


def quantized_layers(path: Path, metadata: Mapping[str, str]) -> dict[str, Form]:
    """The layers of a weight file that are quantized, and how.

    `quantized` in the metadata says so, in JSON: {"layers.0.attention.wqkv": "int4-g32", ..., "output": "int8"}.
    UserError when it is malformed, or from a newer version of this program.
    """
    if metadata.get("format") == FORMAT and metadata.get("version") != VERSION:
        raise UserError(
            f"{path} has version {metadata.get('version')!r}, this program knows {VERSION!r}; "
            "update the program, or convert again"
        )
    try:
        return {layer: FORMS[name] for layer, name in json.loads(metadata.get("quantized", "{}")).items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: `quantized` in its metadata is malformed; quantize the model again") from error


def quantized_shapes(
    config: ModelConfig, quantized: Mapping[str, Form], ordered: Container[str] = ()
) -> dict[str, tuple[int, ...]]:
    """`expected_shapes` where these layers are quantized. ValueError if they can't be.

    int8: `.weight` [out, in], `.scales` [out] or, in groups, [out, in / group], w = q * scale. int4: `.weight` uint8
    [out, in / 2], even inputs in the low halves of the bytes, `.scales` and `.zeros` [out, in / group],
    w = (q - zero) * scale. mxfp4: as int4, but without zeros, w = FP4_VALUES[q] * scale. Experts have one more
    dimension before these. A layer in groups that is among the `ordered` has `.order` int32 [in] as well: its weight is
    for the inputs x[..., order].
    """
    plain = expected_shapes(config)
    if "output" in quantized and config.tied:  # it gets a weight of its own; the embedding stays as it is
        plain["output.weight"] = plain["tok_embeddings.weight"]
    for layer, form in quantized.items():
        shape = plain.get(f"{layer}.weight", ())
        if not is_quantizable(layer, shape) or (form.groupsize and shape[-1] % form.groupsize):
            groups = f" in groups of {form.groupsize}" if form.groupsize else ""
            raise ValueError(f"{layer!r} is no layer that can be quantized{groups}")
    shapes = {}
    for name, shape in plain.items():
        layer, _, kind = name.rpartition(".")
        form = quantized.get(layer) if kind == "weight" else None
        if form is None:
            shapes[name] = shape
            continue
        *outer, inputs = shape
        shapes[name] = (*outer, inputs * form.bits // 8)
        for part in form.parts[1:]:
            shapes[f"{layer}.{part}"] = (*outer, inputs // form.groupsize) if form.groupsize else tuple(outer)
        if form.groupsize and layer in ordered:
            shapes[f"{layer}.order"] = (inputs,)
    return shapes


def is_quantizable(layer: str, shape: tuple[int, ...]) -> bool:
    """Whether a layer with a weight of this shape may be quantized: all that multiply, but for what chooses among
    experts and what sees images."""
    if layer.startswith("vision."):
        return False
    is_embedding = layer in ("tok_embeddings", "pos_embeddings")
    chooses = layer.endswith((".router", ".shared_gate"))
    return len(shape) in (2, 3) and not is_embedding and not chooses and not layer.endswith("_norm")


def check_tensors(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    path: Path,
    quantized: Mapping[str, Form] = MappingProxyType({}),
) -> None:
    """UserError names the first tensor that is missing, misshapen, of a dtype that cannot be run, or unexpected."""
    if "model.embed_tokens.weight" in stored or "model.layers.0.input_layernorm.weight" in stored:
        raise UserError(
            f"{path} has the tensor names of Hugging Face; "
            f"run `python convert_hf_checkpoint.py --checkpoint_dir {path.parent}` first"
        )
    try:
        ordered = {layer for layer in quantized if f"{layer}.order" in stored and ".experts." not in layer}
        shapes = quantized_shapes(config, quantized, ordered)
    except ValueError as error:
        raise UserError(f"{path}: by its metadata {error}; quantize the model again") from error
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        dtypes = FLOATS
        if kind == "weight" and layer in quantized:
            dtypes = (quantized[layer].weight_dtype,)
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
