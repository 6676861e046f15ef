"""Weight ranges: symmetric, per channel, valid for any weight."""

from __future__ import annotations

import itertools

import pytest
import torch

from lpsn_tvm.passes.weight_quantizers import choose_scales, max_scale, round_nearest


def weighted_error(matrix: torch.Tensor, scale: torch.Tensor, bits: int, h: torch.Tensor) -> torch.Tensor:
    error = matrix - round_nearest(matrix, scale, bits) * scale[:, None, :]
    return (h[:, :, None] * error**2).sum(dim=1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_search_is_no_worse_than_the_maximum(bits: int) -> None:
    matrix = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    h = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) ** 4
    found = weighted_error(matrix, choose_scales(matrix, bits, h), bits, h)
    assert bool((found <= weighted_error(matrix, max_scale(matrix, bits), bits, h) * 1.00001).all())
    if bits <= 4:
        assert float(found.sum()) < 0.8 * float(weighted_error(matrix, max_scale(matrix, bits), bits, h).sum())


def test_more_bits_are_never_worse() -> None:
    matrix = torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(0))
    h = torch.ones(1, 200)
    errors = [float(weighted_error(matrix, choose_scales(matrix, bits), bits, h).sum()) for bits in range(2, 9)]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors))


def test_importance_moves_the_range() -> None:
    matrix = torch.cat([torch.full((1, 9, 1), 0.1), torch.full((1, 1, 1), 1.0)], dim=1)
    quiet = choose_scales(matrix, 3, torch.tensor([[1.0] * 9 + [1e-6]]))
    loud = choose_scales(matrix, 3, torch.tensor([[1e-6] * 9 + [1.0]]))
    assert float(quiet) < float(loud)


@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
@pytest.mark.parametrize("power_of_two", [False, True], ids=["any", "power_of_two"])
def test_schemes(per_channel: bool, power_of_two: bool) -> None:
    matrix = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    matrix[:, :, 2] = 0.0
    scale = choose_scales(matrix, 4, per_channel=per_channel, power_of_two=power_of_two)
    assert scale.shape == (2, 5) and bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
    if power_of_two:
        assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    if not per_channel:
        assert len(scale.unique()) == 1


def test_zero_weights_have_a_valid_scale() -> None:
    scale = choose_scales(torch.zeros(1, 9, 3), 4, torch.zeros(1, 9))
    assert torch.equal(scale, torch.ones(1, 3))
    assert not round_nearest(torch.zeros(1, 9, 3), scale, 4).any()


def test_tiny_weights_have_a_finite_reciprocal() -> None:
    scale = choose_scales(torch.full((1, 4, 1), 1e-42), 8)
    assert bool(torch.isfinite(1.0 / scale).all())
