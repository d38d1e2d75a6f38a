"""Attention in plain PyTorch: the reference versions of its ops. That of a prefill also runs where there is no kernel.

y = decode_attention(q, k_cache, v_cache, input_pos, window, sinks, scale, softcap, ring, rows, k_scale, v_scale)
y = prefill_attention(q, k, v, input_pos, first_pos, window, sinks, scale, softcap, rows, k_scale, v_scale)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    window: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    ring: bool = False,
    rows: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Queries [B, S, H, D] at positions int64 [B, S] over caches [max_B, KV, T, D] -> [B, S, H, D].

    A query sees the keys up to its position, with `window` only so many of them. Its cost follows what it sees, and
    what else the cache holds does not matter, not even NaN. Query head h goes with the keys of head h // (H / KV).

    scale: of the products q k, by default D ** -0.5.
    softcap: unless it is 0, scores are softcap * tanh(scale * q k / softcap), as in Gemma 2.
    sinks: [H], of any float dtype: a score for each head that takes part in the softmax, but has no value (gpt-oss).
    ring: the cache holds the last positions only, position p in slot p % (T - 1), and what is written to slot T - 1 is
        never seen. With S queries, the last of them must not have taken the slot of the first one's oldest key.
    rows: int64 [B], the rows of the caches that the queries look at, by default the first B.
    k_scale, v_scale: of int8 caches, float32 [max_B, KV, T]: what the keys and values are multiples of.

    Raises ValueError (RuntimeError where the C++ version runs) for a ring without a window of at most T - 1, a scale
    that is not positive, and a negative softcap.
    """
    B, S, H, _ = q.shape
    kv_heads, T = k_cache.shape[1:3]
    if ring and (window is None or window > T - 1):
        raise ValueError(f"ring: expected a window of at most {T - 1}, got {window}")
    scale = _checked_scale(q, scale, softcap)
    slot, at = torch.arange(T, device=q.device), input_pos[:, :, None]
    distance = (at - slot) % (T - 1) if ring else at - slot  # from a slot's key to the query
    seen = (distance >= 0) & (distance < (T + 1 if window is None else window))  # [B, S, T]
    if ring:
        seen = seen & (distance <= at) & (slot < T - 1)
    caches = (_of_rows(*cache, B, rows, torch.float32) for cache in ((k_cache, k_scale), (v_cache, v_scale)))
    k, v = (cache.repeat_interleave(H // kv_heads, 1) for cache in caches)
    scores = (q.float().transpose(1, 2) @ k.transpose(2, 3)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(H, 1, 1).expand(*scores.shape[:3], 1)), -1)
    weights = scores.softmax(-1)[..., :T]
    # What a query does not see may be NaN, which a weight of 0 does not hide.
    y = [weights[:, :, s, None] @ v.masked_fill(~seen[:, s, None, :, None], 0) for s in range(S)]
    return torch.cat(y, 2).transpose(1, 2).to(q.dtype).contiguous()


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_pos: Tensor,
    first_pos: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    rows: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The same for many queries, without rings: key j of row b is at position first_pos[b] + j, int64 [B], by default
    at j; what is before position 0 is never seen.

    k and v [max_B, KV, L, D] may have any strides if each head of a key is together, their scales any. On CPUs what
    lies in them beyond the last query's position may be anything.
    """
    scale = _checked_scale(q, scale, softcap)
    key_pos = torch.arange(k.shape[2], device=q.device)[None, None]
    if first_pos is not None:
        key_pos = key_pos + first_pos[:, None, None]
    seen = key_pos <= input_pos[:, :, None]  # [B, S, L]
    if window is not None:
        seen = seen & (key_pos > input_pos[:, :, None] - window)
    if first_pos is not None:
        seen = seen & (key_pos >= 0)
    k, v = (_of_rows(*cache, len(q), rows, q.dtype) for cache in ((k, k_scale), (v, v_scale)))
    return attend(q, k, v, seen, scale, softcap, sinks)


def _of_rows(cache: Tensor, scale: Tensor | None, count: int, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The given rows of a cache, by default the first `count`, as floats."""
    if (cache.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"expected scales with a cache in int8 and with no other, got a cache in {cache.dtype}")
    cache, scale = (x if x is None else x[:count] if rows is None else x[rows] for x in (cache, scale))
    return cache.to(dtype) if scale is None else (cache.float() * scale[..., None]).to(dtype)


def _checked_scale(q: Tensor, scale: float | None, softcap: float) -> float:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not (scale > 0 and softcap >= 0):
        raise ValueError(f"expected scale > 0 and softcap >= 0, got {scale} and {softcap}")
    return scale


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Queries [B, S, heads, D], keys and values [B, kv_heads, L, D], mask [B, S, L] -> like q.

    `scale`, `softcap` and `sinks` as in decode_attention.
    """
    B, S, n_heads, D = q.shape
    n_kv_heads = k.shape[1]
    if softcap or sinks is not None:  # which no fused attention of PyTorch's has
        return attend_by_heads(q, k, v, mask, scale, softcap, sinks)
    mask = mask[:, None]
    if S == 1:
        # The queries of a group share their keys: as rows of one small matrix they read them once.
        q = q.view(B, n_kv_heads, n_heads // n_kv_heads, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).view(B, 1, n_heads, D)
    if q.device.type == "cuda" and n_heads != n_kv_heads:
        # There no fused kernel takes both a mask and groups, and the others make scores of float32.
        k, v = (cache.repeat_interleave(n_heads // n_kv_heads, 1) for cache in (k, v))
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, scale=scale, enable_gqa=n_heads != k.shape[1]
    )
    return y.transpose(1, 2).contiguous()


def attend_by_heads(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """The same step by step, for the queries of one head of keys after the other: all scores may be gigabytes."""
    B, S, n_heads, _ = q.shape
    group = n_heads // k.shape[1]
    outputs = []
    for head, queries in enumerate(q.split(group, dim=2)):
        scores = (queries.transpose(1, 2) @ k[:, head, None].transpose(2, 3)).float() * scale  # [B, group, S, L]
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
        if sinks is not None:
            sink = sinks[head * group : (head + 1) * group].float()[None, :, None, None].expand(B, group, S, 1)
            weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        outputs.append((weights.to(v.dtype) @ v[:, head, None]).transpose(1, 2))
    return torch.cat(outputs, dim=2)
