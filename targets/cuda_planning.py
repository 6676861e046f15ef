"""From a lowered module to launches over one arena: every tensor gets a place for as long as it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.cuda_compile import CudaFunction
from lpsn_tvm.targets.cuda_program import ALIGNMENT, KernelLaunch, Packer, Place, Port
from lpsn_tvm.targets.kernel_lowering import OPERATIONS


@dataclass
class Buffer:
    """A piece of the arena and the steps that need it; where it lies is decided last."""

    size: int
    first: int
    last: int
    offset: int = 0


@dataclass(frozen=True)
class _Step:
    name: str
    function: CudaFunction
    arguments: tuple[Any, ...]
    workspaces: Mapping[str, Buffer]
    operations: int


@dataclass(frozen=True)
class Plan:
    """Launches and where everything lies; see `CudaProgram`."""

    launches: tuple[KernelLaunch, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    arena_bytes: int
    constants: bytes


@dataclass
class _Planner:
    functions: Mapping[str, CudaFunction]
    operations: Mapping[str, int]
    packer: Packer = field(default_factory=Packer)
    buffers: list[Buffer] = field(default_factory=list)
    steps: list[_Step] = field(default_factory=list)
    values: dict[Any, Any] = field(default_factory=dict)

    def used(self, expr: Any) -> Any:
        """The Buffer or Place of an operand, needed until the step that comes next."""
        if graph.is_constant(expr):
            array = graph.constant_value(expr)
            return Place("constants", self.packer.add(array), array.nbytes)
        value = self.values[expr]
        if isinstance(value, Buffer):
            value.last = len(self.steps)
        return value

    def allocate(self, size: int) -> Buffer:
        """Memory that the next step writes."""
        self.buffers.append(Buffer(size, len(self.steps), len(self.steps)))
        return self.buffers[-1]

    def bind(self, var: Any, value: Any) -> None:
        """Take one binding of the module."""
        name = graph.op_name(value)
        if isinstance(value, relax.Var) or name == "relax.reshape":
            self.values[var] = self.used(value if isinstance(value, relax.Var) else value.args[0])
        elif isinstance(value, relax.Tuple):
            self.values[var] = [self.used(item) for item in value.fields]
        elif name == "relax.call_tir":
            self._call(var, value)
        elif graph.is_constant(value):
            self.values[var] = self.used(value)
        else:
            raise CompileError(f"{name or type(value).__name__} has no kernel for GPUs", where=var.name)

    def _call(self, var: Any, call: Any) -> None:
        function = self.functions[call.args[0].name_hint]
        operands = [self.used(item) for item in call.args[1].fields]
        result = self.allocate(_bytes(graph.shape_of(var), graph.dtype_of(var)))
        workspaces = {name: self.allocate(size) for name, size in function.workspaces.items()}
        self.values[var] = result
        operations = int(self.operations.get(var.name, 0))
        self.steps.append(_Step(var.name, function, (*operands, result), workspaces, operations))


def plan(mod: Any, functions: Mapping[str, CudaFunction]) -> Plan:
    """Give every tensor of `main` a place, and list its launches.

    Parameters
    ----------
    mod : IRModule
        `main` holds nothing but `call_tir`, reshapes and the tuple that it returns.
    functions : mapping of str to CudaFunction
        By the names that `main` calls.

    Raises
    ------
    CompileError
        Something else is in `main`.
    """
    main = mod["main"]
    planner = _Planner(functions, (main.attrs or {}).get(OPERATIONS, {}))
    inputs = tuple(
        Port(shape, dtype, Place("input", index, _bytes(shape, dtype)))
        for index, (shape, dtype) in enumerate((graph.shape_of(p), graph.dtype_of(p)) for p in main.params)
    )
    for param, port in zip(main.params, inputs, strict=True):
        planner.values[param] = port.place
    for var, value in graph.bindings(mod):
        planner.bind(var, value)
    result = main.body.body
    fields = list(result.fields) if isinstance(result, relax.Tuple) else [result]
    found = [planner.used(item) for item in fields]
    flat = found[0] if len(found) == 1 and isinstance(found[0], list) else found
    types = list(result.ty.fields) if isinstance(result.ty, relax.TupleType) else [result.ty]
    for value in flat:
        if isinstance(value, Buffer):
            # Memory of its own: at run time the caller's can take its place.
            value.first, value.last = 0, len(planner.steps)
    arena = assign_offsets(planner.buffers)
    return Plan(
        launches=tuple(launch for step in planner.steps for launch in _launches(step)),
        inputs=inputs,
        outputs=tuple(
            Port(tuple(int(extent) for extent in kind.shape.values), str(kind.dtype), _place(value))
            for kind, value in zip(types, flat, strict=True)
        ),
        arena_bytes=arena,
        constants=planner.packer.bytes(),
    )


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _place(value: Buffer | Place) -> Place:
    return Place("arena", value.offset, value.size) if isinstance(value, Buffer) else value


def _launches(step: _Step) -> Iterable[KernelLaunch]:
    places = dict(zip(step.function.parameters, map(_place, step.arguments), strict=True))
    places |= {name: _place(buffer) for name, buffer in step.workspaces.items()}
    for index, launch in enumerate(step.function.launches):
        arguments = tuple(places[name] for name in launch.arguments)
        yield KernelLaunch(
            launch.kernel,
            launch.grid,
            launch.block,
            launch.shared_bytes,
            arguments,
            step.name,
            bytes=sum(place.size for place in set(arguments)),
            # A second launch only adds up what the first one left.
            operations=step.operations if index == 0 else 0,
        )


def assign_offsets(buffers: Iterable[Buffer]) -> int:
    """Largest first, each at the lowest address that no buffer of its time occupies; the arena's size."""
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.first)):
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if offset + buffer.size <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.size))
        buffer.offset = offset
        placed.append(buffer)
    return max((_aligned(buffer.offset + buffer.size) for buffer in placed), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
