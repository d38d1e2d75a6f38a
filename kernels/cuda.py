"""The ops of this folder for CUDA, in Triton. __init__.py imports this file when it meets the first CUDA tensor.

    y = linear_int8(x, packed, scales, bias)                     # what torch.ops.brisk.linear_int8 does on CUDA, ...
    y = linear_int8_grouped(x, packed, scales, out_features, groupsize, bias)
    y = linear_int4(x, packed, out_features, groupsize, scale_dtype, zero, bias)
    y = decode_attention(q, k_cache, v_cache, input_pos, window, sinks, scale, softcap, ring, rows, k_scale, v_scale)

Activations are not quantized here: the tensor cores multiply them with the weights' integers, whose scales come after.
TRITON_INTERPRET=1 runs everything on CPU tensors, without a GPU and slowly: that is how the tests do it.

To PyTorch the ops stay opaque, as their CPU versions are: Inductor calls them, CUDA graphs record their launches, and
nested compile regions take them as they are, in every version. Given them as `torch.library.triton_op`, Inductor would
compile the kernels again and could fuse nothing with them. Sizes are chosen by rule: autotuning would time kernels at
the first call of every shape, which may be while a graph is recorded.

What the speed rests on. An H200 reads 4.3 TB/s, or 33 bytes a nanosecond for each of its 132 multiprocessors. Memory
answers after 0.7 us or so, hence a multiprocessor must have more than 23 KB under way: asynchronous 16-byte copies,
some 8 KB a stage and three stages ahead of the arithmetic, in two or more programs. At that rate it may spend 3.6
instructions on an int4 weight and 7 on an int8 weight. The loops, which are in cuda_loops.py, take 2.6 to 3.1 and 3.1
(FP4: 3.7 to 4; counted in their SASS). None of this has been timed yet.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda_loops import CHUNK, dequantized_chunks, multiply, multiply_int4, store
from kernels.packing import FP4, ZERO_BYTES, ZERO_FLOATS, kind_of_zeros

FEW_ROWS = 64  # 16 at a time, from the L2 cache at best; for more the weight is dequantized, for a GEMM
PROGRAMS = 512  # enough to even out over 132 multiprocessors
SPLIT_PROGRAMS = 256  # attention: two for each multiprocessor

# ---------------------------------------------------------------------------------------------------------------------
# Linear layers of few rows


@triton.jit
def _linear_int8(
    x_ptr, w_ptr, s_ptr, b_ptr, y_ptr, R, N, K,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """x [R, K], w int8 [N, K], s [N], or [K / GROUP, N] if there are groups, which are whole BK -> y [R, N].

    EVEN: BN divides N and BC * BK divides K.
    """
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    y = multiply(x_ptr, w_ptr, s_ptr, r, r < R, N, K, GROUP, BM, BN, BC, BK, EVEN)
    store(y, y_ptr, b_ptr, r, r < R, N, BIAS)


@triton.jit
def _linear_int4(
    x_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, R, N, K, chunks,
    ZERO: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """x [R, K], w int32 [N, chunks, 4] as pack_int4 makes it, s and z [groups, N] -> y [R, N].

    EVEN: BN divides N, BC divides chunks and K is CHUNK * chunks.
    """
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    y = multiply_int4(x_ptr, w_ptr, s_ptr, z_ptr, r, r < R, N, K, chunks, ZERO, GROUP, BM, BN, BC, EVEN)
    store(y, y_ptr, b_ptr, r, r < R, N, BIAS)


def linear_int8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times int8 [N, K], with a float32 scale for each row -> [..., N] in x's dtype."""
    return _int8(x, packed, scales, 0, bias)


def linear_int8_grouped(
    x: Tensor, packed: Tensor, scales: Tensor, out_features: int, groupsize: int, bias: Tensor | None = None
) -> Tensor:
    """x [..., K] times int8 [N, K], with scales [K / groupsize, N] -> [..., N] in x's dtype."""
    return _int8(x, packed, scales, groupsize, bias)


