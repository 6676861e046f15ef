from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_graphs import Net, fake_quantized, random_feed, simple_plan
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.lower_shapes import linear_index, match_depth_to_space, nearest_index
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.reference import run_reference

op = relax.op


def resize(x: Any, size: tuple[int, int], method: str, transform: str, rounding: str = "floor") -> Any:
    return op.image.resize2d(
        x, size, layout="NCHW", method=method, coordinate_transformation_mode=transform, rounding_method=rounding
    )


# Each operator stands between two convolutions of a [1, 8, 9, 10] tensor, so that it runs in integers. Name ->
# (builder, integer operator).
MOVES = {
    "max_pool": (lambda x: op.nn.max_pool2d(x, (3, 2), (2, 2), (1, 0, 1, 1)), "max_pool2d"),
    "reshape": (lambda x: op.reshape(x, (1, 4, 18, 10)), "reshape"),
    "permute": (lambda x: op.permute_dims(x, (0, 1, 3, 2)), "transpose"),
    "slice": (lambda x: op.strided_slice(x, [1, 3], [2, 9], [8, -11], [2, -3]), "strided_slice"),
    "slice_negative": (lambda x: op.strided_slice(x, [1], [-6], [-1], [1]), "strided_slice"),
    "pad_constant": (lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 3]), "pad"),
    "pad_reflect": (lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 3], pad_mode="reflect"), "pad"),
    "pad_replicate": (lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 3], pad_mode="replicate"), "pad"),
    "global_max": (lambda x: op.max(x, [2, 3], True), "max_pool2d"),
    "nearest": (lambda x: resize(x, (18, 30), "nearest_neighbor", "asymmetric"), "resize_nearest"),
    "nearest_ratio": (
        lambda x: resize(x, (13, 7), "nearest_neighbor", "half_pixel", "round_prefer_floor"),
        "resize_nearest",
    ),
    "nearest_corners": (
        lambda x: resize(x, (13, 7), "nearest_neighbor", "align_corners", "round_prefer_ceil"),
        "resize_nearest",
    ),
    "linear": (lambda x: resize(x, (18, 20), "linear", "half_pixel"), "resize_linear"),
    "linear_corners": (lambda x: resize(x, (13, 7), "linear", "align_corners"), "resize_linear"),
    "linear_asymmetric": (lambda x: resize(x, (27, 5), "linear", "asymmetric"), "resize_linear"),
    "pixel_shuffle": (lambda x: op.nn.pixel_shuffle(x, 2), "depth_to_space"),
    "avg_pool": (lambda x: op.nn.avg_pool2d(x, (3, 2), (2, 2), (1, 0, 1, 1)), "avg_pool2d"),
    "avg_pool_include_pad": (
        lambda x: op.nn.avg_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1), count_include_pad=True),
        "avg_pool2d",
    ),
    "mean": (lambda x: op.mean(x, [2, 3], True), "global_avg_pool2d"),
    "concat": (lambda x: op.concat([x, x], 1), "concat"),
}


def network(build: Any) -> Any:
    net = Net((1, 3, 9, 10))
    x = net.emit(op.nn.relu(net.conv(net.input, 8)), "before")
    y = net.emit(build(x), "middle")
    return net.module(net.conv(y, 4, 1, name="after"))


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("case", MOVES)
def test_operator_runs_in_integers_and_agrees_with_rounded_floats(case: str, bits: int) -> None:
    build, name = MOVES[case]
    mod = network(build)
    plan = simple_plan(mod, activation_bits=bits)
    lowered = lower_to_integer(mod, plan)
    calls = {var.name: graph.op_name(value) for var, value in graph.bindings(lowered)}
    assert calls["middle"] == f"lpsn.{name}"
    feeds = random_feed(mod)
    got = run_reference(lowered, feeds, fetch=["middle"])
    params = plan.activations["middle"]
    real = (got["middle"].astype(np.float32) - params.zero_point) * params.scale
    want = fake_quantized(mod, plan, feeds, fetch=["middle"])
    # Linear resizing has weights that are multiples of 1/128 and rounds ties up: at most one step, rarely. All
    # else only at float ties.
    assert np.max(np.abs(real - want["middle"])) <= 1.01 * float(params.scale)
    assert np.mean(np.abs(real - want["middle"]) > 0.01 * float(params.scale)) < (0.15 if "linear" in case else 0.03)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_is_recognized_in_the_importers_spelling(mode: str) -> None:
    net = Net((1, 3, 5, 6))
    x = net.conv(net.input, 8)
    six, axes = ((1, 2, 2, 2, 5, 6), (0, 3, 4, 1, 5, 2)) if mode == "DCR" else ((1, 2, 2, 2, 5, 6), (0, 1, 4, 2, 5, 3))
    y = net.emit(op.permute_dims(net.emit(op.reshape(x, six)), axes))
    y = net.emit(op.reshape(y, (1, 2, 10, 12)), "shuffled")
    mod = net.module(net.conv(y, 4, name="after"))
    lowered = lower_to_integer(mod, simple_plan(mod))
    calls = [graph.op_name(value) for _, value in graph.bindings(lowered)]
    assert calls[:4] == ["lpsn.quantize", "lpsn.conv2d", "lpsn.depth_to_space", "lpsn.conv2d"]
    feeds = random_feed(mod)
    np.testing.assert_allclose(
        run_reference(lowered, feeds)["after"], fake_quantized(mod, simple_plan(mod), feeds)["after"], atol=1e-4
    )


def test_a_channel_shuffle_is_not_depth_to_space() -> None:
    net = Net((1, 8, 4, 4))
    y = net.emit(op.permute_dims(net.emit(op.reshape(net.input, (1, 2, 4, 4, 4))), (0, 2, 1, 3, 4)))
    y = net.emit(op.reshape(y, (1, 8, 4, 4)), "shuffled")
    mod = net.module(y)
    bound = {var.name: value for var, value in graph.bindings(mod)}
    assert match_depth_to_space(bound["shuffled"], bound, lambda _: True) is None


@pytest.mark.parametrize(("size", "target"), [(4, 8), (3, 7), (10, 5), (7, 3), (5, 1), (1, 4)])
@pytest.mark.parametrize(
    "transform", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "tf_half_pixel_for_nn"]
)
def test_resize_indices_stay_inside_and_weights_sum_to_128(size: int, target: int, transform: str) -> None:
    indices, weights = linear_index(size, target, transform)
    pairs = np.reshape(weights, (-1, 2))
    assert len(indices) == 2 * target and np.all(pairs.sum(axis=1) == 128) and pairs.min() >= 0
    for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil", "round", ""):
        rows = nearest_index(size, target, transform, rounding)
        assert len(rows) == target and min(rows) >= 0 and max(rows) < size
    assert max(indices) < size and min(indices) >= 0
