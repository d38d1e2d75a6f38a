"""Linear layers of mixtures of experts for CUDA, in Triton: y = x W^T + b, where each row chooses some of the W.

    y = linear_experts(x, weight, chosen, bias)                          # weight [E, N, K] of floats
    y = linear_int8_experts(x, packed, scales, chosen, bias)             # int8 [E, N, K], a scale a row
    y = linear_int8_grouped_experts(x, packed, scales, chosen, out_features, groupsize, bias)
    y = linear_int4_experts(x, packed, chosen, out_features, groupsize, scale_dtype, zero, bias)

Row r of `chosen` [R, k] names k experts, and y [R, k, N] has what each makes of its input, x[r, j]; where x is
[R, 1, K], all of a row's have the same. The pairs (r, j) are numbered r k + j here.

Pairs with the same expert share the reading of its weights: a program takes a block of up to BM of them, and some
columns. Which pairs a block holds is known on the device only, so the grid has as many blocks as there can be, and
programs without pairs end at once. Nothing waits for the device: CUDA graphs can record a decode step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda import _block, _parts
from kernels.cuda_loops import CHUNK, dequantized_chunks, multiply, multiply_int4, store

FEW_ROWS = 16  # of an expert, on average; for more, larger blocks are worth their registers
FEW_PAIRS = 64  # programs find their pairs themselves, which is faster than one more launch
SORTED = tl.constexpr(1024)  # pairs that _sort looks at together

# ---------------------------------------------------------------------------------------------------------------------
# Blocks of pairs


@triton.jit
def _sort(chosen_ptr, sorted_ptr, P, BM: tl.constexpr):
    """chosen [P] -> the pairs of each expert in blocks of BM [E + P // BM, BM], -1 where a block has no more.

    A program for each expert e, which gets the blocks from pairs_before(e) // BM + e on, up to those of e + 1. That is
    one more than its pairs may need, and does not depend on how many blocks the others fill.
    """
    e = tl.program_id(0)
    lane = tl.arange(0, SORTED)
    before, own = 0, 0
    for start in range(0, P, SORTED):
        chosen = tl.load(chosen_ptr + start + lane, start + lane < P, 2**31 - 1)
        before += tl.sum((chosen < e).to(tl.int32))
        own += tl.sum((chosen == e).to(tl.int32))
    first, end = before // BM + e, (before + own) // BM + e + 1
    sorted_ptr += first * BM
    tl.store(sorted_ptr + own + lane, -1, own + lane < (end - first) * BM)
    done = 0
    for start in range(0, P, SORTED):
        same = (tl.load(chosen_ptr + start + lane, start + lane < P, -1) == e).to(tl.int32)
        tl.store(sorted_ptr + done + tl.cumsum(same) - 1, start + lane, same != 0)
        done += tl.sum(same)


@triton.jit
def _pairs(chosen_ptr, sorted_ptr, P, BM: tl.constexpr, BP: tl.constexpr):
    """The expert of block program_id(0), negative if there is no such block, and its pairs [BM], negative likewise.

    BP 0: as _sort has them. 1: each pair is a block. Else all P <= BP pairs are looked at here, and pair i begins
    block i, if a multiple of BM pairs before it has the same expert.
    """
    block, m = tl.program_id(0), tl.arange(0, BM)
    if BP == 0:
        pairs = tl.load(sorted_ptr + block * BM + m)
        first = tl.load(sorted_ptr + block * BM)
        expert = tl.load(chosen_ptr + first, first >= 0, -1)
    elif BP == 1:
        pairs = tl.where(m == 0, block, -1)
        expert = tl.load(chosen_ptr + block)
    else:
        expert = tl.load(chosen_ptr + block)
        i = tl.arange(0, BP)
        same = tl.load(chosen_ptr + i, i < P, -1) == expert
        before = tl.sum((same & (i < block)).to(tl.int32))
        slot = tl.cumsum(same.to(tl.int32)) - 1 - before
        here = same[None, :] & (slot[None, :] == m[:, None])
        pairs = tl.sum(tl.where(here, i[None, :] + 1, 0), 1) - 1
        expert = tl.where(before % BM == 0, expert, -1)
    return expert.to(tl.int64), pairs


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _few(
    x_ptr, w_ptr, s_ptr, b_ptr, y_ptr, chosen_ptr, sorted_ptr, P, share, N, K,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """x [P / share, K], w [E, N, K], and s and EVEN as in `multiply`, for each expert -> y [P, N]."""
    expert, pairs = _pairs(chosen_ptr, sorted_ptr, P, BM, BP)
    if expert < 0:
        return
    w_ptr += expert * N * K
    if s_ptr is not None:
        s_ptr += expert * N * (K // GROUP if GROUP else 1)
    if BIAS:
        b_ptr += expert * N
    y = multiply(x_ptr, w_ptr, s_ptr, pairs // share, pairs >= 0, N, K, GROUP, BM, BN, BC, BK, EVEN)
    store(y, y_ptr, b_ptr, pairs, pairs >= 0, N, BIAS)


@triton.jit
def _few_int4(
    x_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, chosen_ptr, sorted_ptr, P, share, N, K, chunks, size,
    ZERO: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """x [P / share, K], and w, s, z and EVEN as in `multiply_int4`, every 16 * size bytes -> y [P, N]."""
    expert, pairs = _pairs(chosen_ptr, sorted_ptr, P, BM, BP)
    if expert < 0:
        return
    w_ptr += expert * size * 4
    s_ptr += expert * size * (128 // s_ptr.dtype.element_ty.primitive_bitwidth)
    z_ptr += expert * size * (128 // z_ptr.dtype.element_ty.primitive_bitwidth)
    if BIAS:
        b_ptr += expert * N
    r, live = pairs // share, pairs >= 0
    y = multiply_int4(x_ptr, w_ptr, s_ptr, z_ptr, r, live, N, K, chunks, ZERO, GROUP, BM, BN, BC, EVEN)
    store(y, y_ptr, b_ptr, pairs, live, N, BIAS)


@triton.jit
def _many(
    x_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr, chosen_ptr, sorted_ptr, P, share, N, K, chunks, size,
    ZERO: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BIAS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """What _few does, or, if w is int32, _few_int4, for blocks of more pairs, whose dots are whole matrices.

    Weights in groups become floats before they are multiplied, not after. They are the tensor cores' first matrix,
    since only that may come out of registers.
    """
    expert, pairs = _pairs(chosen_ptr, sorted_ptr, P, BM, BP)
    if expert < 0:
        return
    INT4: tl.constexpr = w_ptr.dtype.element_ty == tl.int32
    BC: tl.constexpr = BK // CHUNK
    begin, row = tl.program_id(1) * BN, tl.arange(0, BN)
    n = begin + row
    if INT4:
        w_ptr += expert * size * 4 + begin.to(tl.int64) * chunks * 4
        s_ptr += expert * size * (128 // s_ptr.dtype.element_ty.primitive_bitwidth)
        z_ptr += expert * size * (128 // z_ptr.dtype.element_ty.primitive_bitwidth)
    else:
        w_ptr += (expert * N + begin) * K
        if s_ptr is not None:
            s_ptr += expert * N * (K // GROUP if GROUP else 1)
    if BIAS:
        b_ptr += expert * N
    live = pairs >= 0
    x_rows = x_ptr + (pairs // share).to(tl.int64) * K
    acc = tl.zeros([BN, BM], tl.float32)
    for start in tl.range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_rows[None, :] + k[:, None], (k < K)[:, None] & live[None, :], 0)
        if GROUP:
            c = start // CHUNK + tl.arange(0, BC)
            inside = (n < N)[:, None] & (c < chunks)[None, :]
            at = (c * CHUNK // GROUP)[None, :] * N + n[:, None]
        if INT4:
            words = w_ptr + (row[:, None] * chunks + c[None, :])[:, :, None] * 4 + tl.arange(0, 4)
            w = tl.load(words, inside[:, :, None], 0)
            w = dequantized_chunks(w, s_ptr, z_ptr, at, inside, ZERO).reshape(BN, BK)
        else:
            w = tl.load(w_ptr + row[:, None] * K + k[None, :], (n < N)[:, None] & (k < K)[None, :], 0)
            if GROUP:
                s = tl.load(s_ptr + at, inside, 0).to(tl.float32)
                w = (w.to(tl.float32).reshape(BN, BC, CHUNK) * s[:, :, None]).reshape(BN, BK)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
    if s_ptr is not None and not GROUP:
        acc *= tl.load(s_ptr + n, n < N, 0)[:, None]
    store(acc, y_ptr, b_ptr, pairs.to(tl.int64), live, N, BIAS)


# ---------------------------------------------------------------------------------------------------------------------
# Ops


def linear_experts(x: Tensor, weight: Tensor, chosen: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, 1 or k, K] times weights [E, N, K] of floats, those that int64 [R, k] chooses -> [R, k, N] in x's dtype.

    A bias is [E, N]. RuntimeError for other shapes; what is chosen is not checked.
    """
    return _matrices(x, weight, None, chosen, 0, bias)


def linear_int8_experts(
    x: Tensor, packed: Tensor, scales: Tensor, chosen: Tensor, bias: Tensor | None = None
) -> Tensor:
    """linear_experts with weights int8 [E, N, K] and float32 scales [E, N]."""
    return _matrices(x, packed, scales, chosen, 0, bias)


def linear_int8_grouped_experts(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    chosen: Tensor,
    out_features: int,
    groupsize: int,
    bias: Tensor | None = None,
) -> Tensor:
    """linear_experts with weights int8 [E, N, K] and scales [E, K / groupsize, N]."""
    return _matrices(x, packed, scales, chosen, groupsize, bias)


def linear_int4_experts(
    x: Tensor,
    packed: Tensor,
    chosen: Tensor,
    out_features: int,
    groupsize: int,
    scale_dtype: torch.dtype,
    zero: int,
    bias: Tensor | None = None,
) -> Tensor:
    """linear_experts with int4 weights: uint8 [E, bytes], for each expert what cuda.pack_int4 makes of its weight."""
    if packed.ndim != 2 or not packed.is_contiguous():
        raise RuntimeError(f"expected packed [experts, bytes], contiguous, got {list(packed.shape)}")
    w, s, z = _parts(packed, out_features, x.shape[-1], groupsize, scale_dtype, zero)
    return _run(x, w, s, z, chosen, out_features, groupsize, bias, zero, packed.shape[1] // 16)


def _matrices(x: Tensor, w: Tensor, s: Tensor | None, chosen: Tensor, groupsize: int, bias: Tensor | None) -> Tensor:
    E, N, K = w.shape
    expected = (E, K // groupsize, N) if groupsize else (E, N)
    if x.shape[-1] != K or (s is not None and s.shape != expected) or (groupsize and K % groupsize):
        got = None if s is None else list(s.shape)
        raise RuntimeError(f"expected x [..., {K}] and scales {expected}, got {list(x.shape)} and {got}")
    if not w.is_contiguous() or not (s is None or s.is_contiguous()):
        raise RuntimeError("expected weights and scales that are contiguous")
    return _run(x, w, s, None, chosen, N, groupsize, bias)


def _run(
    x: Tensor,
    w: Tensor,
    s: Tensor | None,
    z: Tensor | None,
    chosen: Tensor,
    N: int,
    groupsize: int,
    bias: Tensor | None,
    zero: int = 0,
    size: int = 0,
) -> Tensor:
    """`size`: the bytes of an expert over 16, if w is int4."""
    E, K = w.shape[0], x.shape[-1]
    if x.ndim != 3 or chosen.ndim != 2 or x.shape[0] != chosen.shape[0] or x.shape[1] not in (1, chosen.shape[1]):
        raise RuntimeError(f"expected x [R, 1 or k, K] and chosen [R, k], got {list(x.shape)}, {list(chosen.shape)}")
    if bias is not None and (bias.shape != (E, N) or not bias.is_contiguous()):
        raise RuntimeError(f"expected bias [{E}, {N}], contiguous, got {list(bias.shape)}")
    R, k = chosen.shape
    y = x.new_empty(R, k, N)
    if not y.numel():
        return y
    int4, pairs, rows = w.dtype == torch.int32, R * k, triton.cdiv(R * k, E)
    chunks = w.shape[2] if int4 else triton.cdiv(K, 32)
    few = rows <= FEW_ROWS and x.dtype != torch.float32
    if few:
        BM, BN = _block(rows, min(pairs, E) * N)
    elif x.dtype == torch.float32:  # for comparisons
        BM, BN = 16, 32
    else:
        BM, BN = min(max(triton.next_power_of_2(rows), 32), 128), 128
    if R == 1:
        blocks, BP = pairs, 1
    elif pairs <= FEW_PAIRS:
        blocks, BP = pairs, triton.next_power_of_2(pairs)
    else:
        blocks, BP = E + pairs // BM, 0
    x, chosen, order = x.contiguous(), chosen.contiguous(), None
    grid, shape = (blocks, triton.cdiv(N, BN)), (pairs, k // x.shape[1], N, K)
    with torch.cuda.device_of(x):
        if not BP:
            order = torch.empty(blocks * BM, dtype=torch.int32, device=x.device)
            _sort[E,](chosen, order, pairs, BM, num_warps=4)
        if not few:
            _many[grid](
                x, w, s, z, bias, y, chosen, order, *shape, chunks, size, zero, groupsize, BM, BN,
                32 if x.dtype == torch.float32 else 64,
                BIAS=bias is not None, BP=BP, num_warps=8 if BM == 128 else 4,
            )  # fmt: skip
        elif int4:
            BC = 512 // BN  # 8 KB of weights a stage
            _few_int4[grid](
                x, w, s, z, bias, y, chosen, order, *shape, chunks, size, zero, groupsize, BM, BN, BC,
                EVEN=N % BN == chunks % BC == 0 and chunks * 32 == K, BIAS=bias is not None, BP=BP, num_warps=4,
            )  # fmt: skip
        else:
            width = (512 if BN == 16 else 256) // w.element_size()  # 8 KB of weights a stage, or 16
            BK = min(width // 4, groupsize or width)
            _few[grid](
                x, w, s, bias, y, chosen, order, *shape, groupsize, BM, BN, width // BK, BK,
                EVEN=N % BN == K % width == 0, BIAS=bias is not None, BP=BP, num_warps=4,
            )  # fmt: skip
    return y
