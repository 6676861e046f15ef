"""Global pooling has one spelling: `mean(x, axis=[2, 3], keepdims=True)` or `max(...)`.

1. `mean(x, [2, 3], keepdims=False)` -> `mean(..., keepdims=True)` and a reshape; the same for `max`.
2. `avg_pool2d` / `max_pool2d` whose only window is the whole image, without padding -> `mean` / `max`.
3. `adaptive_avg_pool2d` to 1x1 -> `mean`.
4. `mean(mean(x, 3), 2)` and `mean(reshape(x, [N, C, H*W]), 2)` -> `mean` over [2, 3].
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from lpsn_tvm import graph

_REDUCE = {"relax.mean": relax.op.mean, "relax.max": relax.op.max}
_POOL = {
    "relax.nn.avg_pool2d": relax.op.mean,
    "relax.nn.max_pool2d": relax.op.max,
    "relax.nn.adaptive_avg_pool2d": relax.op.mean,
}


def normalize_pooling(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Apply the rules above.

    Parameters
    ----------
    mod : IRModule
        Any module of one dataflow block.
    renamed : dict
        Untouched.
    """

    def rewrite(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        name = graph.op_name(value)
        if name in _POOL and _is_global(name, value, var):
            return _POOL[name](lookup(value.args[0]), [2, 3], True)
        if name not in _REDUCE:
            return None
        source = _image(builder, name, value, lookup)
        if source is None:
            return None
        if len(graph.shape_of(var)) == 4:
            return _REDUCE[name](source, [2, 3], True)
        pooled = graph.emit_named(builder, _REDUCE[name](source, [2, 3], True), f"{var.name}.pool")
        return relax.op.reshape(pooled, graph.shape_of(var))

    return graph.rebuild(mod, rewrite)


def _image(builder: Any, name: str, call: Any, lookup: Any) -> Any:
    """The [N, C, H, W] tensor over whose whole image the call reduces; None if it does not."""
    attrs = graph.call_attrs(call)
    data = lookup(call.args[0])
    if attrs["axis"] is None or not isinstance(data, relax.Var):
        return None
    axes, shape = tuple(int(axis) for axis in attrs["axis"]), graph.shape_of(data)
    if len(shape) == 4 and axes == (2, 3):
        return data
    producer = builder.lookup_binding(data)
    if len(axes) != 1 or producer is None:
        return None
    if graph.op_name(producer) == "relax.reshape" and len(shape) == 3 and axes == (2,):
        source = graph.shape_of(producer.args[0])
        return producer.args[0] if len(source) == 4 and source[:2] == shape[:2] else None
    if graph.op_name(producer) == name and graph.call_attrs(producer)["axis"] is not None:
        inner = graph.call_attrs(producer)
        source = graph.shape_of(producer.args[0])
        both = {int(inner["axis"][0]), axes[0] if inner["keepdims"] or axes[0] < int(inner["axis"][0]) else axes[0] + 1}
        return producer.args[0] if len(source) == 4 and len(inner["axis"]) == 1 and both == {2, 3} else None
    return None


def _is_global(name: str, call: Any, var: Any) -> bool:
    if graph.shape_of(var)[2:] != (1, 1):
        return False
    attrs = graph.call_attrs(call)
    if name == "relax.nn.adaptive_avg_pool2d":
        return True
    return (
        tuple(attrs["pool_size"]) == graph.shape_of(call.args[0])[2:]
        and not any(attrs["padding"])
        and tuple(attrs["dilation"]) == (1, 1)
    )
