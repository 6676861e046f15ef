"""Quantize one layer on the inputs that the quantized prefix gives it: re-solve, ranges, rounding, bias correction.

Sums over sampled output positions are all that is needed (`normal_equations`): X^T X with a ones column for the
inputs of the quantized prefix, X^T Y for
the outputs of the float network. With the means taken out ("centred") the bias is free: whatever weights come out, it
makes the mean output right.

Source: Frantar et al., "GPTQ", 2022; Nagel et al., "Data-free
quantization", 2019 (bias correction).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lpsn_tvm.errors import QuantizeError
from lpsn_tvm.graph import Layer
from lpsn_tvm.passes.align_scales import WeightGrid
from lpsn_tvm.passes.gptq import gptq_round, refit_scale
from lpsn_tvm.passes.normal_equations import LayerGeometry
from lpsn_tvm.passes.weight_quantizers import choose_scales, round_nearest
from lpsn_tvm.quant import QuantizedWeight, QuantParams, QuantScheme

LARGEST_SQUARE = 1e34
PRIOR = 1e-2
"""How strongly re-solved weights are pulled towards the old ones, in units of the mean of diag(X^T X)."""
MAX_INTEGER = 2**31 - 1


@dataclass(frozen=True)
class LayerSums:
    """What a layer's quantization needs to know about its data, as means over rows.

    Parameters
    ----------
    mean_x : float64[groups, k]
        Mean input under the quantized prefix.
    mean_y : float64[groups, outputs]
        Mean output of the float network.
    gram, moment : float64[groups, k, k], float64[groups, k, outputs], optional
        Centred X^T X and X^T Y; not needed for rounding to nearest.
    """

    mean_x: Tensor
    mean_y: Tensor
    gram: Tensor | None = None
    moment: Tensor | None = None

    @classmethod
    def from_normal_equations(cls, gram: Tensor, moment: Tensor) -> LayerSums:
        """Take the means out of X^T X and X^T Y whose last column (and row) is the ones column."""
        count = gram[:, -1:, -1:]
        mean_x = gram[:, :-1, -1] / count[:, 0]
        mean_y = moment[:, -1] / count[:, 0]
        centred = gram[:, :-1, :-1] - mean_x[:, :, None] * gram[:, -1:, :-1]
        centred_moment = moment[:, :-1] - mean_x[:, :, None] * moment[:, -1:]
        # Cancellation can leave a negative variance where an input never varies.
        centred.diagonal(dim1=1, dim2=2).clamp_(min=0.0)
        return cls(mean_x, mean_y, centred, centred_moment)


def resolved_matrix(matrix: Tensor, sums: LayerSums, prior: float = PRIOR) -> Tensor:
    """Least squares weights on the quantized inputs, pulled towards the old weights; float64[groups, k, outputs]."""
    assert sums.gram is not None and sums.moment is not None
    mean = sums.gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    ridge = prior * torch.where(mean > 0, mean, torch.ones_like(mean))
    system = sums.gram.clone()
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    lower, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()):
        return matrix.double()
    old = matrix.double()
    return old + torch.cholesky_solve(sums.moment - torch.bmm(sums.gram, old), lower)


def quantize_layer(
    layer: Layer,
    sums: LayerSums,
    bits: int,
    scheme: QuantScheme,
    x: QuantParams,
    *,
    resolve: bool = True,
    rounding: str = "gptq",
    kept: QuantParams | None = None,
    grid: WeightGrid | None = None,
) -> QuantizedWeight:
    """Integers, scales and bias of one layer.

    Parameters
    ----------
    layer : Layer
        Float weight and bias.
    sums : LayerSums
        Without `gram` the weights are not re-solved and rounded to nearest.
    bits : int
        Weight bits, 2..8.
    scheme : QuantScheme
        Granularity and whether scales are powers of two.
    x : QuantParams
        Of the layer's input.
    resolve : bool
        Whether weights may move before they are rounded.
    rounding : {"gptq", "nearest"}
        "gptq" needs `sums.gram`.
    kept : QuantParams, optional
        Scales of a model that came quantized: used as they are, with rounding to nearest.
    grid : WeightGrid, optional
        Scales that hardware without multipliers can requantize; any by default.

    Raises
    ------
    QuantizeError
        The worst case of the int32 accumulator does not fit, or the layer's inputs are too large to be multiplied in
        float32.
    """
    if sums.gram is not None and not bool((sums.gram.diagonal(dim1=1, dim2=2) < LARGEST_SQUARE).all()):
        raise QuantizeError(
            "the values it reads overflow float32 when they are squared and summed; scale the calibration data down, "
            "or list the layer in `ignore`",
            where=layer.name,
        )
    geometry = LayerGeometry.of(layer)
    whole = geometry.weight_matrix(torch.from_numpy(layer.weight), torch.from_numpy(layer.bias))
    matrix = whole[:, :-1]
    if kept is not None:
        scale = (
            torch.from_numpy(np.array(kept.scale, np.float32))
            .reshape(-1)
            .expand(layer.out_channels)
            .reshape(geometry.groups, -1)
        )
        bits = kept.bits
        integers = round_nearest(matrix.float(), scale, bits)
    else:
        if resolve and sums.gram is not None:
            matrix = resolved_matrix(matrix, sums)
        smallest = _smallest_scale(layer, x, geometry.groups)
        scale, integers = _round(matrix, sums, bits, scheme, rounding, smallest, grid)
    if kept is not None:
        bias = whole[:, -1].double()  # the model came quantized: its bias belongs to its weights
    else:
        bias = sums.mean_y - torch.einsum("gk,gkm->gm", sums.mean_x, integers.double() * scale[:, None, :].double())
    # The integer network holds it as int32 in these units; at few bits they are coarse enough to be simulated too.
    unit = scale.double() * float(np.asarray(x.scale))
    bias = torch.round(bias / unit) * unit
    check_accumulator(layer, integers, x)
    values, _ = geometry.split_matrix(torch.cat([integers.double(), bias[:, None, :]], dim=1))
    flat = scale.reshape(-1).float().numpy().copy()
    axis = None if not scheme.weight_per_channel and kept is None else (0 if layer.kind == "conv2d" else 1)
    params = QuantParams(flat if axis is not None else flat[0], 0, bits, True, axis)
    return QuantizedWeight(values.to(torch.int8).numpy(), params, bias.reshape(-1).float().numpy())


def _round(
    matrix: Tensor,
    sums: LayerSums,
    bits: int,
    scheme: QuantScheme,
    rounding: str,
    smallest: Tensor,
    grid: WeightGrid | None,
) -> tuple[Tensor, Tensor]:
    """(scale float32[groups, outputs], integers)."""
    on_grid, unit = scheme.power_of_two or grid is not None, 1.0 if grid is None else grid.unit
    importance = None if sums.gram is None else sums.gram.diagonal(dim1=1, dim2=2)
    matrix = matrix.float()
    scale = choose_scales(
        matrix, bits, importance, per_channel=scheme.weight_per_channel, power_of_two=on_grid, unit=unit
    )
    if on_grid:
        smallest = unit * torch.exp2(torch.ceil(torch.log2(smallest / unit)))
    scale = torch.maximum(scale, smallest if scheme.weight_per_channel else smallest.max())
    if grid is not None:
        # A coarser unit than the output's could not be shifted right; a channel of zeros may have any.
        scale = torch.clamp(scale, max=grid.largest)
    if rounding == "nearest" or sums.gram is None:
        return scale, round_nearest(matrix, scale, bits)
    integers = gptq_round(matrix, sums.gram, scale, bits)
    if scheme.weight_per_channel and not on_grid:
        scale = torch.maximum(refit_scale(matrix, integers, scale, sums.gram), smallest)
    return scale, integers


def _smallest_scale(layer: Layer, x: QuantParams, groups: int) -> Tensor:
    """Scale per output channel below which the bias, in units of input scale * weight scale, would crowd the int32
    accumulator.

    It matters for channels whose weights are all but zero; their integers then round to zero, which is what they
    contribute.
    """
    step = float(np.asarray(x.scale)) * 2.0**28
    return (
        torch.from_numpy(np.abs(layer.bias).astype(np.float64) / step).clamp(min=2.0**-96).float().reshape(groups, -1)
    )


def check_accumulator(layer: Layer, integers: Tensor, x: QuantParams) -> None:
    """Refuse a layer whose products, summed over the worst input, leave int32."""
    largest = max(abs(x.qmin), abs(x.qmax)) + abs(x.zero_point)
    worst = float(integers.double().abs().sum(dim=1).max()) * largest
    if worst > MAX_INTEGER:
        raise QuantizeError(
            f"the worst case of its accumulator is {worst:.3g}, int32 holds {MAX_INTEGER}; "
            "list it in `ignore` or use fewer bits",
            where=layer.name,
        )
