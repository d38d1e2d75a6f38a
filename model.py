"""The model: a decoder-only transformer (Llama, Mistral, Qwen2, Qwen3, MiniMind) with a static KV cache.

    config = ModelConfig.from_hf(json.load(open("config.json")))       # config.py
    model = Transformer(config)                            # random weights; checkpoint.load_model reads real ones
    model.setup_caches(max_batch_size=1, max_seq_length=1024)
    logits = model(tokens, input_pos)                      # [B, S], [B, S] -> [B, S, V]

Every row of a batch stands at a position of its own. Attention masks by position, so whatever lies in the cache beyond
a row's position is never seen: ragged prompts need no left padding and a rollback is only a smaller position.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig, RopeConfig
from kernels import packing

DECODE_QUERIES = 16  # of a row: up to so many attention takes the decode kernel, and no decode step has more


# ---------------------------------------------------------------------------------------------------------------------
# Rotary position embedding


def rope_frequencies(rope: RopeConfig, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each rotated pair, float32 [head_dim / 2]; what `dynamic` adds is in rope_angles."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    freqs = 1.0 / rope.theta**exponent
    if rope.type == "linear":
        return freqs / rope.factor
    if rope.type == "llama3":
        # Long wavelengths are stretched, short ones kept, those between blended.
        wavelength = 2 * math.pi / freqs
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = ((rope.original_length / wavelength - rope.low_freq_factor) / span).clamp(0, 1)
        return (1 - keep) * freqs / rope.factor + keep * freqs
    if rope.type == "yarn":
        # Pairs that turn more than beta_fast times over the trained length are kept, fewer than beta_slow stretched.
        low, high = (
            head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if low == high else 0
        stretch = ((torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
        return stretch * freqs / rope.factor + (1 - stretch) * freqs
    return freqs


def rope_angles(rope: RopeConfig, freqs: Tensor, input_pos: Tensor, padding: int = -1) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [B, S, 1, head_dim / 2], of positions [B, S]; `padding` is the padding position."""
    if rope.type == "dynamic":
        # NTK scaling: past the trained length the base grows with the length that each row has reached.
        half = freqs.shape[0]
        reached = input_pos.masked_fill(input_pos == padding, 0).amax(dim=1) + 1
        reached = reached.clamp(min=rope.original_length).float()
        growth = rope.factor * reached / rope.original_length - (rope.factor - 1)
        exponent = torch.arange(half, dtype=torch.float32, device=freqs.device) / max(half - 1, 1)
        freqs = (freqs * growth[:, None] ** -exponent)[:, None]
    angles = input_pos[:, :, None].float() * freqs
    return (angles.cos() * rope.attention_factor)[:, :, None], (angles.sin() * rope.attention_factor)[:, :, None]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [B, S, heads, head_dim]; element i pairs with element i + head_dim / 2, as in HF's checkpoints."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The layers


class Linear(nn.Module):
    """y = x W^T + b with W [out, in]; x may have any leading dimensions."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, but a few rows on a CPU read a bfloat16 weight at the speed of memory."""
    if x.device.type == "cpu" and weight.dtype == torch.bfloat16:
        return torch.ops.brisk.linear_bf16(x, weight, bias)
    return F.linear(x, weight, bias)