def _int8(x: Tensor, packed: Tensor, scales: Tensor, groupsize: int, bias: Tensor | None) -> Tensor:
    (N, K), x, shape = packed.shape, *_as_rows(x)
    expected = (K // groupsize, N) if groupsize else (N,)
    if x.shape[1] != K or scales.shape != expected or (groupsize and K % groupsize):
        raise RuntimeError(f"expected x [..., {K}] and scales {expected}, got {list(shape)} and {list(scales.shape)}")
    if _is_gemm(x):
        weight = torch.empty(N, K, dtype=x.dtype, device=x.device)
        groups = (N, -1, groupsize or K)
        torch.mul(packed.view(groups), scales.float().view(-1, N).t()[:, :, None], out=weight.view(groups))
        y = _gemm(x, weight, bias)
    else:
        y = x.new_empty(len(x), N)
        BM, BN = _block(len(x), N)
        width = 512 if BN == 16 else 256  # 8 KB of weights a stage, or 16
        BK = min(width // 4, groupsize or width)
        with torch.cuda.device_of(x):
            _linear_int8[triton.cdiv(len(x), BM), triton.cdiv(N, BN)](
                x, packed, scales, bias, y, len(x), N, K, groupsize, BM, BN, width // BK, BK,
                EVEN=N % BN == K % width == 0, BIAS=bias is not None, num_warps=4,
            )  # fmt: skip
    return y.view(*shape[:-1], N)


def linear_int4(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    groupsize: int,
    scale_dtype: torch.dtype,
    zero: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x [..., K] times an int4 weight from `pack_int4`, which also says what `zero` is -> [..., N] in x's dtype."""
    N, (x, shape) = out_features, _as_rows(x)
    w, s, z = _parts(packed, N, x.shape[1], groupsize, scale_dtype, zero)
    if _is_gemm(x):
        y = _gemm(x, _dequantized(w, s, z, x.shape[1], groupsize, zero, x.dtype), bias)
    else:
        y = x.new_empty(len(x), N)
        BM, BN = _block(len(x), N)
        chunks, BC = w.shape[1], 512 // BN  # 8 KB of weights a stage
        with torch.cuda.device_of(x):
            _linear_int4[triton.cdiv(len(x), BM), triton.cdiv(N, BN)](
                x, w, s, z, bias, y, len(x), N, x.shape[1], chunks, zero, groupsize, BM, BN, BC,
                EVEN=N % BN == chunks % BC == 0 and x.shape[1] == chunks * 32, BIAS=bias is not None,
                num_warps=4,
            )  # fmt: skip
    return y.view(*shape[:-1], N)


def _as_rows(x: Tensor) -> tuple[Tensor, torch.Size]:
    """[..., K] -> ([rows, K], the shape before)."""
    return x.reshape(-1, x.shape[-1]).contiguous(), x.shape


def _is_gemm(x: Tensor) -> bool:
    # float32 is for comparisons: not worth a kernel.
    return len(x) == 0 or len(x) > FEW_ROWS or x.dtype == torch.float32


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _block(rows: int, N: int) -> tuple[int, int]:
    """Rows of x and columns of y for a program.

    Every program reads all of x: BN is so large that this is not much beside the weights (BM rows of 2 bytes against
    BN rows of 0.5 or 1), but otherwise so small that all multiprocessors get programs.
    """
    BN, smallest = 64, 16 if rows == 1 else 32 if rows <= 4 else 64
    while smallest < BN and N // BN < PROGRAMS:
        BN //= 2
    return 8 if rows <= 8 else 16, BN


# ---------------------------------------------------------------------------------------------------------------------
# int4 weights: packed, and as a matrix of floats


def pack_int4(
    q: Tensor, scales: Tensor, zeros: Tensor | None, K: int, groupsize: int, zero: int | None = None
) -> tuple[Tensor, int]:
    """uint8 [N, ceil(K / 2)] (the low nibble is the even k), scales and zeros [N, groups] -> (packed, zero).

    `packed` holds the words of q, the scales, and the zeros if `zero` says so, which is as in packing.pack_int4 and may
    be given; one after the other, as `_parts` finds them. Without zeros, q is FP4. 16 bytes hold the same 32 weights as
    before, in another order: bits 4 e + 8 h + 16 b of word j are k = 16 h + 4 j + 2 e + b. So the word j is what one
    thread feeds to the tensor cores, and the two weights of each register (b) lie 16 bits apart. Scales and zeros are
    turned, [groups, N], for 16-byte copies.
    """
    N, groups = scales.shape
    q = F.pad(q, (0, groups * groupsize // 2 - q.shape[1])).view(N, -1, 2, 4, 2)  # [N, chunks, h, j, e], bytes of two b
    first, second = q.unbind(-1)
    halves = torch.stack(((first & 15) | (second << 4), (first >> 4) | (second & 240)), -1)  # [N, chunks, h, j, b]
    zero = kind_of_zeros(zeros) if zero is None else zero
    parts = [halves.permute(0, 1, 3, 4, 2).contiguous(), scales.T.contiguous()]
    if zero in (ZERO_BYTES, ZERO_FLOATS):
        parts.append(zeros.T.to(torch.uint8 if zero == ZERO_BYTES else torch.float32).contiguous())
    pieces = [part.view(-1).view(torch.uint8) for part in parts]
    return torch.cat([F.pad(piece, (0, -len(piece) % 16)) for piece in pieces]), zero


def unpack_int4(
    packed: Tensor, N: int, K: int, groupsize: int, scale_dtype: torch.dtype, zero: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What pack_int4 packed: q uint8 [N, ceil(K / 2)], scales and zeros [N, groups]."""
    w, s, z = _parts(packed, N, K, groupsize, scale_dtype, zero)
    even, odd = w.view(torch.uint8).view(N, -1, 4, 2, 2).permute(3, 0, 1, 4, 2)  # [b; N, chunks, h, j]
    q = torch.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 240)), -1).reshape(N, -1)
    zeros = z.T.float() if zero < 0 else torch.full_like(s.T, zero, dtype=torch.float32)
    return q[:, : (K + 1) // 2], s.T, None if zero == FP4 else zeros


def _parts(packed: Tensor, N: int, K: int, groupsize: int, scale_dtype: torch.dtype, zero: int) -> tuple[Tensor, ...]:
    """What pack_int4 packed: words int32 [N, chunks, 4], scales [groups, N], and zeros, or the scales once more; each
    [E, ...], if packed is [E, bytes]."""
    groups = triton.cdiv(K, groupsize)
    zero_dtype = {ZERO_BYTES: torch.uint8, ZERO_FLOATS: torch.float32}.get(zero)
    parts, begin = [], 0
    for dtype, shape in (
        (torch.int32, (N, groups * groupsize // 32, 4)), (scale_dtype, (groups, N)), (zero_dtype, (groups, N))
    ):  # fmt: skip
        if dtype is not None:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            parts.append(packed[..., begin : begin + nbytes].view(dtype).view(*packed.shape[:-1], *shape))
            begin += triton.cdiv(nbytes, 16) * 16
    if begin != packed.shape[-1]:
        raise RuntimeError(f"expected {begin} bytes for {N} rows of {K} weights, got {packed.shape[-1]}")
    return *parts[:2], parts[-1]


@triton.jit
def _dequantize_int4(
    w_ptr, s_ptr, z_ptr, y_ptr, N, K, chunks,
    ZERO: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The arguments of _linear_int4 -> y [N, K] = (q - z) s."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    inside = (n < N) & (c < chunks)
    w = tl.load(w_ptr + ((n.to(tl.int64) * chunks + c) * 4)[:, :, None] + tl.arange(0, 4), inside[:, :, None], 0)
    y = dequantized_chunks(w, s_ptr, z_ptr, c * CHUNK // GROUP * N + n, inside, ZERO)
    k = (c * CHUNK)[:, :, None] + tl.arange(0, CHUNK)
    tl.store(y_ptr + n.to(tl.int64)[:, :, None] * K + k, y, inside[:, :, None] & (k < K))


def _dequantized(w: Tensor, s: Tensor, z: Tensor, K: int, groupsize: int, zero: int, dtype: torch.dtype) -> Tensor:
    N, chunks, _ = w.shape
    y = torch.empty(N, K, dtype=dtype, device=w.device)
    with torch.cuda.device_of(w):
        _dequantize_int4[triton.cdiv(N, 16), triton.cdiv(chunks, 16)](
            w, s, z, y, N, K, chunks, zero, groupsize, 16, 16, num_warps=4
        )
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Attention of a few queries over the cache
#
# The keys that a row of the batch sees, known on the device only, are divided among `splits` programs for each head of
# keys. So the grid is the same for every position (one CUDA graph), the cost follows the position, and a program
# without keys ends at once. Programs of a second kernel put the splits of a query together.
#
# In a ring, positions are counted from the oldest one that any query of the row sees: the slot of each then takes no
# division. A query so far from the others that its key has the slot of theirs is padding, and sees nothing.

LOG2_E = tl.constexpr(1.4426950408889634)  # scores are in powers of two


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, pos_ptr, rows_ptr, y_ptr, stats_ptr, scale, softcap,
    S, T, window, splits, k_b, k_h, k_t, v_b, v_h, v_t,
    KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, RING: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """q [B, S, KV * G, D] -> for each split of keys, float32: y [B, KV, splits, S * G, D], not yet divided by the sum
    of the weights, and stats [B, KV, splits, S * G, 2], the largest score (as a power of two) and that sum.

    Scores are scale * q k, with CAP softcap * tanh(scale / 2 * q k). int8 keys and values have scales [max_B, KV, T].
    """
    split, b, kv = tl.program_id(0), (tl.program_id(1) // KV).to(tl.int64), tl.program_id(1) % KV
    row, d = tl.program_id(2) * BM + tl.arange(0, BM), tl.arange(0, BD)
    s, live = row // G, row < S * G
    pos = tl.load(pos_ptr + b * S + s, live, -1)
    oldest = tl.maximum(tl.min(tl.where(live, pos, 2**62)) - window + 1, 0) if RING else 0
    oldest_slot = (oldest % (T - 1)).to(tl.int32) if RING else 0
    pos = _counted(pos, oldest, T, RING)
    first, last = tl.min(tl.where(live, pos, 2**30)), tl.max(pos)
    begin = tl.maximum(first - window + 1, 0) if WINDOW else 0
    end = tl.minimum(last + 1, T)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BT), splits) * BT
    begin += split * share
    end = tl.minimum(begin + share, end)

    head = (b * S + s) * (KV * G) + kv * G + row % G
    q = tl.load(q_ptr + head[:, None] * D + d[None, :], live[:, None] & (d < D)[None, :], 0)
    q = q.to(q_ptr.dtype.element_ty if k_scale_ptr is not None else k_ptr.dtype.element_ty)
    cache_row = b if rows_ptr is None else tl.load(rows_ptr + b)
    first_scale = (cache_row * KV + kv) * T
    k_ptr += cache_row * k_b + kv * k_h
    v_ptr += cache_row * v_b + kv * v_h
    most = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT)
        slot = t
        if RING:
            slot += oldest_slot
            slot = tl.where(slot < T - 1, slot, slot - (T - 1))
        inside = (t < end)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + slot[:, None] * k_t + d[None, :], inside, 0)
        v = tl.load(v_ptr + slot[:, None] * v_t + d[None, :], inside, 0)
        seen = (t[None, :] <= pos[:, None]) & (t < end)[None, :]
        if WINDOW:
            seen &= t[None, :] > pos[:, None] - window
        scores = tl.dot(q, k.to(q.dtype).T, input_precision="ieee") * scale
        if k_scale_ptr is not None:
            scores *= tl.load(k_scale_ptr + first_scale + slot, t < end, 0.0)[None, :]
        if CAP:
            scores = (2 * tl.sigmoid(scores) - 1) * softcap
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # no key yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(weights, 1)
        if v_scale_ptr is not None:  # what a query does not see may have any scale
            weights = tl.where(seen, weights * tl.load(v_scale_ptr + first_scale + slot, t < end, 0.0)[None, :], 0.0)
            v = v.to(q.dtype)
        weights = weights.to(v.dtype)
        acc *= shrink[:, None]
        most = new
        if v_scale_ptr is not None or S == 1 or (start + BT - 1 <= first and (not WINDOW or start > last - window)):
            acc = tl.dot(weights, v, acc, input_precision="ieee")
        else:
            # Not all queries see all of these values, and what one must not see may be NaN, which a weight of 0 does
            # not hide.
            for i in range(S):
                at = _counted(tl.load(pos_ptr + b * S + i), oldest, T, RING)
                visible = t <= at
                if WINDOW:
                    visible &= t > at - window
                part = tl.dot(weights, tl.where(visible[:, None], v, 0.0), input_precision="ieee")
                acc = tl.where((s == i)[:, None], acc + part, acc)

    out = (tl.program_id(1).to(tl.int64) * splits + split) * (S * G) + row
    tl.store(stats_ptr + out * 2, most, live)
    tl.store(stats_ptr + out * 2 + 1, total, live)
    tl.store(y_ptr + out[:, None] * D + d[None, :], acc, (live & (total != 0))[:, None] & (d < D)[None, :])


@triton.jit
def _counted(pos, oldest, T, RING: tl.constexpr):
    """int64 positions -> int32, in a ring from the oldest on; -1 for those that are not among its T - 1."""
    if RING:
        pos = pos - oldest
        pos = tl.where((pos >= 0) & (pos < T - 1), pos, -1)
    return tl.minimum(pos, 2**30).to(tl.int32)


@triton.jit
def _combine(
    part_ptr, stats_ptr, sinks_ptr, y_ptr, S, splits,
    KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What _attend left, and the heads' sinks [KV * G] if there are any -> y [B, S, KV * G, D]."""
    row, b, kv = tl.program_id(0), (tl.program_id(1) // KV).to(tl.int64), tl.program_id(1) % KV
    split, d = tl.arange(0, BS), tl.arange(0, BD)
    at = (tl.program_id(1).to(tl.int64) * splits + split) * (S * G) + row
    most = tl.load(stats_ptr + at * 2, split < splits, float("-inf"))
    total = tl.load(stats_ptr + at * 2 + 1, split < splits, 0.0)
    largest = tl.max(most, 0)
    if SINKS:
        sink = tl.load(sinks_ptr + kv * G + row % G).to(tl.float32) * LOG2_E
        largest = tl.maximum(largest, sink)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # padding that sees nothing
    weight = tl.exp2(most - largest)
    used = total != 0  # the others left nothing to read
    part = tl.load(part_ptr + at[:, None] * D + d[None, :], used[:, None] & (d < D)[None, :], 0.0)
    total = tl.sum(total * weight, 0)
    if SINKS:
        total += tl.exp2(sink - largest)
    y = tl.sum(part * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    head = (b * S + row // G) * (KV * G) + kv * G + row % G
    tl.store(y_ptr + head * D + d, y, d < D)


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

    See kernels.decode_attention. Positions and rows stay on the device.
    """
    B, S, H, D = q.shape
    KV, T = k_cache.shape[1:3]
    fits = k_cache.shape[0] >= B if rows is None else rows.shape == (B,)
    if k_cache.shape != v_cache.shape or not fits or k_cache.shape[3] != D or H % KV:
        raise RuntimeError(f"q {list(q.shape)} does not go with caches {list(k_cache.shape)}, {list(v_cache.shape)}")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1 or input_pos.shape != (B, S):
        raise RuntimeError(f"expected caches [max_B, KV, T, D] and input_pos [{B}, {S}], got {list(input_pos.shape)}")
    for cache, of_cache in ((k_cache, k_scale), (v_cache, v_scale)):
        if (cache.dtype == torch.int8) != (of_cache is not None):
            raise RuntimeError(f"expected scales with a cache in int8 and with no other, got a cache in {cache.dtype}")
        if of_cache is not None and (of_cache.shape != cache.shape[:3] or not of_cache.is_contiguous()):
            raise RuntimeError(f"expected contiguous scales {list(cache.shape[:3])}, got {list(of_cache.shape)}")
    if ring and (window is None or window > T - 1):
        raise RuntimeError(f"ring: expected a window of at most {T - 1}, got {window}")
    if sinks is not None and sinks.shape != (H,):
        raise RuntimeError(f"sinks: expected [{H}], got {list(sinks.shape)}")
    scale = D**-0.5 if scale is None else scale
    if not (scale > 0 and softcap >= 0):
        raise RuntimeError(f"expected scale > 0 and softcap >= 0, got {scale} and {softcap}")
    y = torch.empty(B, S, H, D, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    G, BD = H // KV, max(16, triton.next_power_of_2(D))
    BM = min(max(16, triton.next_power_of_2(S * G)), 64)
    BT = 64 if BD * k_cache.element_size() <= 256 else 32  # so that keys and values are 32 KB a stage at most
    splits = max(1, min(triton.cdiv(SPLIT_PROGRAMS, B * KV), triton.cdiv(T, BT), 64))
    part = torch.empty(B, KV, splits, S * G, D, dtype=torch.float32, device=q.device)
    stats = torch.empty(B, KV, splits, S * G, 2, dtype=torch.float32, device=q.device)
    scale = 2 * scale / softcap if softcap else scale * LOG2_E.value
    with torch.cuda.device_of(q):
        _attend[splits, B * KV, triton.cdiv(S * G, BM)](
            q.contiguous(), k_cache, v_cache, k_scale, v_scale, input_pos.contiguous(),
            None if rows is None else rows.contiguous(), part, stats, scale, softcap * LOG2_E.value,
            S, T, window or 0, splits, *k_cache.stride()[:3], *v_cache.stride()[:3], KV, G, D,
            window is not None, softcap > 0, ring, BM, BT, BD, num_warps=4, num_stages=3 if BT == 64 else 2,
        )  # fmt: skip
        _combine[S * G, B * KV](
            part, stats, None if sinks is None else sinks.contiguous(), y, S, splits, KV, G, D,
            sinks is not None, triton.next_power_of_2(splits), BD, num_warps=4,
        )  # fmt: skip
    return y
