"""Rounding with error feedback (GPTQ): each weight is rounded so that it makes up for the errors of those rounded
before it.

Minimises tr((W - Q)^T H (W - Q)) greedily. With H = R D R^T, R unit upper triangular in the chosen order, the loss
is the sum over k of
D_k |e_k + sum_{j<k} R_jk e_j|^2, so weight k is rounded after adding sum_{j<k} R_jk e_j, where e_j = w_j - q_j.
This needs one Cholesky
factorisation and no inverse; blocks of columns make the feedback a matrix product. All output channels are rounded
at once.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", 2022; Chee, Cai, Kuleshov, De Sa, "QuIP", 2023 (the factorised
form and its equivalence).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpsn_tvm.passes.weight_quantizers import integer_limits, round_nearest

DAMPING = 1e-2
BLOCK = 96
REFINE_LIMIT = 640
"""Up to this many columns rounding is improved weight by weight afterwards; above, it takes too long."""


def gptq_round(
    matrix: Tensor,
    gram: Tensor,
    scale: Tensor,
    bits: int,
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
    sweeps: int = 2,
) -> Tensor:
    """Integers Q[groups, k, outputs] (float32 holding integers) of small output error.

    Parameters
    ----------
    matrix : float[groups, k, outputs]
        Weights without the bias row.
    gram : float64[groups, k, k]
        Centred X^T X of the layer's inputs.
    scale : float32[groups, outputs]
        Step of each output channel.
    bits : int
        2..8.
    damping : float
        Added to the diagonal, as a fraction of its mean.
    block : int
        Columns whose feedback is applied one by one; the rest is a matrix product.
    sweeps : int
        Coordinate-descent passes afterwards (for at most `REFINE_LIMIT` columns).

    Notes
    -----
    The result is never worse than nearest rounding on `gram`: an output channel for which it would be takes the
    nearest integers.
    """
    matrix = matrix.float()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    ordered = matrix.gather(1, order[:, :, None].expand_as(matrix))
    factor = _unit_factor(_permuted(gram, order), damping)
    result = _feedback_round(ordered, factor, scale, bits, block)
    integers = torch.empty_like(result).scatter_(1, order[:, :, None].expand_as(result), result)
    nearest = round_nearest(matrix, scale, bits)
    keep = output_error(matrix, nearest, scale, gram) < output_error(matrix, integers, scale, gram)
    integers = torch.where(keep[:, None, :], nearest, integers)
    if matrix.shape[1] <= REFINE_LIMIT and sweeps:
        integers = _refine(matrix, integers, scale, gram, bits, sweeps, damping)
    return integers


def output_error(matrix: Tensor, integers: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """Squared output error (w - q)^T gram (w - q) of each output channel, float[groups, outputs]."""
    error = matrix.float() - integers.float() * scale[:, None, :]
    return (error * torch.bmm(gram.float(), error)).sum(dim=1)


def refit_scale(matrix: Tensor, integers: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """Best scales for given integers: (q^T H w) / (q^T H q) per output channel, kept within 25 % of the old ones."""
    product = torch.bmm(gram.float(), integers.float())
    above, below = (product * matrix.float()).sum(dim=1), (product * integers.float()).sum(dim=1)
    fitted = torch.where(below > 0, above / below.clamp(min=1e-30), scale)
    return torch.where((fitted > 0.8 * scale) & (fitted < 1.25 * scale), fitted, scale)


def _permuted(gram: Tensor, order: Tensor) -> Tensor:
    if gram.shape[0] == 1:
        return gram[0][order[0]][:, order[0]][None].float()
    k = gram.shape[1]
    rows = gram.gather(1, order[:, :, None].expand(-1, -1, k))
    return rows.gather(2, order[:, None, :].expand(-1, k, -1)).float()


def _unit_factor(gram: Tensor, damping: float) -> Tensor:
    """Unit upper triangular R with gram + damping = R D R^T; float32[groups, k, k]. Overwrites `gram`."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    # Inputs that never vary: any H will do, the rounding is then to nearest.
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    while True:
        gram.diagonal(dim1=1, dim2=2).add_((damping * mean)[:, None])
        # Reversed both ways the lower factor becomes the upper one.
        lower, info = torch.linalg.cholesky_ex(gram.flip(1, 2))
        if not bool(info.any()):
            break
        damping *= 10.0
    upper = lower.flip(1, 2)
    unit: Tensor = upper / upper.diagonal(dim1=1, dim2=2)[:, None, :]
    return unit


def _feedback_round(matrix: Tensor, factor: Tensor, scale: Tensor, bits: int, block: int) -> Tensor:
    low, high = integer_limits(bits)
    columns = matrix.shape[1]
    integers = torch.empty_like(matrix)
    error = torch.zeros_like(matrix)
    inverse = 1.0 / scale
    for start in range(0, columns, block):
        end = min(start + block, columns)
        wanted = matrix[:, start:end].clone()
        if start:
            wanted.baddbmm_(factor[:, :start, start:end].transpose(1, 2), error[:, :start])
        inner = factor[:, start:end, start:end]
        for k in range(end - start):
            q = torch.clamp(torch.round(wanted[:, k] * inverse), low, high)
            integers[:, start + k] = q
            # `wanted` holds the feedback already: the error passed on is that of the original weight.
            e = matrix[:, start + k] - q * scale
            error[:, start + k] = e
            if k + 1 < end - start:
                wanted[:, k + 1 :].addcmul_(inner[:, k, k + 1 :, None], e[:, None, :])
    return integers


def _refine(
    matrix: Tensor, integers: Tensor, scale: Tensor, gram: Tensor, bits: int, sweeps: int, damping: float
) -> Tensor:
    """Coordinate descent: round each weight to its optimum given all others; the damped loss never rises."""
    low, high = integer_limits(bits)
    hessian = gram.float().clone()
    mean = hessian.diagonal(dim1=1, dim2=2).mean(dim=1)
    hessian.diagonal(dim1=1, dim2=2).add_((damping * torch.where(mean > 0, mean, torch.ones_like(mean)))[:, None])
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    integers = integers.clone()
    gradient = torch.bmm(hessian, matrix - integers * scale[:, None, :])
    for _ in range(sweeps):
        changed = False
        for k in range(matrix.shape[1]):
            step = torch.round(gradient[:, k] / (diagonal[:, k, None] * scale))
            new = torch.clamp(integers[:, k] + step, low, high)
            delta = new - integers[:, k]
            if not bool(delta.any()):
                continue
            changed = True
            integers[:, k] = new
            gradient.addcmul_(hessian[:, :, k, None], (delta * scale)[:, None, :], value=-1.0)
        if not changed:
            break
    return integers
