"""Lowering to GPU kernels."""

from __future__ import annotations

from math import prod
from typing import Any

from lpsn_tvm import graph
from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.cuda.convert import relayout
from lpsn_tvm.schedules.cuda.weights import input_block
from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.targets.kernel_lowering import lower_to_kernels

MOST_ELEMENTS = 2**31 - 1
"""Kernels count elements of a tensor in 32 bits."""


def lower(backend: Any, mod: Any) -> Any:
    """`lpsn.*` calls -> `call_tir` of kernels; see `Backend.lower`.

    Raises
    ------
    CompileError
        A tensor is too large, or an operator has no kernel.
    """
    for value in (*mod["main"].params, *(var for var, call in graph.bindings(mod) if graph.op_name(call))):
        _check_size(value)
    return lower_to_kernels(backend, mod, relayout)


def _check_size(var: Any) -> None:
    """Channels that only fill blocks count, too."""
    shape = graph.shape_of(var)
    blocked = len(shape) in (2, 4)
    spec = TensorSpec(shape, graph.dtype_of(var), input_block(shape[1]) if blocked else 0)
    elements = prod(spec.memory_shape)
    if elements > MOST_ELEMENTS:
        raise CompileError(
            f"{list(shape)} takes {elements} elements on a GPU, at most {MOST_ELEMENTS} can be addressed: "
            "choose a smaller batch or image",
            where=var.name,
        )
