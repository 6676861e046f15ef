"""Relax functions for golden tests, written as a Python function that binds values by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm import graph

Bind = Callable[[str, Any], Any]


def function(body: Callable[..., Any], **shapes: tuple[int, ...]) -> Any:
    """A module whose `main` is `body(bind, *params)`; `bind(name, call)` binds a call and gives the variable; a list of
    results is a tuple.
    """
    params = [relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in shapes.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            result = body(lambda name, call: graph.emit_named(builder, call, name), *params)
            output = builder.emit_output(relax.Tuple(result) if isinstance(result, list) else result)
        builder.emit_func_output(output)
    return builder.get()


def const(value: Any) -> Any:
    """A float32 constant."""
    return graph.constant(np.asarray(value, np.float32))


def random(*shape: int, seed: int = 0) -> Any:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def channel(values: Any) -> Any:
    """A per-channel constant [1, C, 1, 1]."""
    return const(np.asarray(values).reshape(1, -1, 1, 1))
