"""Which reader serves a checkpoint that others quantized.

    fields = read_quantization(config, folder)      # quantization_config, or an older tool's file; None: floats
    tensors = collapse(fields, tensors)             # each quantized weight as one Packed, see packed.py

A new format is a module with `collapse(fields, tensors)`, and a name in METHODS.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from errors import UserError
from files import read_json
from formats import bitsandbytes, compressed, fp8, gptq_awq, mxfp4
from formats.packed import Packed, Stored

CONFIG_FILES = ("quantize_config.json", "quant_config.json")  # of older GPTQ and AWQ, where config.json is silent
METHODS: dict[str, ModuleType] = {
    "gptq": gptq_awq, "awq": gptq_awq, "bitsandbytes": bitsandbytes, "compressed-tensors": compressed, "fp8": fp8,
    "fbgemm_fp8": fp8, "mxfp4": mxfp4,
}  # fmt: skip


def read_quantization(config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """How a checkpoint is quantized: a parsed config.json says so, or a separate file in `folder`. UserError names what
    is not supported."""
    where, fields = "config.json: quantization_config", config.get("quantization_config")
    fields = fields or config.get("compression_config")  # as compressed-tensors first called it
    for name in CONFIG_FILES:
        if not fields and (folder / name).is_file():
            where, fields = name, read_json(folder / name)
    if not fields:
        return None
    method = gptq_awq.method_of(fields) if isinstance(fields, dict) else repr(fields)
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(
            f"{where}: quant_method {method!r} is not supported, only {known} are; convert the original model"
        )
    fields = fields | {"quant_method": method}
    try:
        collapse(fields, {})  # no weights yet: what the fields mean
    except UserError as error:
        raise UserError(str(error).replace("config.json: quantization_config", where, 1)) from error
    return fields


def collapse(fields: Mapping[str, Any] | None, tensors: Mapping[str, Stored]) -> Mapping[str, Stored | Packed]:
    """The tensors, with a Packed under the name of each weight that is stored in pieces. UserError names what is
    missing, misshapen or not supported."""
    if fields is not None:
        return METHODS[fields["quant_method"]].collapse(fields, tensors)
    for name in tensors:
        if name.endswith(".qweight"):
            raise UserError(
                f"layer {name.removesuffix('.qweight')!r} is quantized, and config.json does not say how;"
                " put the quantize_config.json of these weights beside it"
            )
    return tensors
