"""Lowering to kernels: dispatch of every lpsn operator, layouts, and conversions where they meet.

Tensors between lpsn operators live in whatever layout the kernels agree on (llvm: 16 channels per block, cuda: 32);
parameters, results and operands of ordinary Relax operators are plain. Kernels with equal keys share one function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from math import prod
from typing import Any

import tvm
from tvm import relax

from lpsn_tvm import float_ops, graph, quant
from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.convert import is_same_memory
from lpsn_tvm.schedules.rules import dispatch
from lpsn_tvm.targets.choices import chosen

ELEMENTWISE = ("lpsn.add", "lpsn.multiply", "lpsn.float_elementwise")


LAYERS = {
    f"{prefix}{kind}": kind for prefix in ("lpsn.", "lpsn.float_") for kind in ("conv2d", "conv2d_transpose", "dense")
}
OPERATIONS = "lpsn.operations"
"""Attribute of a lowered `main`: variable of a layer -> multiplications and additions for the whole batch."""

Relayout = Callable[[TensorSpec, TensorSpec], Kernel]
"""(layout that is there, layout wanted) -> kernel that copies."""


def lower_to_kernels(backend: Any, mod: tvm.IRModule, relayout: Relayout) -> tvm.IRModule:
    """`lpsn.*` calls -> `call_tir` of the backend's kernels; see `Backend.lower`."""
    return _Lowering(backend, mod, relayout).run()


def argument_names(op: str, count: int) -> list[str]:
    """Names of an operator's tensor arguments, from its reference function; the last name repeats for variadic ones."""
    function = quant.OPERATORS.get(op) or float_ops.OPERATORS.get(op)
    if function is None:
        return [f"arg{i}" for i in range(count)]
    names: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}{i}" for i in range(count - len(names))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names[:count]


