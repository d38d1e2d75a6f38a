"""Which tensors of a checkpoint each of ours is made of; families.py says how each family calls them.

plan = plan_tensors(config, tensors, names)              # {"layers.0.attention.wqkv.weight": [Piece, Piece, Piece]}
for rows in piece.read("weight"): ...                    # runs of rows, in our order
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from config import ModelConfig
from errors import UserError, log
from families import Names
from formats.packed import Packed, Stored, slices
from layout import Form, is_quantizable
from model import expected_shapes
from weights import FLOATS

Source = Stored | Packed

# Tables and masks that some checkpoints hold, though they follow from the config.
IGNORED = re.compile(
    r"(|.*\.)(rotary_emb\.inv_freq|(attn|attention|self_attn)\.(masked_bias|mask)|pos_cis|freqs_(cos|sin))"
    r"|(transformer\.)?h\.\d+\.attn\.bias|gpt_neox\.layers\.\d+\.attention\.bias"
    r"|rope_freqs\.weight|rope_factors_(long|short)\.weight"  # GGUF's; gguf_config.py has read them
)
# What sees pictures or hears, beside a language model.
OTHER_SENSES = re.compile(r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\..*")


VISION = {  # of Qwen2-VL's eyes and Qwen2.5-VL's, ours -> theirs
    "patch_embed": ["patch_embed.proj"], "attention_norm": ["norm1"], "ffn_norm": ["norm2"], "wqkv": ["attn.qkv"],
    "wo": ["attn.proj"], "w1": ["mlp.fc1"], "w2": ["mlp.fc2"], "w13": ["mlp.gate_proj", "mlp.up_proj"],
    "merger.norm": ["merger.ln_q"], "merger.w1": ["merger.mlp.0"], "merger.w2": ["merger.mlp.2"],
}  # fmt: skip


def text_names(tensors: Mapping[str, Source], names: Names, sees: bool = False) -> Mapping[str, Source]:
    """The tensors of the language part, by the names that a model without eyes and with a head has; where it `sees`
    those of its eyes too, as `visual.`."""
    nested = re.compile(r"(language_model\.model|model\.language_model)\.")
    if sees:
        renamed = {nested.sub("model.", name).replace("model.visual.", "visual.", 1): name for name in tensors}
        return {name: tensors[theirs] for name, theirs in renamed.items()}
    if any(nested.match(name) for name in tensors):
        text = {name: tensor for name, tensor in tensors.items() if not OTHER_SENSES.fullmatch(name)}
        if left_out := len(tensors) - len(text):
            log(f"{left_out} tensors that are not for text are left out")
        return {nested.sub("model.", name).removeprefix("language_model."): text[name] for name in text}
    embedding = f"{names.parts['tok_embeddings'][0]}.weight"
    prefix, _, bare = embedding.partition(".")
    if bare in tensors and embedding not in tensors:  # saved without its head, as the first GPT-2 was
        return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# What a tensor of the source has to go through: whole, of stacked experts one after the other, or in groups of rows


def heads_apart(config: ModelConfig, tensor: Tensor) -> Tensor:
    """GPT-NeoX: q, k and v of one head after the other, [heads * 3 * head_dim, ...] -> all q, all k, all v."""
    rows = tensor.unflatten(0, (config.n_heads, 3, config.head_dim))
    return rows.transpose(0, 1).flatten(0, 2)


def transposed(config: ModelConfig, tensor: Tensor) -> Tensor:
    """GPT-2, an expert of gpt-oss: [in, out] -> [out, in]."""
    return tensor.t() if tensor.ndim == 2 else tensor


def gate_and_up_by_turns(config: ModelConfig, tensor: Tensor) -> Tensor:
    """gpt-oss: an expert's [in, 2 ffn], or its bias [2 ffn], gate and up by turns -> [2 ffn, in], all of the gate
    first."""
    rows = transposed(config, tensor)
    return torch.cat((rows[0::2], rows[1::2]))


def pairs_apart(rotary_dim: int, head_dim: int, heads: int, tensor: Tensor) -> Tensor:
    """Of the rows [heads * head_dim, ...] of each head, elements (0, 1), (2, 3) ... become (0, rotary_dim / 2), ...;
    rows below them, which are those of v, stay as they are."""
    rows, rest = tensor[: heads * head_dim].unflatten(0, (-1, head_dim)), tensor[heads * head_dim :]
    turned = rows[:, :rotary_dim].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((torch.cat((turned, rows[:, rotary_dim:]), 1).flatten(0, 1), rest))


def less_one(config: ModelConfig, tensor: Tensor) -> Tensor:
    """GGUF's norms of Gemma: 1 was added. (In float32 exact, as the weights are, but for tiny ones.)"""
    return tensor.float() - 1


