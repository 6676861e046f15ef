"""Simulate a quantization plan in float: the same rounding points as the integer network, on the torch interpreter.

Before: a canonical float network. After: the numbers that the integer network computes, up to float rounding and
the int32 rounding of biases: every
variable of `Regions.quantized` is rounded to its grid where it is produced, every layer of the plan has the weights
that its integers stand for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.regions import Regions
from lpsn_tvm.quant import QuantizedWeight, QuantParams, QuantPlan, Rounding


def fake_quantize_tensor(x: Tensor, params: QuantParams, rounding: Rounding = "half_even") -> Tensor:
    """`quant.fake_quantize` of a per-tensor scheme in torch, bit for bit (or rounded half up)."""
    scale = np.float32(np.asarray(params.scale).reshape(-1)[0])
    inverse = np.float32(1.0) / scale
    low, high = params.qmin - params.zero_point, params.qmax - params.zero_point
    value = torch.mul(x, float(inverse)).clamp_(low, high)
    value = value.round_() if rounding == "half_even" else value.add_(0.5).floor_()
    return value.mul_(float(scale))


class FakeQuantizer:
    """Transform of the interpreter that rounds every quantized variable.

    Parameters
    ----------
    regions : Regions
        Says which variables are quantized, and which share their parameters.
    activations : mapping of variable to QuantParams
        Read at every call: a walk may fill it as it goes; a quantized variable that is not in it yet passes through.
    rounding : {"half_even", "half_up"}
        Of the scheme; network inputs are rounded half to even in either case.
    """

    def __init__(
        self, regions: Regions, activations: Mapping[str, QuantParams], rounding: Rounding = "half_even"
    ) -> None:
        self.regions, self.activations, self.rounding = regions, activations, rounding

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """What the readers of variable `name` see."""
        if not self.regions.is_quantized(name):
            return tensor
        params = self.activations.get(self.regions.source(name))
        rounding = "half_even" if name in self.regions.inputs else self.rounding
        return tensor if params is None else fake_quantize_tensor(tensor, params, rounding)


def per_output(scale: Any, values_shape: tuple[int, ...], kind: str, groups: int) -> Tensor:
    """A weight's scales, one per output channel or one for all, in a shape that broadcasts against the weight."""
    scales = torch.as_tensor(np.asarray(scale, np.float32)).reshape(-1)
    if scales.numel() == 1:
        return scales.reshape([1] * len(values_shape))
    if kind == "dense":
        return scales.reshape(1, -1)
    if kind == "conv2d":
        return scales.reshape(-1, *[1] * (len(values_shape) - 1))
    # Transposed weights are [in channels, out channels of one group, kh, kw]: each group of rows has its own output
    # channels.
    rows = values_shape[0] // groups
    return scales.reshape(groups, 1, -1).expand(groups, rows, -1).reshape(values_shape[0], -1, 1, 1)


def dequantized_weight(weight: QuantizedWeight, kind: str, groups: int) -> Tensor:
    """The real numbers, float32, that a layer's integers stand for."""
    values = torch.from_numpy(np.asarray(weight.values)).float()
    return values * per_output(weight.params.scale, tuple(values.shape), kind, groups)


def set_quantized_weights(interpreter: TorchInterpreter, weights: Mapping[str, QuantizedWeight]) -> None:
    """Give the interpreter's layers the rounded weights and corrected biases of a plan."""
    for name, weight in weights.items():
        step = interpreter.by_name[next(iter(interpreter.by_name[name].variables))]
        kind = {"relax.matmul": "dense", "relax.nn.conv2d": "conv2d"}.get(step.op, "conv2d_transpose")
        groups = int(step.attrs.get("groups", 1))
        interpreter.set_params(name, dequantized_weight(weight, kind, groups), weight.bias)


def evaluate_plan(
    interpreter: TorchInterpreter,
    plan: QuantPlan,
    regions: Regions,
    batches: Iterable[Mapping[str, Any]],
    rounding: Rounding = "half_even",
) -> Iterator[dict[str, Tensor]]:
    """Outputs of the quantized network, simulated, batch by batch.

    Parameters
    ----------
    interpreter : TorchInterpreter
        Of the float module that the plan was made for; its parameters are put back at the end.
    plan : QuantPlan
        Activation parameters and integer weights.
    regions : Regions
        The regions that the plan was made with.
    batches : iterable of dict of str to float32 ndarray
        Network inputs.
    rounding : {"half_even", "half_up"}
        Of the scheme that the plan was made for.

    Yields
    ------
    dict of str to float32 Tensor
    """
    before = dict(interpreter.params)
    set_quantized_weights(interpreter, plan.weights)
    transform = FakeQuantizer(regions, plan.activations, rounding)
    try:
        with torch.no_grad():
            for feeds in batches:
                yield interpreter.run(feeds, transform=transform)
    finally:
        interpreter.params = before
