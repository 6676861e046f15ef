"""`lpsn.quantize`, `lpsn.dequantize` and pure layout conversion: where plain tensors of the user meet blocked ones of
the device.
"""

from __future__ import annotations

from math import prod
from typing import Any

from lpsn_tvm.schedules.cuda.threads import element_kernel
from lpsn_tvm.schedules.cuda.weights import input_block
from lpsn_tvm.schedules.kernel import Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.rounding import parameters, scaled, to_integer
from lpsn_tvm.schedules.views import View, compute, existing, within


def quantize(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.quantize`; a plain image becomes blocked on the way."""
    data, zero_point = inputs[0], int(attrs["zero_point"])
    if data.dtype != "float32":
        return None
    out = TensorSpec(data.shape, str(attrs["out_dtype"]), wanted_block(data))
    numbers = parameters(attrs["inv_scale"], attrs["qmin"] - zero_point, attrs["qmax"] - zero_point, zero_point)

    def define(x: View, p: Any) -> Any:
        return compute(out, lambda *i: to_integer(x(*existing(out, i)) * p[0], p[1], p[2], p[3], out.dtype))

    # Plain input: each thread reads its channels from as many planes, neighbours read neighbouring pixels.
    return element_kernel("quantize", (data,), (numbers,), out, define)


def dequantize(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `quant.dequantize`, straight into plain layout, which is what users and float operators read."""
    data = inputs[0]
    out = TensorSpec(data.shape, "float32", 0)
    numbers = parameters(attrs["scale"], attrs["zero_point"])

    def define(x: View, p: Any) -> Any:
        return compute(out, lambda *i: scaled(x(*i), p[0], p[1]))

    return element_kernel("dequantize", (data,), (numbers,), out, define)


def relayout(data: TensorSpec, out: TensorSpec) -> Kernel:
    """Copy into another layout; lanes beyond C become zero."""

    def define(x: View) -> Any:
        return compute(out, lambda n, c, *rest: within(out, c, lambda: x(n, c, *rest)))

    return element_kernel("relayout", (data,), (), out, define, is_gathered=True)


def wanted_block(data: TensorSpec) -> int:
    """Layout of a quantized network input: images are blocked; what is blocked already, and other ranks, stay."""
    if data.block or len(data.shape) != 4 or prod(data.shape[2:]) == 1:
        return data.block
    return input_block(data.shape[1])
