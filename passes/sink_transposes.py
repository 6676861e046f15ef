"""Move transposes behind the operators that do not care, so that inverse pairs of channels-last exports meet and
vanish.

Before: `t = permute_dims(x, NCHW->NHWC); b = add(t, Const[C]); r = relu(b); y = permute_dims(r, NHWC->NCHW)`.
After: `b = add(x, Const[C, 1, 1]); y = relu(b)` (under the names b and r).

A value is carried as (variable, permutation) and only materialised, under `<name>.perm`, for operators that need its
own layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph

_FUNCTIONS = (
    "nn.relu clip nn.leakyrelu sigmoid tanh nn.silu nn.gelu nn.gelu_tanh nn.softplus nn.selu exp log sqrt rsqrt square "
    "abs negative erf floor ceil round sin cos sign tan atan"
)
_UNARY = {f"relax.{name}" for name in _FUNCTIONS.split()}
_BINARY = {f"relax.{name}" for name in "add subtract multiply divide maximum minimum power".split()}
_REDUCE = {"relax.mean": relax.op.mean, "relax.sum": relax.op.sum, "relax.max": relax.op.max, "relax.min": relax.op.min}
Carried = tuple[Any, tuple[int, ...]]


def sink_transposes(mod: tvm.IRModule, renamed: dict[str, str]) -> tvm.IRModule:
    """Sink and cancel `permute_dims`; nothing happens to a module without them.

    Parameters
    ----------
    mod : IRModule
        Any module of one dataflow block.
    renamed : dict
        Gets the removed transposes that became another variable.
    """
    if not any(graph.op_name(value) == "relax.permute_dims" for _, value in graph.bindings(mod)):
        return mod
    return _Sinker(mod, renamed).run()


class _Sinker:
    def __init__(self, mod: tvm.IRModule, renamed: dict[str, str]) -> None:
        self.mod = mod
        self.renamed = renamed
        self.builder = relax.BlockBuilder()
        self.carried: dict[Any, Carried] = {}
        self.plain: dict[Any, Any] = {}  # old variable -> new variable in its own layout
        self.taken = {var.name for var, _ in graph.bindings(mod)} | {param.name for param in mod["main"].params}

    def run(self) -> tvm.IRModule:
        function = self.mod["main"]
        self.plain = {param: param for param in function.params}
        with self.builder.function("main", list(function.params)):
            with self.builder.dataflow():
                for var, value in graph.bindings(self.mod):
                    if not isinstance(value, relax.Call):
                        self.plain[var] = self._materialise(value)
                    elif not self._sink(var, value):
                        call = relax.Call(
                            value.op, [self._materialise(a) for a in value.args], value.attrs, list(value.ty_args)
                        )
                        self.plain[var] = graph.emit_named(self.builder, call, var.name)
                output = self.builder.emit_output(self._materialise(function.body.body))
            self.builder.emit_func_output(output)
        return self.builder.get()

    def _materialise(self, expr: Any) -> Any:
        """An operand in its own layout."""
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._materialise(item) for item in expr.fields])
        if not isinstance(expr, relax.Var):
            return expr
        if expr not in self.plain:
            base, axes = self.carried[expr]
            name = expr.name
            while name == base.name or (name != expr.name and name in self.taken):
                name += ".perm"
            self.taken.add(name)
            self.plain[expr] = graph.emit_named(self.builder, relax.op.permute_dims(base, list(axes)), name)
        return self.plain[expr]

    def _lazy(self, expr: Any) -> Carried | None:
        return self.carried.get(expr) if isinstance(expr, relax.Var) else None

    def _sink(self, var: Any, call: Any) -> bool:
        """Whether the call was emitted on the untransposed operand."""
        name = graph.op_name(call)
        if name == "relax.permute_dims":
            return self._compose(var, call)
        lazy = [
            self._lazy(a) for a in (call.args[0].fields if isinstance(call.args[0], relax.Tuple) else call.args[:2])
        ]
        first = next((item for item in lazy if item is not None), None)
        if first is None:
            return False
        axes = first[1]
        new = self._rewrite(name, call, axes)
        if new is None:
            return False
        base = graph.emit_named(self.builder, new, var.name)
        if name in _REDUCE and graph.call_attrs(call)["keepdims"] is False:
            self.plain[var] = base
        else:
            self.carried[var] = (base, axes)
        return True

    def _compose(self, var: Any, call: Any) -> bool:
        axes = graph.call_attrs(call)["axes"] or tuple(range(len(graph.shape_of(call)) - 1, -1, -1))
        source = call.args[0]
        base, inner = self._lazy(source) or (self._materialise(source), tuple(range(len(axes))))
        total = tuple(inner[axis] for axis in axes)
        if total == tuple(range(len(total))):
            self.plain[var] = base
            self.renamed[var.name] = base.name
        else:
            self.carried[var] = (base, total)
        return True

    def _rewrite(self, name: str, call: Any, axes: tuple[int, ...]) -> Any:
        """The call on bases, or None if the operator cannot take them. `axes[i]` is the base axis of outer axis i."""
        attrs = graph.call_attrs(call)
        if name in _UNARY:
            return relax.Call(call.op, [self.carried[call.args[0]][0], *call.args[1:]], call.attrs, list(call.ty_args))
        if name in _BINARY:
            operands = [self._operand(argument, axes) for argument in call.args]
            return (
                None
                if any(o is None for o in operands)
                else relax.Call(call.op, operands, call.attrs, list(call.ty_args))
            )
        if name == "relax.concat":
            operands = [self._operand(item, axes) for item in call.args[0].fields]
            return None if any(o is None for o in operands) else relax.op.concat(operands, axes[attrs["axis"]])
        if name in _REDUCE:
            return self._reduced(name, call, axes, attrs)
        if name == "relax.nn.pad" and self._lazy(call.args[0]):
            width = [0] * (2 * len(axes))
            for outer, inner in enumerate(axes):
                width[2 * inner : 2 * inner + 2] = attrs["pad_width"][2 * outer : 2 * outer + 2]
            return relax.op.nn.pad(self.carried[call.args[0]][0], width, attrs["pad_mode"], attrs["pad_value"])
        if name == "relax.strided_slice" and self._lazy(call.args[0]):
            moved = [axes[int(axis.value)] for axis in call.args[1].fields]
            bounds = [[int(item.value) for item in argument.fields] for argument in call.args[2:5]]
            return relax.op.strided_slice(self.carried[call.args[0]][0], moved, *bounds)
        if name in ("relax.nn.softmax", "relax.nn.log_softmax"):
            return getattr(relax.op.nn, name.rsplit(".", 1)[1])(self.carried[call.args[0]][0], axis=axes[attrs["axis"]])
        if name == "relax.nn.prelu":
            # Canonical prelu is per axis 1, which is another axis of the base.
            return (
                None if axes[attrs["axis"]] != 1 else relax.op.nn.prelu(self.carried[call.args[0]][0], call.args[1], 1)
            )
        return None

    def _reduced(self, name: str, call: Any, axes: tuple[int, ...], attrs: dict[str, Any]) -> Any:
        reduced = sorted(axes[axis] for axis in attrs["axis"])
        left = [axes[axis] for axis in range(len(axes)) if axis not in attrs["axis"]]
        if not attrs["keepdims"] and left != sorted(left):
            return None
        return _REDUCE[name](self.carried[call.args[0]][0], reduced, attrs["keepdims"])

    def _operand(self, expr: Any, axes: tuple[int, ...]) -> Any:
        """An operand of a binary operator seen from the base layout."""
        if graph.is_constant(expr):
            value = graph.constant_value(expr)
            if value.ndim == 0:
                return expr
            aligned = value.reshape((1,) * (len(axes) - value.ndim) + value.shape)
            return graph.constant(np.transpose(aligned, np.argsort(axes)))
        lazy = self._lazy(expr)
        if lazy is not None:
            return lazy[0] if lazy[1] == axes else None
        return None
