"""Turns a Hugging Face checkpoint into one of ours: downloads it, checks it, renames and fuses its tensors.

    python convert_hf_checkpoint.py --repo meta-llama/Llama-3.2-1B            -> checkpoints/meta-llama/Llama-3.2-1B/
    python convert_hf_checkpoint.py --checkpoint_dir path/to/folder           -> checkpoints/local/folder/
    ... [--revision R] [--out DIR] [--dtype bfloat16|float16|float32]

Reads model.safetensors, pytorch_model.bin (both also in shards) and MiniMind's .pth, whose path --checkpoint_dir may
name. Checkpoints that others quantized, by GPTQ or AWQ, stay so; --dtype is then that of all the rest. Works tensor by
tensor, in a temporary folder that takes the place of an older checkpoint at the end: a kill leaves the old checkpoint,
or none, never a mix.
"""

import errors  # first, so that Ctrl-C is quiet while torch is imported
from files import lock_temporary, read_json, sync_folder, write_atomically
from layout import FORMAT, VERSION, Form, quantized_shapes
from weights import CHUNK_BYTES, FLOATS, check_index, read_header, read_index, read_safetensors
from writer import write_safetensors

# isort: split
import functools
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config import ModelConfig
from errors import ArgumentParser, UserError
from files import check_disk, gb
from formats.gptq_awq import Dequantized, Format, QuantizedLinear, is_quantized, quantized_linear, read_format
from formats.hub import CONFIG_FILES, TOKENIZER_FILES, choose_weights, download
from formats.pickled import PickledFiles, PickledTensor
from model import expected_shapes
from tokenizer import load_tokenizer
from weights import StoredTensor

