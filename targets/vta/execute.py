"""Running an assembled network: host steps in numpy, programs in the simulator. Needs neither tvm, torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm import float_ops, quant
from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.host_steps import OPERATORS as OWN_OPERATORS
from lpsn_tvm.targets.vta.layout import TileLayout
from lpsn_tvm.targets.vta.network import DeviceTensor, HostStep, VtaNetwork
from lpsn_tvm.targets.vta.simulator import SimulationResult, simulate

Array = npt.NDArray[Any]
HOST_OPERATORS: dict[str, Any] = {**quant.OPERATORS, **float_ops.OPERATORS, **OWN_OPERATORS}
"""Every operator that a `HostStep` may name."""


@dataclass(frozen=True)
class Execution:
    """One run of a network.

    Parameters
    ----------
    outputs : mapping of name to ndarray
    simulations : tuple of SimulationResult
        Of each program, in order.
    inputs : tuple of mapping of region to bytes
        What each program was given.
    """

    outputs: dict[str, Array]
    simulations: tuple[SimulationResult, ...]
    inputs: tuple[Mapping[str, bytes], ...]


def execute(network: VtaNetwork, feeds: Mapping[str, Array], **options: Any) -> Execution:
    """Run a network on input values; `options` are those of `simulate` (model, strict, interleaving, timeline).

    Raises
    ------
    CompileError
        An input is missing.
    VtaProgramError
        A program broke a rule of the hardware.
    """
    memory = HostMemory(feeds)
    for info in network.inputs:
        if info.name not in feeds:
            raise CompileError(f"input is missing; given: {', '.join(feeds) or 'none'}", where=info.name)
    simulations, given = [], []
    for step in network.steps:
        if isinstance(step, HostStep):
            memory.put(step.output, run_host(step, memory))
            continue
        inputs = {tensor.region: memory.bytes_of(tensor) for tensor in step.inputs}
        result = simulate(step.linked, inputs=inputs, **options)
        memory.keep(step.outputs, result.memory)
        simulations.append(result)
        given.append(inputs)
    outputs = {name: memory.value(name) for name in network.outputs}
    return Execution(outputs, tuple(simulations), tuple(given))


def run_host(step: HostStep, memory: HostMemory) -> Array:
    """The output of a host step."""
    function = HOST_OPERATORS.get(step.op)
    if function is None:
        raise CompileError(f"the host has no operator {step.op}", where=step.output)
    operands = [step.constants[name] if name in step.constants else memory.value(name) for name in step.inputs]
    return np.asarray(function(*operands, **step.attrs))


class HostMemory:
    """Values as arrays and device tensors as bytes; each is made from the other when it is asked for.

    Parameters
    ----------
    values : mapping of name to ndarray
        What the host has at the start.
    """

    def __init__(self, values: Mapping[str, Array]) -> None:
        self._values = dict(values)
        self._bytes: dict[str, bytes] = {}
        self._holders: dict[str, DeviceTensor] = {}

    def put(self, name: str, value: Array) -> None:
        """A value that the host made."""
        self._values[name] = value

    def keep(self, tensors: Sequence[DeviceTensor], regions: Mapping[str, bytes]) -> None:
        """What a program left in its output regions."""
        for tensor in tensors:
            self._bytes[tensor.name] = regions[tensor.region]
            self._values.pop(tensor.value, None)
            if isinstance(tensor.layout, TileLayout):
                self._holders[tensor.value] = tensor

    def value(self, name: str) -> Array:
        """The array of a value, unpacked from a device tensor where need be."""
        if name not in self._values:
            if name not in self._holders:
                raise CompileError("nothing has made this value yet", where=name)
            holder = self._holders[name]
            self._values[name] = holder.layout.unpack(self._bytes[holder.name])  # type: ignore[union-attr]
        return self._values[name]

    def bytes_of(self, tensor: DeviceTensor) -> bytes:
        """The bytes of a device tensor, as a program left them or packed from its value."""
        if tensor.name in self._bytes:
            return self._bytes[tensor.name]
        return tensor.layout.pack(self.value(tensor.value))
