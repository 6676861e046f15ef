"""The plan as a whole: what it holds, how well it does, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.errors import CalibrationError, QuantizeError
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.fake_quantize import evaluate_plan
from lpsn_tvm.passes.plan_quantization import plan_quantization
from lpsn_tvm.passes.quantize_layer import check_accumulator
from lpsn_tvm.passes.regions import find_regions
from lpsn_tvm.quant import QuantParams, QuantPlan, QuantScheme
from tests.support.small_graphs import Net

VTA = QuantScheme(activation_signed=True, activation_symmetric=True, weight_per_channel=False, power_of_two=True)


def images(count: int, seed: int, shape: tuple[int, ...] = (3, 12, 12)) -> np.ndarray:
    """Smooth random images: neighbouring pixels are correlated, as GPTQ likes and reality is."""
    rng = np.random.default_rng(seed)
    x = np.cumsum(np.cumsum(rng.normal(size=(count, *shape)), axis=2), axis=3)
    x -= x.mean(axis=(1, 2, 3), keepdims=True)
    return (x / x.std(axis=(1, 2, 3), keepdims=True)).astype(np.float32)


def batches(x: np.ndarray, size: int = 16) -> list[dict[str, np.ndarray]]:
    return [{"input": x[i : i + size]} for i in range(0, len(x), size)]


CALIBRATION, TEST = batches(images(64, 0)), batches(images(32, 1))


def residual_network(seed: int = 0) -> Any:
    net = Net((1, 3, 12, 12), seed)
    x = net.emit(relax.op.nn.relu(net.conv(net.input, 8, name="stem")), "stem.relu")
    y = net.emit(relax.op.nn.relu(net.conv(x, 12, name="a")), "a.relu")
    y = net.emit(relax.op.clip(net.conv(y, 12, groups=12, name="dw"), 0.0, 6.0), "dw.relu6")
    x = net.emit(relax.op.nn.relu(net.emit(relax.op.add(net.conv(y, 8, 1, name="b"), x), "sum")), "sum.relu")
    pooled = net.emit(relax.op.reshape(net.emit(relax.op.mean(x, [2, 3], keepdims=True), "mean"), (1, 8)), "flat")
    return net.module(net.dense(pooled, 5, name="fc"))


NETWORK = residual_network()
REAL = np.concatenate([next(iter(TorchInterpreter(NETWORK).run(feed).values())).numpy() for feed in TEST])


def plan_for(weight_bits: int = 8, activation_bits: int = 8, **options: Any) -> QuantPlan:
    calibration = options.pop("calibration", CALIBRATION)
    return plan_quantization(NETWORK, calibration, weight_bits=weight_bits, activation_bits=activation_bits, **options)


def relative_error(plan: QuantPlan, mod: Any = NETWORK, ignore: tuple[str, ...] = ()) -> float:
    found = evaluate_plan(TorchInterpreter(mod), plan, find_regions(mod, ignore), TEST)
    outputs = np.concatenate([next(iter(result.values())).numpy() for result in found])
    return float(((outputs - REAL) ** 2).sum() / ((REAL - REAL.mean(axis=0)) ** 2).sum())


def test_plan_covers_exactly_what_the_regions_quantize() -> None:
    plan, regions = plan_for(4, 6), find_regions(NETWORK)
    assert tuple(plan.activations) == regions.quantized
    assert set(plan.weights) == {"stem", "a", "dw", "b", "fc"}
    assert plan.activations["flat"] is plan.activations["mean"]
    layers = graph.find_layers(NETWORK)
    for name, weight in plan.weights.items():
        assert weight.values.dtype == np.int8 and weight.values.shape == layers[name].weight.shape
        assert weight.params.scale.shape == weight.bias.shape == (layers[name].out_channels,)
        assert weight.bias.dtype == weight.params.scale.dtype == np.float32
        assert weight.values.min() >= -8 and weight.values.max() <= 7
    assert {name: params.bits for name, params in plan.activations.items()} == {
        "input": 8,
        "stem.relu": 6,
        "a.relu": 6,
        "dw.relu6": 6,
        "sum.relu": 6,
        "mean": 6,
        "flat": 6,
    }


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("activation_bits", [2, 5, 8])
def test_all_bits_run(weight_bits: int, activation_bits: int) -> None:
    plan = plan_for(weight_bits, activation_bits)
    for weight in plan.weights.values():
        assert np.abs(weight.values.astype(int)).max() <= 2 ** (weight_bits - 1) and weight.params.bits == weight_bits
    assert np.isfinite(relative_error(plan))


def test_more_bits_are_not_worse() -> None:
    weights = [relative_error(plan_for(bits, 8)) for bits in (2, 3, 4, 6, 8)]
    both = [relative_error(plan_for(bits, bits)) for bits in (2, 4, 6, 8)]
    for errors in (weights, both):
        assert all(later < 1.1 * earlier for earlier, later in itertools.pairwise(errors))
    assert both[-1] < 2e-3 and both[0] > 20 * both[-1]


@pytest.mark.parametrize("bits", [(4, 8), (3, 8), (4, 4)], ids=str)
def test_closed_form_beats_rounding_to_nearest(bits: tuple[int, int]) -> None:
    closed = [relative_error(plan_for(*bits, seed=seed)) for seed in range(2)]
    nearest = relative_error(plan_for(*bits, rounding="nearest"))
    assert max(closed) < 0.8 * nearest


def test_bias_correction_makes_the_mean_right() -> None:
    plan = plan_for(3, 8, rounding="nearest")
    interpreter, regions = TorchInterpreter(NETWORK), find_regions(NETWORK)
    mean = np.concatenate(
        [next(iter(out.values())).numpy() for out in evaluate_plan(interpreter, plan, regions, CALIBRATION)]
    ).mean(axis=0)
    real = np.concatenate([next(iter(interpreter.run(feed).values())).numpy() for feed in CALIBRATION]).mean(axis=0)
    spread = REAL.std()
    assert np.abs(mean - real).max() < 0.03 * spread


def test_same_seed_same_plan() -> None:
    first, second = plan_for(4, 4, seed=3), plan_for(4, 4, seed=3)
    for name, weight in first.weights.items():
        np.testing.assert_array_equal(weight.values, second.weights[name].values)
        np.testing.assert_array_equal(weight.bias, second.weights[name].bias)


@pytest.mark.parametrize("observer", ["mse", "minmax", "percentile", "entropy"])
def test_observers(observer: str) -> None:
    assert relative_error(plan_for(8, 8, observer=observer)) < 0.02


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)], ids=str)
def test_symmetric_power_of_two_scheme(bits: tuple[int, int]) -> None:
    plan = plan_for(*bits, scheme=VTA)
    for params in (*plan.activations.values(), *(weight.params for weight in plan.weights.values())):
        assert params.zero_point == 0 and params.signed and np.shape(params.scale) == ()
        assert float(np.log2(params.scale)) % 1 == 0
    assert relative_error(plan) < (0.02 if bits == (8, 8) else 1.0)


def test_ignored_layers_stay_float() -> None:
    plan = plan_for(4, 4, ignore=["a", "f?"])
    assert set(plan.weights) == {"stem", "dw", "b"} and {"a", "fc"} <= set(plan.float_nodes)
    assert np.isfinite(relative_error(plan, ignore=("a", "f?")))


def test_bits_of_single_layers() -> None:
    plan = plan_for(4, 4, layer_bits={"dw": (8, 6), "f*": 8})
    weights = {name: weight.params.bits for name, weight in plan.weights.items()}
    assert weights == {"stem": 4, "a": 4, "dw": 8, "b": 4, "fc": 8}
    assert [plan.activations[name].bits for name in ("a.relu", "flat", "sum.relu")] == [6, 8, 4]


def test_kept_scales_are_used_in_the_schemes_container() -> None:
    kept = QuantParams(np.float32(0.05), -128, 8, True)
    weight = QuantParams(np.full(12, 0.01, np.float32), 0, 8, True, 0)
    plan = plan_for(8, 8, keep={"a.relu": kept}, keep_weights={"a": weight})
    params = plan.activations["a.relu"]
    assert (float(params.scale), params.zero_point, params.signed) == (pytest.approx(0.05), 0, False)
    assert params.real_range == pytest.approx((0.0, 12.75))
    np.testing.assert_array_equal(plan.weights["a"].params.scale, weight.scale)


@pytest.mark.parametrize("bits", [8, 3])
def test_dead_channels_zero_weights_and_constant_activations(bits: int) -> None:
    net = Net((1, 3, 12, 12))
    x = net.conv(net.input, 4, name="a", bias=np.array([0.3, -5.0, 0.0, 1.0], np.float32))
    x = net.emit(relax.op.nn.relu(net.emit(relax.op.nn.relu(x))))
    dead = net.emit(relax.op.clip(x, 0.5, 0.5))
    mod = net.module(net.conv(dead, 2, name="b"))
    layers = graph.find_layers(mod)
    assert layers["a"].weight.shape[0] == 4

    def zero(builder: Any, var: Any, value: Any, lookup: Any) -> Any:
        if var.name == "a.acc":
            weight = graph.constant_value(value.args[1]).copy()
            weight[1:3] = 0.0
            weight[3] *= 1e-30
            return relax.Call(value.op, [lookup(value.args[0]), graph.constant(weight)], value.attrs)
        return None

    plan = plan_quantization(graph.rebuild(mod, zero), CALIBRATION, weight_bits=bits, activation_bits=bits)
    for weight in plan.weights.values():
        assert np.all(weight.params.scale > 0) and np.all(np.isfinite(weight.params.scale))
        assert np.all(np.isfinite(weight.bias))
        step = float(plan.activations["input"].scale) * weight.params.scale.astype(np.float64)
        assert np.all(np.abs(weight.bias / step) < 2**30)


def test_weights_that_are_not_finite_are_refused() -> None:
    net = Net((1, 3, 12, 12))
    bias = np.array([0.0, np.nan], np.float32)
    mod = net.module(net.conv(net.emit(relax.op.nn.relu(net.conv(net.input, 4))), 2, name="head/conv", bias=bias))
    with pytest.raises(QuantizeError, match=r"^head/conv: .*NaN"):
        plan_quantization(mod, CALIBRATION, weight_bits=8, activation_bits=8)


@pytest.mark.parametrize(
    ("bits", "scheme"),
    [((1, 8), QuantScheme()), ((8, 9), QuantScheme()), ((4, 8), QuantScheme(weight_bits=(8,)))],
    ids=["W1", "A9", "W4 on 8-bit hardware"],
)
def test_bits_that_do_not_exist_are_refused(bits: tuple[int, int], scheme: QuantScheme) -> None:
    with pytest.raises(QuantizeError, match="allowed"):
        plan_for(*bits, scheme=scheme)


def test_unknown_layer_in_layer_bits_is_refused() -> None:
    with pytest.raises(QuantizeError, match=r"^conv9: no quantized layer"):
        plan_for(layer_bits={"conv9": 4})


def test_no_calibration_data() -> None:
    with pytest.raises((CalibrationError, QuantizeError), match="no calibration"):
        plan_for(calibration=[])


def test_accumulator_that_could_overflow_is_refused() -> None:
    import torch

    layer = graph.find_layers(NETWORK)["fc"]
    with pytest.raises(QuantizeError, match=r"^fc: .*int32"):
        check_accumulator(layer, torch.full((1, 70_000, 1), -128.0), QuantParams(np.float32(1), 0, 8, False))


def test_a_small_memory_budget_uses_fewer_samples() -> None:
    assert relative_error(plan_for(4, 8, memory_budget=1 << 18)) < 0.2


def test_progress_counts_up() -> None:
    calls: list[tuple[str, int, int]] = []
    plan_for(4, 4, progress=lambda *call: calls.append(call))
    assert {stage for stage, _, _ in calls} == {"observe ranges", "quantize layers"}
    assert calls[-1] == ("quantize layers", 5, 5)