# What transformers 5 renames when it loads files, beside stacking the experts. It is how later adapters call these.
STACKED = {"w13": "gate_up_proj", "w2": "down_proj"}
IN_MEMORY = (
    (".block_sparse_moe.gate.", ".mlp.gate."), (".block_sparse_moe.experts.", ".mlp.experts."),
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
    (".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),
)  # fmt: skip

FUNCTIONS = (heads_apart, transposed, gate_and_up_by_turns, less_one)
TRANSFORMS = {function.__name__: function for function in FUNCTIONS}
SWAPPING = (transposed, gate_and_up_by_turns)  # whose weights have the inputs first


def swaps(transform: Callable[[Tensor], Tensor] | None) -> bool:
    return getattr(transform, "func", None) in SWAPPING


@dataclass(frozen=True)
class Piece:
    """Rows of one of our tensors: a tensor of the source, or the parts of a packed one."""

    tensor: Source
    transform: Callable[[Tensor], Tensor] | None = None
    stacked: bool = False  # experts, which are transformed one by one
    group: int = 0  # so many rows may be transformed without the others; 0: none
    form: Form | None = None  # in which it stays quantized

    def read(self, kind: str) -> Iterable[Tensor]:
        """The rows, in runs; where it stays quantized, of its part of that `kind` (weight, scales, zeros, order)."""
        if self.form is not None:
            return self.read_part(kind)
        if self.transform is None:
            return slices(self.tensor)
        if self.stacked:
            experts = (self.tensor.read(i, i + 1)[0] for i in range(self.tensor.shape[0]))
            return (self.transform(expert)[None].contiguous() for expert in experts)
        runs = slices(self.tensor, self.group or self.tensor.shape[0])
        return (self.transform(rows).contiguous() for rows in runs)

    def read_part(self, kind: str) -> Iterable[Tensor]:
        parts = self.tensor.read_part(kind)
        if self.transform is None or kind == "order":
            return parts
        if self.stacked:  # packed experts have the outputs first already, which the transform is to bring there
            return (self.transform(expert[0].t())[None].contiguous() for expert in parts)
        runs = regrouped(parts, self.group) if self.group else [torch.cat(list(parts))]
        return (self.transform(rows).contiguous() for rows in runs)  # an order of the rows, which is that of all parts


def settle_tie(
    config: ModelConfig, tensors: Mapping[str, Source], names: Names
) -> tuple[ModelConfig, Mapping[str, Source]]:
    """What `tie_word_embeddings` means for these weights, as in transformers 5: an output projection that differs from
    the embedding is kept, and where only one of the two is there it serves as both."""
    if not config.tied:
        return config, tensors
    head, embedding = (f"{names.parts[part][0]}.weight" for part in ("output", "tok_embeddings"))
    if head in tensors and embedding not in tensors:
        return config, {embedding if name == head else name: tensor for name, tensor in tensors.items()}
    if head not in tensors:
        return config, tensors
    if isinstance(tensors[head], Packed):  # of the same floats, but rounded: plan_tensors gives it a place of its own
        return config, tensors
    expected = (config.vocab_size, config.dim)
    if tensors[head].shape != expected or tensors[embedding].shape != expected:
        return dataclasses.replace(config, tied=False), tensors  # plan_tensors names the one that does not fit
    if not equal(tensors[head], tensors[embedding]):
        log(
            f"warning: config.json ties {head!r} to {embedding!r}, but the weights hold two that differ;"
            " both are kept, and the converted config.json says so"
        )
        return dataclasses.replace(config, tied=False), tensors
    return config, tensors


@dataclass(frozen=True)
class Wanted:
    """A tensor of the source that one of ours needs."""

    name: str
    shape: tuple[int, ...]  # in the source
    transform: Callable[[Tensor], Tensor] | None = None
    stacked: bool = False
    group: int = 0

    def in_our_order(self, rows: Tensor) -> Tensor:
        """What belongs to the outputs of its layer, or of one of the experts in it, [out, ...] -> in our order."""
        if self.transform is None:
            return rows
        return self.transform(rows.t() if rows.ndim == 2 and swaps(self.transform) else rows)


def wanted_for_vision(config: ModelConfig, ours: str, shape: tuple[int, ...]) -> Iterator[Wanted]:
    """The same of what sees images."""
    layer, part, kind = re.fullmatch(r"vision\.(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", ours).groups()
    stems = VISION[part]
    if part == "w2" and config.vision.gated:
        stems = ["mlp.down_proj"]
    prefix = f"visual.blocks.{layer}." if layer else "visual."
    if part == "patch_embed":  # a convolution whose steps are as wide as its kernel
        vision = config.vision
        kernel = (vision.dim, vision.channels, vision.frames, vision.patch, vision.patch)
        yield Wanted(f"{prefix}{stems[0]}.{kind}", kernel, lambda tensor: tensor.flatten(1))
        return
    for stem in stems:
        yield Wanted(f"{prefix}{stem}.{kind}", (shape[0] // len(stems), *shape[1:]))


def wanted_for(config: ModelConfig, ours: str, shape: tuple[int, ...], names: Names) -> Iterator[Wanted]:
    """What one of our tensors is made of, in order."""
    if ours.startswith("vision."):
        yield from wanted_for_vision(config, ours, shape)
        return
    layer, part, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+?)(?:\.(weight|bias))?", ours).groups()
    prefix = names.layer.format(layer) if layer else ""
    stems = names.parts[part]
    function = TRANSFORMS.get(names.transforms.get(part, ""))
    transform = function and functools.partial(function, config)
    stacked = ".experts." in part and "{}" not in stems[0]
    if function in SWAPPING and kind == "weight":
        shape = (*shape[:-2], shape[-1], shape[-2])
    rows = [shape[0] // len(stems)] * len(stems)
    if part == "attention.wqkv" and len(stems) == 3:
        rows = [count * config.head_dim for count in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    if "{}" in stems[0]:  # one for each expert or head
        each = [(stem.format(i), (shape[1] // len(stems), *shape[2:])) for i in range(shape[0]) for stem in stems]
    else:
        each = [(stem, (count, *shape[1:])) for stem, count in zip(stems, rows, strict=True)]
    turn = functools.partial(pairs_apart, config.rotary_dim, config.head_dim, config.n_heads + config.n_kv_heads)
    for i, (stem, own_shape) in enumerate(each):
        if stem.startswith("="):
            name = prefix + stem[1:] + ("_bias" if kind == "bias" else "")
        else:
            name = f"{prefix}{stem}.{kind}"
        turned = names.interleaved and (part == "attention.wqkv" and i < 2)
        if names.interleaved and part in ("attention.q_norm", "attention.k_norm") and len(shape) == 2:
            yield Wanted(name, own_shape, lambda tensor: turn(tensor.flatten()).view(tensor.shape))
        elif turned:
            yield Wanted(name, own_shape, turn, group=config.head_dim if len(stems) == 3 else 0)
        else:
            yield Wanted(name, own_shape, transform, stacked)


@dataclass(frozen=True)
class Place:
    """Where a tensor of the source belongs among ours."""

    ours: str
    start: int  # its first row there, or in an expert's part of it
    rows: int  # as many there, or of one expert
    inputs: int  # elements of a row
    wanted: Wanted
    expert: int | None = None  # whose it is
    experts: int = 0  # so many are stacked in it


def places(config: ModelConfig, names: Names) -> dict[str, Place]:
    """All tensors of the source of a model by their names, those in its files and those in transformers' memory."""
    found: dict[str, Place] = {}
    for ours, shape in expected_shapes(config).items():
        of_experts = ".experts." in ours
        row_shape = shape[2:] if of_experts else shape[1:]
        inputs, start = math.prod(row_shape), 0
        for wanted in wanted_for(config, ours, shape, names):
            rows = math.prod(wanted.shape) // inputs
            if wanted.stacked:
                found[wanted.name] = Place(ours, 0, shape[1], inputs, wanted, experts=shape[0])
            elif of_experts:
                found[wanted.name] = Place(ours, start % shape[1], rows, inputs, wanted, expert=start // shape[1])
            else:
                found[wanted.name] = Place(ours, start, rows, inputs, wanted)
            start += rows
        if of_experts and not found[wanted.name].experts:
            container, matrix = wanted.name.split(".experts.")[0], ours.split(".")[-2]
            stacked = f"{container}.experts.{STACKED[matrix]}"
            found[stacked] = Place(ours, 0, shape[1], inputs, Wanted(stacked, shape, stacked=True), experts=shape[0])
    for name, place in list(found.items()):
        for in_files, in_memory in IN_MEMORY:
            if in_files in name:
                found.setdefault(name.replace(in_files, in_memory), place)
    return found


def with_rows(wanted: Wanted, tensors: Mapping[str, Source]) -> Wanted:
    """A matrix of one row may be stored as a vector, as in GGUF."""
    found = tensors.get(wanted.name)
    if found is None or wanted.shape[:1] != (1,) or found.shape != wanted.shape[1:] or wanted.transform:
        return wanted
    return dataclasses.replace(wanted, shape=found.shape, transform=lambda tensor: tensor[None])


def check(wanted: Wanted, tensors: Mapping[str, Source]) -> None:
    """UserError when the tensor is missing, misshapen or no float."""
    name = wanted.name
    if name not in tensors:
        raise UserError(f"tensor {name!r} is missing from the weights; get all of them, or the config of these")
    found = tensors[name].shape
    if found != wanted.shape:
        raise UserError(
            f"tensor {name!r} has the shape {list(found)} where the config means {list(wanted.shape)};"
            " get the config of these weights"
        )
    if tensors[name].dtype not in (*FLOATS, torch.float64):
        raise UserError(f"tensor {name!r} is {tensors[name].dtype}, not a float; convert the unquantized model")


def plan_tensors(
    config: ModelConfig, tensors: Mapping[str, Source], names: Names, keep_quantized: bool = True
) -> dict[str, list[Piece]]:
    """The names of our unquantized model, each with the pieces of the source that it is made of.

    What is quantized stays so where `keep_quantized` says it and our forms hold it. UserError names the first tensor
    that is missing, misshapen or of a wrong type, then the first that is unexpected.
    """
    plan: dict[str, list[Piece]] = {}
    used = set()
    shapes = expected_shapes(config)
    head, embedding = (f"{names.parts[part][0]}.weight" for part in ("output", "tok_embeddings"))
    if config.tied and keep_quantized:  # an embedding is kept as floats; as the output it may stay quantized
        source = tensors.get(head, tensors.get(embedding))
        if isinstance(source, Packed) and source.form is not None:
            shapes["output.weight"] = shapes["tok_embeddings.weight"]
            tensors = {head: source, **tensors}
    for ours, shape in shapes.items():
        wanted = [with_rows(part, tensors) for part in wanted_for(config, ours, shape, names)]
        for part in wanted:
            check(part, tensors)
        used |= {part.name for part in wanted}
        quantizable = keep_quantized and is_quantizable(ours.removesuffix(".weight"), shape)
        form = common_form([tensors[part.name] for part in wanted], len(shape) == 3) if quantizable else None
        plan[ours] = [Piece(tensors[part.name], part.transform, part.stacked, part.group, form) for part in wanted]
    for name, tensor in tensors.items():
        if name in used or IGNORED.fullmatch(name):
            continue
        # AutoGPTQ gave every layer a bias.
        of_packed = isinstance(tensors.get(f"{name.removesuffix('.bias')}.weight"), Packed)
        if name.endswith(".bias") and of_packed and not any_nonzero(tensor):
            continue
        if config.tied and name == head:  # the same as the embedding, see settle_tie
            continue
        raise UserError(f"tensor {name!r} is unexpected, the config says nothing of it; get that of these weights")
    return plan


def common_form(parts: list[Source], experts: bool) -> Form | None:
    """The form in which these can be one layer: that of all of them, and one order of the inputs serves all; of experts
    none has an order. None: not without turning them into floats."""
    if not all(isinstance(part, Packed) for part in parts):
        return None
    form = parts[0].form
    if form is None or any(part.form != form for part in parts):
        return None
    if experts:
        return form if all(part.order is None for part in parts) else None
    orders = [torch.arange(part.shape[1]) if part.order is None else part.order for part in parts]
    return form if all(torch.equal(order, orders[0]) for order in orders) else None


def any_nonzero(tensor: Source) -> bool:
    return any(bool(rows.any()) for rows in slices(tensor))


def equal(a: Source, b: Source) -> bool:
    """Whether two tensors of one shape hold the same."""
    return a.dtype == b.dtype and all(torch.equal(x, y) for x, y in zip(slices(a), slices(b), strict=True))


def regrouped(runs: Iterable[Tensor], group: int) -> Iterator[Tensor]:
    """The same rows in runs of whole groups."""
    rest: list[Tensor] = []
    for run in runs:
        rows = torch.cat((*rest, run))
        whole = len(rows) // group * group
        if whole:
            yield rows[:whole]
        rest = [rows[whole:]]
