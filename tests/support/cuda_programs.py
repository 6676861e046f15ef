"""Run what the cuda backend generates without a GPU: every launch of a plan through the emulation, over one arena.

`run_module` and `run_kernel` use the GPU instead where `cuda_executors` says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda_emulation import compile_kernel
from cuda_executors import run_generated, run_launch

import lpsn_tvm
from lpsn_tvm.targets import get_backend
from lpsn_tvm.targets.cuda_build import generate
from lpsn_tvm.targets.cuda_compile import cuda_source
from lpsn_tvm.targets.cuda_program import KernelLaunch, Place


class Memory:
    """Device memory of one run: views by place, the same object for the same place."""

    def __init__(self, arena_bytes: int, constants: bytes, inputs: Sequence[np.ndarray]) -> None:
        self.arena = np.full(arena_bytes, 0xCD, np.uint8)
        self.constants = np.frombuffer(constants, np.uint8)
        self.inputs = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in inputs]
        self.views: dict[Place, np.ndarray] = {}

    def __getitem__(self, place: Place) -> np.ndarray:
        if place not in self.views:
            if place.region == "input":
                self.views[place] = self.inputs[place.offset][: place.size]
            else:
                whole = self.arena if place.region == "arena" else self.constants
                self.views[place] = whole[place.offset : place.offset + place.size]
        return self.views[place]


def run_launches(
    source: str, launches: Sequence[KernelLaunch], memory: Memory, *, checked: bool = True, **options: Any
) -> None:
    for launch in launches:
        kernel = compile_kernel(source, launch.kernel, checked=checked)
        kernel(
            launch.grid,
            launch.block,
            launch.shared_bytes,
            *(memory[place] for place in launch.arguments),
            **options,
        )


def run_module(backend: Any, mod: Any, feeds: Mapping[str, np.ndarray], **options: Any) -> list[np.ndarray]:
    """The outputs of `main`, in order; `checked=False` leaves out races and bounds and is ten times faster."""
    source, plan = generate(backend, mod)
    arrays = [np.array(feeds[param.name]) for param in mod["main"].params]
    memory = Memory(plan.arena_bytes, plan.constants, arrays)
    for launch in plan.launches:
        run_launch(source.source, launch, memory, backend.device, **options)
    return [memory[port.place].view(port.dtype).reshape(port.shape) for port in plan.outputs]


def run_kernel(kernel: Any, arrays: Sequence[np.ndarray], arch: str = "sm_86", **options: Any) -> np.ndarray:
    """One kernel on arrays of logical shape; lanes beyond the channels of the inputs are poisoned."""
    from run_kernel import poisoned

    made = cuda_source({"kernel": kernel.build()}, arch)
    inputs = [poisoned(spec, array) for spec, array in zip(kernel.inputs, arrays, strict=True)]
    return run_generated(kernel, made, inputs, arch, **options)


def network(model: Any, **options: Any) -> Any:
    """The pruned and quantized network that `lpsn_tvm.build` would compile for GPUs."""

    def keep(backend: Any, mod: Any, parts: Any, progress: Any) -> Any:
        return SimpleNamespace(mod=mod, report=parts.report)

    backend: Any = replace(get_backend("cuda -arch=sm_86"), maker=keep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no calibration data
        built: Any = lpsn_tvm.build(model, target=backend, measure=False, progress=False, **options)
    return built.mod
