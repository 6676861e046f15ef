"""Least squares re-solve of a layer's weights and bias on the inputs that the compressed prefix really gives it.

    minimise  sum over rows ||x W - y||^2 + damping * mean(diag(X^T X)) * ||W - W_prior||^2      (bias undamped)

The prior is the layer's current weight: where the prefix is exact the solution IS the current weight, and a system
with fewer rows than columns (a dense layer on few images) changes only what the data speaks about.

Source: a study for this project (README, "Numbers").
"""

from __future__ import annotations

import torch
from scipy.linalg import lapack
from torch import Tensor

MIRROR_ROWS = 512
"""Rows that are copied at once when a triangle is mirrored."""
SOLVE_DAMPING = 1e-3
SCORE_DAMPING = 1e-4


def damping_vector(gram: Tensor, damping: float) -> Tensor:
    """What is added to the diagonal: `damping * mean(diag)` on weight columns, a rounding guard on the bias column.

    Where rows are scarce the damping grows, by `1 + 100 * (columns / rows)^4`: nothing at ten rows per column, 0.1 of
    the mean at one row per column, so that a dense layer on few samples is not fitted to their noise. The number of
    rows is the last entry of the bias column.

    Parameters
    ----------
    gram : float64[groups, k + 1, k + 1]
        X^T X, bias column last.
    damping : float
        Relative to the mean of the diagonal (bias column left out), per group.

    Returns
    -------
    float64[groups, k + 1]
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal[:, :-1].mean(dim=1, keepdim=True) if gram.shape[1] > 1 else diagonal
    # A system of all-zero inputs still has to be solvable: its weights then stay what they are.
    mean = torch.where(mean > 0, mean, diagonal[:, -1:].clamp_min(1e-30))
    rows = diagonal[:, -1:].clamp_min(1)
    scarcity = 1 + 100 * ((gram.shape[1] - 1) / rows) ** 4
    vector = (damping * scarcity * mean).expand_as(diagonal).clone()
    vector[:, -1] = 1e-9 * diagonal[:, -1]
    return vector


def solve(gram: Tensor, moment: Tensor, prior: Tensor, damping: float = SOLVE_DAMPING) -> Tensor:
    """The damped least squares solution W.

    Parameters
    ----------
    gram : float64[groups, k, k]
        X^T X; the last column is the bias.
    moment : float64[groups, k, outputs]
        X^T Y.
    prior : float64[groups, k, outputs]
        Weights that the damping pulls towards.
    damping : float
        Relative to the mean of the diagonal.

    Returns
    -------
    float64[groups, k, outputs]
    """
    return prior + factor_solve(damped_factor(gram, damping), moment - gram @ prior)


def factor_solve(factor: Tensor, moment: Tensor) -> Tensor:
    """Solve with a lower Cholesky factor; `torch.cholesky_solve` would copy the factor (170 MB at 4608 columns)."""
    half = torch.linalg.solve_triangular(factor, moment, upper=False)
    result: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return result


def invert_factor(factor: Tensor) -> Tensor:
    """The inverse of L L^T, written over the lower factor L (`torch.cholesky_inverse` would hold two more copies).

    Parameters
    ----------
    factor : float64[k, k]
        Lower Cholesky factor, column by column in memory as `torch.linalg.cholesky_ex` returns it; lost.
    """
    columns = factor.mT.contiguous().numpy().T  # no copy where the memory is column-major already
    inverse, info = lapack.dpotri(columns, lower=1, overwrite_c=1)
    if info:
        raise ArithmeticError(f"a Cholesky factor has a zero at {info}: the factorisation should have refused it")
    result = torch.from_numpy(inverse.T)  # its upper triangle is set
    for start in range(0, len(result), MIRROR_ROWS):
        stop = min(start + MIRROR_ROWS, len(result))
        result[stop:, start:stop] = result[start:stop, stop:].mT
        square = result[start:stop, start:stop].triu()
        result[start:stop, start:stop] = square + square.triu(1).mT
    return result


def damped_factor(gram: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of gram with damping.

    The diagonal is raised in place and put back: at 4608 columns a copy would be 170 MB.

    Parameters
    ----------
    gram : float64[groups, k, k]
        X^T X; the last column is the bias.
    damping : float
        Relative to the mean of the diagonal.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    before = diagonal.clone()
    diagonal.add_(damping_vector(gram, damping))
    try:
        return cholesky(gram)
    finally:
        diagonal.copy_(before)


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a symmetric positive matrix; if rounding made it indefinite the diagonal is raised."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    jitter = 1e-10
    while bool((info > 0).any()):
        bump = jitter * matrix.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
        factor, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(bump.expand(matrix.shape[:-1])))
        jitter *= 100
    result: Tensor = factor
    return result


def relative_error(gram: Tensor, moment: Tensor, energy: Tensor, weights: Tensor, spread: Tensor) -> float:
    """||X W - Y||^2 over the total variance of Y, from the sums alone.

    Parameters
    ----------
    gram, moment, weights
        X^T X, X^T Y and W as in `solve`.
    energy : float64[]
        Sum of squares of Y.
    spread : float64[]
        Sum of squares of Y minus its mean (per output).
    """
    residual = (weights * (gram @ weights)).sum() - 2 * (weights * moment).sum() + energy
    return float(residual.clamp_min(0) / spread.clamp_min(1e-30))
