"""Turns a Hugging Face checkpoint into one of ours: downloads it, checks it, renames and fuses its tensors.

    python convert_hf_checkpoint.py --repo meta-llama/Llama-3.2-1B            -> checkpoints/meta-llama/Llama-3.2-1B/
    python convert_hf_checkpoint.py --repo ORG/NAME-GGUF --file X-Q4_K_M.gguf -> checkpoints/ORG/NAME-GGUF/
    python convert_hf_checkpoint.py --checkpoint_dir path/to/folder           -> checkpoints/local/folder/
    ... --adapter PATH_OR_REPO[=WEIGHT] ...                                   -> checkpoints/local/NAME+ADAPTER/
    ... [--revision R] [--out DIR] [--dtype bfloat16|float16|float32] [--overwrite]
    python convert_hf_checkpoint.py --families                                -> the families of models that can be run

Reads model.safetensors, pytorch_model.bin (both also in shards), MiniMind's .pth and GGUF files, whose path
--checkpoint_dir may name. What others quantized keeps its values: what our int4, int8 and mxfp4 hold exactly stays
quantized, the rest is dequantized to --dtype, and the last line says which. A GGUF file is dequantized as a whole where
--dtype is given. Works tensor by tensor, in a temporary folder that takes the place of an older checkpoint at the end:
a kill leaves the old checkpoint, or none, never a mix. With adapters (LoRA, DoRA) all weights become floats: merged in
float32, see merge.py, and stored in the dtype of the base. Converted again, a model keeps what was quantized from it;
another model, one whose tensors differ from those that are there, is replaced with --overwrite only.
"""

import errors  # first, so that Ctrl-C is quiet while torch is imported

# isort: split
import contextlib
import copy
import fcntl
import functools
import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
from arguments import add_threads
from config import ModelConfig
from errors import ArgumentParser, UserError, log
from families import FAMILIES
from files import check_disk, gb, link_or_copy, read_json, replace_folder, write_atomically
from formats.hub import CONFIG_FILES, IMAGE_FILES, TOKENIZER_FILES, cached, download
from formats.names import Piece, plan_tensors, settle_tie
from formats.packed import Packed, slices
from formats.source import Source, open_source
from layout import FORMAT, VERSION, Form, quantized_shapes
from lora import find_adapter, read_adapter
from merge import adapted, merge, merged_name, weighted_path
from tokenizer import load_tokenizer
from weights import read_header, read_index, read_safetensors
from writer import write_safetensors

SHARD_BYTES = 5 * 10**9
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

COPIED = (*CONFIG_FILES, *TOKENIZER_FILES, *IMAGE_FILES)  # as they are

Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # what is written: name -> dtype and shape


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def choose_dtype(config: dict[str, Any], plan: Mapping[str, list[Piece]]) -> torch.dtype:
    """The dtype of all that is not quantized. A checkpoint of ours has one: where the source mixes, or holds what can
    only be dequantized, that of config.json."""
    tensors = [piece.tensor for pieces in plan.values() for piece in pieces if piece.form is None]
    stored = {None if isinstance(tensor, Packed) else tensor.dtype for tensor in tensors}
    if len(stored) > 1 or None in stored:
        named = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))
        embedding = plan["tok_embeddings.weight"][0].tensor
        stored = {named or (torch.bfloat16 if isinstance(embedding, Packed) else embedding.dtype)}
    return torch.float32 if stored == {torch.float64} else stored.pop()


def set_options(raw_config: dict[str, Any], **options: Any) -> None:
    """Sets them in a config.json, which may have those of the language part apart."""
    for fields in (raw_config, raw_config.get("text_config")):
        if isinstance(fields, dict):
            fields.update(options)


