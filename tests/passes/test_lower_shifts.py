"""Shift arithmetic: every operator of a lowered graph obeys the hardware's rules, and means what the plan says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import models
from small_graphs import check_regions, random_feed

from lpsn_tvm import graph, quant
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.passes.plan_quantization import plan_quantization
from lpsn_tvm.passes.regions import find_regions
from lpsn_tvm.quant import QuantPlan, QuantScheme
from lpsn_tvm.reference import run_reference

EIGHT = QuantScheme(
    activation_signed=True, activation_symmetric=True, rounding="half_up", weight_container_bits=8, residual_shift=6
)
FOUR = replace(
    EIGHT, weight_bits=(2, 3, 4), activation_bits=(2, 3, 4), input_bits=7, weight_container_bits=4, residual_shift=2
)
INT32_MAX = 2**31 - 1
LAYERS = ("lpsn.conv2d", "lpsn.conv2d_transpose", "lpsn.dense")
CHECKS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def layer_problems(call: Any, attrs: dict[str, Any], scheme: QuantScheme) -> list[str]:
    """What the accelerator could not execute of a weighted layer."""
    values, bias, scale = (graph.constant_value(arg) for arg in call.args[2:5])
    limit = 1 << (scheme.weight_container_bits - 1)
    found = [] if np.all((values >= -limit) & (values < limit)) else ["weights leave their container"]
    if attrs["out_dtype"] == "float32":
        return found
    shift = -quant.exponent_of(scale)
    axis = 1 if graph.op_name(call) != "lpsn.conv2d" else 0
    rows = np.abs(np.moveaxis(values, axis, 0).astype(np.int64)).reshape(values.shape[axis], -1).sum(axis=1)
    if graph.op_name(call) == "lpsn.conv2d_transpose":
        rows = rows.max()
    worst = rows * 128 + np.abs(bias.astype(np.int64)) + (1 << np.maximum(shift - 1, 0))
    found += [] if np.all(worst <= INT32_MAX) else ["accumulator overflows"]
    found += [] if np.all((shift >= 0) & (shift <= 30)) else ["shift out of range"]
    if len(call.args) > 5:
        left = shift + quant.exponent_of(attrs["residual_multiplier"])
        found += [] if np.all(left >= 0) else ["residual is finer than the accumulator"]
        drop = np.maximum(left - attrs["residual_shift"], 0)
        found += [] if np.all(shift - drop >= 0) else ["residual is too coarse"]
        found += [] if attrs["residual_shift"] == scheme.residual_shift else ["residual_shift is not the hardware's"]
    return found


def problems(lowered: Any, scheme: QuantScheme) -> list[str]:
    """Every way in which a lowered graph breaks the hardware's rules."""
    found: list[str] = []
    for var, call in graph.bindings(lowered):
        op = graph.op_name(call)
        if not op.startswith("lpsn."):
            continue
        attrs = graph.call_attrs(call)
        known = ("x_zero_point",) if scheme.has_activation_offset and op == "lpsn.conv2d" else ()
        zero_points = [key for key in attrs if key.endswith("zero_point") and key not in known]
        local = [f"{key} is not 0" for key in zero_points if attrs[key] != 0]
        local += (
            [f"out_dtype {attrs['out_dtype']}"] if attrs.get("out_dtype", "int8") not in ("int8", "float32") else []
        )
        if op in (*LAYERS, "lpsn.add", "lpsn.concat", "lpsn.avg_pool2d", "lpsn.global_avg_pool2d"):
            local += [] if attrs["rounding"] == "half_up" else ["rounding is not half_up"]
        local += layer_problems(call, attrs, scheme) if op in LAYERS else []
        found += [f"{var.name} ({op}): {text}" for text in local]
    return found


def is_float_layer(call: Any) -> bool:
    """Whether a weighted layer writes float32."""
    return graph.op_name(call) in LAYERS and graph.call_attrs(call)["out_dtype"] == "float32"


def planned(mod: Any, scheme: QuantScheme, bits: tuple[int, int]) -> QuantPlan:
    feeds = [random_feed(mod, seed) for seed in range(4)]
    return plan_quantization(mod, feeds, weight_bits=bits[0], activation_bits=bits[1], scheme=scheme)


def check(model: Any, scheme: QuantScheme, bits: tuple[int, int], worst: float) -> None:
    mod = canonicalize(import_model(load_model(model)).mod)
    plan = planned(mod, scheme, bits)
    lowered = lower_to_integer(mod, plan, scheme=scheme)
    assert problems(lowered, scheme) == []
    regions = find_regions(mod)
    written = {region.name for region in regions.regions if region.float_output}
    through_float = {var.name for var, call in graph.bindings(lowered) if is_float_layer(call)} - written
    assert through_float <= {f"{name}.f" for name in written}, "a planned layer never needs a multiplier"
    feeds = random_feed(mod, 0)
    check_regions(mod, plan, lowered, feeds)
    got, want = run_reference(lowered, feeds), run_reference(mod, feeds)
    for value, real in zip(got.values(), want.values(), strict=True):
        noise = float(np.sqrt(np.mean((value - real) ** 2)))
        assert noise <= worst * max(float(np.sqrt(np.mean(real**2))), 1e-3)


@settings(max_examples=20, **CHECKS)
@given(model=models(), power_of_two=st.booleans())
def test_eight_bits_obey_the_hardware_and_stay_close_to_float(model: Any, power_of_two: bool) -> None:
    check(model, replace(EIGHT, power_of_two=power_of_two), (8, 8), 0.2)


@settings(max_examples=20, **CHECKS)
@given(model=models(), power_of_two=st.booleans())
def test_four_bits_obey_the_hardware(model: Any, power_of_two: bool) -> None:
    check(model, replace(FOUR, power_of_two=power_of_two), (4, 4), 2.0)


@settings(max_examples=20, **CHECKS)
@given(model=models())
def test_offsets_go_into_biases(model: Any) -> None:
    check(model, replace(FOUR, has_activation_offset=True), (4, 4), 2.0)
