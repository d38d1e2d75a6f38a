"""Turns the weights of a checkpoint into int8 or int4, in a file beside them that every script takes as it is.

    python quantize.py --mode int8 --checkpoint_path checkpoints/ORG/NAME        -> .../model_int8.safetensors
    python quantize.py --mode int4 | int4-gptq [--groupsize 32|64|128]           -> .../model_int4-gptq-g32.safetensors
    ... [--calibration FILE] [--act_order] [--keep_output] [--out FILE] [--overwrite] [--device cuda]
    python generate.py --checkpoint_path checkpoints/ORG/NAME/model_int8.safetensors ...

int8       symmetric: w = q * scale. `.weight` int8 [out, in]; a scale for each output row, `.scales` float32 [out], or
           with --groupsize for each group of inputs, `.scales` bfloat16 [out, in / group].
int4       symmetric, a scale for each group of inputs: w = (q - 8) * scale, q in 0..15. `.weight` uint8 [out, in / 2],
           even inputs in the low halves of the bytes, `.scales` bfloat16 and `.zeros` uint8 (all 8) [out, in / group].
           Clipping is searched for the least squared error.
int4-gptq  the same layout, rounded so that each layer's output on real text changes least (GPTQ, see rounding.py).

In groups of 32, a decode step reads 4.5 bits a weight of int4, and 8.5 of int8. Norms, biases and embeddings stay as
they are; where the output projection is tied to the embedding, the file holds both, the projection quantized. The
metadata says how, layer by layer (quantized_layers reads it). Works tensor by tensor, GPTQ block by block.
"""

import errors  # first, so that Ctrl-C is quiet while torch is imported

# isort: split
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from arguments import add_model, add_threads, model_path
from attention import KVCache
from config import ModelConfig
from errors import ArgumentParser, UserError, log
from files import check_disk, check_memory, gb, read_text
from kernels.packing import GROUPSIZES, dequantize
from layout import FORMAT, VERSION, Form, check_tensors, is_quantizable, quantized_layers, quantized_shapes
from model import Block, Norm, Transformer, activate, expected_shapes
from rounding import SCALE_DTYPE, ZERO, gptq_layer, inputs_of, quantize_int4, quantize_int8, stored_int4
from tokenizer import load_tokenizer
from weights import StoredTensor, check_finite, read_header, read_safetensors
from writer import write_safetensors

MODES = ("int8", "int4", "int4-gptq")
ELEMENTS = 2**20  # of a weight, worked on at a time
CALIBRATION = checkpoint.DEMO.parent / "calibration.txt"
FEW = 8  # an expert with fewer inputs than an eighth of its width is rounded, as they say too little of the others
WINDOW, WINDOWS = 1024, 32  # tokens of calibration text run together, and how many times at most

# ---------------------------------------------------------------------------------------------------------------------
# Layer by layer

Parts = tuple[Tensor, ...]  # of a quantized layer: weight, scales and, for int4, zeros, on the CPU


class Source:
    """The tensors of a checkpoint, in runs of rows. UserError names one that is not finite."""

    def __init__(self, stored: Mapping[str, StoredTensor], device: torch.device):
        self.stored, self.device = stored, device

    def chunks(self, name: str) -> Iterator[Tensor]:
        """As they are stored; `output.weight` is the embedding where there is no other."""
        tensor = self.stored.get(name) or self.stored["tok_embeddings.weight"]
        rows = rows_at_a_time(tensor.shape)
        for start in range(0, tensor.shape[0], rows):
            yield check_finite(tensor.read(start, min(start + rows, tensor.shape[0])), name, tensor.path)

    def floats(self, name: str) -> Iterator[Tensor]:
        """In float32, on the device."""
        return (chunk.to(self.device, torch.float32) for chunk in self.chunks(name))


