"""From lowered steps to programs: phases, memory, resolved operators, instructions.

Consecutive operators of the accelerator become one program: its tokens flow across layers, so the next layer's loads
overlap the last one's computation. Every input and output of a program has a region of its own; what lives only inside
is in the arena; weights, vectors and constant data are one read-only region each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lpsn_tvm.errors import CompileError
from lpsn_tvm.progress import ProgressCallback, silent
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Step, Store, TileOp, Vector
from lpsn_tvm.targets.vta.builder import ProgramBuilder
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.layout import GatherLayout, pack_integers, pack_weights
from lpsn_tvm.targets.vta.memory import Arena, Lifetime, plan_arena
from lpsn_tvm.targets.vta.network import DeviceStep, DeviceTensor, HostStep, LoweredNetwork, VtaNetwork
from lpsn_tvm.targets.vta.phases import consumers, reads_of, split_into_phases, writes_of
from lpsn_tvm.targets.vta.program import Access

ARENA, WEIGHTS, VECTORS, CONSTANTS = "arena", "weight", "vector", "constant"
Emit = Callable[[ProgramBuilder, TileOp, Any], None]
Chooser = Callable[[TileOp, VtaConfig], Any]


@dataclass(frozen=True)
class _Placement:
    """Where the tensors and constants of one program are: name -> (region, offset in tiles)."""

    tensors: Mapping[str, tuple[str, int]]
    weights: Mapping[str, int]
    vectors: Mapping[str, int]

    def resolve(self, op: TileOp) -> TileOp:
        """The operator on the program's regions."""
        return replace(op, steps=tuple(self._step(step) for step in op.steps))

    def _step(self, step: Step) -> Step:
        if isinstance(step, Gemm):
            return replace(
                step,
                source=self._plane(step.source),
                weights=WEIGHTS,
                weight_base=step.weight_base + self.weights[step.weights],
            )
        if isinstance(step, Vector):
            return replace(step, region=VECTORS, base=step.base + self.vectors[step.region])
        return replace(step, plane=self._plane(step.plane)) if isinstance(step, Store) else step

    def _plane(self, plane: Plane) -> Plane:
        region, tile = self.tensors[plane.region]
        return replace(plane, region=region, base=plane.base + tile)


def assemble(
    network: LoweredNetwork,
    *,
    emit: Emit,
    choose: Chooser,
    progress: ProgressCallback = silent,
) -> VtaNetwork:
    """The programs of a lowered network.

    Parameters
    ----------
    network : LoweredNetwork
        Operators on symbolic tensors.
    emit : (builder, op, schedule) -> None
        Writes an operator's instructions.
    choose : (op, config) -> schedule
        Search, or a default.
    progress : callable (stage, done, total)
        Told of every emitted operator.

    Raises
    ------
    CompileError
        An operator has no schedule that fits the buffers (names it), or an operand is missing.
    """
    phases = split_into_phases(network)
    counted = _counted(emit, sum(isinstance(step, TileOp) for step in network.steps), progress)
    steps: list[DeviceStep | HostStep] = []
    earlier: set[str] = set()
    for index, phase in enumerate(phases):
        ops = [step for step in phase if isinstance(step, TileOp)]
        steps.extend(step for step in phase if isinstance(step, HostStep))
        if not ops:
            continue
        inputs, outputs = _borders(network, ops, earlier, *consumers(phases, index + 1, network))
        schedules = [choose(op, network.config) for op in ops]
        steps.append(_program(network, ops, schedules, inputs, outputs, counted))
        earlier |= {name for op in ops for name in writes_of(op)}
    _check_outputs(network)
    return VtaNetwork(network.config, network.inputs, network.outputs, tuple(steps), network.notes)


def _counted(emit: Emit, total: int, progress: ProgressCallback) -> Emit:
    """`emit`, with a report of every operator."""
    done = itertools.count(1)

    def counted(builder: ProgramBuilder, op: TileOp, schedule: Any) -> None:
        emit(builder, op, schedule)
        progress("emit", next(done), total)

    if total:
        progress("emit", 0, total)
    return counted


def _borders(
    network: LoweredNetwork, ops: Sequence[TileOp], earlier: set[str], tensors: set[str], values: set[str]
) -> tuple[list[str], list[str]]:
    """Names of the tensors that a program takes and gives; `tensors` and `values` are what comes after needs."""
    reads = dict.fromkeys(name for op in ops for name in reads_of(op, network))
    writes = dict.fromkeys(name for op in ops for name in writes_of(op))
    # A tensor that several programs fill, each a part of it, goes in and out.
    inputs = [name for name in (*reads, *writes) if name not in writes or name in earlier]
    repacked = {network.tensors[name].value for name in tensors} - {""}
    wanted = values | set(network.outputs) | repacked
    outputs = [name for name in writes if name in tensors or network.tensors[name].value in wanted]
    return list(dict.fromkeys(inputs)), outputs


