"""Run kernels for GPUs on logical (NCHW) arrays, in emulation or where `cuda_executors` says, and compare them with the
reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from cuda_executors import run_generated

from lpsn_tvm import quant
from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.conv2d_transpose_mma import conv2d_transpose
from lpsn_tvm.schedules.cuda.dense import dense
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES
from lpsn_tvm.schedules.cuda.weights import input_block
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.targets.cuda_compile import CudaSource, cuda_source

BUILDERS = {"conv2d": conv2d, "conv2d_transpose": conv2d_transpose, "dense": dense}
REFERENCES = {"conv2d": quant.conv2d, "conv2d_transpose": quant.conv2d_transpose, "dense": quant.dense}


@cache
def _generated(key: Any, arch: str, build: Any) -> CudaSource:
    return cuda_source({"kernel": build.function()}, arch)


class _Build:
    """A kernel's builder that counts as equal to those of the same key."""

    def __init__(self, kernel: Kernel) -> None:
        self.key, self.function = kernel.key, kernel.build

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Build) and self.key == other.key


def run_kernel(kernel: Kernel, arrays: Sequence[Array], arch: str, *, order: str = "random") -> Array:
    """The kernel's result in logical shape; lanes beyond the channels of the inputs hold garbage, workspaces too.

    Races, accesses outside of arrays and reads of copies that nobody waited for fail in the emulation.
    """
    made = _generated(kernel.key, arch, _Build(kernel))
    inputs = [poisoned(spec, array) for spec, array in zip(kernel.inputs, arrays, strict=True)]
    return run_generated(kernel, made, inputs, arch, order=order, seed=3)


def poisoned(spec: TensorSpec, array: Array) -> Array:
    """The array packed, with numbers that must not matter in the lanes beyond C."""
    packed = spec.pack(array)
    beyond = spec.blocks * spec.block - spec.shape[1] if spec.block else 0
    if beyond:
        packed[:, -1, ..., spec.block - beyond :] = 111
    return packed


def assert_exact(
    op: str,
    arrays: Sequence[Array],
    constants: Mapping[str, Array],
    attrs: Mapping[str, Any],
    arch: str,
    tile: Tile | None = None,
) -> Kernel:
    """The tensor-core kernel of `op` equals the reference bit for bit; the kernel."""
    # Images come in the narrow blocks that quantization gives them, residuals as other kernels write them.
    blocks = [input_block(arrays[0].shape[1]) if arrays[0].ndim == 4 else 32, *[32] * (len(arrays) - 1)]
    specs = tuple(TensorSpec(a.shape, str(a.dtype), block) for a, block in zip(arrays, blocks, strict=True))
    kernel = BUILDERS[op](specs, constants, attrs, ARCHITECTURES[arch], tile)
    assert kernel is not None
    got = run_kernel(kernel, arrays, arch)
    want = REFERENCES[op](arrays[0], constants["weight"], constants["bias"], constants["scale"], *arrays[1:], **attrs)
    assert got.dtype == want.dtype
    assert want.size < 64 or want.min() < want.max()
    np.testing.assert_array_equal(got, want)
    return kernel