def rows_at_a_time(shape: Sequence[int]) -> int:
    return max(ELEMENTS // max(math.prod(shape[1:]), 1), 1)


def rounded_layers(source: Source, quantized: Mapping[str, Form]) -> Iterator[tuple[str, Parts]]:
    """Each layer to nearest, on its own."""
    for layer, form in quantized.items():
        parts, outer = [], ()
        for rows in source.floats(f"{layer}.weight"):
            outer, rows = rows.shape[1:-1], rows.flatten(0, -2)  # of experts the outputs are the second dimension
            parts.append(rounded(rows, form))
        whole = (torch.cat(part) for part in zip(*parts, strict=True))
        yield layer, tuple(part.unflatten(0, (-1, *outer)) for part in whole)


def rounded(weight: Tensor, form: Form) -> Parts:
    """float32 [out, in] to nearest."""
    if form.bits == 4:
        return stored_int4(*quantize_int4(weight, form.groupsize))
    return tuple(part.cpu() for part in quantize_int8(weight, form.groupsize))


@torch.no_grad()
def gptq_layers(
    source: Source, quantized: Mapping[str, Form], config: ModelConfig, tokens: Tensor, act_order: bool, progress: tqdm
) -> Iterator[tuple[str, Parts]]:
    """Each layer by GPTQ, on the inputs that the layers before it, quantized, give for `tokens` [N, T].

    One block is in memory at a time, and one Hessian.
    """
    length, device = tokens.shape[1], source.device
    with torch.device("meta"):
        model = Transformer(config)
    embeddings = [name for name in ("tok_embeddings.weight", "pos_embeddings.weight") if name in source.stored]
    model.load_state_dict({name: torch.cat(list(source.chunks(name))) for name in embeddings}, False, assign=True)
    hidden = model.embed(tokens, torch.arange(length)[None]).float()  # [N, T, dim]
    input_pos = torch.arange(length, device=device)[None]
    model.setup_rope(device)
    angles = model.angles(input_pos)
    cache = (1, config.n_kv_heads, length + 1, config.head_dim)
    rare = 0  # experts that the text hardly reached

    def windows() -> Iterator[Tensor]:
        return (window[None].to(device) for window in hidden)

    def quantize_layer(layer: str, chunks: Iterable[Tensor], hessian: Tensor) -> Parts:
        if not bool(hessian.isfinite().all()):
            raise UserError(f"the calibration text overflows in {layer!r}; the weights are broken, get them again")
        parts, error = gptq_layer(chunks, hessian, quantized[layer].groupsize, act_order)
        progress.set_postfix_str(f"{layer} output error {error:.2%}")
        return parts

    def quantize_matrix(layer: str, weight: Tensor, x: Tensor) -> Parts:
        """Of one expert, float32 [out, in], which becomes what it is rounded to; x [T, in] are its inputs."""
        nonlocal rare
        if len(x) * FEW >= weight.shape[1]:
            return quantize_layer(layer, weight.split(rows_at_a_time(weight.shape)), (x.t() @ x).double())
        rare += 1
        levels, scales = quantize_int4(weight, quantized[layer].groupsize)
        weight.copy_(dequantize(levels, scales, ZERO, quantized[layer].groupsize))
        return stored_int4(levels, scales)

    def quantize_experts(prefix: str, block: Block, run: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Parts]]:
        """Each expert by its own inputs."""
        experts = block.feed_forward.experts
        calls = list(inputs_of(experts, windows(), run))
        rows, chosen = (torch.cat([args[i] for args in calls]) for i in range(2))
        found: dict[str, list[Parts]] = {"w13": [], "w2": []}
        for expert in range(config.experts.count):
            x = rows[(chosen == expert).any(1)]
            w13, w2 = (layer.weight[expert] for layer in (experts.w13, experts.w2))
            found["w13"].append(quantize_matrix(f"{prefix}w13", w13, x))
            bias = None if experts.w13.bias is None else experts.w13.bias[expert]
            x = activate(config, F.linear(x, w13, bias))
            found["w2"].append(quantize_matrix(f"{prefix}w2", w2, x))
        for name, parts in found.items():
            yield prefix + name, tuple(torch.stack(part) for part in zip(*parts, strict=True))

    for i in range(config.n_layers):
        with torch.device("meta"):
            block = Block(config, i)
        prefix = f"layers.{i}."
        state = {name: torch.cat(list(source.floats(prefix + name))) for name in block.state_dict()}
        block.load_state_dict(state, assign=True)
        block.attention.kv_cache = KVCache(cache, torch.float32, device)

        def run(x: Tensor, block: Block = block, angles: tuple = angles[i]) -> Tensor:
            return block(x, input_pos, input_pos, *angles, input_pos[0], None, None)

        for layer in (layer for layer in quantized if layer.startswith(prefix)):
            if layer.endswith(".experts.w13"):
                yield from quantize_experts(layer.removesuffix("w13"), block, run)
            elif not layer.endswith(".experts.w2"):
                linear = block.get_submodule(layer.removeprefix(prefix))
                rows = linear.weight.split(rows_at_a_time(linear.weight.shape))
                yield layer, quantize_layer(layer, rows, input_hessian(linear, windows(), run))
        for n, window in enumerate(windows()):
            hidden[n] = run(window)[0]
    if "output" in quantized:
        norm = Norm(config, config.dim, bias=config.norm_bias)
        state = {name: next(source.floats(f"norm.{name}")) for name in norm.state_dict()}
        norm.load_state_dict(state, assign=True)
        hessian = sum((x.t() @ x).double() for x in (norm(window[0]) for window in windows()))
        yield "output", quantize_layer("output", source.floats("output.weight"), hessian)
    if rare:
        every = 2 * config.experts.count * sum(config.expert_layers)
        log(
            f"warning: {rare} of {every} matrices of experts were rounded to nearest, as the calibration text hardly"
            " reached them; give a longer or more varied text as --calibration"
        )


