"""A `VtaNetwork` as JSON and binary blobs, and back: what a module file holds and what a bundle is made from.

The JSON refers to blobs by name. Per program: `program<i>/insn.bin` (encoded instructions, addresses relative to their
regions, in tiles), `program<i>/targets.bin` (one byte per instruction: index of its region in `regions`, 255: none) and
one blob per region that has contents. A loader that has placed the regions adds `address // tile bytes` to the address
field of every LOAD and STORE whose target is not 255.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.schedules.vta import ops
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.isa import decode, encode
from lpsn_tvm.targets.vta.layout import GatherLayout, Lane, TileLayout
from lpsn_tvm.targets.vta.network import DeviceStep, DeviceTensor, HostStep, VtaNetwork
from lpsn_tvm.targets.vta.program import Program, Region

Array = npt.NDArray[Any]
NO_TARGET = 255
_CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        ops.TileOp, ops.Plane, ops.Span, ops.Tap, ops.Gemm, ops.Vector, ops.Scalar, ops.Pool, ops.Store,
        Schedule, TileLayout, GatherLayout, Lane, DeviceTensor, TensorInfo,
    )
}  # fmt: skip


def to_record(value: Any) -> Any:
    """Dataclasses of this package -> JSON values; `{"type": class, fields...}`, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {f.name: to_record(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_record(item) for item in value]
    return value


def from_record(record: Any) -> Any:
    """Inverse of `to_record`; lists become tuples.

    Raises
    ------
    ValueError
        Unknown class or field.
    """
    if isinstance(record, Mapping):
        values = {key: from_record(value) for key, value in record.items()}
        kind = values.pop("type", None)
        if kind not in _CLASSES:
            raise ValueError(f"unknown record {kind!r}")
        return _CLASSES[kind](**values)
    return tuple(from_record(item) for item in record) if isinstance(record, list) else record


def network_to_files(network: VtaNetwork) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(JSON record, blobs by name)."""
    blobs: dict[str, bytes] = {}
    steps = [
        _host_record(step, index, blobs) if isinstance(step, HostStep) else _device_record(step, index, blobs)
        for index, step in enumerate(network.steps)
    ]
    record = {
        "config": network.config.to_json(),
        "inputs": [asdict(info) for info in network.inputs],
        "outputs": list(network.outputs),
        "notes": list(network.notes),
        "steps": steps,
    }
    return record, blobs


def network_from_files(record: Mapping[str, Any], blobs: Mapping[str, bytes]) -> VtaNetwork:
    """Inverse of `network_to_files`.

    Raises
    ------
    ArtifactError
        Something is missing or of the wrong form.
    """
    try:
        config = VtaConfig.from_json(record["config"])
        return VtaNetwork(
            config,
            tuple(TensorInfo(i["name"], tuple(i["shape"]), i["dtype"]) for i in record["inputs"]),
            tuple(record["outputs"]),
            tuple(
                _host_step(step, blobs) if step["kind"] == "host" else _device_step(step, blobs, config)
                for step in record["steps"]
            ),
            tuple(record["notes"]),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(f"is no valid network ({type(error).__name__}: {error})", where="vta") from error


def _host_record(step: HostStep, index: int, blobs: dict[str, bytes]) -> dict[str, Any]:
    constants = {}
    for number, (name, array) in enumerate(step.constants.items()):
        file = f"host{index}/{number}.bin"
        blobs[file] = np.ascontiguousarray(array).tobytes()
        constants[name] = {"shape": list(array.shape), "dtype": str(array.dtype), "file": file}
    attrs = {key: list(v) if isinstance(v, tuple) else v for key, v in step.attrs.items()}
    return {
        "kind": "host",
        "op": step.op,
        "inputs": list(step.inputs),
        "output": step.output,
        "attrs": attrs,
        "constants": constants,
        "reason": step.reason,
    }


def _host_step(record: Mapping[str, Any], blobs: Mapping[str, bytes]) -> HostStep:
    constants = {
        name: np.frombuffer(blobs[entry["file"]], entry["dtype"]).reshape(entry["shape"])
        for name, entry in record["constants"].items()
    }
    return HostStep(
        record["op"], tuple(record["inputs"]), record["output"], dict(record["attrs"]), constants, record["reason"]
    )


def program_to_files(program: Program, folder: str, blobs: dict[str, bytes]) -> dict[str, Any]:
    """JSON record of one program; its blobs are added as `<folder>/...`."""
    names = list(program.regions)
    codes = [NO_TARGET if target is None else names.index(target) for target in program.targets]
    blobs[f"{folder}/insn.bin"] = encode(program.instructions, program.config)
    blobs[f"{folder}/targets.bin"] = bytes(codes)
    regions = []
    for region in program.regions.values():
        file = None if region.data is None else f"{folder}/{region.name}.bin"
        if file is not None and region.data is not None:
            blobs[file] = region.data
        regions.append({"name": region.name, "size": region.size, "access": region.access, "file": file})
    return {
        "insn": f"{folder}/insn.bin",
        "targets": f"{folder}/targets.bin",
        "regions": regions,
        "marks": [list(mark) for mark in program.marks],
    }


def program_from_files(record: Mapping[str, Any], blobs: Mapping[str, bytes], config: VtaConfig) -> Program:
    """Inverse of `program_to_files`."""
    regions = {
        r["name"]: Region(r["name"], r["size"], None if r["file"] is None else blobs[r["file"]], r["access"])
        for r in record["regions"]
    }
    names = list(regions)
    targets = [None if code == NO_TARGET else names[code] for code in blobs[record["targets"]]]
    marks = tuple((int(index), str(name)) for index, name in record["marks"])
    return Program(config, decode(blobs[record["insn"]], config), targets, regions, marks)


def _device_record(step: DeviceStep, index: int, blobs: dict[str, bytes]) -> dict[str, Any]:
    return {
        "kind": "device",
        **program_to_files(step.program, f"program{index}", blobs),
        "ops": to_record(step.ops),
        "schedules": to_record(step.schedules),
        "inputs": to_record(step.inputs),
        "outputs": to_record(step.outputs),
        "peak_arena": step.peak_arena,
    }


def _device_step(record: Mapping[str, Any], blobs: Mapping[str, bytes], config: VtaConfig) -> DeviceStep:
    return DeviceStep(
        program_from_files(record, blobs, config),
        from_record(record["ops"]),
        from_record(record["schedules"]),
        from_record(record["inputs"]),
        from_record(record["outputs"]),
        int(record["peak_arena"]),
    )