SHARD_BYTES = 5 * 10**9
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Our tensors, and those that each is made of, one below the other. Llama, Mistral, Qwen and MiniMind share the names.
HF_NAMES = {
    "tok_embeddings": ["model.embed_tokens"],
    "attention.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.wo": ["self_attn.o_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "attention_norm": ["input_layernorm"],
    "feed_forward.w13": ["mlp.gate_proj", "mlp.up_proj"],
    "feed_forward.w2": ["mlp.down_proj"],
    "ffn_norm": ["post_attention_layernorm"],
    "norm": ["model.norm"],
    "output": ["lm_head"],
}
MINIMIND_V1_NAMES = {name: [name] for name in HF_NAMES} | {
    "attention.wqkv": ["attention.wq", "attention.wk", "attention.wv"],
    "feed_forward.w13": ["feed_forward.w1", "feed_forward.w3"],
}
# Tables and masks that some checkpoints hold, though they follow from the config.
IGNORED = re.compile(r"(|.*\.)(rotary_emb\.inv_freq|(attention|self_attn)\.(masked_bias|mask)|pos_cis|freqs_(cos|sin))")


Source = StoredTensor | PickledTensor


def open_weights(path: Path) -> dict[str, Source]:
    """The tensors of a weight file or index, by the names that they have there."""
    if ".safetensors" in path.name:
        return dict(read_safetensors(path)[0])
    indexed = path.name.endswith(".index.json")
    tensors = PickledFiles(read_index(path) if indexed else [path]).tensors
    if indexed:
        check_index(path, tensors)
    # What torch.compile and DistributedDataParallel put before the names of a model they wrap.
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Names, shapes and the config


@dataclass(frozen=True)
class Piece:
    """Rows of one of our tensors: a whole tensor of the source, or a quantized layer."""

    tensor: Source | QuantizedLinear | Dequantized
    interleaved_heads: int = 0  # heads of q or k whose RoPE pairs lie next to each other


def plan_tensors(
    config: ModelConfig, tensors: Mapping[str, Source], is_v1: bool, form: Format | None = None
) -> dict[str, list[Piece]]:
    """The names of our unquantized model, each with the pieces of the source that it is made of.

    UserError names the first tensor that is missing, misshapen or of a wrong type, then the first that is unexpected.
    """
    plan: dict[str, list[Piece]] = {}
    used, unequal = set(), []
    head, embedding = ("output", "tok_embeddings") if is_v1 else ("lm_head", "model.embed_tokens")
    shapes = expected_shapes(config)
    if config.tied and is_quantized(head, tensors):  # the embedding, quantized, which itself stays as it is
        shapes["output.weight"] = shapes["tok_embeddings.weight"]
    for ours, shape in shapes.items():
        layer, part, kind = re.fullmatch(r"(layers\.\d+\.|)(.+)\.(weight|bias)", ours).groups()
        names = (MINIMIND_V1_NAMES if is_v1 else HF_NAMES)[part]
        prefix = "model." + layer if layer and not is_v1 else layer
        rows, heads = [shape[0] // len(names)] * len(names), [0] * len(names)
        if part == "attention.wqkv":
            rows = [count * config.head_dim for count in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
            heads = [config.n_heads, config.n_kv_heads, 0] if is_v1 else heads
        plan[ours] = []
        for stem, count, interleaved in zip((prefix + name for name in names), rows, heads, strict=True):
            if kind == "weight" and len(shape) == 2 and ours != "tok_embeddings.weight" and is_quantized(stem, tensors):
                linear = quantized_linear(form, stem, tensors, (count, shape[1]))
                used |= {f"{linear.name}.{part}" for part in linear.tensors}
                plan[ours].append(Piece(linear))
                continue
            name = f"{stem}.{kind}"
            if name not in tensors:
                raise UserError(f"tensor {name!r} is missing from the weights; config.json and weights do not match")
            found, expected = tensors[name].shape, (count, *shape[1:])
            if found != expected:
                raise UserError(
                    f"tensor {name!r} has the shape {list(found)} where config.json means {list(expected)};"
                    " get the config.json of these weights"
                )
            if tensors[name].dtype not in (*FLOATS, torch.float64):
                raise UserError(f"tensor {name!r} is {tensors[name].dtype}, not a float; convert the unquantized model")
            used.add(name)
            plan[ours].append(Piece(tensors[name], interleaved))
        if not alike([piece.tensor for piece in plan[ours]]):
            unequal.append(layer + part)
            plan[ours] = [
                Piece(Dequantized(piece.tensor)) if isinstance(piece.tensor, QuantizedLinear) else piece
                for piece in plan[ours]
            ]
    if unequal:
        message = "are quantized differently, or to 8 bits that are not symmetric; they become floats"
        print(f"warning: the parts of {', '.join(unequal)} {message}", file=sys.stderr)
    for name, tensor in tensors.items():
        if name in used or IGNORED.fullmatch(name):
            continue
        # AutoGPTQ gave every layer a bias.
        if name.endswith(".bias") and f"{name.removesuffix('.bias')}.qweight" in used and not any_nonzero(tensor):
            continue
        if config.tied and name == f"{head}.weight":
            if not equal(tensor, tensors[f"{embedding}.weight"]):
                raise UserError(
                    f"tensor {name!r} differs from {embedding + '.weight'!r}, to which config.json ties it;"
                    " correct tie_word_embeddings"
                )
            continue
        raise UserError(f"tensor {name!r} is unexpected; config.json does not speak of it, get that of these weights")
    return plan


def alike(parts: list[Source | QuantizedLinear]) -> bool:
    """Whether these can be one layer: none of them is quantized, or all, and one order of the inputs serves all."""
    if not all(isinstance(part, QuantizedLinear) and part.is_exact() for part in parts):
        return not any(isinstance(part, QuantizedLinear) for part in parts)
    orders = [torch.arange(part.shape[1]) if part.order is None else part.order for part in parts]
    return all(torch.equal(order, orders[0]) for order in orders)


def any_nonzero(tensor: Source) -> bool:
    return any(bool(rows.any()) for rows in slices(tensor))


def equal(a: Source, b: Source) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and all(torch.equal(x, y) for x, y in zip(slices(a), slices(b), strict=True))


def slices(tensor: Source | Dequantized) -> Iterator[Tensor]:
    """The tensor in runs of rows of at most CHUNK_BYTES."""
    rows = tensor.shape[0]
    step = max(CHUNK_BYTES * rows // (torch.Size(tensor.shape).numel() * tensor.dtype.itemsize), 1)
    for start in range(0, rows, step):
        yield tensor.read(start, min(start + step, rows))


def read_config(path: Path, tensors: Mapping[str, Source]) -> dict[str, Any]:
    """config.json as our checkpoint gets it: as it came, but for what MiniMind leaves to its code."""
    is_v1 = "tok_embeddings.weight" in tensors
    if is_v1 and not path.exists():
        return minimind_v1_config({}, tensors)
    config = read_json(path)
    if is_v1 and "hidden_size" not in config:
        return minimind_v1_config(config, tensors)
    if config.get("model_type") == "minimind" and "model.layers.0.self_attn.q_norm.weight" in tensors:
        config["qk_norm"] = True  # newer versions normalize q and k, and say so nowhere but in the weights
    return config


def minimind_v1_config(config: dict[str, Any], tensors: Mapping[str, Source]) -> dict[str, Any]:
    """MiniMind's LMConfig, or what the shapes tell where there is none, as the Llama config that it amounts to.

    Published were two generations: 16 heads, 8 of them with keys and values, base 1e4; and 8 heads, 2, base 1e6.
    """
    if config.get("use_moe") or any(".experts." in name for name in tensors):
        raise UserError("these weights are a mixture of experts, which is not supported; take the dense MiniMind")
    names = ("tok_embeddings.weight", "layers.0.attention.wk.weight", "layers.0.feed_forward.w1.weight")
    for name in names:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise UserError(f"tensor {name!r} is missing or not a matrix; these are not the weights of a MiniMind")
    (vocab, dim), (kv_rows, _), (ffn_dim, _) = (tensors[name].shape for name in names)
    layers = 1 + max(int(n[1]) for n in (re.match(r"layers\.(\d{1,6})\.", name) for name in tensors) if n)
    older = "rope_theta" not in config if config else 2 * kv_rows == dim
    heads, kv_heads = config.get("n_heads", 16 if older else 8), config.get("n_kv_heads", 8 if older else 2)
    if not config and kv_rows * heads != dim * kv_heads:
        raise UserError("these weights have other heads than the published MiniMind; put its config.json beside them")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.get("dim", dim),
        "intermediate_size": config.get("hidden_dim") or ffn_dim,
        "num_hidden_layers": config.get("n_layers", layers),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": config.get("vocab_size", vocab),
        "rms_norm_eps": config.get("norm_eps", 1e-5),
        "rope_theta": config.get("rope_theta", 1e4 if older else 1e6),
        "max_position_embeddings": config.get("max_seq_len", 512 if older else 8192),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": config.get("bos_token_id", 1),
        "eos_token_id": config.get("eos_token_id", 2),
    }


def choose_dtype(config: dict[str, Any], plan: Mapping[str, list[Piece]]) -> torch.dtype:
    """The dtype that is stored. A checkpoint of ours has one: where the source mixes, that of config.json."""
    tensors = [piece.tensor for pieces in plan.values() for piece in pieces]
    stored = {tensor.dtype for tensor in tensors if not isinstance(tensor, QuantizedLinear)}
    if len(stored) > 1:
        named = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))
        stored = {named or plan["tok_embeddings.weight"][0].tensor.dtype}
    return torch.float32 if stored == {torch.float64} else stored.pop()


# ---------------------------------------------------------------------------------------------------------------------
# Convert


def convert(source: Path, out: Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES) -> str:
    """Converts a folder (or a .pth file) to the checkpoint folder `out` and returns a line of what was written.

    UserError before anything is written when the source is incomplete or unsupported, the disk too small, or `out`
    something else than a checkpoint of ours.
    """
    if source.is_file():
        weights, source = source, source.parent
    elif source.is_dir():
        weights = source / choose_weights(sorted(entry.name for entry in source.iterdir()), source)
    else:
        raise UserError(f"{source} is not there; name the folder of a Hugging Face checkpoint")
    tensors = open_weights(weights)
    if "layers.0.attention.wqkv.weight" in tensors:
        raise UserError(f"{source} is already converted; name it as --checkpoint_path to generate.py")
    raw_config = read_config(source / "config.json", tensors)
    config = ModelConfig.from_hf(raw_config)
    form = read_format(raw_config, source)
    plan = plan_tensors(config, tensors, "tok_embeddings.weight" in tensors, form)
    dtype = dtype or choose_dtype(raw_config, plan)
    check_tokenizer(source, config)

    stored, quantized = stored_tensors(config, plan, dtype)
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored.values())
    path = out.resolve()
    if path.exists() and path.samefile(source):
        raise UserError(f"--out {out} is the source itself; name another folder")
    check_disk(size, path)
    dtype_name = str(dtype).removeprefix("torch.")
    metadata = {"format": FORMAT, "version": VERSION, "dtype": dtype_name}
    if quantized:
        forms = {layer: quantized_form.name for layer, quantized_form in quantized.items()}
        metadata |= {"mode": form.method, "quantized": json.dumps(forms)}

    def write(folder: Path) -> None:
        for name in (*CONFIG_FILES, *TOKENIZER_FILES):
            if (source / name).is_file():
                with write_atomically(folder / name) as file:
                    file.write((source / name).read_bytes())
        if not (source / "config.json").exists() or read_json(source / "config.json") != raw_config:
            with write_atomically(folder / "config.json") as file:
                file.write(json.dumps(raw_config, indent=2).encode())
        write_weights(folder, plan, stored, metadata, shard_bytes)

    replace_folder(path, write)
    parameters = sum(math.prod(piece.tensor.shape) for pieces in plan.values() for piece in pieces)
    kind = f"int{form.bits} ({form.method.upper()}) and {dtype_name}" if quantized else dtype_name
    return (
        f"wrote {out}: {parameters / 1e6:,.1f} M parameters, {kind}, {gb(size)}; "
        f'try: python generate.py --checkpoint_path {shlex.quote(str(out))} --prompt "Hello"'
    )


