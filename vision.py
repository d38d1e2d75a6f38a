"""What sees images: a vision transformer over patches, whose output takes the places of tokens in a prompt.

    vision = VisionTransformer(config.vision)                # part of a model.Transformer: its `vision`
    x = vision(patches, [(1, 74, 74), (1, 20, 36)])          # of two images, images.py -> [tokens, dim]
    positions = rope_positions(images, length)               # of a prompt that holds images: [3, length]

Qwen2-VL, https://arxiv.org/abs/2409.12191, and Qwen2.5-VL, https://arxiv.org/abs/2502.13923. Patches of all images lie
one after the other, merge x merge of them, which become one token, together. Each sees those of its own image; in
Qwen2.5-VL's layers with windows those of its own window. What sees each other lies side by side, so attention is of
whole segments, and segments of one size are a batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels  # noqa: F401  defines torch.ops.brisk
from attention import apply_rope
from config import VisionConfig

if TYPE_CHECKING:
    from engine import Request
    from images import ImageInput
    from model import Transformer

EPS = 1e-6  # of all norms here
BLOCK = 1024  # patches that a CPU takes through all but the attention of a layer at a time
Grid = tuple[int, int, int]  # patches of an image: in time, down, across
Runs = list[tuple[int, int]]  # (number, length) of segments that follow one another


class Projection(nn.Module):
    """y = x W^T + b with W [out, in]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class VisionNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(config.dim), requires_grad=False) if config.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS)
        return F.rms_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype) * self.weight


