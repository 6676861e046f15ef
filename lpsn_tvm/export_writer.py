"""Collecting the nodes and initializers of an ONNX graph under unique names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lpsn_tvm.errors import UnsupportedOpError

Array = np.ndarray[Any, Any]


class GraphWriter:
    """Collects nodes and initializers under unique names.

    Parameters
    ----------
    opset : int
        17..21.
    is_batch_dynamic : bool
        Axis 0 is a symbol: shapes written into the model must not fix it.
    """

    def __init__(self, opset: int, is_batch_dynamic: bool) -> None:
        self.opset, self.is_batch_dynamic = opset, is_batch_dynamic
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.taken: set[str] = set()

    def unique(self, name: str) -> str:
        """`name`, or `name` with a number if it is taken."""
        candidate, count = name, 1
        while candidate in self.taken:
            candidate, count = f"{name}_{count}", count + 1
        self.taken.add(candidate)
        return candidate

    def constant(self, value: Array, name: str) -> str:
        """An initializer; returns its tensor name."""
        name = self.unique(name)
        self.initializers.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, *, node_name: str | None = None, **attrs: Any) -> str:
        """A node, named like its output unless told otherwise; returns the output."""
        given = {key: value for key, value in attrs.items() if value is not None}
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=node_name or output, **given))
        return output

    def inner(self, op: str, inputs: Sequence[str], output: str, **attrs: Any) -> str:
        """A node whose result is an intermediate value of what computes `output`."""
        return self.node(op, inputs, self.unique(f"{output}.{op.lower()}"), **attrs)

    def number(self, value: float, output: str) -> str:
        """A float32 scalar."""
        return self.constant(np.array(value, np.float32), f"{output}.value")

    def axes(self, op: str, x: str, axes: Sequence[int], output: str, keepdims: bool) -> str:
        """A reduction: its axes are an attribute before opset 18, an input from then on (ReduceSum: from 13)."""
        if self.opset < 18 and op != "ReduceSum":
            return self.node(op, [x], output, axes=list(axes), keepdims=int(keepdims))
        indices = self.constant(np.array(axes, np.int64), f"{output}.axes")
        return self.node(op, [x, indices], output, keepdims=int(keepdims))

    def shape(self, shape: Sequence[int], source: Sequence[int], output: str) -> str:
        """A reshape target; the batch stays what it is if it is a symbol."""
        target = list(shape)
        if self.is_batch_dynamic:
            if len(source) == 0 or target[0] != source[0]:
                raise UnsupportedOpError(
                    "this reshape mixes the batch with other axes: export with a fixed batch", where=output
                )
            target[0] = 0
        return self.constant(np.array(target, np.int64), f"{output}.shape")