def check_tokenizer(source: Path, config: ModelConfig) -> None:
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        print(f"warning: {source} has no tokenizer; put its files into the converted folder", file=sys.stderr)
    else:
        load_tokenizer(source, config.vocab_size)


def stored_tensors(
    config: ModelConfig, plan: Mapping[str, list[Piece]], dtype: torch.dtype
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], dict[str, Form]]:
    """What is written: name -> dtype and shape; and the layers of it that are quantized, and how."""
    linears = {name.removesuffix(".weight"): [piece.tensor for piece in pieces] for name, pieces in plan.items()
               if isinstance(pieces[0].tensor, QuantizedLinear)}  # fmt: skip
    quantized = {layer: parts[0].stored for layer, parts in linears.items()}
    ordered = [layer for layer, parts in linears.items() if parts[0].order is not None]
    stored = {}
    for name, shape in quantized_shapes(config, quantized, ordered).items():
        layer, _, kind = name.rpartition(".")
        stored[name] = dtype, shape
        if layer in quantized and kind != "bias":
            scales = functools.reduce(torch.promote_types, (part.tensors["scales"].dtype for part in linears[layer]))
            dtypes = {"scales": scales, "zeros": torch.uint8, "order": torch.int32}
            stored[name] = dtypes.get(kind, quantized[layer].weight_dtype), shape
    return stored, quantized


