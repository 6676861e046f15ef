"""The module of an accelerator: programs and host steps, run by the simulator on any machine, exported for a board.

Running and loading need numpy and the simulator only: neither tvm, torch nor onnx.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lpsn_tvm.accelerator_report import AcceleratorReport
from lpsn_tvm.artifact import Artifact, shared_fields
from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.targets.vta.cycle_model import CycleModel
from lpsn_tvm.targets.vta.execute import Execution, execute
from lpsn_tvm.targets.vta.network import DeviceStep, VtaNetwork
from lpsn_tvm.targets.vta.profile import operator_cycles, profile
from lpsn_tvm.targets.vta.serialize import network_from_files, network_to_files
from lpsn_tvm.targets.vta.simulator import SimulationResult


@dataclass(frozen=True)
class NetworkSimulation:
    """A simulated run of one batch.

    Parameters
    ----------
    outputs : mapping of name to ndarray
    programs : tuple of SimulationResult
        With timelines, in order.
    layers : mapping of name to cycles
        What each operator adds to the whole.
    milliseconds : float
        At the configured clock, host steps left out.
    """

    outputs: dict[str, np.ndarray]
    programs: tuple[SimulationResult, ...]
    layers: dict[str, int]
    milliseconds: float

    @property
    def cycles(self) -> int:
        """Of all programs."""
        return sum(result.cycles for result in self.programs)

    @property
    def counters(self) -> dict[str, int]:
        """Micro-operations, bytes and stalls, summed over the programs; see `simulator.COUNTERS`."""
        names = self.programs[0].counters if self.programs else {}
        return {name: sum(result.counters[name] for result in self.programs) for name in names}


@dataclass(kw_only=True)
class VtaArtifact(Artifact):
    """A compiled network for the accelerator; see `Artifact`.

    Parameters
    ----------
    network : VtaNetwork
    model : str
        Cycle model that the schedules were chosen for.
    """

    kind = "vta"
    timing = "simulated, host steps left out"

    network: VtaNetwork = field(repr=False)
    model: str = "pynq"
    _cycles: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> Any:
        """The accelerator's geometry, `VtaConfig`."""
        return self.network.config

    @property
    def cycles(self) -> int:
        """Simulated cycles of one batch, under the module's own cycle model."""
        if self.model not in self._cycles:
            self._cycles.update(self.profile((self.model,)).cycles)
        return self._cycles[self.model]

    def milliseconds(self, model: str | None = None) -> float:
        """Simulated milliseconds of one batch at the configured clock, host steps left out.

        Parameters
        ----------
        model : "rtl" or "pynq", optional
            Cycle model; the module's own by default.
        """
        return self.profile((model or self.model,)).milliseconds[model or self.model]

    def profile(self, models: tuple[str, ...] = ("rtl", "pynq")) -> AcceleratorReport:
        """Cycles, utilization and memory traffic of every step."""
        return profile(self.network, models)

    def execute(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """One batch: host steps in numpy, programs in the simulator, rules of the hardware checked."""
        outputs = execute(self.network, self._feeds(arrays), model=None).outputs
        return [outputs[name] for name in self.network.outputs]

    def simulate(
        self, *args: Any, model: str | CycleModel | None = None, interleaving: int | None = None, **kwargs: Any
    ) -> NetworkSimulation:
        """Run one batch and count.

        Parameters
        ----------
        *args, **kwargs : array-like[N, ...]
            Inputs as in a call; N at most the compiled batch size (the last sample is repeated up to it).
        model : "rtl", "pynq" or CycleModel, optional
            The module's own by default.
        interleaving : int, optional
            Seed of a random order of the units; a correct program gives the same outputs in any.

        Raises
        ------
        ArtifactError
            More samples than one batch.
        VtaProgramError
            A program broke a rule of the hardware.
        """
        run, count = self._run_whole(args, kwargs, model or self.model, interleaving)
        layers: dict[str, int] = {}
        for result in run.simulations:
            if result.timeline is not None:
                cycles = operator_cycles(result.timeline, result.cycles)
                for (_, name), added in zip(result.timeline.marks, cycles, strict=True):
                    layers[name] = layers.get(name, 0) + added
        total = sum(result.cycles for result in run.simulations)
        outputs = {
            info.name: run.outputs[name][:count] for info, name in zip(self.outputs, self.network.outputs, strict=True)
        }
        return NetworkSimulation(outputs, run.simulations, layers, total / (self.config.clock_mhz * 1e3))

    def _run_whole(
        self, args: Any, kwargs: Mapping[str, Any], model: str | CycleModel, interleaving: int | None
    ) -> tuple[Execution, int]:
        arrays = self._arrays(args, kwargs)
        count = arrays[0].shape[0]
        if count > self.batch:
            raise ArtifactError(f"{count} samples; a simulation takes one batch of {self.batch}", where="simulate")
        feeds = self._feeds(self._padded(arrays))
        return execute(self.network, feeds, model=model, interleaving=interleaving, timeline=True), count

    def _feeds(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {info.name: array for info, array in zip(self.network.inputs, arrays, strict=True)}

    def benchmark(self, *, repeats: int = 30, warmup: int = 5) -> float:
        """Simulated milliseconds of one batch (the same every time, so nothing is repeated)."""
        return self.milliseconds()

    def details(self) -> dict[str, Any]:
        """What `lpsn-tvm inspect` shows beside the report."""
        programs = [
            {
                "operators": len(step.ops),
                "instructions": len(step.program.instructions),
                "regions": {region.name: region.size for region in step.program.regions.values()},
            }
            for step in self.network.device_steps
        ]
        return super().details() | {"config": self.config.to_json(), "cycle_model": self.model, "programs": programs}

    def pack(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The network's JSON, and its programs and constants."""
        record, blobs = network_to_files(self.network)
        return {"network": record, "cycle_model": self.model}, blobs

    @classmethod
    def unpack(cls, manifest: Mapping[str, Any], members: Mapping[str, bytes], where: str) -> VtaArtifact:
        """Inverse of `pack`."""
        try:
            network = network_from_files(manifest["network"], members)
        except ArtifactError as error:
            raise ArtifactError(str(error), where=where) from error
        return cls(**shared_fields(manifest), network=network, model=str(manifest["cycle_model"]))

    def export_vta(self, path: str | os.PathLike[str], *, per_layer: bool = False, **options: Any) -> Path:
        """Write the network as program directories, which any simulator or loader can run.

        Parameters
        ----------
        path : path
            Directory to make.
        per_layer : bool
            One program per operator instead of one per uninterrupted run of operators.
        **options
            See `network_directory.export_network`.

        Raises
        ------
        ArtifactError
            It cannot be written.
        """
        from lpsn_tvm.targets.vta.network_directory import export_network

        return export_network(self, path, per_layer=per_layer, **options)

    def export_pynq(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write a bundle (zip) that a PYNQ board runs: programs, weights, runner, self-test, vta_config.json, README.

        Parameters
        ----------
        path : path
            Zip file to write.
        **options
            `sample`: one batch by input name that the board's self-test runs; see `pynq.export_pynq`.

        Raises
        ------
        ArtifactError
            It cannot be written.
        """
        from lpsn_tvm.targets.vta.pynq import export_pynq

        names = [info.name for info in self.outputs]
        settings = {"output_names": names, "title": self.report.model or "network"} | options
        return export_pynq(self.network, path, **settings)

    @property
    def device_steps(self) -> tuple[DeviceStep, ...]:
        """The programs, in order."""
        return self.network.device_steps
