"""A template of a real tensor-core kernel, some of whose configurations do not compile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lpsn_tvm.schedules.cuda.conv2d_mma import conv2d
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.template import REMAKERS, Config, Template

NAME, ARCH = "gpu_convolution", "sm_86"
REMAKERS[NAME] = "gpu_templates:remake"
TILES = {"small": Tile(64, 32, 2, 1), "wide": Tile(64, 64, 2, 2), "split": Tile(64, 32, 2, 1, splits=2)}
CHOICES = (*TILES, "unknown_function", "unlinked")
SHAPE, FILTERS = (1, 32, 6, 5), 64
ATTRS = {"strides": (1, 1), "padding": (1, 1, 1, 1), "x_zero_point": 3, "out_zero_point": 128}


def constants(seed: int) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {
        "weight": generator.integers(-127, 128, (FILTERS, SHAPE[1], 3, 3)).astype(np.int8),
        "bias": generator.integers(-500, 500, FILTERS).astype(np.int32),
        "scale": generator.uniform(0.5, 1.5, FILTERS).astype(np.float32) * np.float32(2e-4),
    }


def template(seed: int = 0) -> Template:
    given = constants(seed)

    def make(config: Config) -> Kernel:
        tile = TILES.get(str(config["tile"]), TILES["small"])
        kernel = conv2d((TensorSpec(SHAPE, "uint8", 32),), given, ATTRS, ARCHITECTURES[ARCH], tile)
        assert kernel is not None
        if config["tile"] in TILES:
            return kernel
        return replace(kernel, build=lambda: _faulty(kernel.build(), str(config["tile"])))

    return Template(NAME, {"filters": FILTERS}, {"tile": CHOICES}, {"tile": "small"}, make)


def remake(workload: Mapping[str, Any]) -> Template:
    return template(seed=99)


def _faulty(function: Any, how: str) -> Any:
    """TVM refuses one; nvcc the other."""
    from tvm import tirx

    if how == "unlinked":
        raise ValueError("no such configuration")
    call = tirx.Evaluate(tirx.call_extern("int32", "a_function_that_is_nowhere"))

    def add(node: Any) -> Any:
        if isinstance(node, tirx.SeqStmt):
            return tirx.SeqStmt([*node.seq[:-1], add(node.seq[-1])])
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            return tirx.AttrStmt(node.node, node.attr_key, node.value, add(node.body))
        return tirx.SeqStmt([call, node])

    return function.with_body(add(function.body))
