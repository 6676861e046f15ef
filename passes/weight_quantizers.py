"""Weight ranges and rounding to nearest: symmetric, per output channel or per tensor.

All functions work on weight matrices W[groups, k, outputs] (see `normal_equations`), where column `m` of group `g`
is one output channel.
Source: Zhang, Colbert, Das, Applied Sciences 2022, 12(15), 7829, Section 3 (symmetric uniform weights).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-96
CHUNK = 1 << 21
"""Elements that the search touches at a time, so that its temporaries stay in cache."""


def integer_limits(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed weight of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def round_nearest(matrix: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest integers of `matrix` / `scale`, clipped; same shape and float type as `matrix`.

    Parameters
    ----------
    matrix : float[groups, k, outputs]
        Weights, bias row excluded.
    scale : float[groups, outputs]
        Step of each output channel.
    bits : int
        2..8.
    """
    low, high = integer_limits(bits)
    return torch.clamp(torch.round(matrix / scale[:, None, :]), low, high)


def max_scale(matrix: Tensor, bits: int) -> Tensor:
    """Scale[groups, outputs] at which the largest magnitude is just representable; 1 for channels that are all zero."""
    largest = matrix.abs().amax(dim=1)
    scale = torch.clamp(largest / (2 ** (bits - 1) - 1), min=SMALLEST_SCALE)
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def choose_scales(
    matrix: Tensor,
    bits: int,
    importance: Tensor | None = None,
    *,
    per_channel: bool = True,
    power_of_two: bool = False,
    unit: float = 1.0,
) -> Tensor:
    """Scales with the least weighted squared error sum_k h_k (w_k - q(w_k))^2, by search below `max_scale`.

    Parameters
    ----------
    matrix : float[groups, k, outputs]
        Weights, bias row excluded.
    bits : int
        2..8.
    importance : float[groups, k], optional
        Diagonal of the (centred) X^T X: how much an error of weight k shows in the output. Equal for all by default.
    per_channel : bool
        One scale per output channel, else one for the whole tensor (repeated).
    power_of_two : bool
        Only powers of two times `unit`.
    unit : float
        See `power_of_two`.

    Returns
    -------
    float32[groups, outputs]
    """
    matrix = matrix.float()
    top = max_scale(matrix, bits)
    if not per_channel:
        zero = matrix.abs().amax(dim=1) == 0
        top = torch.where(zero, torch.zeros_like(top), top).max().expand_as(top)
        top = torch.where(top > 0, top, torch.ones_like(top))
    weights = torch.ones(matrix.shape[:2]) if importance is None else importance.float()
    # Where no input varies at all every scale is as good as another: fall back on plain squared error.
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, torch.ones_like(weights))
    weights = weights / weights.mean(dim=1, keepdim=True)
    step = unit if power_of_two else None
    return _search(matrix, top, weights, bits, per_channel=per_channel, unit=step)


def _ratios(bits: int) -> list[float]:
    """Fractions of the largest scale that are tried: coarse bits gain from deep clipping, fine bits do not."""
    smallest, count = (0.2, 56) if bits <= 3 else (0.35, 40) if bits <= 5 else (0.7, 12)
    return [1.0 - (1.0 - smallest) * i / (count - 1) for i in range(count)]


def _search(
    matrix: Tensor, top: Tensor, weights: Tensor, bits: int, *, per_channel: bool, unit: float | None
) -> Tensor:
    if unit is not None:
        ceiling = unit * torch.exp2(torch.ceil(torch.log2(top / unit) - 1e-6))
        candidates = [ceiling * 2.0**-step for step in range(4 if bits <= 4 else 2)]
    else:
        candidates = [top * ratio for ratio in _ratios(bits)]
    best_error = torch.full(top.shape, math.inf)
    best = candidates[0].clone()
    for scale in candidates:
        error = _weighted_error(matrix, scale, weights, bits)
        if not per_channel:
            error = error.sum().expand_as(error)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return torch.clamp(best, min=SMALLEST_SCALE)


def _weighted_error(matrix: Tensor, scale: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Sum over k of weights * squared rounding error, float32[groups, outputs]."""
    low, high = integer_limits(bits)
    groups, rows, outputs = matrix.shape
    error = torch.zeros(groups, outputs)
    step = max(1, CHUNK // max(1, groups * outputs))
    inverse = (1.0 / scale)[:, None, :]
    for start in range(0, rows, step):
        part = matrix[:, start : start + step]
        residue = torch.mul(part, inverse).round_().clamp_(low, high).mul_(scale[:, None, :]).sub_(part)
        error += torch.einsum("gkm,gk->gm", residue.square_(), weights[:, start : start + step])
    return error
