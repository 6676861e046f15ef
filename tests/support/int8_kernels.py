"""Compile one integer kernel for a named instruction set and run it on logical (NCHW) arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm

from lpsn_tvm import runtime
from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import Isa, isa_of
from lpsn_tvm.targets.llvm import required_features

CPUS = {
    "avx512-vnni": "icelake-server",
    "avx512-vnni-no-vbmi": "cascadelake",
    "avx512": "skylake-avx512",
    "avx-vnni": "alderlake",
    "avx2": "haswell",
    "generic": "x86-64",
}


@cache
def target_of(isa_name: str) -> tuple[Any, Isa]:
    """Target and instruction set by name; skips the test where this machine cannot run it."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": CPUS[isa_name]})
    missing = set(required_features(target)) - (runtime.cpu_features() or set())
    if any(name.startswith(("avx", "fma")) for name in missing):
        pytest.skip(f"this machine lacks {', '.join(sorted(missing))}")
    return target, isa_of(target)


def run_kernel(kernel: Kernel | None, arrays: Sequence[np.ndarray], target: Any, garbage: int = 171) -> np.ndarray:
    """The kernel's result in the logical layout; lanes beyond the channels are filled with `garbage`, which must not
    matter.
    """
    assert kernel is not None
    run = tvm.compile(tvm.IRModule({"main": kernel.build()}), target=target)["main"]
    packed = [_packed(spec, array, garbage) for spec, array in zip(kernel.inputs, arrays, strict=True)]
    out = tvm.runtime.tensor(np.full(kernel.out.memory_shape, 77).astype(kernel.out.dtype))
    run(*(tvm.runtime.tensor(array) for array in (*packed, *kernel.constants)), out)
    return kernel.out.unpack(out.numpy())


def _packed(spec: TensorSpec, array: np.ndarray, garbage: int) -> np.ndarray:
    packed = spec.pack(array)
    if spec.block:
        exists = spec.pack(np.ones(spec.shape, bool))
        packed[~exists.astype(bool)] = np.array(garbage).astype(spec.dtype)
    return packed
