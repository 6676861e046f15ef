"""Elementwise kernels: requantize, add, multiply, and fused chains of float operations."""

from __future__ import annotations

from functools import partial
from typing import Any

from lpsn_tvm.schedules import elementwise
from lpsn_tvm.schedules.cuda.threads import common_block, element_kernel
from lpsn_tvm.schedules.elementwise import Attrs, Constants, Inputs, Maker
from lpsn_tvm.schedules.kernel import Kernel

MAKER = Maker(element_kernel, common_block)
CHAIN_MAKER = Maker(partial(element_kernel, is_gathered=True), common_block)


def requantize(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.requantize`."""
    return elementwise.requantize(MAKER, inputs, attrs)


def add(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.add` (numpy broadcasting between operands of equal rank)."""
    return elementwise.add(MAKER, inputs, attrs)


def multiply(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.multiply` (numpy broadcasting between operands of equal rank)."""
    return elementwise.multiply(MAKER, inputs, attrs)


def float_elementwise(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """Kernel of `lpsn.float_elementwise`: the whole program in registers."""
    return elementwise.float_elementwise(CHAIN_MAKER, inputs, constants, attrs)
