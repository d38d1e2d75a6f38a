"""The model: a decoder-only transformer with a static KV cache. What differs among families are options of ModelConfig.

    config = ModelConfig.from_hf(json.load(open("config.json")))       # config.py
    model = Transformer(config)                            # random weights; checkpoint.load_model reads real ones
    model.setup_caches(max_batch_size=1, max_seq_length=1024)
    logits = model(tokens, input_pos)                      # [B, S], [B, S] -> [B, S, V]

Every row of a batch stands at a position of its own. Attention masks by position, so whatever lies in the cache beyond
a row's position is never seen: ragged prompts need no left padding and a rollback is only a smaller position, of at
most DECODE_QUERIES where layers have windows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import DECODE_QUERIES, LOOKBACK, KVCache, apply_rope, rope_angles, rope_frequencies
from config import ModelConfig
from kernels.attention import prefill_attention
from vision import Seen, VisionTransformer

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
        return linear(x, *self.operands)

    @property
    def op(self) -> str | None:
        """By which op of kernels/ it is computed on a CPU."""
        return "linear_bf16" if self.weight.dtype == torch.bfloat16 else None

    @property
    def operands(self) -> tuple[Tensor, Tensor | None]:
        """What that takes besides x."""
        return self.weight, self.bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, but a few rows on a CPU read a bfloat16 weight at the speed of memory."""
    if x.device.type == "cpu" and weight.dtype == torch.bfloat16:
        return torch.ops.brisk.linear_bf16(x, weight, bias)
    return F.linear(x, weight, bias)


class ExpertsLinear(nn.Module):
    """The same layer of all experts: y = x W[e]^T + b[e] with W [experts, out, in], for the experts e of each row."""

    def __init__(self, experts: int, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(experts, out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [R, 1 or k, in], for each expert of a row the same or its own; chosen [R, k] -> [R, k, out]."""
        return torch.ops.brisk.linear_experts(x, self.weight, chosen, self.bias)


class Embedding(nn.Module):
    """A row of W [vocab, dim] for each token. (torch.nn's draws random weights, which takes a second even on meta.)"""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, in float32, with weights [dim], or [heads, dim] of a head each."""

    def __init__(self, config: ModelConfig, *shape: int, bias: bool = False):
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(shape), requires_grad=False) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros(shape), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1:]
        if self.kind == "layer":
            y = F.layer_norm(x.float(), size, eps=self.eps)
            y = y if self.weight is None else y * self.weight.float()
            return (y if self.bias is None else y + self.bias.float()).to(x.dtype)
        y = F.rms_norm(x.float(), size, eps=self.eps)
        if self.kind == "rms_plus_one":
            return (y * (1 + self.weight.float())).to(x.dtype)
        return y.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention over the cache: n_heads queries share n_kv_heads keys and values."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.window, self.clip, self.softcap = config.window(layer), config.clip_qkv, config.attention_softcap
        self.scale = config.attention_scale or None
        if config.attention_scale_falls:
            self.scale = (self.scale or config.head_dim**-0.5) / (layer + 1)
        self.rope = None if config.rope_of(layer) is None else config.ropes[config.rope_of(layer)]
        rows = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.wqkv = Linear(config.dim, rows, config.qkv_bias)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim, config.wo_bias)
        self.norms_all = config.qk_norm == "all"
        self.q_norm = qk_norm(config, config.n_heads)
        self.k_norm = qk_norm(config, config.n_kv_heads)
        sinks = nn.Parameter(torch.zeros(config.n_heads), requires_grad=False) if config.attention_sinks else None
        self.register_parameter("sinks", sinks)
        self.kv_cache: KVCache | None = None

    def forward(
        self,
        x: Tensor,
        input_pos: Tensor,
        query_pos: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_pos: Tensor,
        only: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        B, S, _ = x.shape
        heads = self.wqkv(x).view(B, S, -1, self.head_dim)
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        if self.norms_all:
            q, k = self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)
        elif self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        if cos is not None:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
            if self.rope.query_beta:
                far = (input_pos // self.rope.original_length)[:, :, None, None].float()
                q = q * (1 + self.rope.query_beta * far.log1p()).to(q.dtype)
        y = self.attend_cached(q, k, v, input_pos, query_pos, key_pos, only, rows)
        return self.wo(y.view(*y.shape[:2], -1))

    def attend_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        input_pos: Tensor,
        query_pos: Tensor,
        key_pos: Tensor,
        only: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        """Writes k and v to the cache -> the queries' sums of values, like q, or of one query a row."""
        cache, device, options = self.kv_cache, q.device.type, (self.window, self.sinks, self.scale, self.softcap)
        seen_from = input_pos
        if only is not None:
            q, query_pos, seen_from = (pick(x, only) for x in (q, query_pos, input_pos))
        few = device in ("cpu", "cuda") and q.shape[1] <= DECODE_QUERIES
        if cache.is_ring and input_pos.shape[1] > DECODE_QUERIES:
            few = False  # new keys may take the place of some that the first queries see
        # Both kernels read what each row's positions allow, so their cost follows these and not key_pos.
        if few:
            cache.update(input_pos, k, v, rows)
            k, v, *scales = cache.parts
            return torch.ops.brisk.decode_attention(q, k, v, query_pos, *options, cache.is_ring, rows, *scales)
        attend = torch.ops.brisk.prefill_attention if device == "cpu" else prefill_attention
        if cache.is_ring:
            old, first_pos = cache.before(input_pos, self.window - 1, rows)
            new = cache.update(input_pos, k, v, rows)
            k, v, *scales = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(old, new, strict=True))
            return attend(q, k, v, seen_from, first_pos, *options, None, *scales)
        cache.update(input_pos, k, v, rows)
        k, v, *scales = (part[:, :, : len(key_pos)] for part in cache.parts)
        return attend(q, k, v, query_pos, None, *options, rows, *scales)


