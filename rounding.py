"""Weights as small integers: to nearest, or by GPTQ (https://arxiv.org/abs/2210.17323). Tensors only, no files.

    levels, scales = quantize_int8(weight, groupsize=0)                   # w = q * scale, a scale a row or a group
    levels, scales = quantize_int4(weight, groupsize=32)                  # w = (q - 8) * scale, a scale a group
    inputs = inputs_of(linear, texts, run)                                # of a layer, while a model runs real text
    (packed, scales, zeros), error = gptq_layer([weight], hessian, 32)    # rounded so that its output changes least

Weights are float32 [out, in], and a group is `groupsize` inputs of an output. Scales of groups are such as bfloat16
has: 16 bits cost nothing, because the levels are chosen after the scale is rounded, and it has the range that float16
lacks.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from errors import UserError
from kernels.packing import dequantize, pack_nibbles

SCALE_DTYPE = torch.bfloat16  # of groups
ZERO = 8  # of int4: kernels read nothing for a zero that all groups share
CLIPPING = [1.09 - 0.03 * step for step in range(13)]  # of a group's range, what is tried
BLOCK = 128  # inputs between updates of the whole rest of a weight; a multiple of every group size
DAMPING = 0.01  # of the mean of the Hessian's diagonal
DAMPING_STEPS = 8  # times 10, as long as that does not suffice

# ---------------------------------------------------------------------------------------------------------------------
# Rounding


def quantize_int8(weight: Tensor, groupsize: int = 0) -> tuple[Tensor, Tensor]:
    """float32 [out, in] -> int8 [out, in], and scales: the largest of a row, or of a group, becomes 127.

    A row: float32 [out]. A group: bfloat16 [out, in / groupsize].
    """
    groups = weight.unflatten(1, (-1, groupsize or weight.shape[1]))
    scales = groups.abs().amax(dim=-1) / 127
    dtype = SCALE_DTYPE if groupsize else torch.float32
    scales = scales.to(dtype).clamp(min=torch.finfo(torch.float32).tiny)
    levels = (groups / scales[..., None].float()).round().to(torch.int8).flatten(1)
    return levels, scales if groupsize else scales[:, 0]


def to_levels(weight: Tensor, scale: Tensor) -> Tensor:
    """The levels 0..15, as floats, that stand for `weight` in w = (q - 8) * scale."""
    return (weight / scale + ZERO).round().clamp(0, 15)


def choose_scale(groups: Tensor, importance: Tensor | None = None) -> Tensor:
    """The scale, float32 [...], of each group [..., g]: of those that clip it more or less, the best.

    Best is the least squared error, each element's weighted by `importance` [g] if given. The levels reach from -8 to
    7, so a scale has the sign that puts the largest weight on the side of the 8. Scales are such as bfloat16 has.
    """
    tiny = torch.finfo(torch.float32).tiny
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    unit = largest.abs().clamp(min=tiny)[..., None]  # squares are taken in units of it
    best, best_scale = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for part in CLIPPING:
        scale = (part * (largest / -ZERO)).to(SCALE_DTYPE).float()
        scale = torch.where(scale.abs() < tiny, tiny, scale)
        wrong = (to_levels(groups, scale[..., None]) - ZERO) * (scale[..., None] / unit) - groups / unit
        error = wrong.square().sum(-1) if importance is None else (wrong.square() * importance).sum(-1)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
    return best_scale


def quantize_int4(weight: Tensor, groupsize: int) -> tuple[Tensor, Tensor]:
    """float32 [out, in] -> levels [out, in] and scales [out, in / groupsize], both float32: round to nearest."""
    groups = weight.unflatten(1, (-1, groupsize))
    scales = choose_scale(groups)
    return to_levels(groups, scales[..., None]).flatten(1), scales


def stored_int4(levels: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize_int4` returns -> as the file holds it: two levels in a byte, scales, zeros."""
    packed = pack_nibbles(levels.to(torch.uint8))
    return packed.cpu(), scales.to(SCALE_DTYPE).cpu(), torch.full(scales.shape, ZERO, dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U [in, in] with H^-1 = U^T U, of H damped.

    Inputs that the calibration text never moved get a curvature of their own, so that they are simply rounded.
    UserError where H is not finite, or not positive however much it is damped.
    """
    # With J that reverses the order, J H J = L L^T gives H = R R^T with R = J L J upper triangular, and U = R^-1: one
    # factorization and one inversion of a triangle, rather than an inverse and a factorization of that.
    live = hessian.diagonal()[hessian.diagonal() != 0]
    mean, damping = live.mean() if len(live) else 1.0, 0.0
    for step in range(DAMPING_STEPS):  # more of it where rounding makes the least eigenvalues negative
        damping += DAMPING * 10**step
        backwards = hessian.flip(0, 1)
        diagonal = backwards.diagonal()
        diagonal[diagonal == 0] = mean
        diagonal += damping * mean
        inverse = inverse_cholesky_(backwards)
        if inverse is not None:
            return inverse.flip(0, 1)
    raise UserError("the Hessian of the calibration text is not finite or not positive; calibrate on another text")


def inverse_cholesky_(matrix: Tensor) -> Tensor | None:
    """L^-1 with L L^T = `matrix` [n, n], which is overwritten; None where that is not positive definite.

    In blocks, by matrix products: their sums have the same order with any number of threads, those of LAPACK's
    factorizations don't, and one weight that is rounded the other way changes all that follow.
    """
    inverse = torch.zeros_like(matrix)
    identity = torch.eye(BLOCK, dtype=matrix.dtype, device=matrix.device)
    for start in range(0, len(matrix), BLOCK):
        stop = min(start + BLOCK, len(matrix))
        before, here, after = slice(0, start), slice(start, stop), slice(stop, None)
        lower, failed = torch.linalg.cholesky_ex(matrix[here, here])
        if failed or not bool(lower.isfinite().all()):
            return None
        corner = torch.linalg.solve_triangular(lower, identity[: stop - start, : stop - start], upper=False)
        inverse[here, here] = corner
        inverse[here, before] = -corner @ (matrix[here, before] @ inverse[before, before])
        below = matrix[after, here] = matrix[after, here] @ corner.t()
        matrix[after, after].addmm_(below, below.t(), alpha=-1)
    return inverse


def gptq(
    weight: Tensor, importance: Tensor, factor: Tensor, groupsize: int, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """float32 [out, in] -> levels and scales like `quantize_int4`, by GPTQ.

    Inputs are rounded one after the other, and what each rounding does wrong is taken back, as far as that goes, by
    those that follow. `importance` [in] is the Hessian's diagonal, `factor` its `inverse_factor`. Scales are chosen
    when a group begins, from what its weights have become by then; given an `order` [in] in which inputs are taken,
    which is then also that of `factor`, they are chosen up front, so that groups are of neighbours all the same.
    """
    out, width = weight.shape
    left = weight.t().clone() if order is None else weight.t()[order]  # [in, out]: an input's weights side by side
    scales = weight.new_empty(width // groupsize, out)
    if order is not None:
        scales = choose_scale(weight.unflatten(1, (-1, groupsize)), importance.view(-1, groupsize)).t()
    levels = torch.empty_like(left)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        block, errors = left[start:stop], torch.empty_like(left[start:stop])
        for i in range(start, stop):
            group = (i if order is None else int(order[i])) // groupsize
            if order is None and i % groupsize == 0:
                inside = block[i - start : i - start + groupsize]
                scales[group] = choose_scale(inside.t(), importance[i : i + groupsize])
            here = block[i - start]
            levels[i] = to_levels(here, scales[group])
            errors[i - start] = (here - (levels[i] - ZERO) * scales[group]) / factor[i, i]
            block[i - start + 1 :] -= factor[i, i + 1 : stop, None] * errors[i - start]
        left[stop:] -= factor[start:stop, stop:].t() @ errors
    if order is not None:
        levels[order] = levels.clone()
    return levels.t().contiguous(), scales.t().contiguous()


def gptq_layer(
    chunks: Iterable[Tensor], hessian: Tensor, groupsize: int, act_order: bool = False
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Quantizes a layer, given as float32 rows of its weight, which are overwritten with what they become.

    Returns the layer as the file holds it and how far its outputs are off: the root of the squared error's share.
    """
    hessian = hessian.double()
    hessian = hessian / hessian.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)  # float32 will hold it
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    factor = inverse_factor(hessian if order is None else hessian[order][:, order]).float()
    hessian = hessian.float()
    packed, wrong, whole = [], 0.0, 0.0
    for weight in chunks:
        quantized = gptq(weight, hessian.diagonal(), factor, groupsize, order)
        rounded = dequantize(*quantized, ZERO, groupsize)
        change = rounded - weight
        wrong += float(((change @ hessian) * change).sum())
        whole += float(((weight @ hessian) * weight).sum())
        weight.copy_(rounded)
        packed.append(stored_int4(*quantized))
    return tuple(torch.cat(parts) for parts in zip(*packed, strict=True)), math.sqrt(max(wrong, 0) / (whole or 1))


class Reached(Exception):
    """Ends a forward where a layer's input is known."""


def inputs_of(module: nn.Module, inputs: Iterable[Tensor], run: Callable[[Tensor], Tensor]) -> Iterator[tuple]:
    """The arguments that `module` is called with while `run` is called on each of `inputs`, which goes no further."""
    seen: list[tuple] = []

    def collect(_, args: tuple) -> None:
        seen.append(args)
        raise Reached

    hook = module.register_forward_pre_hook(collect)
    for x in inputs:
        with contextlib.suppress(Reached):
            run(x)
        yield seen.pop()
    hook.remove()