def _program(
    network: LoweredNetwork,
    ops: Sequence[TileOp],
    schedules: Sequence[Any],
    inputs: Sequence[str],
    outputs: Sequence[str],
    emit: Emit,
) -> DeviceStep:
    """One program of these operators."""
    config = network.config
    builder = ProgramBuilder(config)
    regions = _border_regions(inputs, outputs)
    arena = _plan(network, ops, regions)
    tile = config.inp_tile_bytes
    places = {name: (region, 0) for name, region in regions.items()}
    places |= {name: (ARENA, offset // tile) for name, offset in arena.offsets.items()}
    _declare_borders(network, ops, regions, inputs, builder)
    places |= {name: (CONSTANTS, tile) for name, tile in _constants(network, ops, builder).items()}
    if arena.size:
        builder.region(ARENA, arena.size, access="rw")
    placement = _Placement(places, _weights(network, ops, builder), _vectors(network, ops, builder))
    resolved = tuple(placement.resolve(op) for op in ops)
    for op, schedule in zip(resolved, schedules, strict=True):
        builder.mark(op.name)
        try:
            emit(builder, op, schedule)
        except CompileError as error:
            raise CompileError(str(error).removeprefix(f"{op.name}: "), where=op.name) from error

    def device(name: str) -> DeviceTensor:
        tensor = network.tensors[name]
        return DeviceTensor(name, tensor.value, regions[name], 0, tensor.layout)

    return DeviceStep(
        builder.finish(),
        resolved,
        tuple(schedules),
        tuple(device(name) for name in inputs),
        tuple(device(name) for name in outputs),
        arena.size,
    )


def _border_regions(inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """Region of every input and output: "input", "output", numbered where there are several."""
    sources = [name for name in inputs if name not in outputs]
    names = {}
    for kind, tensors in (("input", sources), ("output", outputs)):
        for index, name in enumerate(tensors):
            names[name] = kind if len(tensors) == 1 else f"{kind}.{index}"
    return names


def _declare_borders(
    network: LoweredNetwork,
    ops: Sequence[TileOp],
    regions: Mapping[str, str],
    inputs: Sequence[str],
    builder: ProgramBuilder,
) -> None:
    """Declares the regions of inputs and outputs, each with the access that the operators need."""
    read = {name for op in ops for name in reads_of(op, network)} | set(inputs)
    written = {name for op in ops for name in writes_of(op)}
    for name, region in regions.items():
        access: Access = "r" if name not in written else "rw" if name in read else "w"
        builder.region(region, network.tensors[name].layout.size, access=access)


def _plan(network: LoweredNetwork, ops: Sequence[TileOp], regions: Mapping[str, str]) -> Arena:
    """Arena of the tensors that only this program knows."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, op in enumerate(ops):
        for name in (*reads_of(op, network), *writes_of(op)):
            if name not in regions:
                first.setdefault(name, index)
                last[name] = index
    return plan_arena(Lifetime(name, network.tensors[name].layout.size, first[name], last[name]) for name in first)


def _weights(network: LoweredNetwork, ops: Sequence[TileOp], builder: ProgramBuilder) -> dict[str, int]:
    """Declares the weight region; first tile of every weight constant."""
    used = dict.fromkeys(step.weights for op in ops for step in op.steps if isinstance(step, Gemm))
    arrays = {name: network.weights[name] for name in used}
    data = b"".join(pack_weights(array, network.config.wgt_bits) for array in arrays.values())
    builder.region(WEIGHTS, len(data), data=data)
    return _starts({name: len(array) for name, array in arrays.items()})


def _vectors(network: LoweredNetwork, ops: Sequence[TileOp], builder: ProgramBuilder) -> dict[str, int]:
    """Declares the region of biases and shifts; first tile of every vector."""
    used = dict.fromkeys(step.region for op in ops for step in op.steps if isinstance(step, Vector))
    arrays = {name: network.vectors[name] for name in used}
    if arrays:
        data = b"".join(np.ascontiguousarray(array, "<i4").tobytes() for array in arrays.values())
        builder.region(VECTORS, len(data), data=data)
    return _starts({name: len(array) for name, array in arrays.items()})


def _constants(network: LoweredNetwork, ops: Sequence[TileOp], builder: ProgramBuilder) -> dict[str, int]:
    """Declares the region of constant sources; first tile of each."""
    sources = dict.fromkeys(step.source.region for op in ops for step in op.steps if isinstance(step, Gemm))
    arrays = {name: network.data[name] for name in sources if name in network.data}
    if arrays:
        data = b"".join(pack_integers(array, network.config.inp_bits) for array in arrays.values())
        builder.region(CONSTANTS, len(data), data=data)
    return _starts({name: len(array) for name, array in arrays.items()})


def _starts(sizes: Mapping[str, int]) -> dict[str, int]:
    starts, total = {}, 0
    for name, size in sizes.items():
        starts[name] = total
        total += size
    return starts


def _check_outputs(network: LoweredNetwork) -> None:
    """Every output of the network exists where the host can have it."""
    made = {step.output for step in network.steps if isinstance(step, HostStep)} | {i.name for i in network.inputs}
    for op in network.steps:
        if isinstance(op, TileOp):
            tensors = (network.tensors[name] for name in writes_of(op))
            made |= {tensor.value for tensor in tensors if not isinstance(tensor.layout, GatherLayout)}
    missing = [name for name in network.outputs if name not in made]
    if missing:
        raise CompileError("no step makes this output of the network", where=missing[0])
