"""The integer graph as plain records: what lowering reads, free of tvm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.forms import Array


@dataclass(frozen=True)
class Node:
    """One operator.

    Parameters
    ----------
    name : str
        The variable that it makes.
    op : str
        "lpsn.conv2d", ...
    operands : tuple of str or ndarray
        Variables and constants, in the order of the numpy function.
    attrs : mapping
        Plain values.
    shape, dtype
        Of the result.
    """

    name: str
    op: str
    operands: tuple[str | Array, ...]
    attrs: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: str = "int8"

    @property
    def variables(self) -> tuple[str, ...]:
        """Operands that are variables."""
        return tuple(operand for operand in self.operands if isinstance(operand, str))

    def variable(self, index: int) -> str:
        """Operand `index`, which must be a variable."""
        operand = self.operands[index]
        if not isinstance(operand, str):
            raise CompileError(f"operand {index} of {self.op} is a constant", where=self.name)
        return operand

    def constant(self, index: int) -> Array:
        """Operand `index`, which must be a constant."""
        operand = self.operands[index]
        if isinstance(operand, str):
            raise CompileError(f"operand {index} of {self.op} is not a constant", where=self.name)
        return operand


@dataclass(frozen=True)
class IntegerGraph:
    """Operators in an order in which operands exist before they are read."""

    inputs: tuple[TensorInfo, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    consumers: Mapping[str, tuple[Node, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for variable in dict.fromkeys(node.variables):
                found.setdefault(variable, []).append(node)
        object.__setattr__(self, "consumers", {name: tuple(nodes) for name, nodes in found.items()})

    def only_consumer(self, name: str) -> Node | None:
        """The one operator that reads `name`, if there is exactly one and the network does not return it."""
        nodes = self.consumers.get(name, ())
        return nodes[0] if len(nodes) == 1 and name not in self.outputs else None


def read_graph(mod: Any) -> IntegerGraph:
    """The records of an integer module's `main`.

    Raises
    ------
    CompileError
        An operator that is neither an integer operator nor one that the host has in numpy.
    """
    from tvm import relax

    from lpsn_tvm import float_ops, graph, quant
    from lpsn_tvm.targets.vta.host_calls import host_call

    function = mod["main"]
    known = quant.OPERATORS.keys() | float_ops.OPERATORS.keys()
    alias: dict[str, str] = {}
    nodes: list[Node] = []

    def operand(expr: Any) -> str | Array:
        if graph.is_constant(expr):
            return graph.constant_value(expr)
        if not isinstance(expr, relax.Var):
            raise CompileError(f"an operand is a {type(expr).__name__}", where=nodes[-1].name if nodes else "main")
        return alias.get(expr.name, str(expr.name))

    results: dict[str, tuple[str, ...]] = {}
    for var, value in graph.bindings(mod):
        if isinstance(value, relax.Var):
            alias[var.name] = alias.get(value.name, value.name)
        elif isinstance(value, relax.Tuple):
            results[var.name] = tuple(str(operand(item)) for item in value.fields)
        elif graph.op_name(value) in known:
            operands = tuple(operand(argument) for argument in value.args[1:])
            attrs = graph.call_attrs(value)
            nodes.append(
                Node(var.name, graph.op_name(value), operands, attrs, graph.shape_of(var), graph.dtype_of(var))
            )
        elif (host := host_call(value)) is not None:
            operands = (*(operand(argument) for argument in host.operands), *host.constants)
            nodes.append(Node(var.name, host.op, operands, host.attrs, graph.shape_of(var), graph.dtype_of(var)))
        else:
            raise CompileError(f"cannot lower {graph.op_name(value) or type(value).__name__}", where=var.name)
    body = function.body.body
    if isinstance(body, relax.Tuple):
        outputs = tuple(str(operand(item)) for item in body.fields)
    else:
        outputs = results.get(body.name, (str(operand(body)),))
    inputs = tuple(TensorInfo(p.name, graph.shape_of(p), graph.dtype_of(p)) for p in function.params)
    return IntegerGraph(inputs, tuple(nodes), outputs)