def write_weights(
    folder: Path,
    plan: Mapping[str, list[Piece]],
    stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    limit: int,
) -> None:
    """Writes model.safetensors, or shards of at most `limit` bytes and their index."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in stored.items()}
    shards: list[list[str]] = [[]]
    for name in stored:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > limit:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else ["model.safetensors"]
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=None, desc="converting") as progress:

        def chunks(name: str) -> Iterator[Tensor]:
            layer, _, kind = name.rpartition(".")
            for piece in plan[name] if name in plan else plan[f"{layer}.weight"]:
                for rows in pieces_of(piece, kind):
                    rows = cast(rows, stored[name][0], name)
                    yield rows
                    progress.update(rows.nbytes)
                if kind == "order":  # one serves all
                    break

        for file, names in zip(files, shards, strict=True):
            write_safetensors(folder / file, {n: stored[n] for n in names}, chunks, metadata)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        with write_atomically(folder / "model.safetensors.index.json") as file:
            file.write(json.dumps(index, indent=2).encode())


def pieces_of(piece: Piece, kind: str) -> Iterable[Tensor]:
    """The rows of a piece, or of the tensor of that `kind` if it is a quantized layer, in runs."""
    if isinstance(piece.tensor, QuantizedLinear):
        return [piece.tensor.order] if kind == "order" else piece.tensor.read(kind)
    return [rotate_half_order(piece)] if piece.interleaved_heads else slices(piece.tensor)


def rotate_half_order(piece: Piece) -> Tensor:
    """Rows of q or k [heads * head_dim, dim] whose RoPE pairs elements (0, 1), (2, 3) ... -> (0, head_dim / 2) ..."""
    weight = piece.tensor.read()
    return weight.view(piece.interleaved_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def cast(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """UserError when float16 does not reach far enough."""
    result = rows.to(dtype)
    if dtype == torch.float16 and rows.dtype != dtype and bool((result.isinf() & ~rows.isinf()).any()):
        raise UserError(f"tensor {name!r} holds values beyond float16; take --dtype bfloat16")
    return result


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary folder, then puts it in the place of `path`. UserError when that is not ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f".{path.name}.converting"), path.with_name(f".{path.name}.old")
    lock = lock_temporary(temporary, is_folder=True)
    try:
        if old.exists():  # left by a killed run, between the renames below or after them
            if path.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, path)
        check_replaceable(path)
        for left in temporary.iterdir():
            left.unlink()
        write(temporary)
        sync_folder(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        sync_folder(path.parent)
        if old.exists():
            shutil.rmtree(old)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def check_replaceable(path: Path) -> None:
    """UserError unless `path` is free, an empty folder, or holds nothing but a checkpoint of ours."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; name another folder as --out")
    entries, has_weights = sorted(path.iterdir()), False
    for entry in entries:
        ours = entry.name in (*CONFIG_FILES, *TOKENIZER_FILES, "model.safetensors.index.json")
        ours = ours or re.fullmatch(r"\.\S+\.tmp", entry.name)  # of a killed run
        if re.fullmatch(r"model\S*\.safetensors", entry.name):
            ours = has_weights = is_our_file(entry)
        if not ours:
            raise UserError(f"{path} holds {entry.name}, which no conversion wrote; name another folder as --out")
    if entries and not has_weights:
        raise UserError(f"{path} is not empty and no converted checkpoint; name another folder as --out")


