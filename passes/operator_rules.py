"""How integer arithmetic sees each Relax operator: one class per operator call, decided from operator and operands
alone.

`regions.py` joins these calls into regions. Classes:

* ``layer``: weighted accumulator (convolution, transposed convolution, matmul with a constant);
* ``elementwise``: any function of ONE tensor applied element by element, constants per tensor or per channel
  allowed (a lookup table);
* ``add`` / ``multiply``: two tensors, numpy broadcasting;
* ``same``: moves numbers without changing them, so the scale stays (pooling by maximum, shapes, slices, pads, resizes);
* ``pool``: averages; ``concat``;
* ``float``: what has no integer form, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tvm import relax

from lpsn_tvm import graph

OperatorClass = Literal["layer", "elementwise", "add", "multiply", "same", "pool", "concat", "float"]

ELEMENTWISE_UNARY = frozenset({
    "relax.nn.relu", "relax.nn.relu6", "relax.nn.leakyrelu", "relax.nn.gelu", "relax.nn.gelu_tanh", "relax.nn.silu",
    "relax.nn.softplus",
    "relax.clip", "relax.sigmoid", "relax.tanh", "relax.exp", "relax.abs", "relax.negative", "relax.sqrt",
    "relax.square", "relax.erf",
    "relax.nn.selu", "relax.sign", "relax.sin", "relax.cos", "relax.atan", "relax.floor", "relax.ceil", "relax.round",
})  # fmt: skip
ELEMENTWISE_BINARY = frozenset({
    "relax.add", "relax.subtract", "relax.multiply", "relax.divide", "relax.maximum", "relax.minimum", "relax.power",
})  # fmt: skip
SAME_SCALE = frozenset({
    "relax.nn.max_pool2d", "relax.reshape", "relax.permute_dims", "relax.strided_slice", "relax.squeeze",
    "relax.expand_dims",
    "relax.flatten", "relax.nn.batch_flatten", "relax.nn.pixel_shuffle",
})  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One binding of a canonical function as the region finder sees it.

    Parameters
    ----------
    name, op : str
        Variable and operator name.
    inputs : tuple of str
        Variables read, aliases resolved, constants left out, in operand order.
    kind : OperatorClass
        See the module's docstring.
    reason : str
        Why the node stays float, else empty.
    per_channel : bool
        An elementwise operator with one constant per channel (axis 1).
    call : relax.Call
        The bound expression.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    kind: OperatorClass
    reason: str
    per_channel: bool
    call: Any


def classify(name: str, call: Any, inputs: tuple[str, ...]) -> Node:
    """The class of one operator call."""
    op = graph.op_name(call)
    kind, reason, per_channel = _classify(op, call, inputs)
    return Node(name, op, inputs, kind, reason, per_channel, call)


def _classify(op: str, call: Any, inputs: tuple[str, ...]) -> tuple[OperatorClass, str, bool]:
    attrs = graph.call_attrs(call)
    if op in graph.LAYER_OPS:
        if graph.is_constant(call.args[1]) and len(inputs) == 1:
            return "layer", "", False
        return "float", "product of two computed tensors", False
    if op in ELEMENTWISE_UNARY:
        return "elementwise", "", False
    if op == "relax.nn.prelu" and graph.is_constant(call.args[1]):
        return _with_constants(call, [call.args[1]], axis=int(attrs.get("axis", 1)))
    if op in ELEMENTWISE_BINARY:
        return _classify_binary(op, call, inputs)
    if op in SAME_SCALE or (op == "relax.max" and _is_global_pool(call, attrs)):
        return "same", "", False
    if op == "relax.nn.pad":
        return _classify_pad(call, attrs)
    if op == "relax.image.resize2d":
        if str(attrs["method"]) in ("nearest_neighbor", "linear") and "crop" not in str(
            attrs["coordinate_transformation_mode"]
        ):
            return "same", "", False
        return "float", f"resize by {attrs['method']} interpolation has no integer form", False
    if op == "relax.nn.avg_pool2d" or (op == "relax.mean" and _is_global_pool(call, attrs)):
        return "pool", "", False
    if op == "relax.concat":
        if len(inputs) == len(call.args[0].fields):
            return "concat", "", False
        return "float", "concatenation with a constant", False
    return "float", f"{op.removeprefix('relax.')} has no integer form", False


def _classify_binary(op: str, call: Any, inputs: tuple[str, ...]) -> tuple[OperatorClass, str, bool]:
    constants = [arg for arg in call.args if graph.is_constant(arg)]
    if constants:
        return _with_constants(call, constants, axis=None)
    if len(set(inputs)) == 1:
        return "elementwise", "", False
    if op in ("relax.add", "relax.multiply"):
        return ("add" if op == "relax.add" else "multiply"), "", False
    # With both operands computed from one tensor (x * sigmoid(x) written as a division) it is still a table;
    # regions.py decides.
    return "elementwise", "", False


def _with_constants(call: Any, constants: list[Any], axis: int | None) -> tuple[OperatorClass, str, bool]:
    """Elementwise if every constant is one number or one number per channel of the result."""
    data = next(arg for arg in call.args if isinstance(arg, relax.Var))
    shape = graph.shape_of(data)
    per_channel = False
    for constant in constants:
        value = graph.constant_value(constant)
        if value.size == 1:
            if value.ndim > len(shape):
                return "float", "broadcasting by a constant changes the shape", False
            continue
        aligned = (1,) * (len(shape) - value.ndim) + value.shape
        is_channel = (
            value.shape == (shape[1],)
            if axis == 1 and value.ndim == 1
            else (len(aligned) == len(shape) > 1 and aligned[1] == shape[1] and int(np.prod(aligned)) == shape[1])
        )
        if not is_channel:
            return "float", f"constant of shape {list(value.shape)} is neither one number nor one per channel", False
        per_channel = True
    return "elementwise", "", per_channel


def _classify_pad(call: Any, attrs: dict[str, Any]) -> tuple[OperatorClass, str, bool]:
    width = [int(item) for item in attrs["pad_width"]]
    rank = len(graph.shape_of(call.args[0]))
    if rank != 4 or any(width[:4]):
        return "float", "padding of other than the two spatial axes", False
    mode = str(attrs["pad_mode"])
    if mode in ("reflect", "replicate", "edge") or (mode == "constant" and float(attrs["pad_value"]) == 0.0):
        return "same", "", False
    return "float", f"padding with mode {mode} and value {attrs['pad_value']}", False


def _is_global_pool(call: Any, attrs: dict[str, Any]) -> bool:
    axis = tuple(int(item) for item in attrs["axis"]) if attrs.get("axis") else ()
    return len(graph.shape_of(call.args[0])) == 4 and axis == (2, 3) and bool(attrs.get("keepdims"))


def as_clip(node: Node) -> tuple[float, float] | None:
    """(low, high) if the node is a clamp (ReLU, ReLU6, clip with constant bounds), else None."""
    if node.op == "relax.nn.relu":
        return 0.0, float("inf")
    if node.op == "relax.nn.relu6":
        return 0.0, 6.0
    if node.op == "relax.clip":
        return float(node.call.args[1].value), float(node.call.args[2].value)
    return None
