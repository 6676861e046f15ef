"""Fold explicit zero pads into the operators that pad themselves.

1. `conv2d(pad(x, 0))` -> the convolution's own padding.
2. `avg_pool2d(pad(x, 0))` -> padding that counts, if the pool itself pads nothing or counts its padding.
3. `max_pool2d(pad(x, 0))` -> the pool's padding, if x cannot be negative (then zero never wins against a real element).
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from lpsn_tvm import graph

_NOT_NEGATIVE = {
    "relax.nn.relu",
    "relax.sigmoid",
    "relax.exp",
    "relax.abs",
    "relax.square",
    "relax.nn.softmax",
    "relax.nn.softplus",
}


def fold_zero_pad(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Apply the rules above; a pad that others read stays for them.

    Parameters
    ----------
    mod : IRModule
        Constants come second, pads are `nn.pad`.
    renamed : dict
        Untouched.
    """
    calls = {var.name: value for var, value in graph.bindings(mod)}
    if not any(graph.op_name(value) == "relax.nn.pad" for value in calls.values()):
        return mod

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        name = graph.op_name(value)
        if name not in ("relax.nn.conv2d", "relax.nn.avg_pool2d", "relax.nn.max_pool2d") or not isinstance(
            value.args[0], relax.Var
        ):
            return None
        pad: Any = calls.get(value.args[0].name)
        width = _spatial_zero_pad(pad)
        if width is None:
            return None
        attrs = graph.call_attrs(value)
        padding = tuple(own + added for own, added in zip(attrs["padding"], width, strict=True))
        data = lookup(pad.args[0])
        if name == "relax.nn.conv2d":
            return relax.op.nn.conv2d(
                data,
                value.args[1],
                strides=attrs["strides"],
                padding=padding,
                dilation=attrs["dilation"],
                groups=attrs["groups"],
                out_dtype="float32",
            )
        common = (attrs["pool_size"], attrs["strides"], padding, attrs["dilation"], attrs["ceil_mode"])
        if name == "relax.nn.avg_pool2d":
            counts = attrs["count_include_pad"] or not any(attrs["padding"])
            return relax.op.nn.avg_pool2d(data, *common, count_include_pad=True) if counts else None
        return relax.op.nn.max_pool2d(data, *common) if _not_negative(pad.args[0], calls) else None

    return graph.rebuild(mod, rewrite)


def _spatial_zero_pad(call: Any) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) of a constant zero pad over H and W only."""
    if graph.op_name(call) != "relax.nn.pad":
        return None
    attrs = graph.call_attrs(call)
    width = attrs["pad_width"]
    if (
        attrs["pad_mode"] != "constant"
        or attrs["pad_value"] != 0.0
        or len(width) != 8
        or any(width[:4])
        or min(width) < 0
    ):
        return None
    return width[4], width[6], width[5], width[7]


def _not_negative(expr: Any, calls: dict[str, Any]) -> bool:
    call: Any = calls.get(expr.name) if isinstance(expr, relax.Var) else None
    name = graph.op_name(call)
    return name in _NOT_NEGATIVE or (name == "relax.clip" and float(call.args[1].value) >= 0)
