"""What runs the launches of kernel tests: the emulation, or the GPU of this machine.

* `LPSN_CUDA_TESTS=gpu`: launches are compiled by nvcc for this machine's GPU and run there, every buffer between guard
  bytes. Tests of kernels for GPUs that this one is older than are skipped. Tests that plant a bug, whose names end in
  "_is_seen" or "_are_seen" or have "_sees_" in them, stay in the emulation: on a GPU a race may well end well.
* `LPSN_CUDA_KIT=folder`: launches run in the emulation, and what went in and came out is kept in the folder, for
  `benchmarks/cuda_kernels.py`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_emulation
import numpy as np
import pytest

from benchmarks import kernel_kit
from benchmarks.kernel_device import KernelDevice
from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.targets import cuda_driver
from lpsn_tvm.targets.cuda_compile import CudaSource, compile_cubin
from lpsn_tvm.targets.cuda_errors import DriverError, is_dead

TESTS, KIT = "LPSN_CUDA_TESTS", "LPSN_CUDA_KIT"
WORKSPACE_BYTE = kernel_kit.WORKSPACE_BYTE
OUT_NUMBER = kernel_kit.OUT_NUMBER
_died_in: list[str] = []
"""The test whose kernel took the GPU context of this process along."""


def _plants_a_bug() -> bool:
    name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2]
    return re.search(r"_(is|are)_seen\b|_sees_", re.split(r"[\[ ]", name)[0]) is not None


def runs_on_gpu() -> bool:
    """Whether launches of the test under way go to the GPU."""
    choice = os.environ.get(TESTS, "emulation")
    if choice not in ("emulation", "gpu"):
        raise ValueError(f"{TESTS} is {choice!r}; it may be 'emulation' or 'gpu'")
    return choice == "gpu" and not _plants_a_bug()


def _device() -> KernelDevice:
    """The GPU, or a skip."""
    if _died_in:
        pytest.skip(f"the GPU context of this process died in {_died_in[0]}")
    return _opened(cuda_driver.LIBRARY)


@functools.cache
def _opened(library: str) -> KernelDevice:
    try:
        device = KernelDevice()
    except ArtifactError as error:
        pytest.skip(f"{TESTS}=gpu: {error}")
    if shutil.which("nvcc") is None:
        pytest.skip(f"{TESTS}=gpu needs nvcc")
    return device


@functools.cache
def machine_code(source: str, arch: str) -> bytes:
    """What nvcc makes of a source, kept beside other temporary files."""
    folder = Path(tempfile.gettempdir()) / f"lpsn-cuda-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}-{arch}.cubin"
    if not path.exists():
        binary, _ = compile_cubin(source, arch)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(binary)
        scratch.replace(path)
    return path.read_bytes()


def run_launch(source: str, launch: Any, buffers: Any, arch: str, *, checked: bool = True, **options: Any) -> None:
    """Run one launch.

    Parameters
    ----------
    launch : Launch or KernelLaunch
    buffers : mapping
        Arrays by what the launch calls its arguments, names or places.
    arch : str
        What the source was made for.
    checked, options
        The emulation's.
    """
    if runs_on_gpu():
        device, needed = _device(), int(arch.removeprefix("sm_").rstrip("af"))
        if needed > device.device.number:
            pytest.skip(f"a kernel for {arch}; this GPU is sm_{device.device.number}")
        if launch.shared_bytes > device.device.shared_bytes:
            pytest.skip(f"{launch.shared_bytes} bytes of shared memory; this GPU has {device.device.shared_bytes}")
        binary = machine_code(source, f"sm_{device.device.number}")
        try:
            device.run(binary, [launch], {name: buffers[name] for name in launch.arguments})
        except DriverError as error:
            if is_dead(error):
                _died_in.append(os.environ.get("PYTEST_CURRENT_TEST", "a test"))
            raise
        return
    number = int(arch.removeprefix("sm_").rstrip("af"))
    emulated = cuda_emulation.compile_kernel(source, launch.kernel, arch=number, checked=checked)
    arguments = [buffers[name] for name in launch.arguments]
    emulated(launch.grid, launch.block, launch.shared_bytes, *arguments, **options)


def run_generated(kernel: Kernel, made: CudaSource, inputs: Sequence[Array], arch: str, **options: Any) -> Array:
    """A kernel's result in logical shape, from inputs as they lie in memory; workspaces and output start as garbage."""
    function = made.functions["kernel"]
    out = np.full(kernel.out.memory_shape, OUT_NUMBER).astype(kernel.out.dtype)
    given = [np.ascontiguousarray(array) for array in (*inputs, *kernel.constants)]
    before = dict(zip(function.parameters, given, strict=False))
    buffers = {**before, function.parameters[-1]: out}
    buffers |= {name: np.full(size, WORKSPACE_BYTE, np.uint8) for name, size in function.workspaces.items()}
    for launch in function.launches:
        run_launch(made.source, launch, buffers, arch, **options)
    result = kernel.out.unpack(out)
    folder = os.environ.get(KIT)
    if folder and not runs_on_gpu() and not _plants_a_bug():
        origin = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
        case = kernel_kit.case_of(kernel, made.source, function, arch, origin)
        kernel_kit.write_case(Path(folder), case, made.source, before, result)
    return result


class WrittenKernel:
    """A hand-written kernel whose arguments are arrays, the last of them its output: called like an emulated one."""

    def __init__(self, source: str, name: str, arch: int) -> None:
        self.source, self.name, self.arch = source, name, f"sm_{arch}"

    def __call__(
        self, grid: int, block: int, shared: int, *arrays: Array, in_all_orders: bool = False, **options: Any
    ) -> None:
        names = tuple(f"argument{i}" for i in range(len(arrays)))
        launch = kernel_kit.KitLaunch(self.name, (grid, 1, 1), (block, 1, 1), shared, names)
        before = {name: array.copy() for name, array in zip(names, arrays, strict=True)}
        if runs_on_gpu():
            run_launch(self.source, launch, dict(zip(names, arrays, strict=True)), self.arch)
            return
        emulated = cuda_emulation.compile_kernel(self.source, self.name, arch=int(self.arch.removeprefix("sm_")))
        (emulated.run_all_orders if in_all_orders else emulated)(grid, block, shared, *arrays, **options)
        folder = os.environ.get(KIT)
        if folder and not _plants_a_bug():
            self._record(Path(folder), launch, before, arrays[-1])

    def _record(self, folder: Path, launch: kernel_kit.KitLaunch, before: dict[str, Array], result: Array) -> None:
        name = launch.arguments[-1]
        del before[name]
        origin = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
        case = kernel_kit.Case(
            kernel_kit.INSTRUCTIONS, self.name, origin, self.arch, kernel_kit.digest(self.source), (launch,), {}, name,
            TensorSpec(result.shape, str(result.dtype)),
        )  # fmt: skip
        kernel_kit.write_case(folder, case, self.source, before, result)

    def run_all_orders(self, grid: int, block: int, shared: int, *arrays: Array) -> None:
        """Run, in the emulation in every order of threads."""
        self(grid, block, shared, *arrays, in_all_orders=True)


def compile_kernel(source: str, name: str, *, arch: int = 80) -> WrittenKernel:
    """A kernel of a hand-written source, as `cuda_emulation.compile_kernel` has it, for the emulation or the GPU."""
    return WrittenKernel(source, name, arch)
