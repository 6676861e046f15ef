"""A template some of whose configurations are wrong, crash, hang or do not compile."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import te, tirx

from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.schedules.template import REMAKERS, Config, Template

NAME = "faulty_add"
MODES = (
    "good", "same", "wrong", "crashes", "hangs", "raises", "ends_the_compiler", "stops_the_compiler", "unlinked",
)  # fmt: skip
REMAKERS[NAME] = "faulty_templates:remake"


def template(elements: int = 64, constant: int = 5) -> Template:
    """y = x + constant, int32, in several more or less successful ways."""
    spec = TensorSpec((elements,), "int32")
    packed = (np.array([constant], np.int32),)

    def make(config: Config) -> Kernel:
        return Kernel(
            lambda: _function(elements, str(config["mode"])), packed, spec, (NAME, elements, *config.values()), (spec,)
        )

    return Template(NAME, {"elements": elements, "input_range": [-7, 9]}, {"mode": MODES}, {"mode": "good"}, make)


def remake(workload: Mapping[str, Any]) -> Template:
    return template(int(workload["elements"]), 0)


def _function(elements: int, mode: str) -> Any:
    if mode == "raises":
        raise ValueError("this configuration\ncannot be made")
    if mode == "ends_the_compiler":
        os.abort()
    if mode == "stops_the_compiler":
        time.sleep(1000)
    x = te.placeholder((elements,), "int32", name="x")
    constant = te.placeholder((1,), "int32", name="constant")
    extra = {"wrong": 1, "unlinked": tirx.call_extern("int32", "a_function_that_is_nowhere")}.get(mode, 0)
    result = te.compute((elements,), lambda i: x[i] + constant[0] + extra, name="y")
    function = te.create_prim_func([x, constant, result])
    if mode not in ("crashes", "hangs"):
        return function
    name = {"crashes": "abort", "hangs": "pause"}[mode]
    call = tirx.Evaluate(tirx.call_extern("int32", name))
    return function.with_body(tirx.SeqStmt([call, function.body]))
