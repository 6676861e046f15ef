"""Templates of CPU kernels: every configuration computes the same; a template can be made again from its workload."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.conv2d_float import conv2d_float
from lpsn_tvm.schedules.llvm.conv2d_int8 import conv2d
from lpsn_tvm.schedules.llvm.conv2d_transpose_float import conv2d_transpose_float
from lpsn_tvm.schedules.llvm.conv2d_transpose_int8 import conv2d_transpose
from lpsn_tvm.schedules.llvm.dense_float import dense_float
from lpsn_tvm.schedules.llvm.dense_int8 import dense
from lpsn_tvm.schedules.llvm.depthwise_float import depthwise_float
from lpsn_tvm.schedules.llvm.depthwise_int8 import depthwise
from lpsn_tvm.schedules.llvm.isa import AVX2, AVX512_VNNI, GENERIC, Isa
from lpsn_tvm.schedules.template import REMAKERS, Template, canonical, remake
from tests.support.run_kernel import run_kernel

CPU_OF = {AVX512_VNNI: "avx512", AVX2: "avx2", GENERIC: "generic"}


def integer(
    builder: Any, shape: tuple[int, ...], weight: tuple[int, ...], *, residual: bool = False, **attrs: Any
) -> Callable[[Isa], Kernel]:
    def make(isa: Isa) -> Kernel:
        generator = np.random.default_rng(0)
        outputs = weight[1] * attrs.get("groups", 1) if builder in (conv2d_transpose, dense) else weight[0]
        constants = {
            "weight": generator.integers(-20, 20, weight).astype(np.int8),
            "bias": generator.integers(-99, 99, outputs).astype(np.int32),
            "scale": np.full(outputs, 2e-3, np.float32),
        }
        inputs = [TensorSpec(shape, "uint8", 16 if len(shape) == 4 else 0)]
        if residual:
            inputs.append(TensorSpec((shape[0], outputs, *shape[2:]), "uint8", 16))
        given = {"strides": (1, 1), "padding": (0, 0, 0, 0), "x_zero_point": 7, "out_zero_point": 120, **attrs}
        return builder(tuple(inputs), constants, given, isa)

    return make


def floating(builder: Any, shape: tuple[int, ...], weight: tuple[int, ...], **attrs: Any) -> Callable[[Isa], Kernel]:
    def make(isa: Isa) -> Kernel:
        generator = np.random.default_rng(0)
        outputs = weight[1] * attrs.get("groups", 1) if builder in (conv2d_transpose_float, dense_float) else weight[0]
        constants = {
            "weight": generator.standard_normal(weight).astype(np.float32),
            "bias": generator.standard_normal(outputs).astype(np.float32),
        }
        given = {
            "strides": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1, "low": 0.0, "high": math.inf,
            "output_padding": (0, 0), **attrs,
        }  # fmt: skip
        return builder((TensorSpec(shape, "float32", 16 if len(shape) == 4 else 0),), constants, given, isa)

    return make


SAME = (1, 1, 1, 1)
KERNELS: dict[str, Callable[[Isa], Kernel]] = {
    "3x3": integer(conv2d, (1, 32, 9, 13), (48, 32, 3, 3), padding=SAME),
    "3x3 stride 2, few inputs": integer(conv2d, (2, 3, 12, 12), (16, 3, 3, 3), padding=SAME, strides=(2, 2)),
    "1x1, one row of pixels": integer(conv2d, (1, 32, 10, 14), (64, 32, 1, 1)),
    "residual": integer(conv2d, (1, 16, 7, 7), (32, 16, 3, 3), padding=SAME, residual=True),
    "groups": integer(conv2d, (1, 64, 6, 6), (64, 32, 3, 3), padding=SAME, groups=2),
    "transposed": integer(conv2d_transpose, (1, 16, 5, 6), (16, 32, 4, 4), strides=(2, 2), padding=SAME),
    "dense": integer(dense, (3, 96), (96, 160)),
    "depthwise": integer(depthwise, (1, 40, 13, 15), (40, 1, 3, 3), padding=SAME, groups=40),
    "depthwise 5x5": integer(depthwise, (1, 16, 14, 14), (16, 1, 5, 5), padding=(2,) * 4, groups=16, strides=(2, 2)),
    "float 3x3": floating(conv2d_float, (1, 32, 9, 14), (32, 32, 3, 3), padding=SAME),
    "float 1x1": floating(conv2d_float, (1, 16, 7, 9), (64, 16, 1, 1)),
    "float, shared blocks": floating(conv2d_float, (1, 24, 6, 6), (24, 8, 3, 3), padding=SAME, groups=3),
    "float transposed": floating(
        conv2d_transpose_float, (1, 16, 5, 6), (16, 32, 4, 4), strides=(2, 2), padding=SAME
    ),
    "float dense": floating(dense_float, (4, 40), (40, 100)),
    "float depthwise": floating(depthwise_float, (1, 32, 8, 12), (32, 1, 3, 3), padding=SAME, groups=32),
}  # fmt: skip


def template_of(name: str, isa: Isa) -> Template:
    template = KERNELS[name](isa).template
    assert template is not None
    return template


@pytest.mark.parametrize("isa", CPU_OF, ids=lambda isa: isa.name)
@pytest.mark.parametrize("name", KERNELS)
def test_a_template_is_consistent(name: str, isa: Isa) -> None:
    template = template_of(name, isa)
    assert template.is_valid(template.default)
    configs = list(template.configs())
    assert (1 if isa is GENERIC else 2) <= len(configs) < 2000
    assert all(template.is_valid(config) for config in configs)
    lengths = {len(template.features(config)) for config in configs}
    assert len(lengths) == 1
    assert all(math.isfinite(value) for config in configs for value in template.features(config))
    assert template.kernel().key == KERNELS[name](isa).key
    keys = {template.make(config).key for config in configs}
    assert len(keys) == len(configs)


@pytest.mark.parametrize("isa", [AVX512_VNNI, AVX2], ids=lambda isa: isa.name)
@pytest.mark.parametrize("name", KERNELS)
def test_a_template_can_be_made_again_elsewhere(name: str, isa: Isa) -> None:
    """Only the workload's JSON text travels."""
    template = template_of(name, isa)
    other = remake(template.name, json.loads(canonical(template.workload)))
    assert (other.key, other.choices, other.default) == (template.key, template.choices, template.default)
    for config in list(template.configs())[:: max(1, len(list(template.configs())) // 5)]:
        mine, made = template.make(config), other.make(config)
        assert [(a.shape, a.dtype) for a in mine.constants] == [(a.shape, a.dtype) for a in made.constants]
        assert mine.out.memory_shape == made.out.memory_shape
        assert [i.memory_shape for i in mine.inputs] == [i.memory_shape for i in made.inputs]


def some_configs(template: Template, count: int) -> list[Any]:
    """Default, and configurations in which every knob takes its smallest and largest values, and random ones."""
    configs = list(template.configs())
    extremes = [
        pick(configs, key=lambda config, k=knob, v=values: v.index(config[k]))
        for knob, values in template.choices.items()
        for pick in (min, max)
    ]
    chosen = {
        canonical(config): config for config in extremes + random.Random(0).sample(configs, min(count, len(configs)))
    }
    return list(chosen.values())


@pytest.mark.parametrize("name", KERNELS)
def test_configurations_compute_the_same(name: str) -> None:
    _check_equal(name, AVX512_VNNI, 1)


@pytest.mark.slow
@pytest.mark.parametrize("isa", CPU_OF, ids=lambda isa: isa.name)
@pytest.mark.parametrize("name", KERNELS)
def test_many_configurations_compute_the_same(name: str, isa: Isa) -> None:
    _check_equal(name, isa, 12)


def _check_equal(name: str, isa: Isa, count: int) -> None:
    template = template_of(name, isa)
    kernel = template.kernel()
    generator = np.random.default_rng(1)
    arrays = [
        generator.standard_normal(spec.shape).astype(np.float32)
        if spec.dtype == "float32"
        else generator.integers(0, 256, spec.shape).astype(spec.dtype)
        for spec in kernel.inputs
    ]
    expected = run_kernel(kernel, arrays, CPU_OF[isa])
    assert len(np.unique(expected)) > 10
    for config in some_configs(template, count):
        found = run_kernel(template.make(config), arrays, CPU_OF[isa])
        np.testing.assert_array_equal(found, expected, err_msg=canonical(config))


def test_every_template_here_has_a_remaker() -> None:
    assert {template_of(name, AVX512_VNNI).name for name in KERNELS} <= set(REMAKERS)