def check_tokenizer(source: Source, config: ModelConfig) -> None:
    """UserError when the tokenizer does not fit; warnings for what only some uses of the model need."""
    if not any((source.folder / name).is_file() for name in TOKENIZER_FILES):
        log(source.told(f"warning: {source.folder} has no tokenizer; put its files into the converted folder"))
    else:
        tokenizer = load_tokenizer(source.folder, config.vocab_size)
        try:
            tokenizer.check_chat_template()
        except UserError as error:
            log(f"warning: {source.told(error)}")
    try:
        ids = checkpoint.load_generation_config(source.folder)["eos_token_ids"]
    except UserError as error:
        log(f"warning: {source.told(error)}")
        return
    if beyond := [i for i in ids if i >= config.vocab_size]:
        log(
            f"warning: the end token {', '.join(map(str, beyond))} is beyond the vocabulary of {config.vocab_size};"
            " correct eos_token_id in generation_config.json or config.json"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Convert


def convert(
    path: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    file: str | None = None,
    adapters: Sequence[tuple[str, float]] = (),
    base: str | None = None,
) -> str:
    """Converts a folder, a .pth or a GGUF file (also the `file` in a folder) to the checkpoint folder `out` and returns
    a line of what was written. LoRA `adapters`, paths or repos with their weights, are merged in; `base`, what people
    call the source, is compared with what they were trained on.

    Weights that are in `out` already stay, with what was quantized from them. UserError before anything is written when
    the source is incomplete or unsupported, the disk too small, or `out` something else than a checkpoint of ours, or
    that of another model and not to `overwrite`.
    """
    folders = [(find_adapter(name), weight) for name, weight in adapters]
    with open_source(path, file) as source, contextlib.ExitStack() as stack:
        if out.resolve().exists() and out.resolve().samefile(source.folder):
            raise UserError(f"--out {out} is the source itself; name another folder")
        if folders:
            source = stack.enter_context(adapted(source, [folder for folder, _ in folders]))
        return write_checkpoint(source, out, dtype, shard_bytes, overwrite, folders, base)


def write_checkpoint(
    source: Source,
    out: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    overwrite: bool,
    adapters: Sequence[tuple[Path, float]],
    base: str | None,
) -> str:
    """See convert."""
    declared = ModelConfig.from_hf(source.config)
    config, tensors = settle_tie(declared, source.tensors, source.names)
    raw_config = copy.deepcopy(source.config)
    if config.tied != declared.tied:
        set_options(raw_config, tie_word_embeddings=config.tied)
    keep_quantized = not adapters and (source.method != "gguf" or dtype is None)
    plan = plan_tensors(config, tensors, source.names, keep_quantized)
    dtype = dtype or choose_dtype(raw_config, plan)
    if adapters:
        tied, vocab_size = config.tied, config.vocab_size
        config, plan = merge(config, plan, [(read_adapter(path, raw_config, base), by) for path, by in adapters])
        if config.tied != tied:
            set_options(raw_config, tie_word_embeddings=config.tied)
        if config.vocab_size != vocab_size:
            set_options(raw_config, vocab_size=config.vocab_size)
    check_tokenizer(source, config)

    stored, quantized = stored_tensors(config, plan, dtype)
    path = out.resolve()
    dtype_name = str(dtype).removeprefix("torch.")
    metadata = {"format": FORMAT, "version": VERSION, "dtype": dtype_name}
    if quantized:
        forms = {layer: form.name for layer, form in quantized.items()}
        metadata |= {"mode": source.method, "quantized": json.dumps(forms)}
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored.values())
    kept: list[str] = []

    def write(folder: Path) -> None:
        kept.extend(reusable_files(out, plan, stored, dtype_name, overwrite))
        for name in kept:
            link_or_copy(path / name, folder / name)
        for name in COPIED:
            if (source.folder / name).is_file():
                with write_atomically(folder / name) as file:
                    file.write((source.folder / name).read_bytes())
        given = source.folder / "config.json"
        if not given.exists() or read_json(given) != raw_config:
            with write_atomically(folder / "config.json") as file:
                file.write(json.dumps(raw_config, indent=2).encode())
        if not weight_files(folder):
            check_disk(size, path)
            write_weights(folder, plan, stored, metadata, shard_bytes)
        if replaced := [name for name in COPIED if kept and differ(path, folder, name)]:
            log(f"warning: {', '.join(replaced)} in {out} differed from the source, and is now as there")

    replace_folder(path, check_replaceable, write)
    counted = [pieces for name, pieces in plan.items() if not (config.tied and name == "output.weight")]
    parameters = sum(math.prod(piece.tensor.shape) for pieces in counted for piece in pieces)
    forms = ", ".join(dict.fromkeys(form.name for form in quantized.values()))
    kind = f"{forms} ({metadata['mode']}) and {dtype_name}" if quantized else dtype_name
    return (
        f"wrote {out}: {parameters / 1e6:,.1f} M parameters, {kind}, {gb(size)}"
        + (f" (unchanged, so kept: {', '.join(kept)})" if kept else "")
        + dequantized_layers(plan, dtype)
        + f'; try: python generate.py --checkpoint_path {shlex.quote(str(out))} --prompt "Hello"'
    )


def dequantized_layers(plan: Mapping[str, list[Piece]], dtype: torch.dtype) -> str:
    """Names what was quantized in the source and is not any more, of which kinds it was and how large it has become."""
    sizes: dict[str, int] = defaultdict(int)
    for ours, pieces in plan.items():
        packed = [piece.tensor for piece in pieces if piece.form is None and isinstance(piece.tensor, Packed)]
        if packed:
            layers = re.sub(r"layers\.\d+\.", "", ours).removesuffix(".weight")
            kinds = ", ".join(dict.fromkeys(tensor.kind for tensor in packed))
            sizes[f"{layers} ({kinds})"] += sum(math.prod(piece.tensor.shape) for piece in pieces) * dtype.itemsize
    return f"; as floats now: {', '.join(f'{name} {gb(size)}' for name, size in sizes.items())}" if sizes else ""


