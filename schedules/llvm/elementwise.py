"""Elementwise kernels without weights: requantize, quantize, dequantize, add, multiply, and fused chains of float
operations.
"""

from __future__ import annotations

from typing import Any

from lpsn_tvm.schedules import elementwise
from lpsn_tvm.schedules.elementwise import Attrs, Constants, Inputs, Maker
from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import elementwise_kernel, offered_block
from lpsn_tvm.schedules.rounding import parameters, scaled, to_integer
from lpsn_tvm.schedules.views import View, compute

MAKER = Maker(elementwise_kernel, offered_block)


def requantize(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.requantize`."""
    return elementwise.requantize(MAKER, inputs, attrs)


def add(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.add` (numpy broadcasting between operands of equal rank)."""
    return elementwise.add(MAKER, inputs, attrs)


def multiply(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.multiply` (numpy broadcasting between operands of equal rank)."""
    return elementwise.multiply(MAKER, inputs, attrs)


def quantize(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.quantize`."""
    data, zero_point = inputs[0], int(attrs["zero_point"])
    if data.dtype != "float32":
        return None
    out = TensorSpec(data.shape, str(attrs["out_dtype"]), data.block)
    numbers = parameters(attrs["inv_scale"], attrs["qmin"] - zero_point, attrs["qmax"] - zero_point, zero_point)

    def define(x: View, p: Any) -> Any:
        return compute(out, lambda *i: to_integer(x(*i) * p[0], p[1], p[2], p[3], out.dtype))

    return elementwise_kernel("quantize", (data,), (numbers,), out, define)


def dequantize(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.dequantize`."""
    data = inputs[0]
    out = TensorSpec(data.shape, "float32", data.block)
    numbers = parameters(attrs["scale"], attrs["zero_point"])

    def define(x: View, p: Any) -> Any:
        return compute(out, lambda *i: scaled(x(*i), p[0], p[1]))

    return elementwise_kernel("dequantize", (data,), (numbers,), out, define)


def float_elementwise(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.float_elementwise`: the whole program on 16 channels at a time."""
    return elementwise.float_elementwise(MAKER, inputs, constants, attrs)
