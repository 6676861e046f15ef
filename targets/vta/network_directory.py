"""A network as a directory: numbered program directories and `network.json`, which puts them in order.

    network.json
    00_conv1/           program.json and binary files, see `program_directory`
    01_fc/
    02_host_scale.npy   constants of host steps
    input_data.npy      one sample, and what the network makes of it
    output_fc.npy

`network.json`: {"format", "config", "per_layer", "inputs", "outputs", "steps", "notes"}. A step is

* {"kind": "program", "directory", "operators", "inputs", "outputs", "cycles"}: before it starts, each tensor of
  `inputs` is in its region; a tensor whose `name` an earlier program had among its outputs is the same bytes, any other
  is packed from the value `value`. A tensor is {"name", "value", "region", "offset", "shape", "layout", "scale"}:
  `layout` says where each integer lies, `scale` (where the network has one) what an integer stands for;
* {"kind": "host", "op", "inputs", "output", "attrs", "constants", "reason"}: the operator of the package's reference
  arithmetic that the host runs on whole values.

With `per_layer`, every operator is a program of its own, complete with its inputs, and "windows" names the bytes of the
whole program's regions that its regions are: {"region", "of", "offset", "size"}.
Expected outputs come from the operators' meaning in numpy, not from running the instructions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.targets.vta.device_reference import ReferenceMemory, expected_outputs
from lpsn_tvm.targets.vta.execute import HostMemory, run_host
from lpsn_tvm.targets.vta.layer_programs import layer_program
from lpsn_tvm.targets.vta.network import DeviceStep, DeviceTensor, HostStep, VtaNetwork
from lpsn_tvm.targets.vta.program import LinkedProgram, Program, link
from lpsn_tvm.targets.vta.program_directory import (
    NETWORK,
    PROGRAM,
    fresh_directory,
    read_json,
    with_inputs,
    write_program,
)
from lpsn_tvm.targets.vta.program_rules import check_memory
from lpsn_tvm.targets.vta.serialize import to_record
from lpsn_tvm.targets.vta.simulator import simulate

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.artifact import VtaArtifact

FORMAT = 1
MODELS = ("rtl", "pynq")
Array = npt.NDArray[Any]


def export_network(
    network: VtaNetwork | VtaArtifact,
    path: str | os.PathLike[str],
    per_layer: bool = False,
    *,
    feeds: Mapping[str, Array] | None = None,
) -> Path:
    """Write a network as program directories; the whole directory appears or nothing does.

    Parameters
    ----------
    network : VtaNetwork or VtaArtifact
        What to export.
    path : path
        Directory to make; an earlier export there is replaced.
    per_layer : bool
        One program per operator instead of one per uninterrupted run of operators.
    feeds : mapping of input name to ndarray, optional
        The sample to export with expected outputs; standard normal values (seed 0) by default.

    Raises
    ------
    ArtifactError
        The directory cannot be written or holds something else; a sample is missing or of the wrong shape.
    """
    whole = network if isinstance(network, VtaNetwork) else network.network
    sample = _sample(whole, feeds)
    with fresh_directory(Path(path)) as folder:
        _Writer(whole, folder, per_layer, sample).write()
    return Path(path)


def program_folders(path: str | os.PathLike[str]) -> list[Path]:
    """The program directories of an export, in order: one for a program, all of `network.json` for a network.

    Raises
    ------
    ArtifactError
        `path` is no export, or its `network.json` names something outside of it.
    """
    folder = Path(path)
    if (folder / PROGRAM).is_file():
        return [folder]
    record = read_json(folder / NETWORK)
    where = str(folder / NETWORK)
    steps = record.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ArtifactError("steps must be a list of objects", where=where)
    names = [step.get("directory") for step in steps if step.get("kind") == "program"]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[0-9]+_[A-Za-z0-9_.-]*", name, re.ASCII):
            raise ArtifactError(f"directory must be a numbered name such as 00_conv, got {name!r}", where=where)
    return [folder / str(name) for name in names]


def _sample(network: VtaNetwork, feeds: Mapping[str, Array] | None) -> dict[str, Array]:
    """One value per input of the network."""
    rng = np.random.default_rng(0)
    made = {info.name: rng.standard_normal(info.shape).astype(info.dtype) for info in network.inputs}
    if feeds is None:
        return made
    if set(feeds) != set(made):
        raise ArtifactError(f"expected inputs {sorted(made)}, got {sorted(feeds)}", where="feeds")
    for name, value in feeds.items():
        if np.shape(value) != made[name].shape:
            raise ArtifactError(f"shape {np.shape(value)} is not {made[name].shape}", where=f"input {name!r}")
    return {name: np.asarray(value, made[name].dtype) for name, value in feeds.items()}


class _Writer:
    """Walks a network on a sample and writes what it meets."""

    def __init__(self, network: VtaNetwork, folder: Path, per_layer: bool, sample: Mapping[str, Array]) -> None:
        self._network, self._folder, self._per_layer, self._sample = network, folder, per_layer, sample
        self._memory = HostMemory(sample)
        self._scales = _scales(network)
        self._programs = 0
        self._steps: list[dict[str, Any]] = []

    def write(self) -> None:
        """Everything."""
        for step in self._network.steps:
            if isinstance(step, HostStep):
                self._host(step)
            else:
                self._device(step)
        network = self._network
        outputs = {name: self._memory.value(name) for name in network.outputs}
        record = {
            "format": FORMAT,
            "config": network.config.to_json(),
            "per_layer": self._per_layer,
            "inputs": [
                {**asdict(info), "file": self._array(f"input_{info.name}", self._sample[info.name])}
                for info in network.inputs
            ],
            "outputs": [
                {"name": name, "shape": value.shape, "file": self._array(f"output_{name}", value)}
                for name, value in outputs.items()
            ],
            "steps": self._steps,
            "notes": list(network.notes),
        }
        (self._folder / NETWORK).write_text(json.dumps(record, indent=1, default=_plain) + "\n", encoding="utf-8")
        network.config.write(self._folder / "vta_config.json")

    def _host(self, step: HostStep) -> None:
        number = len(self._steps)
        files = {
            name: self._array(f"{number:02d}_host_{name}", np.asarray(value)) for name, value in step.constants.items()
        }
        self._memory.put(step.output, run_host(step, self._memory))
        self._steps.append(
            {
                "kind": "host",
                "op": step.op,
                "inputs": step.inputs,
                "output": step.output,
                "attrs": dict(step.attrs),
                "constants": files,
                "reason": step.reason,
            }
        )

    def _device(self, step: DeviceStep) -> None:
        inputs = {tensor.region: self._memory.bytes_of(tensor) for tensor in step.inputs}
        regions, config = step.program.regions, self._network.config
        expected = expected_outputs(step.ops, regions, inputs, config)
        if self._per_layer:
            self._layers(step, inputs)
        else:
            outputs = {tensor.region: expected[tensor.region] for tensor in step.outputs}
            record = self._program(step.program, [op.name for op in step.ops], inputs, outputs)
            record["inputs"] = [self._tensor(tensor) for tensor in step.inputs]
            record["outputs"] = [self._tensor(tensor) for tensor in step.outputs]
        self._memory.keep(step.outputs, expected)

    def _layers(self, step: DeviceStep, inputs: Mapping[str, bytes]) -> None:
        config = self._network.config
        memory = ReferenceMemory.of(step.ops, step.program.regions, inputs, config)
        bytes_per_tile = {
            "data": config.inp_tile_bytes,
            "weight": config.wgt_tile_bytes,
            "vector": config.acc_tile_bytes,
        }
        for op, schedule in zip(step.ops, step.schedules, strict=True):
            layer = layer_program(op, schedule, memory)
            record = self._program(layer.program, [op.name], {}, layer.expected)
            record["windows"] = [
                {
                    "region": window.name,
                    "of": window.region,
                    "offset": window.first * bytes_per_tile[window.role],
                    "size": (window.end - window.first) * bytes_per_tile[window.role],
                }
                for window in layer.windows
            ]
            memory.run(op)

    def _program(
        self, program: Program, operators: list[str], inputs: Mapping[str, bytes], expected: Mapping[str, bytes]
    ) -> dict[str, Any]:
        """One numbered program directory; its step in network.json."""
        linked = with_inputs(link(program), inputs)
        check_memory(linked)
        folder = self._folder / f"{self._programs:02d}_{_plain_name(operators[0])}"
        folder.mkdir()
        cycles = _cycles(linked)
        write_program(linked, folder, expected, cycles)
        self._programs += 1
        step: dict[str, Any] = {
            "kind": "program", "directory": folder.name, "operators": operators, "cycles": cycles
        }  # fmt: skip
        self._steps.append(step)
        return step

    def _tensor(self, tensor: DeviceTensor) -> dict[str, Any]:
        return {
            "name": tensor.name,
            "value": tensor.value,
            "region": tensor.region,
            "offset": tensor.offset,
            "shape": tensor.shape,
            "layout": to_record(tensor.layout),
            "scale": self._scales.get(tensor.value),
        }

    def _array(self, name: str, value: Array) -> str:
        file = f"{_plain_name(name)}.npy"
        if (self._folder / file).exists():
            file = f"{_plain_name(name)}-{len(list(self._folder.iterdir()))}.npy"
        np.save(self._folder / file, np.ascontiguousarray(value), allow_pickle=False)
        return file


def _cycles(linked: LinkedProgram) -> dict[str, int]:
    """Predicted cycles under every model; they do not depend on data."""
    return {model: simulate(linked, model=model, functional=False).cycles for model in MODELS}


def _scales(network: VtaNetwork) -> dict[str, Any]:
    """What one integer of a value stands for, from the host steps that make or read integers."""
    scales: dict[str, Any] = {}
    for step in network.host_steps:
        if step.op == "lpsn.quantize":
            inverse = np.float32(step.attrs["inv_scale"])
            scales[step.output] = step.attrs.get("scale") or float(1 / inverse)
        elif step.op == "lpsn.dequantize":
            scales[step.inputs[0]] = step.attrs["scale"]
        elif step.op == "vta.scale" and step.inputs[1] in step.constants:
            scales[step.inputs[0]] = step.constants[step.inputs[1]].tolist()
    return scales


def _plain_name(text: str) -> str:
    """Letters, digits, `_`, `-` and `.` only, at most 60 of them."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:60]


def _plain(value: Any) -> Any:
    """JSON form of a numpy value."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{value!r} has no JSON form")