def qk_norm(config: ModelConfig, heads: int) -> Norm | None:
    shapes = {"head": (config.head_dim,), "heads": (heads, config.head_dim), "all": (heads * config.head_dim,)}
    return Norm(config, *shapes[config.qk_norm], bias=config.qk_norm_bias) if config.qk_norm else None


def pick(x: Tensor, only: Tensor) -> Tensor:
    """One token of each row: [B, S, ...] and indices [B] -> [B, 1, ...]."""
    return x[torch.arange(len(only), device=x.device), only][:, None]


def activate(config: ModelConfig, x: Tensor) -> Tensor:
    """The activation of a feed-forward: [..., ffn], or of a gated one [..., 2 ffn], gate and up -> [..., ffn]."""
    kind = config.activation
    gate, up = x.chunk(2, dim=-1) if config.gated else (x, None)
    if kind == "clamped_silu":  # of gpt-oss
        limit = config.activation_limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        return gate * torch.sigmoid(config.activation_alpha * gate) * up
    if kind == "silu":
        y = F.silu(gate)
    elif kind.startswith("gelu"):
        y = F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    else:
        y = F.relu(gate).square() if kind == "relu2" else F.relu(gate)
    return y if up is None else y * up


class FeedForward(nn.Module):
    """w2(activation(gate) * up), gate and up in one matrix w13; or w2(activation(w1))."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.config = config
        if config.gated:
            self.w13 = Linear(config.dim, 2 * width, config.mlp_bias)
        else:
            self.w1 = Linear(config.dim, width, config.mlp_bias)
        self.w2 = Linear(width, config.dim, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(activate(self.config, self.w13(x) if self.config.gated else self.w1(x)))


class Experts(nn.Module):
    """The feed-forwards of a mixture: each row goes through those that are chosen for it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, experts = config, config.experts
        self.w13 = ExpertsLinear(experts.count, config.dim, 2 * experts.width, experts.bias)
        self.w2 = ExpertsLinear(experts.count, experts.width, config.dim, experts.bias)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Rows [R, dim], experts int64 [R, k] and how much they count, float32 [R, k] -> [R, dim]."""
        y = self.w2(activate(self.config, self.w13(x[:, None], chosen)), chosen)
        return (y * weights[:, :, None]).sum(1).to(x.dtype)


class MixtureOfExperts(nn.Module):
    """Takes the place of FeedForward: a router chooses k experts for each token; one more may be for all tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.k, self.normalized = config.experts.chosen, config.experts.normalized
        self.router = Linear(config.dim, config.experts.count, config.experts.bias)
        self.experts = Experts(config)
        width = config.experts.shared_width
        self.shared = FeedForward(config, width) if width else None
        self.shared_gate = Linear(config.dim, 1) if config.experts.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, chosen = self.router(rows).float().softmax(-1).topk(self.k)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        y = self.experts(rows, chosen, weights).view(x.shape)
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else shared * torch.sigmoid(self.shared_gate(x)))


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to its input, with norms before, after or both."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        before, after = config.norm_place in ("before", "both"), config.norm_place in ("after", "both")

        def norm(wanted: bool) -> Norm | None:
            return Norm(config, config.dim, bias=config.norm_bias) if wanted else None

        self.parallel, self.residual_scale = config.parallel, config.residual_scale
        self.attention_norm = norm(before)
        self.attention = Attention(config, layer)
        self.post_attention_norm = norm(after)
        self.ffn_norm = norm(before and not config.shared_norm)
        self.feed_forward = (
            MixtureOfExperts(config) if config.has_experts(layer) else FeedForward(config, config.ffn_dim)
        )
        self.post_ffn_norm = norm(after)

    @torch.compiler.nested_compile_region  # traced and compiled once for each kind of layer, called for every one
    def forward(
        self,
        x: Tensor,
        input_pos: Tensor,
        query_pos: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        key_pos: Tensor,
        only: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        """[B, S, dim] -> the same, or [B, 1, dim]: of each row just token `only` [B], though all reach the cache."""
        h = x if self.attention_norm is None else self.attention_norm(x)
        y = self.attention(h, input_pos, query_pos, cos, sin, key_pos, only, rows)
        if self.post_attention_norm is not None:
            y = self.post_attention_norm(y)
        if only is not None:
            x, h = pick(x, only), pick(h, only)
        if not self.parallel:
            x = h = self.add(x, y)
        elif self.ffn_norm is not None:
            h = x
        f = self.feed_forward(h if self.ffn_norm is None else self.ffn_norm(h))
        if self.post_ffn_norm is not None:
            f = self.post_ffn_norm(f)
        return self.add(x, y + f if self.parallel else f)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.residual_scale == 1 else x + y * self.residual_scale


class Transformer(nn.Module):
    """The whole model. `setup_caches` must have been called before the first forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.pos_embeddings = Embedding(config.context_length, config.dim) if config.learned_positions else None
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = Norm(config, config.dim, bias=config.norm_bias)
        self.output = None if config.tied else Linear(config.dim, config.vocab_size, config.output_bias)
        self.vocabulary: nn.Module | None = None  # where this process has a slice of it: tp.AllGather
        self.vision = None if config.vision is None else VisionTransformer(config.vision)
        # int64 [rows]: how far from its position a row's text, behind images, is rotated. None: there can be no image.
        self.register_buffer("rope_offset", None, persistent=False)
        self.embedding_scale = config.embedding_scale
        self.max_batch_size = self.max_seq_length = 0
        self.cache_dtype: torch.dtype | None = None  # int8, or None: that of the weights

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Preallocates K and V where the weights are, [max_batch_size, kv_heads, max_seq_length + 1, head_dim] a layer,
        of layers with a window only as much as that needs.

        The last slot, which no query ever looks at, is for padding: its position is `max_seq_length`.
        """
        config, weight = self.config, self.tok_embeddings.weight
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        for i, layer in enumerate(self.layers):
            slots = cache_slots(config.window(i), max_seq_length)
            shape = (max_batch_size, config.n_kv_heads, slots + 1, config.head_dim)
            padding = max_seq_length if slots < max_seq_length else None
            layer.attention.kv_cache = KVCache(shape, self.cache_dtype or weight.dtype, weight.device, padding)
        self.setup_rope(weight.device)
        self.register_buffer("key_pos", torch.arange(max_seq_length, device=weight.device), persistent=False)
        if config.rope.sections:
            self.rope_offset = torch.zeros(max_batch_size, dtype=torch.int64, device=weight.device)
        # As transformers has it, in the dtype of the weights.
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=weight.dtype).item()

    def setup_rope(self, device: torch.device) -> None:
        for i, rope in enumerate(self.config.ropes if self.config.rotary_dim else []):
            freqs = rope_frequencies(rope, self.config.rotary_dim, device)
            self.register_buffer(f"rope_freqs_{i}", freqs, persistent=False)

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
        reached: Tensor | None = None,
        seen: Seen | None = None,
    ) -> Tensor:
        """The normalized output of the last layer, [B, S, dim]; with `only` [B] that of one token a row, [B, 1, dim].

        A prefill needs no more, and saves most of the last layer's work. `rows` [B] are the rows of the cache that the
        tokens belong to, by default the first B. `reached` [B]: see rope_angles; of a prompt in chunks its length.
        `seen`: the images among the tokens, of one row.
        """
        x = self.embed(tokens, input_pos)
        if seen is not None:
            x = torch.where(seen.places[..., None], seen.embeddings, x)
        angles = self.angles(self.rotated_by(input_pos, rows) if seen is None else seen.positions, reached)
        key_pos = self.key_pos if key_pos is None else key_pos
        # What padding sees does not matter, so let it be little: it would read the whole cache.
        query_pos = input_pos.masked_fill(input_pos == self.max_seq_length, 0)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x, input_pos, query_pos, *angles[i], key_pos, only if i == last else None, rows)
        return self.norm(x)

    def embed(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """[B, S] -> the input of the first layer, [B, S, dim]."""
        x = self.tok_embeddings(tokens)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        if self.pos_embeddings is not None:  # padding has a position beyond the last
            x = x + self.pos_embeddings(input_pos.clamp(max=self.config.context_length - 1))
        return x

    def rotated_by(self, input_pos: Tensor, rows: Tensor | None) -> Tensor:
        """Positions [B, S] of text -> what it is rotated by, which differs behind images."""
        if self.rope_offset is None:
            return input_pos
        offset = self.rope_offset[: len(input_pos)] if rows is None else self.rope_offset[rows]
        return input_pos + offset[:, None]

    def angles(
        self, input_pos: Tensor, reached: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor] | tuple[None, None]]:
        """cos and sin of each layer at positions [B, S], or [3, B, S] with images; None where it has no RoPE."""
        config, kinds = self.config, []
        for i, rope in enumerate(config.ropes if config.rotary_dim else []):
            kinds.append(rope_angles(rope, getattr(self, f"rope_freqs_{i}"), input_pos, self.max_seq_length, reached))
        ropes = [config.rope_of(i) for i in range(config.n_layers)]
        return [(None, None) if rope is None else kinds[rope] for rope in ropes]

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
        logits = linear(hidden, self.tok_embeddings.weight) if self.output is None else self.output(hidden)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return cap * (logits / cap).tanh() if cap else logits


def cache_slots(window: int | None, max_seq_length: int) -> int:
    """Positions that the cache of a layer with this window holds."""
    return max_seq_length if window is None else min(window + LOOKBACK, max_seq_length)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint, in the order of the layers."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