def is_our_file(path: Path) -> bool:
    try:
        return read_header(path)[1].get("format") == FORMAT
    except UserError:
        return False


def main() -> None:
    parser = ArgumentParser(description="Convert a Hugging Face checkpoint.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--repo", metavar="ORG/NAME", help="a model on the Hugging Face hub, downloaded first")
    source.add_argument("--checkpoint_dir", type=Path, metavar="DIR", help="a folder, or a MiniMind .pth file")
    parser.add_argument("--revision", help="branch, tag or commit of --repo")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: checkpoints/ORG/NAME, checkpoints/local/DIR")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as it is stored")
    args = parser.parse_args()
    folder = args.checkpoint_dir
    if args.repo is not None:
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", args.repo):
            raise UserError(f"{args.repo!r} is not of the form ORG/NAME; for a folder use --checkpoint_dir")
        out = args.out or Path("checkpoints", *args.repo.split("/"))
        check_replaceable(out.resolve())  # before gigabytes are fetched
        folder = download(args.repo, args.revision)
    else:
        if args.revision is not None:
            raise UserError("--revision goes with --repo only; leave it out")
        name = folder.resolve().stem if folder.is_file() else folder.resolve().name
        out = args.out or Path("checkpoints", "local", name)
    print(convert(folder, out, args.dtype and DTYPES[args.dtype]), file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
