"""What a converter sees of one ONNX node, and how it emits Relax bindings under the node's name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.errors import UnsupportedOpError

Expr = Any
Array = npt.NDArray[Any]


class Emitter:
    """Binds expressions under names that are unique in the whole function.

    The name of a node belongs to its last binding; bindings before it get `<node>.1`, `<node>.2`, ... so that a reader
    can tell whose they are.
    """

    def __init__(self, builder: relax.BlockBuilder, taken: set[str]) -> None:
        self.builder = builder
        self.taken = taken

    def fresh(self, name: str) -> str:
        """`name.1`, or the next number that is free; reserved from now on."""
        count = 1
        while f"{name}.{count}" in self.taken:
            count += 1
        self.taken.add(f"{name}.{count}")
        return f"{name}.{count}"

    def emit(self, expr: Expr, name: str) -> Expr:
        """Bind `expr` under exactly `name`; nested calls are bound first, under fresh names below it."""
        return graph.emit_named(self.builder, self._flat(expr, name), name)

    def bind(self, expr: Expr, name: str) -> Expr:
        """A variable, constant or shape as it is; a call bound under a fresh name below `name`."""
        if isinstance(expr, relax.Call):
            return self.emit(expr, self.fresh(name))
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.bind(item, name) for item in expr.fields])
        return expr

    def _flat(self, expr: Expr, name: str) -> Expr:
        if not isinstance(expr, relax.Call):
            return expr
        arguments = [self.bind(argument, name) for argument in expr.args]
        return relax.Call(expr.op, arguments, expr.attrs, list(expr.ty_args))


@dataclass
class Node:
    """One ONNX node with its operands already converted.

    Parameters
    ----------
    name, op_type : str
        Unique name and operator.
    inputs : list of Expr or None
        None where an optional input is left out; reading past the end gives None too.
    attrs : dict
        Plain values: int, float, str, tuples of these, numpy arrays for tensors.
    output_count : int
        How many outputs the node has.
    opset : int
        Version of the default operator set.
    emitter : Emitter
    """

    name: str
    op_type: str
    inputs: list[Expr | None]
    attrs: dict[str, Any]
    output_count: int
    opset: int
    emitter: Emitter = field(repr=False)

    def input(self, index: int) -> Expr | None:
        """Operand `index`, None if absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def emit(self, expr: Expr, suffix: str | None = None) -> Expr:
        """Bind under the node's own name, or `<name>.<suffix>`; suffix "" takes the next free number."""
        if suffix is None:
            return self.emitter.emit(expr, self.name)
        if suffix == "":
            return self.emitter.emit(expr, self.emitter.fresh(self.name))
        name = f"{self.name}.{suffix}"
        if name in self.emitter.taken:
            name = self.emitter.fresh(name)
        self.emitter.taken.add(name)
        return self.emitter.emit(expr, name)

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Static shape of an operand."""
        return graph.shape_of(self.inputs[index])

    def constant(self, index: int, what: str) -> Array | None:
        """The value of a constant operand, None if absent; an error that names it if it is computed."""
        expr = self.input(index)
        if expr is None:
            return None
        if not graph.is_constant(expr):
            raise self.unsupported(f"{what} is computed at run time; only constants are supported")
        return graph.constant_value(expr)

    def integers(self, attribute: str, index: int) -> tuple[int, ...] | None:
        """A list that newer operator sets give as an input and older ones as an attribute."""
        if attribute in self.attrs:
            value = self.attrs[attribute]
            return tuple(value) if isinstance(value, (tuple, list)) else (int(value),)
        value = self.constant(index, attribute)
        return None if value is None else tuple(int(item) for item in np.asarray(value).reshape(-1))

    def unsupported(self, message: str) -> UnsupportedOpError:
        """The error for this node."""
        return UnsupportedOpError(message, where=f"node {self.name!r} ({self.op_type})")
