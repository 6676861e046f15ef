"""Rounding with error feedback: never worse than nearest, and exactly the textbook algorithm."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsn_tvm.passes.gptq import _feedback_round, _unit_factor, gptq_round, output_error, refit_scale
from lpsn_tvm.passes.weight_quantizers import choose_scales, integer_limits, round_nearest


def problem(seed: int, groups: int, columns: int, outputs: int, rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, columns, columns, generator=generator) * 0.4 + torch.eye(columns)
    x = torch.bmm(torch.randn(groups, rows, columns, generator=generator).relu(), mixing)
    x -= x.mean(dim=1, keepdim=True)
    weight = torch.randn(groups, columns, outputs, generator=generator) * 0.1
    return weight, torch.bmm(x.transpose(1, 2), x).double()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 3),
    columns=st.integers(1, 20),
    outputs=st.integers(1, 5),
    bits=st.integers(2, 8),
)
def test_never_worse_than_nearest(seed: int, groups: int, columns: int, outputs: int, bits: int) -> None:
    weight, gram = problem(seed, groups, columns, outputs, rows=15)
    scale = choose_scales(weight, bits, gram.diagonal(dim1=1, dim2=2))
    integers = gptq_round(weight, gram, scale, bits, damping=1e-4)
    low, high = integer_limits(bits)
    assert low <= float(integers.min()) and float(integers.max()) <= high
    assert torch.equal(integers, integers.round())
    nearest = output_error(weight, round_nearest(weight, scale, bits), scale, gram)
    ours = output_error(weight, integers, scale, gram)
    # The refinement works on the damped loss; undamped it may give back its damping.
    assert bool((ours <= nearest * 1.01 + 1e-6 * nearest.max() + 1e-9).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gains_on_correlated_inputs(bits: int) -> None:
    weight, gram = problem(0, 1, 144, 32, rows=2000)
    scale = choose_scales(weight, bits, gram.diagonal(dim1=1, dim2=2))
    nearest = float(output_error(weight, round_nearest(weight, scale, bits), scale, gram).sum())
    plain = float(output_error(weight, gptq_round(weight, gram, scale, bits, sweeps=0), scale, gram).sum())
    refined = float(output_error(weight, gptq_round(weight, gram, scale, bits), scale, gram).sum())
    assert refined <= plain < 0.8 * nearest


def test_equals_gptq_with_explicit_inverse() -> None:
    weight, gram = problem(3, 1, 24, 6)
    scale = choose_scales(weight, 3)
    damping = 1e-2
    hessian = gram[0] + damping * gram[0].diagonal().mean() * torch.eye(24, dtype=torch.float64)
    # The update of the paper: row of the Cholesky factor of the inverse, weights changed in place.
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    w = weight[0].double().clone()
    expected = torch.empty_like(w)
    for k in range(24):
        expected[k] = torch.clamp(torch.round(w[k] / scale[0]), -4, 3)
        residue = (w[k] - expected[k] * scale[0]) / upper[k, k]
        w[k:] -= upper[k, k:, None] * residue[None]
    ours = _feedback_round(weight, _unit_factor(gram.float(), damping), scale, 3, block=7)
    assert torch.equal(ours[0].double(), expected)


def test_close_to_the_exhaustive_optimum() -> None:
    weight, gram = problem(5, 1, 6, 1)
    scale = choose_scales(weight, 2, gram.diagonal(dim1=1, dim2=2))
    candidates = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)), dtype=torch.float32)
    error = weight[0, :, 0] - candidates * scale[0, 0]
    best = float(((error.double() @ gram[0]) * error).sum(dim=1).min())
    ours = float(output_error(weight, gptq_round(weight, gram, scale, 2, damping=1e-6, sweeps=8), scale, gram).sum())
    assert best <= ours * 1.0001 and ours < 1.5 * best


def test_refitted_scale_is_never_worse() -> None:
    weight, gram = problem(7, 2, 30, 8)
    scale = choose_scales(weight, 3)
    integers = gptq_round(weight, gram, scale, 3)
    before = output_error(weight, integers, scale, gram)
    after = output_error(weight, integers, refit_scale(weight, integers, scale, gram), gram)
    assert bool((after <= before * 1.0001).all()) and float(after.sum()) < float(before.sum())


@pytest.mark.parametrize("kind", ["constant inputs", "dead column", "fewer rows than columns"])
def test_singular_systems_are_rounded(kind: str) -> None:
    weight, gram = problem(1, 1, 40, 4, rows=10 if kind == "fewer rows than columns" else 300)
    if kind == "constant inputs":
        gram.zero_()
    elif kind == "dead column":
        gram[:, 3], gram[:, :, 3] = 0.0, 0.0
    scale = choose_scales(weight, 4, gram.diagonal(dim1=1, dim2=2))
    integers = gptq_round(weight, gram, scale, 4)
    assert bool(torch.isfinite(integers).all())
    if kind == "constant inputs":
        np.testing.assert_array_equal(integers, round_nearest(weight, scale, 4))
