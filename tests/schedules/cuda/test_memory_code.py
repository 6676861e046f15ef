"""Machine code of kernels that are bound by memory: 16 bytes per access, nothing in local memory, few instructions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import cuda_sass
import numpy as np
import pytest

from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.schedules.rules import dispatch
from lpsn_tvm.targets.cuda_compile import cuda_source
from lpsn_tvm.targets.cuda_rules import RULES

RESULT = {"out_zero_point": 7, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}
SUM = {"a_multiplier": 0.5, "b_multiplier": 0.3, "a_zero_point": 3, "b_zero_point": 4, **RESULT}
PRODUCT = {"multiplier": 0.003, "a_zero_point": 3, "b_zero_point": 4, **RESULT}
LARGE = (8, 256, 28, 28)
IMAGE = (64, 64, 112, 112)
COPIED = {"multipliers": (1.0, 1.0), "zero_points": (7, 7), **RESULT}
WINDOW = {"kernel": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1)}

CASES: dict[str, tuple[str, list[tuple[int, ...]], dict[str, Any]]] = {
    "add": ("lpsn.add", [LARGE, LARGE], SUM),
    "multiply": ("lpsn.multiply", [LARGE, (8, 256, 1, 1)], PRODUCT),
    "requantize": ("lpsn.requantize", [LARGE], {"multiplier": 0.7, "in_zero_point": 9, **RESULT}),
    "lookup": ("lpsn.lookup", [LARGE], {"qmin": 0}),
    "pad": ("lpsn.pad", [LARGE], {"pad_width": (1, 2, 0, 1), "value": 9, "mode": "constant"}),
    "resize": ("lpsn.resize_nearest", [LARGE], {"rows": (0, 0, 1, 1), "columns": (4, 2, 0)}),
    "slice": ("lpsn.strided_slice", [LARGE], {"axes": (1,), "begin": (16,), "end": (64,), "strides": (1,)}),
    "concat": ("lpsn.concat", [(1, 64, 28, 28), (1, 48, 28, 28)], {"axis": 1, **COPIED}),
    "odd_concat": ("lpsn.concat", [(1, 48, 28, 28), (1, 20, 28, 28)], {"axis": 1, **COPIED}),
    "float_concat": ("lpsn.float_concat", [(1, 64, 28, 28), (1, 48, 28, 28)], {"axis": 1}),
    "depth_to_space": ("lpsn.depth_to_space", [(1, 256, 28, 28)], {"block_size": 2, "mode": "DCR"}),
    "max_pool": ("lpsn.max_pool2d", [IMAGE], WINDOW),
    "float_max_pool": ("lpsn.float_max_pool2d", [IMAGE], WINDOW),
    "avg_pool": ("lpsn.avg_pool2d", [IMAGE], {**WINDOW, "in_zero_point": 5, "multiplier": 0.9, **RESULT}),
    "float_average": ("lpsn.float_global_avg_pool2d", [(1, 2048, 7, 7)], {}),
}


@cache
def machine_code(arch: str) -> Mapping[str, cuda_sass.KernelCode]:
    """All cases, compiled together."""
    cuda_sass.require_tools()
    functions = {}
    for name, (op, shapes, attrs) in CASES.items():
        dtype = "float32" if "float" in op else "uint8"
        specs = tuple(TensorSpec(shape, dtype, 32) for shape in shapes)
        constants = {"table": np.arange(256).astype(np.uint8)} if op == "lpsn.lookup" else {}
        kernel = dispatch(RULES, op, specs, constants, attrs, None)
        assert kernel is not None
        functions[name] = kernel.build()
    found = cuda_sass.kernel_code(cuda_source(functions, arch).source, arch)
    return {name.removesuffix("_kernel"): code for name, code in found.items()}


ARCHITECTURES = pytest.mark.parametrize(
    "arch", [*(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_75", "sm_80", "sm_86", "sm_89")), "sm_90"]
)


@ARCHITECTURES
@pytest.mark.parametrize("name", CASES)
def test_accesses_are_wide(name: str, arch: str) -> None:
    code = machine_code(arch)[name]
    assert code.count("LDG.E.128") >= 1
    assert code.local_memory == 0
    if name != "float_average":  # One channel per thread at the end: a few bytes in all.
        assert code.count("STG") == code.count("STG.E.128") >= 1


@ARCHITECTURES
def test_overlapping_windows_share_loads(arch: str) -> None:
    code = machine_code(arch)["max_pool"]
    assert (code.count("LDG"), code.count("STG")) == (15, 2), "2 windows of 3 x 3 pixels are 3 x 5 together"


def test_bytes_are_compared_in_pairs() -> None:
    """32 outputs of 9 inputs each: one comparison per byte would be 256 instructions."""
    code = machine_code("sm_90")["max_pool"]
    assert 0 < code.count("VIMNMX") + code.count("VIMNMX3") <= 144
