"""What tensor-core layers offer to the tuner: every valid choice computes the same."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from cuda_kernels import BUILDERS, run_kernel

from lpsn_tvm.schedules.cuda.conv_template import config_of, tile_of
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES
from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.schedules.template import Template, canonical, remake

LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ("conv2d", (1, 72, 6, 7), (80, 72, 3, 3), {"padding": (1, 1, 1, 1)}),
    "colours": ("conv2d", (2, 3, 11, 12), (40, 3, 5, 5), {"strides": (2, 2), "padding": (2, 2, 2, 2)}),
    "groups": ("conv2d", (1, 128, 5, 5), (128, 32, 3, 3), {"groups": 4, "padding": (1, 1, 1, 1)}),
    "transposed": ("conv2d_transpose", (1, 64, 4, 5), (64, 40, 4, 4), {"strides": (2, 2), "padding": (1, 1, 1, 1)}),
    "dense": ("dense", (40, 160), (160, 70), {}),
}


def _template(name: str, arch: str = "sm_80") -> tuple[Template, np.ndarray]:
    op, shape, weight_shape, attrs = LAYERS[name]
    rng = np.random.default_rng(0)
    outputs = weight_shape[0] if op == "conv2d" else weight_shape[1]
    constants = {
        "weight": rng.integers(-128, 128, weight_shape).astype(np.int8),
        "bias": rng.integers(-99, 99, outputs).astype(np.int32),
        "scale": np.full(outputs, 4e-4, np.float32),
    }
    given = {"strides": (1, 1), "padding": (0, 0, 0, 0), "x_zero_point": 9, "out_zero_point": 120, **attrs}
    kernel = BUILDERS[op]((TensorSpec(shape, "uint8", 32),), constants, given, ARCHITECTURES[arch])
    assert kernel is not None
    assert kernel.template is not None
    return kernel.template, rng.integers(0, 256, shape).astype(np.uint8)


def test_knobs_are_the_tile() -> None:
    tile = Tile(64, 32, 4, 1, 2, 5, 3, 2)
    assert tile_of(config_of(tile)) == tile


@pytest.mark.parametrize("arch", ["sm_61", "sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("name", LAYERS)
def test_made_again_elsewhere(name: str, arch: str) -> None:
    template, _ = _template(name, arch)
    again = remake(template.name, json.loads(canonical(template.workload)))
    assert again.key == template.key
    assert (again.choices, again.default) == (template.choices, template.default)
    assert again.is_valid(again.default)
    mine, other = template.kernel(), again.kernel()
    assert mine.key == other.key
    assert [(c.shape, c.dtype) for c in mine.constants] == [(c.shape, c.dtype) for c in other.constants]
    assert (mine.inputs, mine.out) == (other.inputs, other.out)


@pytest.mark.parametrize("name", LAYERS)
def test_features_have_one_length(name: str) -> None:
    template, _ = _template(name)
    configs = list(template.configs())
    assert len(configs) > 20
    assert len({len(template.features(config)) for config in configs}) == 1
    assert len({template.features(config) for config in configs}) > len(configs) // 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_choice_gives_the_same(name: str, arch: str) -> None:
    template, data = _template(name, arch)
    configs = [c for c in template.configs() if tile_of(c).threads <= 128 and tile_of(c).rows <= 64]
    want = run_kernel(template.kernel(), [data], arch)
    assert want.min() < want.max()
    for config in random.Random(0).sample(configs, min(8, len(configs))):
        np.testing.assert_array_equal(run_kernel(template.make(config), [data], arch), want, str(config))