def input_hessian(layer: nn.Module, windows: Iterable[Tensor], run: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of x x^T, float64 [in, in], over every input x of a layer. GPTQ's H is twice that, which changes
    nothing."""
    hessian = torch.zeros(2 * layer.weight.shape[1:], dtype=torch.float64, device=layer.weight.device)
    for (x,) in inputs_of(layer, windows, run):
        x = x.flatten(0, -2)
        hessian += x.t() @ x
    return hessian


def read_calibration(path: Path, folder: Path, config: ModelConfig, device: torch.device) -> Tensor:
    """Windows of tokens, int64 [N, T], of a text. UserError when it is too short to tell inputs apart."""
    tokenizer = load_tokenizer(folder, config.vocab_size)
    tokens = torch.tensor(tokenizer.encode(read_text(path)), dtype=torch.long)
    # Fewer tokens than inputs leave directions that no text was seen to use, and the Hessian without an inverse.
    widest = max(config.dim, config.n_heads * config.head_dim)
    if not all(config.expert_layers) or not config.expert_layers:  # the text cannot reach every expert as often
        widest = max(widest, config.ffn_dim)
    window = min(WINDOW, config.context_length)
    length = max(1, min(window, len(tokens)))
    count = min(len(tokens) // length, max(WINDOWS, -(-widest // length)))
    if count * length < widest:
        least = widest if widest < window else -(-widest // window) * window
        raise UserError(
            f"the calibration text {path} has {len(tokens)} tokens, this model needs {least} or more;"
            " give a longer text as --calibration"
        )
    # Between blocks the activations of all windows, within one a Hessian and what it is factored with.
    copies = 3 if config.experts else 1  # experts take their inputs from all windows, which are put together
    check_memory(4 * copies * count * length * config.dim + 40 * widest**2, f"calibrating on {path}", device)
    return tokens[: count * length].view(count, length)


def plan_layers(config: ModelConfig, mode: str, groupsize: int | None, keep_output: bool) -> dict[str, Form]:
    """The layers to quantize, in the order of the file, and how. `groupsize` None: a scale a row of int8.

    Where `groupsize` does not divide a layer's input, the largest smaller one that does; UserError where none does.
    """
    shapes = expected_shapes(config)
    if config.tied:
        shapes["output.weight"] = shapes["tok_embeddings.weight"]
    layers, bits = {}, 8 if mode == "int8" else 4
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight") or not is_quantizable(layer, shape) or (layer == "output" and keep_output):
            continue
        if groupsize is None:
            layers[layer] = Form(bits)
            continue
        fitting = [size for size in GROUPSIZES if size <= groupsize and shape[-1] % size == 0]
        if not fitting:
            raise UserError(
                f"no group of {groupsize} or a smaller size divides the {shape[-1]} inputs of {layer!r};"
                " take --mode int8 without --groupsize"
            )
        layers[layer] = Form(bits, max(fitting))
    return layers


def file_name(mode: str, groupsize: int | None, act_order: bool, keep_output: bool) -> str:
    """model_int4-gptq-g32-act_order-keep_output.safetensors: what differs from the default is in the name."""
    flags = {f"g{groupsize}": groupsize, "act_order": act_order, "keep_output": keep_output}
    return f"model_{'-'.join([mode, *(name for name, given in flags.items() if given)])}.safetensors"


def check_out(out: Path, source: Path, config: ModelConfig, overwrite: bool) -> None:
    """UserError when `out` is no file to write the quantized weights of `source` to, or is there already."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: a weight file is called NAME.safetensors; name it so")
    if not (out.parent / "config.json").is_file() or checkpoint.load_config(out.parent) != config:
        raise UserError(f"--out {out}: its folder is no checkpoint of this model; copy config.json and tokenizer there")
    if not out.exists():
        return
    try:
        metadata = read_header(out)[1]
    except UserError:
        metadata = {}
    if metadata.get("mode") not in MODES:  # the weights of a model, maybe these
        raise UserError(f"{out} is there already, and quantize.py did not write it; name another file as --out")
    if not overwrite:
        raise UserError(
            f"{out} is there already, quantized to {describe(metadata)}; name another file as --out, or replace it by"
            " --overwrite"
        )


