"""Which tensors of a Hugging Face checkpoint, or of MiniMind's, each of ours is made of.

plan = plan_tensors(config, tensors, HF)                 # {"layers.0.attention.wqkv.weight": [Piece, Piece, Piece]}
for rows in piece.read("weight"): ...                    # runs of rows, in our order
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from config import ModelConfig
from errors import UserError, log
from formats.gptq_awq import Dequantized, Format, QuantizedLinear, is_quantized, quantized_linear
from formats.pickled import PickledTensor
from model import expected_shapes
from weights import CHUNK_BYTES, FLOATS, StoredTensor

Source = StoredTensor | PickledTensor


@dataclass(frozen=True)
class Names:
    """How a form of checkpoint names its tensors and orders their rows."""

    parts: dict[str, list[str]]  # ours -> those that it is made of, one below the other
    prefix: str = ""  # of the names of layers
    interleaved: bool = False  # the pairs of elements that RoPE rotates lie next to each other


HF = Names(  # Llama, Mistral, Qwen and MiniMind share them
    {
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
    },
    prefix="model.",
)
# Tables and masks that some checkpoints hold, though they follow from the config.
IGNORED = re.compile(r"(|.*\.)(rotary_emb\.inv_freq|(attention|self_attn)\.(masked_bias|mask)|pos_cis|freqs_(cos|sin))")


@dataclass(frozen=True)
class Piece:
    """Rows of one of our tensors: a whole tensor of the source, or a quantized layer."""

    tensor: Source | QuantizedLinear | Dequantized
    interleaved_heads: int = 0  # heads of q or k whose RoPE pairs lie next to each other

    def read(self, kind: str) -> Iterable[Tensor]:
        """The rows, in runs; of a quantized layer those of its tensor of that `kind` (weight, scales, zeros, order)."""
        if isinstance(self.tensor, QuantizedLinear):
            return [self.tensor.order] if kind == "order" else self.tensor.read(kind)
        if not self.interleaved_heads:
            return slices(self.tensor)
        # [heads * head_dim, dim]: elements (0, 1), (2, 3) ... of a head become (0, head_dim / 2), (1, head_dim / 2 + 1)
        rows = self.tensor.read()
        return [rows.view(self.interleaved_heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)]


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


def plan_tensors(
    config: ModelConfig, tensors: Mapping[str, Source], names: Names, form: Format | None = None
) -> dict[str, list[Piece]]:
    """The names of our unquantized model, each with the pieces of the source that it is made of.

    UserError names the first tensor that is missing, misshapen or of a wrong type, then the first that is unexpected.
    """
    plan: dict[str, list[Piece]] = {}
    used, unequal = set(), []
    head = names.parts["output"][0]
    shapes = expected_shapes(config)
    if config.tied and is_quantized(head, tensors):  # the embedding, quantized, which itself stays as it is
        shapes["output.weight"] = shapes["tok_embeddings.weight"]
    for ours, shape in shapes.items():
        layer, part, kind = re.fullmatch(r"(layers\.\d+\.|)(.+)\.(weight|bias)", ours).groups()
        parts = names.parts[part]
        prefix = names.prefix + layer if layer else ""
        rows, heads = [shape[0] // len(parts)] * len(parts), [0] * len(parts)
        if part == "attention.wqkv":
            rows = [count * config.head_dim for count in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
            heads = [config.n_heads, config.n_kv_heads, 0] if names.interleaved else heads
        plan[ours] = []
        for stem, count, interleaved in zip((prefix + name for name in parts), rows, heads, strict=True):
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
        log(
            f"warning: the parts of {', '.join(unequal)} are quantized differently, or to 8 bits that are not"
            " symmetric; they become floats"
        )
    for name, tensor in tensors.items():
        if name in used or IGNORED.fullmatch(name):
            continue
        # AutoGPTQ gave every layer a bias.
        if name.endswith(".bias") and f"{name.removesuffix('.bias')}.qweight" in used and not any_nonzero(tensor):
            continue
        if config.tied and name == f"{head}.weight":  # the same as the embedding, see settle_tie
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
    """Whether two tensors of one shape hold the same."""
    return a.dtype == b.dtype and all(torch.equal(x, y) for x, y in zip(slices(a), slices(b), strict=True))


def slices(tensor: Source | Dequantized) -> Iterator[Tensor]:
    """The tensor in runs of rows of at most CHUNK_BYTES."""
    rows = tensor.shape[0]
    step = max(CHUNK_BYTES * rows // (torch.Size(tensor.shape).numel() * tensor.dtype.itemsize), 1)
    for start in range(0, rows, step):
        yield tensor.read(start, min(start + step, rows))
