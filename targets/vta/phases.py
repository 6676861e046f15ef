"""Which steps share a program: host steps and programs alternate, as rarely as the operands allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.vta.ops import Gemm, Store, TileOp
from lpsn_tvm.targets.vta.network import HostStep, LoweredNetwork, SymbolicTensor


def reads_of(op: TileOp, network: LoweredNetwork) -> tuple[str, ...]:
    """Tensors (`Plane.region`) that an operator reads, each once; constants are none."""
    sources = dict.fromkeys(step.source.region for step in op.steps if isinstance(step, Gemm))
    return tuple(name for name in sources if name not in network.data)


def writes_of(op: TileOp) -> tuple[str, ...]:
    """Tensors that an operator stores to, each once."""
    return tuple(dict.fromkeys(step.plane.region for step in op.steps if isinstance(step, Store)))


def split_into_phases(network: LoweredNetwork) -> list[list[TileOp] | list[HostStep]]:
    """Lists of host steps and of operators in turn, in an order that respects every operand.

    Host steps take even phases and programs odd ones; a step runs in the earliest phase of its kind that all its
    operands allow. So a host step between two independent operators splits nothing.

    Raises
    ------
    CompileError
        An operand is read before any step has made it.
    """
    finder = _Phases(network)
    phases = [finder.host(step) if isinstance(step, HostStep) else finder.device(step) for step in network.steps]
    order = sorted(range(len(phases)), key=lambda index: phases[index])
    return [[network.steps[index] for index in group] for _, group in groupby(order, key=lambda i: phases[i])]  # type: ignore[misc]


class _Phases:
    """Phases of the steps so far, and of what they made."""

    def __init__(self, network: LoweredNetwork) -> None:
        self.network = network
        self.tensors: Mapping[str, SymbolicTensor] = network.tensors
        self.values = {info.name: 0 for info in network.inputs}
        self.device_values: dict[str, int] = {}
        self.written: dict[str, int] = {}

    def host(self, step: HostStep) -> int:
        needed = [name for name in step.inputs if name not in step.constants]
        phase = max((self._on_host(name, step.output) for name in needed), default=0)
        self.values[step.output] = phase
        return phase

    def device(self, op: TileOp) -> int:
        phase = 1
        for name in (*reads_of(op, self.network), *writes_of(op)):
            if name not in self.tensors:
                raise CompileError(f"uses the unknown tensor {name!r}", where=op.name)
            if name in self.written:
                phase = max(phase, self.written[name])
        for name in reads_of(op, self.network):
            if name not in self.written:
                phase = max(phase, self._on_host(self.tensors[name].value, op.name) + 1)
        for name in writes_of(op):
            self.written[name] = max(phase, self.written.get(name, 0))
            value = self.tensors[name].value
            self.device_values[value] = max(phase, self.device_values.get(value, 0))
        return phase

    def _on_host(self, value: str, reader: str) -> int:
        """First host phase in which the host has the value."""
        if value in self.values:
            return self.values[value]
        if value in self.device_values:
            return self.device_values[value] + 1
        raise CompileError(f"reads {value!r}, which no step before it makes", where=reader)


def consumers(
    phases: Sequence[Sequence[TileOp] | Sequence[HostStep]], start: int, network: LoweredNetwork
) -> tuple[set[str], set[str]]:
    """What the phases from `start` on take from before: device tensors by name, and values that the host reads."""
    tensors: set[str] = set()
    values: set[str] = set()
    for phase in phases[start:]:
        for step in phase:
            if isinstance(step, HostStep):
                values |= {name for name in step.inputs if name not in step.constants}
            else:
                tensors |= {*reads_of(step, network), *writes_of(step)}
    return tensors, values
