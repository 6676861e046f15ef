"""Compile one kernel and run it on numpy arrays of logical shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import tvm

from lpsn_tvm import float_ops, quant
from lpsn_tvm.schedules.kernel import Array, Builder, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import AVX2, AVX512_VNNI, GENERIC, Isa
from lpsn_tvm.schedules.rules import dispatch
from lpsn_tvm.targets.llvm_rules import RULES

CPUS: dict[str, tuple[str | None, Isa]] = {
    "avx512": ("cascadelake", AVX512_VNNI), "avx2": ("haswell", AVX2), "generic": (None, GENERIC),
}  # fmt: skip
REFERENCE: dict[str, Any] = {**quant.OPERATORS, **float_ops.OPERATORS}


def rule(op: str) -> Builder:
    """What lowering for llvm asks for the kernel of an operator."""
    return partial(dispatch, RULES, op)


@cache
def target_of(cpu: str) -> Any:
    mcpu, _ = CPUS[cpu]
    return tvm.target.Target({"kind": "llvm", **({"mcpu": mcpu} if mcpu else {})})


def run_kernel(kernel: Kernel, arrays: Sequence[Array], cpu: str = "avx512") -> Array:
    """The kernel's result in logical shape; memory beyond the channels of the inputs is poisoned."""
    function = tvm.compile(kernel.build(), target=target_of(cpu))["main"]
    inputs = [poisoned(spec, array) for spec, array in zip(kernel.inputs, arrays, strict=True)]
    out = tvm.runtime.tensor(np.full(kernel.out.memory_shape, 77, kernel.out.dtype))
    function(*[tvm.runtime.tensor(array) for array in (*inputs, *kernel.constants)], out)
    return kernel.out.unpack(out.numpy())


def poisoned(spec: TensorSpec, array: Array) -> Array:
    """The array packed, with numbers that must not matter in the lanes beyond C."""
    packed = spec.pack(array)
    if spec.block:
        beyond = spec.blocks * spec.block - spec.shape[1]
        if beyond:
            packed[:, -1, ..., spec.block - beyond :] = np.nan if array.dtype == np.float32 else 111
    return packed


def build_and_run(
    builder: Builder,
    arrays: Sequence[Array],
    constants: Mapping[str, Array],
    attrs: Mapping[str, Any],
    cpu: str = "avx512",
    block: int = 16,
) -> Array:
    """Offer the arrays in layout `block` (rank 4; others plain) to `builder` and run what it returns."""
    offered = tuple(TensorSpec(a.shape, str(a.dtype), block if a.ndim == 4 else 0) for a in arrays)
    kernel = builder(offered, constants, attrs, CPUS[cpu][1])
    assert kernel is not None
    return run_kernel(kernel, arrays, cpu)


def assert_exact(
    builder: Builder,
    op: str,
    arrays: Sequence[Array],
    attrs: Mapping[str, Any],
    constants: Mapping[str, Array] | None = None,
    cpu: str = "avx512",
    block: int = 16,
) -> None:
    """The kernel equals the reference bit for bit."""
    constants = constants or {}
    got = build_and_run(builder, arrays, constants, attrs, cpu, block)
    want = REFERENCE[op](*arrays, *constants.values(), **attrs)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def assert_close(
    builder: Builder,
    op: str,
    arrays: Sequence[Array],
    attrs: Mapping[str, Any],
    constants: Mapping[str, Array] | None = None,
    cpu: str = "avx512",
    block: int = 16,
    tolerance: float = 1e-5,
) -> None:
    """The kernel equals the float reference within `tolerance`, relative to the largest value."""
    constants = constants or {}
    got = build_and_run(builder, arrays, constants, attrs, cpu, block)
    residual = arrays[1:] if op in ("lpsn.float_conv2d", "lpsn.float_dense") else ()
    others = () if residual else arrays[1:]
    want = REFERENCE[op](arrays[0], *others, *constants.values(), *residual, **attrs)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=tolerance * max(1.0, float(np.abs(want).max())))