class Embedding(nn.Module):
    """A row of W [vocab, dim] for each token. (torch.nn's draws random weights, which takes a second even on meta.)"""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class KVCache(nn.Module):
    """Keys and values of one layer, [B, kv_heads, T, head_dim], preallocated."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        super().__init__()
        for name in ("k", "v"):
            self.register_buffer(name, packing.allocate(shape, dtype, device), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> None:
        """Writes k and v [B, S, kv_heads, head_dim] at positions [B, S] of these rows, by default the first B."""
        rows = torch.arange(len(input_pos), device=input_pos.device) if rows is None else rows
        self.k[rows[:, None], :, input_pos] = k
        self.v[rows[:, None], :, input_pos] = v


class Attention(nn.Module):
    """Grouped-query attention over the cache: n_heads queries share n_kv_heads keys and values."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.window = config.sliding_window if config.window_layers and config.window_layers[layer] else None
        rows = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.wqkv = Linear(config.dim, rows, config.qkv_bias)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim, config.wo_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.kv_cache: KVCache | None = None

    def forward(
        self,
        x: Tensor,
        input_pos: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_pos: Tensor,
        only: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        B, S, _ = x.shape
        heads = self.wqkv(x).view(B, S, -1, self.head_dim)
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        self.kv_cache.update(input_pos, k, v, rows)
        if only is not None:
            q, input_pos = pick(q, only), pick(input_pos, only)
        y = attention(q, self.kv_cache.k, self.kv_cache.v, input_pos, key_pos, self.window, rows)
        return self.wo(y.view(*y.shape[:2], -1))


def pick(x: Tensor, only: Tensor) -> Tensor:
    """One token of each row: [B, S, ...] and indices [B] -> [B, 1, ...]."""
    return x[torch.arange(len(only), device=x.device), only][:, None]


def attention(
    q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, key_pos: Tensor, window: int | None, rows: Tensor | None
) -> Tensor:
    """Queries [B, S, heads, D] over the first L = len(key_pos) entries of caches [max_B, kv_heads, T, D] -> like q."""
    B, S, n_heads, D = q.shape
    if q.device.type in ("cpu", "cuda") and S <= DECODE_QUERIES and rows is None:
        # Reads what each row's positions allow, so its cost follows them and not key_pos.
        return torch.ops.brisk.decode_attention(q, k, v, input_pos, window)
    n_kv_heads, L = k.shape[1], key_pos.shape[0]
    k, v = (cache[:B, :, :L] if rows is None else cache[:, :, :L][rows] for cache in (k, v))
    mask = key_pos <= input_pos[:, :, None]  # [B, S, L]
    if window is not None:
        mask = mask & (key_pos > input_pos[:, :, None] - window)
    if S == 1:
        # The queries of a group share their keys: as rows of one small matrix they read them once.
        q = q.view(B, n_kv_heads, n_heads // n_kv_heads, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).view(B, 1, n_heads, D)
    if q.device.type == "cuda" and n_heads != n_kv_heads:
        # There no fused kernel takes both a mask and groups, and the others make scores of float32.
        k, v = (cache.repeat_interleave(n_heads // n_kv_heads, 1) for cache in (k, v))
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask[:, None], enable_gqa=n_heads != k.shape[1]
    )
    return y.transpose(1, 2).contiguous()


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(gate) * up), gate and up in one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.ffn_dim, config.mlp_bias)
        self.w2 = Linear(config.ffn_dim, config.dim, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer: attention and feed-forward, each added to its input."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    @torch.compiler.nested_compile_region  # traced and compiled once, called for every layer
    def forward(
        self,
        x: Tensor,
        input_pos: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_pos: Tensor,
        only: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        """[B, S, dim] -> the same, or [B, 1, dim]: of each row just token `only` [B], though all reach the cache."""
        y = self.attention(self.attention_norm(x), input_pos, cos, sin, key_pos, only, rows)
        x = (x if only is None else pick(x, only)) + y
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The whole model. `setup_caches` must have been called before the first forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tied else Linear(config.dim, config.vocab_size)
        self.vocabulary: nn.Module | None = None  # where this process has a slice of it: tp.AllGather
        self.max_batch_size = self.max_seq_length = 0

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Preallocates K and V where the weights are, [max_batch_size, kv_heads, max_seq_length + 1, head_dim] a layer.

        The last slot, which no query ever looks at, is for padding: its position is `max_seq_length`.
        """
        config, weight = self.config, self.tok_embeddings.weight
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        shape = (max_batch_size, config.n_kv_heads, max_seq_length + 1, config.head_dim)
        for layer in self.layers:
            layer.attention.kv_cache = KVCache(shape, weight.dtype, weight.device)
        freqs = rope_frequencies(config.rope, config.head_dim, weight.device)
        self.register_buffer("rope_freqs", freqs, persistent=False)
        self.register_buffer("key_pos", torch.arange(max_seq_length, device=weight.device), persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor, key_pos: Tensor | None = None) -> Tensor:
        """Tokens and their positions, int64 [B, S] -> logits [B, S, V] in the weights' dtype.

        `key_pos` [L] is a prefix of `self.key_pos`: attention reads that much of the cache, by default all of it. It
        must reach past every position, and the cost of a step follows it.
        """
        return self.logits(self.hidden(tokens, input_pos, key_pos))

    def hidden(
        self,
        tokens: Tensor,
        input_pos: Tensor,
        key_pos: Tensor | None = None,
        only: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The normalized output of the last layer, [B, S, dim]; with `only` [B] that of one token a row, [B, 1, dim].

        A prefill needs no more, and saves most of the last layer's work. `rows` [B] are the rows of the cache that the
        tokens belong to, by default the first B.
        """
        x = self.tok_embeddings(tokens)
        cos, sin = rope_angles(self.config.rope, self.rope_freqs, input_pos, padding=self.max_seq_length)
        key_pos = self.key_pos if key_pos is None else key_pos
        for layer in self.layers[:-1]:
            x = layer(x, input_pos, cos, sin, key_pos, None, rows)
        return self.norm(self.layers[-1](x, input_pos, cos, sin, key_pos, only, rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., V]."""
        logits = self._own_logits(hidden)
        return logits if self.vocabulary is None else self.vocabulary(logits)

    def max_logit(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[..., dim] -> the largest logit [...] and its token; several ranks find it without gathering all logits."""
        logits = self._own_logits(hidden)
        value, token = logits.max(-1) if self.vocabulary is None else self.vocabulary.max(logits)
        return value, token

    def _own_logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.tok_embeddings.weight) if self.output is None else self.output(hidden)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint, in the order of the layers."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