class _Lowering:
    """One module's rewriting."""

    def __init__(self, backend: Any, mod: tvm.IRModule, relayout: Relayout) -> None:
        self.backend, self.mod, self.relayout = backend, mod, relayout
        self.builder = relax.BlockBuilder()
        self.values: dict[Any, tuple[Any, TensorSpec]] = {}
        self.converted: dict[tuple[Any, int], Any] = {}
        self.functions: dict[Hashable, Any] = {}
        self.operations: dict[str, int] = {}

    def run(self) -> tvm.IRModule:
        function = self.mod["main"]
        for param in function.params:
            self.values[param] = (param, TensorSpec(graph.shape_of(param), graph.dtype_of(param)))
        with self.builder.function("main", list(function.params)):
            with self.builder.dataflow():
                for var, value in graph.bindings(self.mod):
                    self._binding(var, value)
                output = self._output(self._plain(function.body.body))
            self.builder.emit_func_output(output)
        result = self.builder.get()
        if function.attrs is not None and len(function.attrs):
            result["main"] = result["main"].with_attrs(function.attrs)
        result["main"] = result["main"].with_attr(OPERATIONS, self.operations)
        return result

    def _output(self, value: Any) -> Any:
        """What the function returns; a layer that is the only output keeps its name."""
        if not isinstance(value, relax.Var):
            return self.builder.emit_output(value)
        output = relax.Var(value.name, value.ty)
        self.builder.emit_normalized(relax.VarBinding(output, value))
        return output

    def _binding(self, var: Any, value: Any) -> None:
        if isinstance(value, relax.Var):
            self.values[var] = self.values[value]
        elif isinstance(value, relax.Tuple):
            self.values[var] = (self._plain(value), TensorSpec((), ""))
        elif graph.op_name(value).startswith("lpsn."):
            self.values[var] = self._kernel_call(var, value)
        elif isinstance(value, relax.Call):
            call = relax.Call(value.op, [self._plain(arg) for arg in value.args], value.attrs, list(value.ty_args))
            new = graph.emit_named(self.builder, call, var.name)
            self.values[var] = (new, TensorSpec(graph.shape_of(var), graph.dtype_of(var)))
        else:
            raise CompileError(f"cannot lower a {type(value).__name__}", where=var.name)

    def _plain(self, expr: Any) -> Any:
        """The expression with every operand in plain layout."""
        if isinstance(expr, relax.Var):
            value, spec = self.values[expr]
            return self._converted(value, spec, spec.with_block(0)) if spec.block else value
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._plain(item) for item in expr.fields])
        return expr

    def _kernel_call(self, var: Any, call: Any) -> tuple[Any, TensorSpec]:
        op, arguments = graph.op_name(call), list(call.args[1:])
        view = self._view(op, var, arguments)
        if view is not None:
            return view
        constants: dict[str, Array] = {}
        tensors: list[tuple[Any, TensorSpec]] = []
        for name, argument in zip(argument_names(op, len(arguments)), arguments, strict=True):
            if graph.is_constant(argument):
                constants[name] = graph.constant_value(argument)
            else:
                tensors.append(self.values[argument])
        tensors = self._ranked(op, tensors, var.name)
        attrs = graph.call_attrs(call)
        kernel = self._dispatch(op, tuple(spec for _, spec in tensors), constants, attrs)
        if kernel is None and constants:
            # A constant that the kernel does not know as one is a tensor like any other.
            tensors = self._ranked(op, [self._operand(argument) for argument in arguments], var.name)
            kernel = self._dispatch(op, tuple(spec for _, spec in tensors), {}, attrs)
        if kernel is None:
            shapes = ", ".join(f"{spec.dtype}{list(spec.shape)}" for _, spec in tensors)
            raise CompileError(f"no kernel of backend {self.backend.name} takes {op} of {shapes}", where=var.name)
        kernel = chosen(self.backend, kernel, var.name)
        wanted = kernel.inputs or tuple(spec for _, spec in tensors)
        operands = [self._converted(value, spec, want) for (value, spec), want in zip(tensors, wanted, strict=True)]
        result = self._emit(kernel, operands, var.name)
        if op in LAYERS:
            in_shape, out_shape = graph.shape_of(arguments[0]), graph.shape_of(var)
            weights = prod(graph.shape_of(arguments[1]))
            macs = graph.layer_macs(LAYERS[op], weights, in_shape, out_shape) // attrs.get("block_size", 1) ** 2
            self.operations[var.name] = 2 * in_shape[0] * macs
        return self._reshaped(result, kernel.out, graph.shape_of(var), var.name)

    def _operand(self, argument: Any) -> tuple[Any, TensorSpec]:
        if graph.is_constant(argument):
            array = graph.constant_value(argument)
            return argument, TensorSpec(array.shape, str(array.dtype))
        return self.values[argument]

    def _ranked(self, op: str, tensors: list[tuple[Any, TensorSpec]], name: str) -> list[tuple[Any, TensorSpec]]:
        """Operands of elementwise operators with equal ranks."""
        if op not in ELEMENTWISE:
            return tensors
        rank = max(len(spec.shape) for _, spec in tensors)
        shapes = [(1,) * (rank - len(spec.shape)) + spec.shape for _, spec in tensors]
        return [
            self._reshaped(value, spec, shape, f"{name}.operand{i}")
            for i, ((value, spec), shape) in enumerate(zip(tensors, shapes, strict=True))
        ]

    def _reshaped(self, value: Any, spec: TensorSpec, shape: tuple[int, ...], name: str) -> tuple[Any, TensorSpec]:
        """The same elements under another shape, in plain layout; nothing where the shape is that already."""
        if spec.shape == shape:
            return value, spec
        plain = self._converted(value, spec, spec.with_block(0))
        out = TensorSpec(shape, spec.dtype)
        return graph.emit_named(self.builder, relax.op.reshape(plain, shape), name), out

    def _dispatch(
        self, op: str, inputs: tuple[TensorSpec, ...], constants: dict[str, Array], attrs: dict[str, Any]
    ) -> Kernel | None:
        return dispatch(self.backend.rules, op, inputs, constants, attrs, self.backend.geometry)

    def _emit(self, kernel: Kernel, operands: list[Any], name: str) -> Any:
        if kernel.key not in self.functions:
            function = kernel.build().with_attr("op_pattern", 8).with_attr("lpsn.kernel", 1)
            self.functions[kernel.key] = self.builder.add_func(function, str(kernel.key[0]))
        constants = [graph.constant(array) for array in kernel.constants]
        out = relax.TensorType(kernel.out.memory_shape, kernel.out.dtype)
        return graph.emit_named(
            self.builder, relax.call_tir(self.functions[kernel.key], [*operands, *constants], out), name
        )

    def _view(self, op: str, var: Any, arguments: list[Any]) -> tuple[Any, TensorSpec] | None:
        """A reshape is the same bytes under another shape: in the layout at hand where only axes of one pixel come or
        go, else in plain layout.
        """
        if op not in ("lpsn.reshape", "lpsn.float_reshape") or graph.is_constant(arguments[0]):
            return None
        value, spec = self.values[arguments[0]]
        shape = graph.shape_of(var)
        if spec.block and (
            min(len(shape), len(spec.shape)) < 2 or shape[:2] != spec.shape[:2] or len(shape) not in (2, 4)
        ):
            value, spec = self._converted(value, spec, spec.with_block(0)), spec.with_block(0)
        out = TensorSpec(shape, spec.dtype, spec.block)
        return graph.emit_named(self.builder, relax.op.reshape(value, out.memory_shape), var.name), out

    def _converted(self, value: Any, spec: TensorSpec, want: TensorSpec) -> Any:
        if spec == want:
            return value
        if (spec.shape, spec.dtype) != (want.shape, want.dtype):
            raise CompileError(
                f"a kernel wants {want} and was offered {spec}", where=getattr(value, "name", "constant")
            )
        key = (value, want.block)
        if key not in self.converted:
            name = f"{getattr(value, 'name', 'constant')}.block{want.block}"
            if is_same_memory(spec, want):
                self.converted[key] = graph.emit_named(self.builder, relax.op.reshape(value, want.memory_shape), name)
            else:
                self.converted[key] = self._emit(self.relayout(spec, want), [value], name)
        return self.converted[key]
