"""Integer graph -> operators on symbolic tensors of the accelerator, and host steps: `lower(mod, config)`.

The graph has `lpsn.*` operators with `rounding="half_up"` (and float operators, which stay on the host). The result is
a `network.LoweredNetwork`; memory, grouping into programs and addresses are the assembly's business:

* `steps`: `TileOp`s and `HostStep`s in the graph's order. A `Plane.region` is a key of `tensors`; a plane may be a part
  of its tensor (the channels of one operand of a concatenation: `base`, `blocks` and gaps between batches), so a tensor
  may be written by several operators, each its own part, and is complete when the last of them has run.
* `tensors`: a device tensor per variable that exists there, under the variable's name, with `value` that name; packed
  copies of what the host holds are called `<variable>.<consumer>`; what the host never reads has the value "".
* `weights`, `vectors`: per operator; equal arrays exist once. Strides of 0 share tiles between blocks.
* `data`: constant sources of `Gemm`s (what padding with another number than 0 adds).
* `vta.scale` (`host_steps.OPERATORS`): int32 accumulators that left in planes of the output's width -> float32.

Rules per operator live in `lower_*.py`; each either appends steps or raises `Unmapped` with the reason for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.host import fetch_outputs, lower_to_host
from lpsn_tvm.targets.vta.integer_graph import IntegerGraph, Node, read_graph
from lpsn_tvm.targets.vta.lower_concat import lower_concat
from lpsn_tvm.targets.vta.lower_context import Context, Unmapped
from lpsn_tvm.targets.vta.lower_conv import lower_layer
from lpsn_tvm.targets.vta.lower_elementwise import lower_add, lower_requantize
from lpsn_tvm.targets.vta.lower_move import (
    lower_depth_to_space,
    lower_pad,
    lower_reshape,
    lower_resize_nearest,
    lower_strided_slice,
    lower_transpose,
)
from lpsn_tvm.targets.vta.lower_pool import lower_avg_pool2d, lower_global_avg_pool2d, lower_max_pool2d
from lpsn_tvm.targets.vta.network import LoweredNetwork
from lpsn_tvm.targets.vta.weights import ConstantPool

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

Rule = Callable[[Context, Node], None]
RULES: dict[str, Rule] = {
    "lpsn.conv2d": lower_layer,
    "lpsn.conv2d_transpose": lower_layer,
    "lpsn.dense": lower_layer,
    "lpsn.add": lower_add,
    "lpsn.requantize": lower_requantize,
    "lpsn.concat": lower_concat,
    "lpsn.max_pool2d": lower_max_pool2d,
    "lpsn.avg_pool2d": lower_avg_pool2d,
    "lpsn.global_avg_pool2d": lower_global_avg_pool2d,
    "lpsn.resize_nearest": lower_resize_nearest,
    "lpsn.pad": lower_pad,
    "lpsn.strided_slice": lower_strided_slice,
    "lpsn.depth_to_space": lower_depth_to_space,
    "lpsn.reshape": lower_reshape,
    "lpsn.transpose": lower_transpose,
}
"""Operator -> what puts it on the accelerator; operators without a rule run on the host."""
_REASONS = {
    "lpsn.quantize": "float32 becomes integers",
    "lpsn.dequantize": "integers become float32",
    "lpsn.lookup": "the accelerator has no tables",
    "lpsn.channel_lookup": "the accelerator has no tables",
    "lpsn.multiply": "the accelerator multiplies by constants only",
    "lpsn.resize_linear": "its weights differ from pixel to pixel",
}
"""Why an operator has no rule."""


def lower(mod: Any, config: VtaConfig) -> LoweredNetwork:
    """The operators of an integer module for one build of the accelerator.

    Parameters
    ----------
    mod : IRModule
        Integer operators with `rounding="half_up"`, fused float operators.
    config : VtaConfig
        The build.

    Raises
    ------
    CompileError
        An operator is unknown, or its numbers contradict each other; names the variable.
    """
    return lower_graph(read_graph(mod), config)


def lower_graph(graph: IntegerGraph, config: VtaConfig) -> LoweredNetwork:
    """`lower` on plain records."""
    context = Context(graph, config, ConstantPool(config))
    for info in graph.inputs:
        context.shapes[info.name] = info.shape
        context.on_host.add(info.name)
        context.host_made.add(info.name)
        if info.dtype == "int8":
            context.ranges[info.name] = (-128, 127)
    for node in graph.nodes:
        if node.name not in context.fused:
            _lower_node(context, node)
    fetch_outputs(context)
    return LoweredNetwork(
        config,
        graph.inputs,
        graph.outputs,
        context.tensors,
        context.pool.weights,
        context.pool.vectors,
        context.resolved_steps(),
        data=context.pool.data,
    )


def _lower_node(context: Context, node: Node) -> None:
    rule = RULES.get(node.op)
    if rule is None:
        reason = (
            "it computes in float32" if node.op.startswith("lpsn.float_") else "the accelerator has no such operation"
        )
        lower_to_host(context, node, _REASONS.get(node.op, reason))
        return
    before = context.snapshot()
    try:
        rule(context, node)
    except Unmapped as reason:
        context.restore(before)
        lower_to_host(context, node, str(reason))
    except ValueError as error:
        # The arithmetic refuses numbers, as `quant` does: multipliers that are no powers of two.
        raise CompileError(str(error), where=node.name) from error
