"""What a schedule depends on: the geometry of an operator without its names and addresses, and the code that emits,
searches and times it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Scalar, Step, Store, TileOp, Vector

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.builder import ProgramBuilder
    from lpsn_tvm.targets.vta.config import VtaConfig
    from lpsn_tvm.targets.vta.cycle_model import CycleModel

# Files besides schedules/vta whose change can change a schedule or its cycles.
_SOURCES = (
    "bounds",
    "builder",
    "cycle_model",
    "dependences",
    "neighbours",
    "ranking",
    "search",
    "search_key",
    "traffic",
    "uop_buffer",
)


def canonical(op: TileOp) -> TileOp:
    """The operator with its own regions, one per operand, that begin at tile 0; no name, immediates 0.

    Operators with equal canonical forms get the same program but for addresses and immediates.
    """
    names: dict[str, str] = {}

    def region(kind: str, name: str) -> str:
        return names.setdefault(f"{kind} {name}", f"{kind}{len(names)}")

    steps: list[Step] = []
    for step in op.steps:
        if isinstance(step, Gemm):
            key = f"{step.source.region} {step.source.base}"
            source = replace(step.source, region=region("input", key), base=0)
            weights = region("weight", f"{step.weights} {step.weight_base}")
            steps.append(replace(step, source=source, weights=weights, weight_base=0))
        elif isinstance(step, Vector):
            steps.append(replace(step, region=region("vector", f"{step.region} {step.base}"), base=0))
        elif isinstance(step, Store):
            key = f"{step.plane.region} {step.plane.base}"
            steps.append(Store(replace(step.plane, region=region("output", key), base=0)))
        elif isinstance(step, Scalar):
            # An immediate costs the same whatever its value.
            steps.append(replace(step, value=0))
        else:
            steps.append(step)
    return replace(op, name="", steps=tuple(steps), macs=0)


def declare(builder: ProgramBuilder, op: TileOp, config: VtaConfig) -> None:
    """Declare the regions of a canonical operator, as large as it needs them."""
    sizes: dict[str, tuple[int, str]] = {}

    def need(name: str, tiles: int, tile_bytes: int, access: str) -> None:
        sizes[name] = max(tiles * tile_bytes, sizes.get(name, (0, access))[0]), access

    for step in op.steps:
        if isinstance(step, Gemm):
            need(step.source.region, plane_end(step.source), config.inp_tile_bytes, "r")
            need(step.weights, weight_end(step, op), config.wgt_tile_bytes, "r")
        elif isinstance(step, Vector):
            need(step.region, step.base + op.blocks, config.acc_tile_bytes, "r")
        elif isinstance(step, Store):
            need(step.plane.region, plane_end(step.plane), config.out_tile_bytes, "w")
    for name, (size, access) in sizes.items():
        builder.region(name, size, access="w" if access == "w" else "r")


def plane_end(plane: Plane) -> int:
    """One past the last tile."""
    last = (plane.batches - 1) * plane.batch_stride + (plane.blocks - 1) * plane.block_stride
    return plane.base + last + (plane.height - 1) * plane.row_stride + plane.width


def weight_end(step: Gemm, op: TileOp) -> int:
    """One past the last weight tile."""
    last = (op.blocks - 1) * step.output_stride + (step.fan_in - 1) * step.input_stride
    return step.weight_base + last + max((tap.weight for tap in step.taps), default=0) + 1


def search_key(op: TileOp, config: VtaConfig, model: CycleModel) -> Mapping[str, Any]:
    """Key of the schedule cache: everything that the result of a search depends on, as JSON values."""
    geometry = {key: value for key, value in asdict(config).items() if key not in ("hardware", "clock_mhz")}
    steps = [[type(step).__name__, asdict(step)] for step in op.steps]
    shape = [op.batches, op.blocks, op.height, op.width]
    return {"shape": shape, "steps": steps, "config": geometry, "model": asdict(model), "code": code_digest()}


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 of the sources that decide schedules and cycles."""
    schedules, target = resources.files("lpsn_tvm.schedules.vta"), resources.files("lpsn_tvm.targets.vta")
    files = [file for file in schedules.iterdir() if file.name.endswith(".py")]
    files += [target / f"{name}.py" for name in _SOURCES]
    core = target / "simulator_src"
    files += list(core.iterdir()) if core.is_dir() else []
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
