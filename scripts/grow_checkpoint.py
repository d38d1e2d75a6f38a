"""Grows a checkpoint to about a billion parameters without changing what it says, to time a real text at a real size.

    python scripts/grow_checkpoint.py --checkpoint_path demo/target --out build/grown [--parameters 1e9]

The result is an ordinary checkpoint: every script takes it, it costs what a trained model of its shape costs, and its
logits are those of the small one but for rounding: another order of additions, while no weight changes. How:

Width: the hidden vector is repeated C times, a power of two. The rows of what makes it (embedding, wo, w2) repeat; the
       columns of what reads it (wqkv, w13, output) repeat divided by C, which is exact. Its root mean square stays, and
       with it every norm. A tied output can't be divided: the weight of the last norm is instead.
Heads, ffn units, layers: new ones have random weights, but zeros where they would add to the hidden vector (wo, w2).
"""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repo's own modules, from any folder

import errors  # first, since torch warns where there is no NumPy

# isort: split
import torch
from torch import Tensor

import checkpoint
from config import ModelConfig
from convert_hf_checkpoint import replace_folder
from errors import ArgumentParser, UserError
from files import check_disk, gb, read_json
from formats.hub import TOKENIZER_FILES
from layout import FORMAT, VERSION, check_tensors, quantized_layers
from model import expected_shapes
from weights import StoredTensor, check_finite, read_safetensors
from writer import write_safetensors

ASPECT = 128  # hidden size by layers, as Llama 3 has it from 1 B to 70 B parameters
FFN = 4  # ffn units by hidden size
GROUP = 4  # queries that share a key


