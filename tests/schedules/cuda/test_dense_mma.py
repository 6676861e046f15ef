"""Tensor-core dense layers in emulation, bit for bit against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_kernels import assert_exact

from lpsn_tvm.schedules.cuda.geometry import Tile


@pytest.mark.parametrize(
    ("batch", "features", "units", "options"),
    [
        (1, 256, 100, {}),
        (3, 70, 40, {"bits": 4, "residual": True}),
        (17, 96, 33, {"out_dtype": "float32"}),
        (17, 96, 36, {"out_dtype": "float32"}),
        (20, 64, 64, {"out_dtype": "float32"}),
        (1, 256, 100, {"out_dtype": "float32"}),
        (3, 70, 10, {"out_dtype": "float32"}),
        (2, 512, 10, {"tile": Tile(16, 32, 1, 1, 2, 3, 4)}),
        (2, 64, 10, {"bits": 4, "factor": 8}),
    ],
)
def test_equals_reference(batch: int, features: int, units: int, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    limit = 1 << options.get("bits", 8) - 1
    factor = options.get("factor", 1)
    constants = {
        "weight": (rng.integers(-limit, limit, (features, units)) * factor).astype(np.int8),
        "bias": rng.integers(-5000, 5000, units).astype(np.int32),
        "scale": (rng.uniform(0.3, 1.0, units) / (limit * factor * np.sqrt(features))).astype(np.float32),
    }
    arrays = [rng.integers(0, 256, (batch, features)).astype(np.uint8)]
    attrs: dict[str, Any] = {"out_zero_point": 100, "out_dtype": options.get("out_dtype", "uint8")}
    if options.get("residual"):
        arrays.append(rng.integers(0, 256, (batch, units)).astype(np.uint8))
        attrs |= {"residual_multiplier": 1.3, "residual_zero_point": 9}
    assert_exact("dense", arrays, constants, attrs, "sm_80", options.get("tile"))
