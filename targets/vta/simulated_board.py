"""The simulator in the place of a board: a bundle runs on any machine, by the same runner as on a board."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm import float_ops, quant
from lpsn_tvm.errors import ArtifactError, VtaProgramError
from lpsn_tvm.targets.vta import host_steps, layout
from lpsn_tvm.targets.vta.board.pynq_board import BoardError, BoardTimeout
from lpsn_tvm.targets.vta.board.runner import Runner
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.program import DEFAULT_BASE, PAGE, LinkedProgram, LinkedRegion
from lpsn_tvm.targets.vta.simulator import SimulationResult, simulate

Array = npt.NDArray[Any]


class SimulatedMemory:
    """Memory that host and accelerator share; see `board.pynq_board.DeviceMemory`."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.array = np.zeros(size, np.uint8)

    def write(self, data: Any, offset: int = 0) -> None:
        """Copy bytes in."""
        values = np.frombuffer(data, np.uint8)
        self.array[offset : offset + values.size] = values

    def read(self) -> Array:
        """A copy of the contents."""
        return self.array.copy()


class SimulatedBoard:
    """What the runner needs of a board.

    Parameters
    ----------
    config : VtaConfig
    model : "rtl", "pynq" or None
        Cycle model.
    """

    def __init__(self, config: VtaConfig, model: str | None) -> None:
        self.config, self.model = config, model
        self.results: list[SimulationResult] = []
        self._memories: list[SimulatedMemory] = []
        self._next = DEFAULT_BASE

    def load(self) -> None:
        """Nothing has to be loaded."""

    def allocate(self, size: int) -> SimulatedMemory:
        """`size` bytes at a multiple of 4096."""
        memory = SimulatedMemory(self._next, size)
        self._next += -(-max(size, 1) // PAGE) * PAGE
        self._memories.append(memory)
        return memory

    def execute(self, address: int, count: int, timeout: float) -> float:
        """Run `count` instructions; simulated seconds (0 without a cycle model).

        Raises
        ------
        BoardTimeout
            The program broke a rule of the hardware; a board might never finish it.
        """
        del timeout
        memories = {str(m.address): m for m in self._memories if m.array.size and m.address != address}
        insn = next(m.array for m in self._memories if m.address == address)[: 16 * count].tobytes()
        regions = {n: LinkedRegion(n, m.array.size, m.array.tobytes(), "rw", m.address) for n, m in memories.items()}
        try:
            result = simulate(LinkedProgram(self.config, insn, address, regions), model=self.model)
        except VtaProgramError as error:
            raise BoardTimeout(f"a program breaks a rule of the hardware: {error}") from error
        for name, memory in memories.items():
            memory.array[:] = np.frombuffer(result.memory[name], np.uint8)
        self.results.append(result)
        return result.cycles / (self.config.clock_mhz * 1e6)


@dataclass(frozen=True)
class BundleRun:
    """A simulated run of a bundle.

    Parameters
    ----------
    outputs : mapping of name to float32[N, ...]
    cycles : tuple of int
        Of each program run, in order.
    milliseconds : float
        Of all programs at the configured clock; host steps left out.
    configuration : str
    self_test : tuple of str
        What was checked, a line each.
    """

    outputs: dict[str, Array]
    cycles: tuple[int, ...]
    milliseconds: float
    configuration: str
    self_test: tuple[str, ...]


def run_bundle(path: str | Path, feeds: Any = None, *, model: str = "pynq") -> BundleRun:
    """Run a bundle in the simulator, after the same self-test as on a board.

    Parameters
    ----------
    path : path
        Zip file or unpacked folder.
    feeds : array or mapping of input name to array [N, ...], optional
        Any N; default: the sample of the self-test.
    model : "rtl" or "pynq"
        Cycle model.

    Raises
    ------
    ArtifactError
        The bundle is missing or damaged, its self-test fails, or the inputs do not fit.
    """
    try:
        runner, board = _runner(path, model)
        checked = runner.self_test() if feeds is None else []
        if feeds is None:
            feeds = runner.known_inputs()
        board.results.clear()
        result = runner(feeds)
    except BoardError as error:
        raise ArtifactError(str(error), where=str(path)) from error
    names = runner.bundle.network["output_names"]
    outputs = result if isinstance(result, Mapping) else {names[0]: result}
    cycles = tuple(run.cycles for run in board.results)
    config = board.config
    return BundleRun(dict(outputs), cycles, sum(cycles) / (config.clock_mhz * 1e3), config.name, tuple(checked))


def _runner(path: str | Path, model: str) -> tuple[Runner, SimulatedBoard]:
    """The package's own runner: nothing of the bundle is executed but its programs."""
    boards: list[SimulatedBoard] = []

    def make(values: Mapping[str, Any]) -> SimulatedBoard:
        boards.append(SimulatedBoard(VtaConfig.from_json(dict(values), where=str(path)), model))
        return boards[0]

    runner = Runner(str(path), board=make, compiled=False, modules=(quant, float_ops, host_steps, layout))
    return runner, boards[0]