def count(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


def grown_config(config: ModelConfig, parameters: float) -> ModelConfig:
    """The shape of about so many parameters whose proportions are nearest to Llama's. UserError if there is none."""
    group = config.n_heads // config.n_kv_heads
    shapes = []
    for copies in (2**n for n in range(16)):
        dim, heads = config.dim * copies, config.n_heads * copies
        # Queries of one key stay together, so a group may only grow by whole multiples.
        new_group = GROUP if GROUP % group == 0 and group * copies >= GROUP else group
        wide = dataclasses.replace(
            config, dim=dim, n_heads=heads, n_kv_heads=heads // new_group, ffn_dim=max(FFN * dim, config.ffn_dim)
        )
        one, two = (count(dataclasses.replace(wide, n_layers=n, window_layers=())) for n in (1, 2))
        layers = round((parameters - one) / (two - one)) + 1
        if layers >= config.n_layers:
            shapes.append(dataclasses.replace(wide, n_layers=layers, window_layers=()))
    if not shapes:
        raise UserError(
            f"the model has {count(config):,} parameters, and a little above them there is no other shape;"
            f" --parameters {parameters:,.0f} is too few, take more"
        )
    return min(shapes, key=lambda shape: abs(math.log(shape.dim / shape.n_layers / ASPECT)))


def grown_fields(raw: dict, config: ModelConfig, new: ModelConfig) -> dict:
    """The fields of config.json with the new shape."""
    fields = raw | {
        "hidden_size": new.dim,
        "intermediate_size": new.ffn_dim,
        "num_hidden_layers": new.n_layers,
        "num_attention_heads": new.n_heads,
        "num_key_value_heads": new.n_kv_heads,
        "head_dim": new.head_dim,
    }
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"] + fields["layer_types"][-1:] * (new.n_layers - config.n_layers)
    return fields


class Growth:
    """What each tensor of the grown checkpoint holds."""

    def __init__(self, stored: Mapping[str, StoredTensor], config: ModelConfig, new: ModelConfig):
        self.stored, self.config, self.new = stored, config, new
        self.copies = new.dim // config.dim
        self.shapes = expected_shapes(new)
        self.generator = torch.Generator().manual_seed(0)
        # Old query heads, the first of their group each; old key heads are the first.
        old_group, group = config.n_heads // config.n_kv_heads, new.n_heads // new.n_kv_heads
        head = torch.arange(config.n_heads)
        self.heads = head // old_group * group + head % old_group

    def read(self, name: str) -> Tensor:
        """The tensor of the model to grow. UserError when it is not finite: zeros would not silence it."""
        return check_finite(self.stored[name].read(), name, self.stored[name].path)

    def units(self, part: str) -> tuple[int, Tensor]:
        """How many outputs of wqkv or w13 (inputs of wo or w2) there are, and where those of the old model are."""
        config, new = self.config, self.new
        if part in ("w13", "w2"):
            old = torch.arange(config.ffn_dim)
            return (2 * new.ffn_dim, torch.cat((old, new.ffn_dim + old))) if part == "w13" else (new.ffn_dim, old)
        heads = self.heads
        if part == "wqkv":
            keys = new.n_heads + torch.arange(config.n_kv_heads)
            heads = torch.cat((heads, keys, keys + new.n_kv_heads))
        count = new.n_heads + 2 * new.n_kv_heads if part == "wqkv" else new.n_heads
        elements = heads[:, None] * new.head_dim + torch.arange(new.head_dim)
        return count * new.head_dim, elements.flatten()

    def tensor(self, name: str) -> Tensor:
        """A tensor of the grown checkpoint, but the embedding."""
        shape, dtype, C = self.shapes[name], self.stored["tok_embeddings.weight"].dtype, self.copies
        part, kind = name.split(".")[-2:]
        old = self.read(name) if name in self.stored else None
        if part == "norm":
            return (old / C if self.config.tied else old).repeat(C)
        if part == "output":
            return (old / C).repeat(1, C)
        if part in ("attention_norm", "ffn_norm"):
            return torch.ones(shape, dtype=dtype) if old is None else old.repeat(C)
        if part in ("q_norm", "k_norm"):
            return torch.ones(shape, dtype=dtype) if old is None else old
        if part in ("wo", "w2"):
            new = torch.zeros(shape, dtype=dtype)
            if old is not None and kind == "bias":
                new = old.repeat(C)
            elif old is not None:
                new[:, self.units(part)[1]] = old.repeat(C, 1)
            return new
        # wqkv and w13: of a new output the weights are random, and its bias is zero.
        new = torch.zeros(shape, dtype=dtype)
        if kind == "weight":
            new.normal_(0.0, self.new.dim**-0.5, generator=self.generator)
        if old is not None:
            new[self.units(part)[1]] = old if kind == "bias" else (old / C).repeat(1, C)
        return new

    def chunks(self, name: str) -> Iterator[Tensor]:
        if name != "tok_embeddings.weight":
            yield self.tensor(name)
        else:
            for rows in self.read(name).split(4096):
                yield rows.repeat(1, self.copies)


def grow(path: Path | str, out: Path, parameters: float = 1e9) -> str:
    """Grows a checkpoint (a folder, or its weight file or index) into the new folder `out`; says what was written."""
    path = checkpoint.weights_path(path)
    if out.exists():
        raise UserError(f"--out {out} exists already; name a new folder")
    config = checkpoint.load_config(path.parent)
    stored, metadata = read_safetensors(path)
    if quantized_layers(path, metadata):
        raise UserError(f"{path} is quantized ({metadata.get('mode')}); grow the original weights, then quantize them")
    check_tensors(config, stored, path)
    if not count(config) <= parameters <= 1e12:  # NaN is refused here as well
        raise UserError(f"--parameters {parameters:,.0f} is out of range; the model has {count(config):,} already")
    new = grown_config(config, parameters)
    fields = grown_fields(read_json(path.parent / "config.json"), config, new)
    dtype = stored["tok_embeddings.weight"].dtype
    growth = Growth(stored, config, new)
    size = count(new) * dtype.itemsize
    check_disk(size, out.resolve())

    def write(folder: Path) -> None:
        tensors = {name: (dtype, shape) for name, shape in growth.shapes.items()}
        metadata = {"format": FORMAT, "version": VERSION, "dtype": str(dtype).split(".")[-1]}
        write_safetensors(folder / "model.safetensors", tensors, growth.chunks, metadata)
        for name in ("generation_config.json", *TOKENIZER_FILES):
            if (path.parent / name).is_file():
                (folder / name).write_bytes((path.parent / name).read_bytes())
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    replace_folder(out.resolve(), write)
    return (
        f"wrote {out}: {count(new) / 1e6:,.1f} M parameters ({new.n_layers} layers, hidden size {new.dim}, ffn"
        f" {new.ffn_dim}, {new.n_heads} heads and {new.n_kv_heads} key/value heads of {new.head_dim}), {gb(size)}; try:"
        f" python generate.py --checkpoint_path {shlex.quote(str(out))}"
    )


def main() -> None:
    parser = ArgumentParser(description="Grow a checkpoint without changing what it says.")
    parser.add_argument(
        "--checkpoint_path", type=Path, default=checkpoint.DEMO, help="a converted folder; default: the demo"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--parameters", type=float, default=1e9, help="about how many to grow to; default: 1e9")
    args = parser.parse_args()
    print(grow(args.checkpoint_path, args.out, args.parameters), file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
