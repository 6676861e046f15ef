"""Operators whose kernels every target makes with its `Maker`: the part of a backend's dispatch table that is written
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lpsn_tvm.schedules import concat, data_movement, elementwise, lookup, pooling, resize
from lpsn_tvm.schedules.kernel import Attrs, Builder, Constants, Inputs, Kernel
from lpsn_tvm.schedules.maker import Maker

Rules = Mapping[str, tuple[Builder, ...]]
"""Operator -> kernel builders, asked in order; the first that does not return None is taken."""
Shared = Callable[[Maker, Inputs, Constants, Attrs], Kernel | None]

OPERATORS: dict[str, Shared] = {
    # integers
    "lpsn.requantize": elementwise.requantize,
    "lpsn.add": elementwise.add,
    "lpsn.multiply": elementwise.multiply,
    "lpsn.lookup": lookup.lookup,
    "lpsn.channel_lookup": lookup.channel_lookup,
    "lpsn.concat": concat.concat,
    "lpsn.max_pool2d": pooling.max_pool2d,
    "lpsn.avg_pool2d": pooling.avg_pool2d,
    "lpsn.global_avg_pool2d": pooling.global_avg_pool2d,
    "lpsn.resize_nearest": resize.resize_nearest,
    "lpsn.resize_linear": resize.resize_linear,
    "lpsn.pad": resize.pad,
    "lpsn.strided_slice": data_movement.strided_slice,
    "lpsn.depth_to_space": data_movement.depth_to_space,
    "lpsn.reshape": data_movement.reshape,
    "lpsn.transpose": data_movement.transpose,
    # floats
    "lpsn.float_elementwise": elementwise.float_elementwise,
    "lpsn.float_concat": concat.float_concat,
    "lpsn.float_max_pool2d": pooling.max_pool2d,
    "lpsn.float_avg_pool2d": pooling.float_avg_pool2d,
    "lpsn.float_global_avg_pool2d": pooling.float_global_avg_pool2d,
    "lpsn.float_resize_nearest": resize.resize_nearest,
    "lpsn.float_resize_linear": resize.resize_linear,
    "lpsn.float_pad": resize.pad,
    "lpsn.float_strided_slice": data_movement.strided_slice,
    "lpsn.float_depth_to_space": data_movement.depth_to_space,
    "lpsn.float_reshape": data_movement.reshape,
    "lpsn.float_transpose": data_movement.transpose,
}


def rules(maker: Maker, own: Rules) -> dict[str, tuple[Builder, ...]]:
    """A backend's dispatch table: its own builders in front of the shared ones.

    Parameters
    ----------
    maker : Maker
        How the target makes shared operators.
    own : mapping of operator to builders
        Layers with weights, and faster kernels for some shapes of shared operators.
    """
    shared = {op: (_bound(maker, builder),) for op, builder in OPERATORS.items()}
    return {op: (*own.get(op, ()), *shared.get(op, ())) for op in {**own, **shared}}


def _bound(maker: Maker, shared: Shared) -> Builder:
    def builder(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
        return shared(maker, inputs, constants, attrs)

    return builder


def dispatch(table: Rules, op: str, inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
    """The kernel of the first builder that takes the operator; None where none does."""
    found = (builder(inputs, constants, attrs, isa) for builder in table.get(op, ()))
    return next((kernel for kernel in found if kernel is not None), None)
