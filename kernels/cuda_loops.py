"""What the kernels of cuda.py and cuda_experts.py share: the loops of linear layers of few rows, and int4 weights.

    y = multiply(x_ptr, w_ptr, s_ptr, r, live, N, K, ...)                # in a kernel: rows r of x times rows of w
    y = multiply_int4(x_ptr, w_ptr, s_ptr, z_ptr, r, live, N, K, chunks, ...)
    store(y, y_ptr, b_ptr, r, live, N, BIAS)
    w = dequantized_chunks(words, s_ptr, z_ptr, at, inside, ZERO)

A program computes 16 to 64 columns of y, those of program_id(1), for up to 16 rows of x, over all of K. The dots are
batched: K is cut in BC pieces, which go around the warps, so that each warp multiplies weights that no other warp
needs, and the pieces' sums are added at the end. The tensor cores take the weights as the side that has 16 rows, and x
as the side that has 8.
"""

import os

import triton
import triton.language as tl

from kernels.packing import FP4

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
E2M1 = tl.constexpr(FP4)
CHUNK = tl.constexpr(32)  # int4 weights in 16 bytes; every group is some chunks
STAGES = tl.constexpr(4)  # of the copies: three under way


@triton.jit
def multiply(
    x_ptr, w_ptr, s_ptr, r, live, N, K,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows r [BM] of x [rows, K], where they are live, times w [N, K] -> [BN, BM].

    w int8 and s float32 [N], or [K / GROUP, N] of any dtype, if there are groups, which are whole BK; or w of floats
    and no s. EVEN: BN divides N and BC * BK divides K.
    """
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    w_ptr += (tl.program_id(1) * BN).to(tl.int64) * K
    row = tl.arange(0, BN)
    acc = tl.zeros([BC, BN, BM], tl.float32)
    for start in tl.range(0, K, BC * BK, num_stages=STAGES):
        k = start + tl.arange(0, BC)[:, None] * BK + tl.arange(0, BK)[None, :]
        inside = tl.full([BC, BK], True, tl.int1) if EVEN else k < K
        some = tl.full([BN], True, tl.int1) if EVEN else n < N
        w = tl.load(w_ptr + row[None, :, None] * K + k[:, None, :], inside[:, None, :] & some[None, :, None], 0)
        x = tl.load(x_ptr + r[None, None, :] * K + k[:, :, None], inside[:, :, None] & live[None, None, :], 0)
        if GROUP:
            c = start + tl.arange(0, BC) * BK
            s = tl.load(s_ptr + (c // GROUP)[:, None] * N + n[None, :], (c < K)[:, None] & (n < N)[None, :], 0)
            acc += tl.dot(w.to(x.dtype), x) * s.to(tl.float32)[:, :, None]
        else:
            acc = tl.dot(w.to(x.dtype), x, acc)
    y = tl.sum(acc, 0)
    if s_ptr is not None and not GROUP:
        y *= tl.load(s_ptr + n, n < N, 0)[:, None]
    return y


@triton.jit
def multiply_int4(
    x_ptr, w_ptr, s_ptr, z_ptr, r, live, N, K, chunks,
    ZERO: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows r [BM] of x [rows, K], where they are live, times w int32 [N, chunks, 4] -> [BN, BM].

    w is as cuda.pack_int4 makes it, s and z [groups, N]. EVEN: BN divides N, BC divides chunks, K is CHUNK * chunks.
    """
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    w_ptr += (tl.program_id(1) * BN).to(tl.int64) * chunks * 4
    row = tl.arange(0, BN)
    word = tl.arange(0, 4)
    # Joined, as the weights are, so that both dots want x in the same registers.
    half = tl.full([BC, BN, CHUNK // 2], 1, tl.float32).to(x_ptr.dtype.element_ty)
    ones = tl.join(half, half).reshape(BC, BN, CHUNK)
    acc = tl.zeros([BC, BN, BM], tl.float32)
    for start in tl.range(0, chunks, BC, num_stages=STAGES):
        c = start + tl.arange(0, BC)
        k = c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        # For chunks beyond the last one, that one again: a mask would take more instructions. What x has there is 0.
        c = c if EVEN else tl.minimum(c, chunks - 1)
        inside = tl.full([BC, BN], True, tl.int1) if EVEN else tl.broadcast_to((n < N)[None, :], BC, BN)
        ends = tl.full([BC, CHUNK], True, tl.int1) if EVEN else k < K
        at = (c * CHUNK // GROUP)[:, None] * N + n[None, :]
        w = tl.load(w_ptr + (row[None, :, None] * chunks + c[:, None, None]) * 4 + word, inside[:, :, None], 0)
        x = tl.load(x_ptr + r[None, None, :] * K + k[:, :, None], ends[:, :, None] & live[None, None, :], 0)
        s = tl.load(s_ptr + at, inside, 0).to(tl.float32)
        q = _nibbles_as_floats(w, x.dtype, ZERO).permute(0, 1, 4, 2, 3, 5).reshape(BC, BN, CHUNK)
        part = tl.dot(q, x)
        if ZERO != E2M1:
            # What was added to q, and the zero, are subtracted from the sum, by way of the sum of x. Every row of it
            # is the same, yet it costs the tensor cores less than subtracting from each q would cost the others.
            sums = tl.dot(ones, x)
            if ZERO >= 0:
                part -= sums * (_offset(x.dtype) + ZERO)
            else:
                part -= sums * (_offset(x.dtype) + tl.load(z_ptr + at, inside, 0).to(tl.float32))[:, :, None]
        acc += part * s[:, :, None]
    return tl.sum(acc, 0)


@triton.jit
def _nibbles_as_floats(w, dtype: tl.constexpr, ZERO: tl.constexpr):
    """Words [..., 4] of pack_int4 -> [..., 4, 2, 2, 2], the q at bits 4 e + 8 h + 16 b at [e, h, b], plus _offset; or
    the values of q, if it is FP4.

    With the bits of 128 above it, a nibble in the low bits of a bfloat16 is 128 + q (of a float16: 1024 + q). So two
    weights become floats, in the register that the tensor cores read, by one shift and one operation a & b | c.
    An FP4 needs more: its exponent and mantissa go where a float's meet, and a product, which is exact for subnormal
    floats too (0 and 0.5), makes up for the other bias of the exponent.
    """
    BF16: tl.constexpr = dtype == tl.bfloat16
    if ZERO == E2M1:
        sign = tl.join(tl.join(w << 12, w << 8), tl.join(w << 4, w))  # to bits 15 and 31
        if BF16:
            size = tl.join(tl.join(w << 6, w << 2), tl.join(w >> 2, w >> 6)) & 0x01C001C0
        else:
            size = tl.join(tl.join(w << 9, w << 5), tl.join(w << 1, w >> 3)) & 0x0E000E00
        w = (sign & -0x7FFF8000) | size
        FMA: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;" if BF16 else "fma.rn.f16x2 $0, $1, $2, $3;"
        if not INTERPRETED:  # times 2^126 or 2^14, minus 0
            numbers = [w, 0x7E807E80 if BF16 else 0x74007400, -0x7FFF8000]
            w = tl.inline_asm_elementwise(FMA, "=r,r,r,r", numbers, tl.int32, is_pure=True, pack=1)
    else:
        w = tl.join(w, w >> 4)
        w = tl.join(w, w >> 8)
        AND_OR: tl.constexpr = (  # spelled out, since two constants make two instructions of it
            "lop3.b32 $0, $1, 0x000F000F, 0x43004300, 0xEA;" if BF16
            else "lop3.b32 $0, $1, 0x000F000F, 0x64006400, 0xEA;"
        )  # fmt: skip
        if INTERPRETED:
            w = (w & 0x000F000F) | (0x43004300 if BF16 else 0x64006400)
        else:
            w = tl.inline_asm_elementwise(AND_OR, "=r,r", [w], tl.int32, is_pure=True, pack=1)
    q = tl.join(w.to(tl.int16), (w >> 16).to(tl.int16)).to(dtype, bitcast=True)
    if INTERPRETED and ZERO == E2M1:
        q = (q.to(tl.float32) * (2.0**126 if BF16 else 2.0**14)).to(dtype)
    return q


@triton.jit
def _offset(dtype: tl.constexpr):
    return 128.0 if dtype == tl.bfloat16 else 1024.0


@triton.jit
def store(y, y_ptr, b_ptr, r, live, N, BIAS: tl.constexpr):
    """Adds the bias to y [BN, BM], which goes to the live ones of rows r of y_ptr [..., N]."""
    n = tl.program_id(1) * y.shape[0] + tl.arange(0, y.shape[0])
    if BIAS:
        y += tl.load(b_ptr + n, n < N, 0).to(tl.float32)[:, None]
    tl.store(y_ptr + r[None, :] * N + n[:, None], y, live[None, :] & (n < N)[:, None])


@triton.jit
def dequantized_chunks(w, s_ptr, z_ptr, at, inside, ZERO: tl.constexpr):
    """Words [n, chunks, 4] of pack_int4, with scales and zeros `at` [n, chunks] -> (q - z) s [n, chunks, CHUNK]."""
    w = tl.join(w, w >> 4)
    w = tl.join(w, w >> 8)
    w = tl.join(w, w >> 16)  # [n, chunks, j, e, h, b]
    q = w.permute(0, 1, 4, 2, 3, 5).reshape(w.shape[0], w.shape[1], CHUNK)
    if ZERO == E2M1:  # as in _nibbles_as_floats
        q = (((q & 8) << 28) | ((q & 7) << 22)).to(tl.float32, bitcast=True) * 2.0**126
    else:
        zero = tl.load(z_ptr + at, inside, 0).to(tl.float32)[:, :, None] if ZERO < 0 else ZERO
        q = (q & 15).to(tl.float32) - zero
    return q * tl.load(s_ptr + at, inside, 0).to(tl.float32)[:, :, None]
