"""Which slices ranks hold: they add up to the whole, are equally wide, and not much more than their share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config import ModelConfig
from model import expected_shapes
from slices import Slices
from tp import Group


@st.composite
def shapes(draw):
    """A shape, and a number of ranks that can share its heads."""
    ranks = draw(st.integers(1, 6))
    kv_heads = draw(st.sampled_from([n for n in range(1, 13) if n % ranks == 0 or ranks % n == 0]))
    per = draw(st.integers(1, 3))
    while kv_heads * per % ranks:
        per += 1
    config = ModelConfig(
        dim=draw(st.sampled_from([8, 32])),
        n_layers=1,
        n_heads=kv_heads * per,
        n_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        ffn_dim=draw(st.integers(1, 150)),
        vocab_size=draw(st.integers(1, 150)),
        context_length=8,
        qkv_bias=True,
        wo_bias=True,
        mlp_bias=True,
        qk_norm="head",
    )
    return config, ranks


def numbered(*shape):
    """No element is zero, as padding is."""
    return torch.arange(1, 1 + math.prod(shape)).view(shape)


def unpadded(parts, size, dim=0):
    """The parts in a row, after a check that what is left at their end is zero."""
    together = torch.cat(parts, dim)
    assert not together.narrow(dim, size, together.shape[dim] - size).any()
    return together.narrow(dim, 0, size)


@given(shapes())
def test_slices_are_the_whole(shape):
    """Every tensor can be put together from the slices, and these have the shapes of `config`."""
    config, ranks = shape
    Group(0, ranks).check(config, {})
    members = [Slices(rank, ranks, config, {}) for rank in range(ranks)]
    for name, shape in expected_shapes(config).items():
        whole = numbered(*shape)
        parts = [member.slice(name, whole) for member in members]
        local = expected_shapes(members[0].config)[name]
        assert all(part.shape == local for part in parts)
        assert all(member.numel(name, shape) == math.prod(local) for member in members)
        if ".wqkv" in name:
            check_heads(config, members[0].config, whole, parts)
        elif ".w13" in name:
            gate, up = zip(*(part.chunk(2) for part in parts), strict=True)
            assert torch.equal(torch.cat((unpadded(gate, config.ffn_dim), unpadded(up, config.ffn_dim))), whole)
        elif ".wo." in name or ".w2." in name:
            together = sum(parts) if name.endswith("bias") else unpadded(parts, shape[1], 1)
            assert torch.equal(together, whole)
        elif name.startswith(("tok_embeddings", "output")):
            assert torch.equal(unpadded(parts, config.vocab_size), whole)
        else:
            assert all(torch.equal(part, whole) for part in parts)


def check_heads(config, local, whole, parts):
    """A rank has its share of the queries in order, and each has the keys and values that it has in the whole."""

    def heads(config, tensor):
        tensor = tensor.unflatten(0, (-1, config.head_dim))
        return tensor.split([config.n_heads, config.n_kv_heads, config.n_kv_heads])

    q, k, v = heads(config, whole)
    found = [heads(local, part) for part in parts]
    assert torch.equal(torch.cat([own for own, _, _ in found]), q)
    for rank, (own_q, own_k, own_v) in enumerate(found):
        for head in range(len(own_q)):
            own = head // (local.n_heads // local.n_kv_heads)
            of = (rank * local.n_heads + head) // (config.n_heads // config.n_kv_heads)
            assert torch.equal(own_k[own], k[of]) and torch.equal(own_v[own], v[of])


@given(
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([32, 64]),
    st.sampled_from([6, 9, 12]),
    st.sampled_from(["feed_forward.w2", "attention.wo"]),
    st.booleans(),
)
def test_slices_of_quantized_layers(ranks, groupsize, groups, layer, ordered):
    """The weights that the slices stand for add up to the weight, whose groups are cut nowhere."""
    layer, inputs = f"layers.0.{layer}", groups * groupsize
    config = ModelConfig(32, 1, 12, 12, inputs // 12, inputs, 8, 8)  # a rank's heads may end inside of a group
    sizes = {layer: groupsize}
    Group(0, ranks).check(config, sizes)
    members = [Slices(rank, ranks, config, sizes) for rank in range(ranks)]
    generator = torch.Generator().manual_seed(inputs)
    packed = torch.randint(0, 256, (4, inputs // 2), generator=generator, dtype=torch.uint8)
    scales, zeros = torch.rand(2, 4, inputs // groupsize, generator=generator)
    order = torch.randperm(inputs, generator=generator)

    def weight(packed, scales, zeros):
        levels = torch.stack((packed & 15, packed >> 4), -1).flatten(1).double()
        return (levels - zeros.repeat_interleave(groupsize, 1)) * scales.repeat_interleave(groupsize, 1)

    whole = weight(packed, scales, zeros)
    expected = torch.zeros_like(whole).index_add_(1, order if ordered else torch.arange(inputs), whole)
    total, widths = torch.zeros_like(whole), set()
    for member in members:
        named = zip(("weight", "scales", "zeros"), (packed, scales, zeros), strict=True)
        own = weight(*(member.slice(f"{layer}.{kind}", tensor) for kind, tensor in named))
        first = member.rank * own.shape[1]
        at = (first + torch.arange(own.shape[1])).clamp(max=inputs - 1)  # padding has no weight, wherever it is added
        total.index_add_(1, member.slice(f"{layer}.order", order) if ordered else at, own)
        widths.add(own.shape[1])
        assert member.slice(f"{layer}.scales", scales[:, 0]).shape == (4,)  # of int8 in whole rows
        assert torch.equal(member.slice("layers.0.attention.wqkv.order", order), order)  # its inputs are all there
    assert torch.equal(total, expected)
    assert widths == {-(-inputs // groupsize // ranks) * groupsize}


def test_padding_keeps_the_zeros_of_groups():
    """So the padded rank has the same kind of packed weight as the others."""
    config = ModelConfig(32, 1, 2, 2, 16, ffn_dim=96, vocab_size=33, context_length=8)
    slices = Slices(1, 2, config, {"layers.0.feed_forward.w2": 32})
    for name, shape in (("layers.0.feed_forward.w2.zeros", (32, 3)), ("output.zeros", (33, 1))):
        assert slices.slice(name, torch.full(shape, 8.0)).eq(8).all()


LLAMA_7B = ModelConfig(4096, 2, 32, 32, 128, ffn_dim=11008, vocab_size=32001, context_length=4096)
LLAMA_1B = ModelConfig(2048, 2, 32, 4, 64, ffn_dim=5504, vocab_size=32001, context_length=2048)
QWEN_05B = ModelConfig(896, 2, 14, 2, 64, ffn_dim=4864, vocab_size=151646, context_length=4096, tied=True)


@pytest.mark.parametrize("groupsize", [None, 0, 128])
@pytest.mark.parametrize(("config", "ranks"), [(LLAMA_7B, 2), (LLAMA_7B, 8), (LLAMA_1B, 4), (QWEN_05B, 2)])
def test_a_rank_holds_its_share(config, ranks, groupsize):
    """The elements of all matrices, unquantized, in int8 and in int4 of 128, and between them nothing is left out."""
    matrices = {name: shape for name, shape in expected_shapes(config).items() if len(shape) == 2}
    layers = [name.removesuffix(".weight") for name in matrices if name != "tok_embeddings.weight"]
    sizes = {} if groupsize is None else dict.fromkeys(layers, groupsize)
    for layer, groupsize in sizes.items():
        rows, inputs = matrices[f"{layer}.weight"]
        if groupsize:
            matrices[f"{layer}.weight"] = rows, inputs // 2
            matrices |= {f"{layer}.{kind}": (rows, inputs // groupsize) for kind in ("scales", "zeros")}
    Group(0, ranks).check(config, sizes)
    members = [Slices(rank, ranks, config, sizes) for rank in range(ranks)]
    whole = sum(map(math.prod, matrices.values()))
    for member in members:
        own = sum(member.numel(name, shape) for name, shape in matrices.items())
        assert whole <= own * ranks < 1.03 * whole
    for name, shape in matrices.items():
        ends = [end for member in members for _, end, _ in member.runs(name, shape)[1]]
        assert max(ends) == shape[member.runs(name, shape)[0]], name


def test_layers_of_several_group_sizes():
    """Feed-forwards are cut alike, in the largest of the groups."""
    config = ModelConfig(8, 3, 2, 2, 4, ffn_dim=640, vocab_size=8, context_length=8)
    sizes = {"layers.0.feed_forward.w2": 32, "layers.1.feed_forward.w2": 128, "layers.0.feed_forward.w13": 64}
    members = [Slices(rank, 2, config, sizes) for rank in (0, 1)]
    assert members[0].config.ffn_dim == 384
    for layer, groupsize in ((0, 32), (1, 128), (2, 1)):
        name, scales = f"layers.{layer}.feed_forward.w2.scales", numbered(3, 640 // groupsize)
        parts = [member.slice(name, scales) for member in members]
        assert torch.equal(unpadded(parts, 640 // groupsize, 1), scales) and parts[0].shape[1] == 384 // groupsize


def test_views():
    """What needs no padding is not copied, nor the whole of what does."""
    config = ModelConfig(8, 1, 2, 2, 4, ffn_dim=100, vocab_size=101, context_length=8)
    tensor = torch.zeros(101, 8)
    first, last = (Slices(rank, 2, config, {}).slice("output.weight", tensor) for rank in (0, 1))
    assert first.data_ptr() == tensor.data_ptr() and first.shape == last.shape == (64, 8)
    assert last.untyped_storage().nbytes() == last.nbytes
