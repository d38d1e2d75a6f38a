"""What config.json says of the weights of compressed-tensors: a scheme for the layers that match a target.

    schemes = read_schemes(config["quantization_config"])   # {"Linear": Scheme(4, False, (1, 128), ...)}
    find_scheme(schemes, "model.layers.0.mlp.up_proj")

What it says of activations and of the KV cache does not matter here: they stay floats.
https://github.com/vllm-project/compressed-tensors
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from errors import UserError, log

FORMATS = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
KNOWN = {
    "quant_method", "version", "format", "quantization_status", "global_compression_ratio", "ignore", "config_groups",
    "kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config", "run_compressed", "dequantize",
    "use_optimized_inference",
}  # fmt: skip
KNOWN_OF_WEIGHTS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group of layers are quantized."""

    bits: int
    floats: bool  # or integers
    block: tuple[int, int]  # outputs and inputs that share a scale; 0 for all
    symmetric: bool
    scattered: bool  # g_idx tells the group of an input

    @property
    def middle(self) -> int:
        """What integers are stored plus, as unsigned ones."""
        return 2 ** (self.bits - 1)


def refused(what: str) -> UserError:
    return UserError(
        f"config.json: quantization_config: {what} is not supported in compressed-tensors; convert the original model"
    )


def read_schemes(fields: Mapping[str, Any]) -> dict[str, Scheme]:
    """The scheme of each target of `config_groups`. UserError names what is not supported."""
    check_format(fields.get("format") or "dense")
    sparsity = fields.get("sparsity_config") or {"format": "dense"}
    kind = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    if kind != "dense":
        raise refused(f"sparsity_config {kind!r}")
    check_transforms(fields.get("transform_config") or {})
    if fields.get("moe_sparsity_config"):
        raise refused("moe_sparsity_config")
    groups = fields.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise refused(f"config_groups {groups!r}")
    schemes: dict[str, Scheme] = {}
    for name, group in groups.items():
        targets = group.get("targets") if isinstance(group, dict) else group
        if not isinstance(group, dict) or not isinstance(targets, list) or not all(map(is_target, targets)):
            raise refused(f"config_groups: {name}: targets {targets!r}")
        check_format(group.get("format") or "dense")
        if group.get("weights"):
            schemes |= dict.fromkeys(targets, read_scheme(group["weights"], f"config_groups: {name}: weights"))
    return schemes


def outer(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """`quantization_config`, or the one that some versions nest in it."""
    nested = fields.get("quantization_config")
    return nested if isinstance(nested, dict) else fields


def tell(fields: Mapping[str, Any]) -> None:
    """Logs what is ignored in fields that read_schemes has accepted."""
    groups = (fields.get("config_groups") or {}).values()
    if fields.get("kv_cache_scheme") or any(g.get("input_activations") or g.get("output_activations") for g in groups):
        log("this checkpoint quantizes activations or the KV cache as well; here they stay floats")
    for name, value in fields.items():
        if name not in KNOWN and value:
            log(
                f"warning: config.json: quantization_config: {name}: this field is unknown and is ignored; check that"
                " it does not matter"
            )


def is_target(target: object) -> bool:
    """A name, or "re:" and a pattern of names."""
    if not isinstance(target, str):
        return False
    try:
        re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def check_format(name: object) -> None:
    if name not in FORMATS:
        raise refused(f"format {name!r}")


def check_transforms(transforms: object) -> None:
    """Rotations (SpinQuant, QuIP) that the weights have gone through already do not matter; those of activations do."""
    try:
        locations = [step["location"] for group in transforms["config_groups"].values() for step in group["apply"]]
    except (KeyError, TypeError, AttributeError):
        locations = ["?"] if transforms else []
    for location in locations:
        if location not in ("weight_input", "weight_output"):
            raise refused(f"transform_config: location {location!r}")


def read_scheme(weights: object, where: str) -> Scheme:
    """`weights` of a group."""
    if not isinstance(weights, dict):
        raise refused(f"{where}: {weights!r}")

    def bad(name: str) -> UserError:
        return refused(f"{where}: {name} {weights.get(name)!r}")

    for name, value in weights.items():
        if name not in KNOWN_OF_WEIGHTS and value is not None:
            raise bad(name)
    bits, kind, size = weights.get("num_bits", 8), str(weights.get("type") or "int").lower(), weights.get("group_size")
    if kind not in ("int", "float"):
        raise bad("type")
    if type(bits) is not int or bits not in ((4, 6, 8) if kind == "float" else range(2, 9)):
        raise bad("num_bits")
    if size is not None and (type(size) is not int or not (size == -1 or 0 < size < 2**31)):
        raise bad("group_size")
    if weights.get("dynamic"):
        raise bad("dynamic")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    strategy = str(strategy).lower()
    if strategy in ("group", "tensor_group"):
        if size is None or size < 1:
            raise bad("group_size")
        block = 1, size
    elif strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block):
            block = [int(part) for part in block.split("x")]
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in block):
            raise bad("block_structure")
    elif strategy in ("channel", "tensor"):
        block = (1 if strategy == "channel" else 0), 0
    else:
        raise bad("strategy")
    symmetric, act_order = weights.get("symmetric", True), weights.get("actorder")
    if not isinstance(symmetric, bool) or (kind == "float" and not symmetric):
        raise bad("symmetric")
    if act_order not in (None, True, False, "group", "dynamic", "weight", "static"):
        raise bad("actorder")
    return Scheme(bits, kind == "float", tuple(block), symmetric, act_order in (True, "group", "dynamic"))


def find_scheme(schemes: Mapping[str, Scheme], layer: str) -> Scheme:
    """The scheme of a quantized layer: the first target that is its name, then the first pattern, then its class."""
    if len(set(schemes.values())) == 1:  # what else should it be
        return next(iter(schemes.values()))
    kind = "Embedding" if "embed" in layer.rpartition(".")[2] or layer.endswith("wte") else "Linear"
    for target in sorted(schemes, key=lambda target: ("re:" in target, target)):
        if target == layer or (target.startswith("re:") and re.match(target.removeprefix("re:"), layer)):
            return schemes[target]
    if kind not in schemes:
        raise UserError(
            f"layer {layer!r} is quantized, and no target of config_groups in config.json is this layer;"
            " get the config.json of these weights"
        )
    return schemes[kind]