def describe(metadata: Mapping[str, str]) -> str:
    """The settings that a file was quantized with: "int4-gptq --groupsize 32 --act_order"."""
    words = [metadata["mode"]]
    words += [f"--{name} {metadata[name]}" for name in ("groupsize", "calibration") if name in metadata]
    words += [f"--{name}" for name in ("act_order", "keep_output") if metadata.get(name) == "true"]
    return " ".join(words)


def quantize(
    path: Path | str,
    mode: str,
    groupsize: int | None = None,
    calibration: Path = CALIBRATION,
    act_order: bool = False,
    keep_output: bool = False,
    device: torch.device | str = "cpu",
    out: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Quantizes a checkpoint (a folder, or its weight file or index) and returns the file that it wrote.

    `groupsize` None: a scale a row of int8, and groups of 32 for int4. UserError when the checkpoint is quantized
    already, does not fit the mode or holds NaN, when the file is there already, or the calibration text is too short.
    """
    path, device = checkpoint.weights_path(path), torch.device(device)
    config = checkpoint.load_config(path.parent)
    stored, metadata = read_safetensors(path)
    if quantized_layers(path, metadata):
        raise UserError(f"{path} is quantized already ({metadata.get('mode')}); quantize the original weights")
    check_tensors(config, stored, path)
    groupsize = groupsize or (None if mode == "int8" else 32)
    out = out or path.parent / file_name(mode, groupsize, act_order, keep_output)
    check_out(out, path, config, overwrite)
    quantized = plan_layers(config, mode, groupsize, keep_output)
    shapes = quantized_shapes(config, quantized)
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    for layer, form in quantized.items():
        dtypes[f"{layer}.weight"] = form.weight_dtype
        dtypes[f"{layer}.scales"] = SCALE_DTYPE if form.groupsize else torch.float32
        dtypes[f"{layer}.zeros"] = torch.uint8
    tensors = {name: (dtypes[name], shape) for name, shape in shapes.items()}
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    check_disk(size, out)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": str(dtypes["tok_embeddings.weight"]).removeprefix("torch."),
        "mode": mode,
        "keep_output": str(keep_output).lower(),
        "quantized": json.dumps({layer: form.name for layer, form in quantized.items()}),
    }
    if groupsize:
        metadata["groupsize"] = str(groupsize)

    source = Source(stored, device)
    tokens = read_calibration(calibration, path.parent, config, device) if mode == "int4-gptq" else None
    progress = tqdm(total=len(quantized), unit="layer", desc=f"quantizing to {mode}", disable=None)
    if tokens is not None:
        metadata |= {"calibration": calibration.name, "calibration_tokens": str(tokens.numel())}
        metadata["act_order"] = str(act_order).lower()
        results = gptq_layers(source, quantized, config, tokens, act_order, progress)
    else:
        results = rounded_layers(source, quantized)
    parts: dict[str, Tensor] = {}

    def chunks(name: str) -> Iterable[Tensor]:
        layer, _, kind = name.rpartition(".")
        if layer not in quantized or kind == "bias":
            return source.chunks(name)
        if kind == "weight":  # comes first in the file, its scales and zeros behind it
            done, tensors = next(results)
            parts.update(zip((f"{done}.{part}" for part in quantized[done].parts), tensors, strict=True))
            progress.update()
        return [parts.pop(name)]

    with progress:
        write_safetensors(out, tensors, chunks, metadata)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # torchrun ends all ranks when the first one fails: that is rank 0, with its message
            errors.exit_with(2)
        raise UserError("quantize.py runs in one process; start it without torchrun")
    parser = ArgumentParser(description="Quantize a checkpoint to int8 or int4.")
    add = parser.add_argument
    add("--mode", choices=MODES, required=True)
    add_model(parser)
    groups = "inputs that share a scale; default: 32 for int4 and int4-gptq, all inputs of a row for int8"
    add("--groupsize", type=int, choices=GROUPSIZES, help=groups)
    text = "text for int4-gptq, like what the model is to read and write; default: that of the demo"
    add("--calibration", type=Path, metavar="FILE", help=text)
    order = "int4-gptq: round the inputs that matter most first; default: in their order"
    add("--act_order", action="store_true", help=order)
    add("--keep_output", action="store_true", help="leave the output projection as it is; default: quantize it too")
    place = "NAME.safetensors in the checkpoint's folder, or in another with its config.json and tokenizer; default: "
    add("--out", type=Path, metavar="FILE", help=place + "model_MODE[-gN][-act_order][-keep_output].safetensors there")
    add("--overwrite", action="store_true", help="replace a quantized file of that name; default: an error")
    device = "where to compute; default: auto, a GPU if there is one"
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=device)
    add_threads(parser)
    args = parser.parse_args()
    if args.mode != "int4-gptq" and (args.calibration or args.act_order):
        raise UserError("--calibration and --act_order go with --mode int4-gptq; leave them out")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda is not available here; take --device cpu")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    written = quantize(
        model_path(args),
        args.mode,
        args.groupsize,
        args.calibration or CALIBRATION,
        args.act_order,
        args.keep_output,
        device,
        args.out,
        args.overwrite,
    )
    print(
        f"wrote {written}: {gb(written.stat().st_size)}; "
        f'try: python generate.py --checkpoint_path {shlex.quote(str(written))} --prompt "Hello"',
        file=sys.stderr,
    )


if __name__ == "__main__":
    errors.run(main)