def stored_tensors(
    config: ModelConfig, plan: Mapping[str, list[Piece]], dtype: torch.dtype
) -> tuple[Stored, dict[str, Form]]:
    """What is written: name -> dtype and shape; and the layers of it that are quantized, and how."""
    layers = {
        name.removesuffix(".weight"): [piece.tensor for piece in pieces]
        for name, pieces in plan.items()
        if pieces[0].form is not None
    }
    quantized = {layer: plan[f"{layer}.weight"][0].form for layer in layers}
    ordered = [layer for layer, parts in layers.items() if parts[0].order is not None]
    stored = {}
    for name, shape in quantized_shapes(config, quantized, ordered).items():
        layer, _, kind = name.rpartition(".")
        stored[name] = dtype, shape
        if layer in quantized and kind != "bias":
            scales = functools.reduce(torch.promote_types, (part.scale_dtype for part in layers[layer]))
            zeros = functools.reduce(torch.promote_types, (part.zero_dtype for part in layers[layer]))
            dtypes = {"scales": scales, "zeros": zeros, "order": torch.int32}
            stored[name] = dtypes.get(kind, quantized[layer].weight_dtype), shape
    return stored, quantized


def write_weights(
    folder: Path, plan: Mapping[str, list[Piece]], stored: Stored, metadata: Mapping[str, str], limit: int
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
            for rows in read_planned(plan, name):
                rows = cast(rows, stored[name][0], name)
                yield rows
                progress.update(rows.nbytes)

        for file, names in zip(files, shards, strict=True):
            write_safetensors(folder / file, {n: stored[n] for n in names}, chunks, metadata)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        with write_atomically(folder / "model.safetensors.index.json") as file:
            file.write(json.dumps(index, indent=2).encode())


def read_planned(plan: Mapping[str, list[Piece]], name: str) -> Iterator[Tensor]:
    """The rows of one of our tensors, in runs, in the dtype of the source."""
    layer, _, kind = name.rpartition(".")
    for piece in plan[name] if name in plan else plan[f"{layer}.weight"]:
        yield from piece.read(kind)
        if kind == "order":  # one serves all
            break


def cast(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """UserError when float16 does not reach far enough."""
    result = rows.to(dtype)
    if dtype == torch.float16 and rows.dtype != dtype and bool((result.isinf() & ~rows.isinf()).any()):
        raise UserError(f"tensor {name!r} holds values beyond float16; take --dtype bfloat16")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The folder it is written to


def weight_files(folder: Path) -> list[str]:
    """The files of the unquantized weights in a checkpoint of ours, the index among them; [] where there are none."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    return [*(path.name for path in read_index(index)), index.name] if index.is_file() else []


def reusable_files(
    out: Path, plan: Mapping[str, list[Piece]], stored: Stored, dtype_name: str, overwrite: bool
) -> list[str]:
    """The weight files in `out` that stay: of the same model those that were quantized from it, and its own if they are
    stored in this dtype. UserError where they are another model's, and not to `overwrite`."""
    weights = weight_files(out)
    quantized = sorted(file.name for file in out.glob("*.safetensors") if file.name not in weights)
    if weights and holds(out, plan, stored):
        same_dtype = read_safetensors(checkpoint.weights_path(out))[1].get("dtype") == dtype_name
        return quantized + weights if same_dtype else quantized
    if not weights and not quantized:
        return []
    if overwrite:
        if quantized:
            log(f"warning: removing {', '.join(quantized)}, quantized from the model that is replaced")
        return []
    what = f"another model and {', '.join(quantized)}, quantized from it" if quantized else "another model"
    if not weights:
        what = f"{', '.join(quantized)}, quantized from weights that are not there any more"
    raise UserError(f"{out} holds {what}; name another folder as --out, or replace all of it with --overwrite")


def holds(folder: Path, plan: Mapping[str, list[Piece]], stored: Stored) -> bool:
    """Whether a checkpoint of ours holds what would be written, be it in another dtype. Ends where they differ."""
    try:
        there, _ = read_safetensors(checkpoint.weights_path(folder))
    except UserError:  # not all of it is there
        return False
    if {name: tensor.shape for name, tensor in there.items()} != {name: shape for name, (_, shape) in stored.items()}:
        return False
    size = sum(tensor.nbytes for tensor in there.values())
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, desc="comparing", leave=False) as progress:
        for name, tensor in there.items():
            wanted = (rows.to(tensor.dtype) for rows in read_planned(plan, name))
            if not same_bytes(slices(tensor), wanted):
                return False
            progress.update(tensor.nbytes)
    return True


def same_bytes(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """Whether two series of tensors hold the same bytes one after the other, in runs of whatever lengths."""
    streams = [(run.contiguous().flatten().view(torch.uint8) for run in runs if run.numel()) for runs in (a, b)]
    left = [next(stream, None) for stream in streams]
    while left[0] is not None and left[1] is not None:
        count = min(map(len, left))
        if not torch.equal(left[0][:count], left[1][:count]):
            return False
        left = [rest[count:] if len(rest) > count else next(s, None) for rest, s in zip(left, streams, strict=True)]
    return left == [None, None]


def differ(old: Path, new: Path, name: str) -> bool:
    """Whether a file of the old folder is another in the new one, or none."""
    if not (old / name).is_file():
        return False
    return not (new / name).is_file() or (old / name).read_bytes() != (new / name).read_bytes()


def check_replaceable(path: Path) -> None:
    """UserError unless `path` is free, an empty folder, or holds nothing but a checkpoint of ours."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; name another folder as --out")
    entries, has_weights = sorted(path.iterdir()), False
    for entry in entries:
        ours = entry.name in (*COPIED, "model.safetensors.index.json")
        ours = ours or re.fullmatch(r"\.\S+\.tmp", entry.name)  # of a killed run
        if entry.suffix == ".safetensors":
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


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def repo_folder(repo: str) -> Path:
    """Where a repo of the hub is converted to. UserError when it is no ORG/NAME."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UserError(f"{repo!r} is not of the form ORG/NAME; for a folder use --checkpoint_dir")
    return checkpoint.CHECKPOINTS / repo


def fetch_checkpoint(repo: str, revision: str | None = None) -> Path:
    """checkpoints/ORG/NAME of a repo of the hub, downloaded and converted first where it is not there yet.

    With a revision what is there is compared with it. UserError when it is another model, and whatever download and
    convert raise. Of several processes one does the work, and the others wait for it.
    """
    out = repo_folder(repo)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.fetching")
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if revision is not None or not (out / "config.json").is_file():
                log(convert(download(repo, revision), out))
        finally:
            lock.unlink(missing_ok=True)
    return out


def main() -> None:
    parser = ArgumentParser(description="Convert a Hugging Face checkpoint.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--repo", metavar="ORG/NAME", help="a model on the Hugging Face hub, downloaded first")
    source.add_argument(
        "--checkpoint_dir", type=Path, metavar="DIR",
        help="a folder, also one of the Hugging Face cache, a GGUF file, or a MiniMind .pth file",
    )  # fmt: skip
    source.add_argument("--families", action="store_true", help="list what can be run; default: convert")
    parser.add_argument(
        "--file", metavar="X.gguf",
        help="which of the GGUF files of --repo or --checkpoint_dir; default: the only one, where there are no others",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of --repo; default: main")
    parser.add_argument(
        "--adapter", type=weighted_path, action="append", default=[], metavar="PATH[=WEIGHT]", dest="adapters",
        help="merge a LoRA adapter in, a folder or ORG/NAME; may be given several times; default: none",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="default: checkpoints/ORG/NAME, checkpoints/local/DIR; with adapters checkpoints/local/NAME+ADAPTER",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="default: as it is stored; given, it dequantizes a GGUF file")
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace another model in --out, and what was quantized from it; default: an error",
    )  # fmt: skip
    add_threads(parser)
    args = parser.parse_args()
    if args.families:
        for name, family in FAMILIES.items():
            print(f"{name:18}{family.models}")
        return
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.repo is not None:
        name, default, folder = args.repo, repo_folder(args.repo), None
    else:
        if args.revision is not None:
            raise UserError("--revision goes with --repo only; leave it out")
        folder, repo = cached(args.checkpoint_dir)
        # A file in the cache is a link to one that is named by its hash.
        name = repo or (re.sub(r"-\d{5}-of-\d{5}$", "", folder.stem) if folder.is_file() else folder.resolve().name)
        default = repo_folder(repo) if repo else checkpoint.CHECKPOINTS / "local" / name
    if args.adapters:
        default = checkpoint.CHECKPOINTS / "local" / merged_name(name, args.adapters)
    out = args.out or default
    if folder is None:
        check_replaceable(out.resolve())  # before gigabytes are fetched
        folder = download(args.repo, args.revision, args.file)
    dtype = args.dtype and DTYPES[args.dtype]
    log(convert(folder, out, dtype, overwrite=args.overwrite, file=args.file, adapters=args.adapters, base=name))


if __name__ == "__main__":
    errors.run(main)
