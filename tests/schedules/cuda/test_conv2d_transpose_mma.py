"""Tensor-core transposed convolutions in emulation, bit for bit against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_kernels import assert_exact

from lpsn_tvm.schedules.cuda.conv2d_transpose_mma import conv2d_transpose
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES
from lpsn_tvm.schedules.kernel import TensorSpec

CASES: dict[str, dict[str, Any]] = {
    "2x2 stride 2": {"kernel": (2, 2), "strides": (2, 2), "padding": (0, 0, 0, 0)},
    "3x3 stride 2, output padding": {"padding": (1, 1, 1, 1), "output_padding": (1, 1)},
    "4x4 stride 2": {"kernel": (4, 4), "padding": (1, 1, 1, 1), "bits": 4},
    "uneven": {"kernel": (5, 2), "strides": (3, 1), "padding": (2, 0, 1, 1), "channels": 40, "units": 50},
    "few channels": {"channels": 3, "units": 10, "padding": (0, 1, 1, 0)},
    "few floats": {"units": 3, "padding": (1, 1, 1, 1), "output_padding": (1, 1), "out_dtype": "float32"},
    "stride 1": {"strides": (1, 1), "padding": (1, 1, 1, 1), "tile": Tile(32, 64, 2, 1)},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str) -> None:
    case = CASES[name]
    rng = np.random.default_rng(2)
    limit = 1 << case.get("bits", 8) - 1
    channels, units = case.get("channels", 32), case.get("units", 32)
    weight = rng.integers(-limit, limit, (channels, units, *case.get("kernel", (3, 3)))).astype(np.int8)
    constants = {
        "weight": weight,
        "bias": rng.integers(-500, 500, units).astype(np.int32),
        "scale": (rng.uniform(0.5, 1.0, units) / (limit * np.sqrt(channels * 4))).astype(np.float32),
    }
    attrs = {
        "strides": case.get("strides", (2, 2)), "padding": case["padding"],
        "output_padding": case.get("output_padding", (0, 0)), "x_zero_point": 131, "out_zero_point": 100,
        "out_dtype": case.get("out_dtype", "uint8"),
    }  # fmt: skip
    x = rng.integers(0, 256, (2, channels, 5, 4)).astype(np.uint8)
    assert_exact("conv2d_transpose", [x], constants, attrs, "sm_80", case.get("tile", Tile(32, 32, 2, 1)))


def test_leaves_groups_to_others() -> None:
    constants = {
        "weight": np.ones((32, 1, 2, 2), np.int8),
        "bias": np.zeros(32, np.int32),
        "scale": np.ones(32, np.float32),
    }
    attrs = {"strides": (2, 2), "padding": (0, 0, 0, 0), "groups": 32}
    assert conv2d_transpose((TensorSpec((1, 32, 4, 4), "uint8"),), constants, attrs, ARCHITECTURES["sm_80"]) is None
