"""A network for the accelerator: first as operators on symbolic tensors (`LoweredNetwork`), then as programs with host
steps in between (`VtaNetwork`), which runs without tvm, torch or onnx.

Names. A *value* is a variable of the integer graph, held by the host as a numpy array. A *device tensor* is a value in
the accelerator's memory in some layout; one value may be in several (plain, gathered). What a program reads that no
operator wrote comes from the host (`layout.pack(value)`); what the host needs and an operator wrote is fetched
(`layout.unpack(bytes)`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.schedules.vta.ops import TileOp
from lpsn_tvm.targets.vta.layout import Layout

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig
    from lpsn_tvm.targets.vta.program import LinkedProgram, Program

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class HostStep:
    """One operator on the host: `output = function(*arguments, **attrs)`; `op` names one of `quant.OPERATORS`,
    `float_ops.OPERATORS` or `host_steps.OPERATORS`.

    Parameters
    ----------
    op : str
        "lpsn.<name>" or "vta.<name>".
    inputs : tuple of str
        Arguments in order: names of values, or keys of `constants`.
    output : str
        Name of the value that it makes.
    attrs : mapping
        JSON values (numbers, strings, lists).
    constants : mapping of str to ndarray
    reason : str
        Why it is not on the accelerator, for the report.
    """

    op: str
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Array] = field(default_factory=dict, repr=False)
    reason: str = ""


@dataclass(frozen=True)
class SymbolicTensor:
    """A device tensor before it has an address: `Plane.region` is its key in `LoweredNetwork.tensors`, `Plane.base`
    counts tiles from its start.

    Parameters
    ----------
    value : str
        The value that it holds ("" for one that the host never sees, half of a split, say).
    layout : TileLayout or GatherLayout
    """

    value: str
    layout: Layout


@dataclass(frozen=True)
class LoweredNetwork:
    """What lowering hands to the assembly.

    Parameters
    ----------
    config : VtaConfig
    inputs : tuple of TensorInfo
        Function parameters of the graph: values that the caller gives.
    outputs : tuple of str
        Values that the network returns, in order.
    tensors : mapping of name to SymbolicTensor
    weights : mapping of name to int8[tiles, BLOCK_OUT, BLOCK_IN]
        `Gemm.weights` names one, `Gemm.weight_base` counts tiles from its start.
    vectors : mapping of name to int32[tiles, BATCH, BLOCK_OUT]
        `Vector.region` names one, `Vector.base` counts tiles from its start; see `layout.vector_tiles`.
    steps : tuple of TileOp or HostStep
        In an order in which every operand exists before it is read.
    notes : tuple of str
        For the report.
    data : mapping of name to int8[tiles, BATCH, BLOCK_IN]
        Constant sources: a `Plane.region` that is no tensor's.
    """

    config: VtaConfig
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, SymbolicTensor]
    weights: Mapping[str, Array]
    vectors: Mapping[str, Array]
    steps: tuple[TileOp | HostStep, ...]
    notes: tuple[str, ...] = ()
    data: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceTensor:
    """A value at a place in a program's memory.

    Parameters
    ----------
    name : str
        Its key in the lowered network: equal names in two programs are the same bytes.
    value : str
        The value that it holds.
    region : str
        Region of the program that holds it.
    offset : int
        Bytes from the region's start (0: inputs and outputs have regions of their own).
    layout : TileLayout or GatherLayout
    """

    name: str
    value: str
    region: str
    offset: int
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.layout.shape


@dataclass(frozen=True)
class DeviceStep:
    """One program: consecutive operators of the accelerator.

    Parameters
    ----------
    program : Program
        Relocatable. Regions: "uop", "weight", "vector" (biases and shifts), "constant" (data tiles that never change),
        "arena" (activations inside), one
        "input..." per input and one "output..." per output; absent where empty.
    ops : tuple of TileOp
        Resolved: planes, weights and vectors name the program's regions.
    schedules : tuple
        `schedules.vta.emit.Schedule` of each operator.
    inputs, outputs : tuple of DeviceTensor
        What is written before it starts, what can be read when it has finished.
    peak_arena : int
        Bytes of the arena.
    """

    program: Program
    ops: tuple[TileOp, ...]
    schedules: tuple[Any, ...]
    inputs: tuple[DeviceTensor, ...]
    outputs: tuple[DeviceTensor, ...]
    peak_arena: int = 0

    @cached_property
    def linked(self) -> LinkedProgram:
        """The program at the default addresses (linked once)."""
        from lpsn_tvm.targets.vta.program import link

        return link(self.program)


@dataclass(frozen=True)
class VtaNetwork:
    """A network that runs: programs and host steps in order.

    Parameters
    ----------
    config : VtaConfig
    inputs : tuple of TensorInfo
    outputs : tuple of str
        Values that `run` returns.
    steps : tuple of DeviceStep or HostStep
    notes : tuple of str
    """

    config: VtaConfig
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[str, ...]
    steps: tuple[DeviceStep | HostStep, ...]
    notes: tuple[str, ...] = ()

    @property
    def device_steps(self) -> tuple[DeviceStep, ...]:
        """The programs."""
        return tuple(step for step in self.steps if isinstance(step, DeviceStep))

    @property
    def host_steps(self) -> tuple[HostStep, ...]:
        """What runs on the host."""
        return tuple(step for step in self.steps if isinstance(step, HostStep))

    @property
    def peak_arena(self) -> int:
        """Bytes of activations that the hungriest program keeps."""
        return max((step.peak_arena for step in self.device_steps), default=0)

    def run(self, feeds: Mapping[str, Array], *, strict: bool = True) -> dict[str, Array]:
        """Output values by name, from input values by name; the programs run in the simulator.

        Raises
        ------
        VtaProgramError
            A program broke a rule of the hardware (`strict`), deadlocked or read what nothing wrote.
        """
        from lpsn_tvm.targets.vta.execute import execute

        return execute(self, feeds, strict=strict).outputs