class VisionBlock(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.n_heads, self.gated, self.activation = config.n_heads, config.gated, config.activation
        self.attention_norm, self.ffn_norm = VisionNorm(config), VisionNorm(config)
        self.wqkv = Projection(config.dim, 3 * config.dim)
        self.wo = Projection(config.dim, config.dim)
        if config.gated:
            self.w13 = Projection(config.dim, 2 * config.ffn_dim)
        else:
            self.w1 = Projection(config.dim, config.ffn_dim)
        self.w2 = Projection(config.ffn_dim, config.dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runs: Runs) -> None:
        """Changes x [patches, dim]; cos and sin [1, patches, 1, head_dim / 2], segments that attend to themselves."""
        head_dim = x.shape[1] // self.n_heads
        q = x.new_empty(len(x), self.n_heads, head_dim)
        kv = x.new_empty(2, self.n_heads, len(x), head_dim)  # keys that go by together lie together
        for rows in blocks(x):
            heads = self.wqkv(self.attention_norm(x[rows])).view(1, -1, 3 * self.n_heads, head_dim)
            qk, v = heads.split([2 * self.n_heads, self.n_heads], dim=2)
            q[rows], k = apply_rope(qk, cos[:, rows], sin[:, rows])[0].split(self.n_heads, dim=1)
            kv[0, :, rows], kv[1, :, rows] = k.transpose(0, 1), v[0].transpose(0, 1)
        y = attend_segments(q, *kv, runs)
        for rows in blocks(x):
            h = x[rows].add_(self.wo(y[rows].flatten(1)))
            h += self.feed_forward(self.ffn_norm(h))

    def feed_forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.w2(activate(self.activation, self.w1(x)))
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(activate(self.activation, gate) * up)


def blocks(x: Tensor) -> Iterator[slice]:
    """The rows of x, on a CPU in pieces: what a layer makes of one stays in the cache, if not in the first."""
    size = BLOCK if x.device.type == "cpu" else max(len(x), 1)
    return (slice(start, start + size) for start in range(0, len(x), size))


class Merger(nn.Module):
    """Patches that belong together -> a token of the language model."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.width = config.dim * config.merge**2
        self.norm = VisionNorm(config)
        self.w1 = Projection(self.width, self.width)
        self.w2 = Projection(self.width, config.out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(self.norm(x).view(-1, self.width))))


class VisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = Projection(config.channels * config.frames * config.patch**2, config.dim, bias=False)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.n_layers))
        self.merger = Merger(config)

    @torch.no_grad()
    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Normalized patches [n, channels * frames * patch * patch] of images of these grids -> [n / merge^2, out_dim].

        ValueError where the grids do not make up the patches.
        """
        config, weight = self.config, self.patch_embed.weight
        if sum(t * h * w for t, h, w in grids) != len(patches):
            raise ValueError(f"{len(patches)} patches for grids {list(grids)}")
        x = self.patch_embed(patches.to(weight.device, weight.dtype))
        places = torch.cat([patch_places(grid, config.merge) for grid in grids])
        whole = runs_of(h * w for t, h, w in grids for _ in range(t))
        windows, order = whole, None
        if config.window:
            windows, order = window_order(grids, config)
            places = in_order(places, order, config.merge)
            order = order.to(x.device)
            x = in_order(x, order, config.merge)
        cos, sin = rope_2d(config, places.to(x.device))
        for i, layer in enumerate(self.layers):
            layer(x, cos, sin, whole if not config.window or i in config.full_layers else windows)
        y = self.merger(x)
        return y if order is None else torch.empty_like(y).index_copy_(0, order, y)


def activate(kind: str, x: Tensor) -> Tensor:
    """x is not needed any more."""
    if kind == "quick_gelu":  # x * sigmoid(1.702 x)
        return F.silu(x.mul_(1.702), inplace=True).mul_(1 / 1.702)
    if kind.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind == "relu2":
        return F.relu(x).square()
    return F.silu(x, inplace=True) if kind == "silu" else F.relu(x)


# ---------------------------------------------------------------------------------------------------------------------
# Where patches are, and which see each other


def patch_places(grid: Grid, merge: int) -> Tensor:
    """Row and column of each patch of an image, int64 [n, 2], in their order."""
    t, h, w = grid
    down, across = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack((down, across), -1).view(h // merge, merge, w // merge, merge, 2)
    return places.transpose(1, 2).reshape(-1, 2).repeat(t, 1)


def rope_2d(config: VisionConfig, places: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [1, n, 1, head_dim / 2]: the first half of the pairs turns by the row, the other one by the
    column."""
    half = config.dim // config.n_heads // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float32, device=places.device) / half
    angles = (places[:, :, None].float() * config.theta**-exponent).flatten(1)[None, :, None]
    return angles.cos(), angles.sin()


def runs_of(lengths: Iterable[int]) -> Runs:
    """[16, 16, 8] -> [(2, 16), (1, 8)]."""
    return [(len(list(equal)), length) for length, equal in groupby(lengths)]


def window_order(grids: Sequence[Grid], config: VisionConfig) -> tuple[Runs, Tensor]:
    """The windows of images, and an order of their tokens, int64 [tokens], in which those of a window lie side by side.

    An image's windows are cut from its upper left corner on; the full ones come first, so that they are one run.
    """
    merge, side, before = config.merge, config.window // config.merge, 0
    lengths: list[int] = []
    orders = []
    for t, h, w in grids:
        h, w = h // merge, w // merge
        row, column = torch.arange(h) // side, torch.arange(w) // side
        frames = torch.arange(t)[:, None, None] * len(row.unique())
        window = ((frames + row[:, None]) * len(column.unique()) + column).flatten()  # of each token
        sizes = window.bincount()
        by_size = sizes.argsort(descending=True, stable=True)
        orders.append(before + by_size.argsort()[window].argsort(stable=True))
        lengths += (sizes[by_size] * merge**2).tolist()
        before += t * h * w
    return runs_of(lengths), torch.cat(orders)


def in_order(x: Tensor, order: Tensor, merge: int) -> Tensor:
    """Patches [n, ...] in an order [n / merge^2] of their tokens."""
    return x.unflatten(0, (-1, merge**2))[order].flatten(0, 1)


def attend_segments(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
    """Attention of each segment to itself: q [n, heads, head_dim], k and v [heads, n, head_dim] -> like q."""
    outputs, start = [], 0
    for number, length in runs:
        rows = slice(start, start + number * length)
        queries = q[rows].unflatten(0, (number, length))
        keys, values = (x[:, rows].unflatten(1, (number, length)).transpose(0, 1) for x in (k, v))
        if q.device.type == "cpu":
            last = torch.full((number, length), length - 1)  # from there a query sees all
            y = torch.ops.brisk.prefill_attention(queries, keys, values, last)
        else:
            y = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values).transpose(1, 2)
        outputs.append(y.flatten(0, 1))
        start = rows.stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


# ---------------------------------------------------------------------------------------------------------------------
# In a prompt


def rope_positions(images: Sequence["ImageInput"], length: int) -> Tensor:
    """What the tokens of a prompt are rotated by, int64 [3, length]: the place in time, down and across.

    Text counts on in all three. The tokens of an image have the place in time of the first one, and their own row and
    column from there on; behind it text counts on from the largest of these.
    """
    positions = torch.arange(length).repeat(3, 1)
    for image in images:
        t, h, w = image.grid
        h, w = h // image.options.merge, w // image.options.merge
        first, end = int(positions[0, image.start]), image.start + image.count
        where = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        positions[:, image.start : end] = first + torch.stack(where).flatten(1)
        positions[:, end:] = first + max(h, w) + torch.arange(length - end)
    return positions


class Seen(NamedTuple):
    """Tokens of images among the S tokens of one row: what the model sees in their places, and where all tokens are."""

    places: Tensor  # bool [1, S], which of the tokens they are
    embeddings: Tensor  # [1, S, dim]
    positions: Tensor  # int64 [3, 1, S], what all tokens are rotated by


class Sight:
    """The images of the prompts that a model prefills, one prompt after the other, piece by piece."""

    def __init__(self, model: "Transformer"):
        self.model = model
        self._request: Request | None = None  # whose images and positions these are
        self._embeddings: dict[str, Tensor] = {}  # by the image's digest
        self._positions = torch.empty(3, 0, dtype=torch.int64)

    def look(self, row: int, request: "Request", first: int, end: int, padding: int = 0) -> Seen | None:
        """What is seen in a prompt's tokens first:end, which are run in this row with so much padding behind them. None
        where they are all text; then the row's `rope_offset` is theirs."""
        if not self._begin(request):
            if self.model.rope_offset is not None:
                self.model.rope_offset[row] = 0
            return None
        inside = [image for image in request.images if image.start < end and image.start + image.count > first]
        if not inside:
            self.model.rope_offset[row] = int(self._positions[0, first]) - first
            return None
        new = {image.digest: image for image in inside if image.digest not in self._embeddings}
        if new:
            patches = torch.cat([image.patches() for image in new.values()])
            embeddings = self.model.vision(patches, [image.grid for image in new.values()])
            parts = embeddings.split([image.count for image in new.values()])
            self._embeddings |= zip(new, parts, strict=True)
        weight, length = self.model.tok_embeddings.weight, end - first + padding
        places = torch.zeros(1, length, dtype=torch.bool, device=weight.device)
        seen = weight.new_zeros(1, length, self.model.config.dim)
        for image in inside:
            begin, stop = max(first, image.start), min(end, image.start + image.count)
            columns = slice(begin - first, stop - first)
            places[:, columns] = True
            seen[0, columns] = self._embeddings[image.digest][begin - image.start : stop - image.start]
        positions = F.pad(self._positions[:, None, first:end], (0, padding))
        return Seen(places, seen, positions.to(weight.device))

    def leave(self, row: int, request: "Request", end: int) -> None:
        """Tokens up to `end` have been run: what follows, if that is text, is rotated by the places behind them."""
        if self._begin(request):
            self.model.rope_offset[row] = int(self._positions[:, :end].max()) + 1 - end
            if end == len(request.prompt):
                self._request, self._embeddings = None, {}

    def samples(self) -> "list[tuple[ImageInput, ...]]":
        """The images of prompts that between them make the model run all that it may: none, and one if it sees any."""
        vision = self.model.config.vision
        if vision is None:
            return [()]
        from images import ImageInput, ImageOptions  # not where Pillow is not needed

        side = vision.patch * vision.merge
        options = ImageOptions(vision.token, vision.patch, vision.frames, vision.merge)
        return [(), (ImageInput(torch.zeros(side, side, 3, dtype=torch.uint8), options, digest="0"),)]

    def _begin(self, request: "Request") -> bool:
        """Whether there is anything to see, for this model."""
        vision = self.model.config.vision
        if not request.images or vision is None:
            return False
        options = request.images[0].options
        if (options.patch, options.frames, options.merge) != (vision.patch, vision.frames, vision.merge):
            return False  # a draft that sees otherwise takes the tokens as they are
        if self._request is not request:
            self._request, self._embeddings = request, {}
            self._positions = rope_positions(request.images, len(request.prompt))
        return True
