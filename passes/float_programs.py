"""Elementwise Relax operators as instructions of a `float_elementwise` program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm import float_ops, graph
from lpsn_tvm.passes.operator_rules import Node, as_clip

_SAME_NAME = {f"relax.{name}": name for name in float_ops.ELEMENTWISE}
_NEURAL = {f"relax.nn.{name}": name for name in ("relu", "silu", "gelu", "gelu_tanh", "softplus", "selu")}
UNARY_AND_BINARY: Mapping[str, str] = {**_SAME_NAME, **_NEURAL}


def is_elementwise(node: Node) -> bool:
    """Whether a node can be part of a program: known operator, float32, operands that broadcast without changing
    rank.
    """
    if node.op not in UNARY_AND_BINARY and node.op not in ("relax.clip", "relax.nn.leakyrelu", "relax.nn.prelu"):
        return False
    shape = graph.shape_of(node.call)
    if graph.dtype_of(node.call) != "float32" or not shape or not node.inputs:
        return False
    for argument in node.call.args:
        if isinstance(argument, relax.Var) and (
            len(graph.shape_of(argument)) != len(shape) or graph.dtype_of(argument) != "float32"
        ):
            return False
        if graph.is_constant(argument) and len(graph.shape_of(argument)) > len(shape):
            return False
    # The result has the shape of what varies: constants must not enlarge it.
    variables = [graph.shape_of(argument) for argument in node.call.args if isinstance(argument, relax.Var)]
    return np.broadcast_shapes(*variables) == shape


@dataclass
class ProgramBuilder:
    """Collects instructions; `tensors` are variables and constants by key, in order of first use."""

    rank: int
    keys: list[str] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    steps: list[tuple[str, list[Any]]] = field(default_factory=list)
    results: dict[str, int] = field(default_factory=dict)

    def add(self, node: Node, resolve: Callable[[Any], str]) -> None:
        """Append one node; operands are earlier results of the program or its inputs."""
        clip = as_clip(node)
        operands = [
            self._operand(node, argument, resolve) for argument in node.call.args if not _is_scalar_expr(argument)
        ]
        if node.op == "relax.nn.relu" or clip is None:
            name = UNARY_AND_BINARY.get(node.op, "")
            if node.op == "relax.nn.leakyrelu":
                name, operands = "leaky_relu", [*operands, float(graph.call_attrs(node.call)["alpha"])]
            elif node.op == "relax.nn.prelu":
                name = "prelu"
            self.steps.append((name, operands))
        else:
            self._append_clip(operands[0], clip)
        self.results[node.name] = len(self.steps) - 1

    def _append_clip(self, operand: Any, clip: tuple[float, float]) -> None:
        low, high = clip
        if np.isinf(high):
            self.steps.append(("maximum", [operand, float(low)]))
        elif np.isinf(low):
            self.steps.append(("minimum", [operand, float(high)]))
        else:
            self.steps.append(("clip", [operand, float(low), float(high)]))

    def _operand(self, node: Node, argument: Any, resolve: Callable[[Any], str]) -> Any:
        """("result", i), ("tensor", i) or a float."""
        if graph.is_constant(argument):
            value = graph.constant_value(argument)
            if value.size == 1:
                return float(value.reshape(-1)[0])
            self.keys.append("")
            self.tensors.append(graph.constant(self._aligned(node, value)))
            return ("tensor", len(self.tensors) - 1)
        key = resolve(argument)
        if key in self.results:
            return ("result", self.results[key])
        if key not in self.keys:
            self.keys.append(key)
            self.tensors.append(argument)
        return ("tensor", self.keys.index(key))

    def _aligned(self, node: Node, value: Any) -> Any:
        """Constants get the rank of the tensors: numpy's rule, except that the slopes of a PReLU belong to axis 1."""
        before = 1 if node.op == "relax.nn.prelu" and value.ndim == 1 else self.rank - value.ndim
        shape = (1,) * before + value.shape
        return value.astype(np.float32).reshape(shape + (1,) * (self.rank - len(shape)))

    def program(self) -> str:
        """The encoded program."""
        count = len(self.tensors)
        steps: float_ops.Program = []
        for name, operands in self.steps:
            numbers = [o if isinstance(o, float) else o[1] + (count if o[0] == "result" else 0) for o in operands]
            steps.append([name, *numbers])
        return float_ops.encode_program(steps)


def _is_scalar_expr(argument: Any) -> bool:
    """Scalar immediates (bounds of a clip) are not operands."""
    return not isinstance(argument, relax.Var) and not graph.is_constant(argument)
