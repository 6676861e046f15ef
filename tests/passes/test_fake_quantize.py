"""The simulation equals the reference arithmetic and, up to rare ties, the integer network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tvm import relax

from lpsn_tvm import graph, quant
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.fake_quantize import (
    FakeQuantizer,
    dequantized_weight,
    evaluate_plan,
    fake_quantize_tensor,
    per_output,
)
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.passes.plan_quantization import plan_quantization
from lpsn_tvm.passes.regions import find_regions
from lpsn_tvm.quant import QuantizedWeight, QuantParams
from lpsn_tvm.reference import run_reference
from tests.support.small_graphs import Net, random_feed


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_equals_the_reference_bit_for_bit(bits: int, signed: bool) -> None:
    x = np.random.default_rng(0).normal(0, 3, (2, 3, 17, 5)).astype(np.float32)
    params = QuantParams(np.float32(0.037), 0 if signed else 2 ** (bits - 1) - 1, bits, signed)
    np.testing.assert_array_equal(
        fake_quantize_tensor(torch.from_numpy(x), params).numpy(), quant.fake_quantize(x, params)
    )


def test_source_is_not_changed_in_place() -> None:
    x = torch.randn(4, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    fake_quantize_tensor(x, QuantParams(np.float32(0.1), 0, 4, False))
    assert torch.equal(x, before)


def test_scales_of_grouped_transposed_weights() -> None:
    values = np.ones((4, 3, 1, 1), np.int8)
    scale = np.arange(1, 7, dtype=np.float32)
    real = dequantized_weight(
        QuantizedWeight(values, QuantParams(scale, 0, 8, True, 1), np.zeros(6, np.float32)), "conv2d_transpose", 2
    )
    np.testing.assert_array_equal(real[:, :, 0, 0], [[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]])
    assert per_output(np.float32(2.0), (4, 3, 1, 1), "conv2d", 1).shape == (1, 1, 1, 1)


def varied_network() -> Any:
    """Residual, squeeze-excitation, tables, pools, concat, transposed and grouped layers, a float node inside."""
    net = Net((1, 3, 16, 16), seed=3)
    op = relax.op
    x = net.emit(op.nn.relu(net.conv(net.input, 8, name="stem")))
    y = net.emit(op.clip(net.conv(x, 8, groups=8, name="dw"), 0.0, 6.0))
    y = net.emit(op.clip(net.conv(y, 8, 1, name="pw"), -3.0, 4.0))
    x = net.emit(op.nn.relu(net.emit(op.add(net.conv(y, 8, name="body"), x))))
    gate = net.conv(net.emit(op.mean(x, [2, 3], keepdims=True)), 4, 1, name="se1")
    gate = net.conv(net.emit(op.nn.relu(gate)), 8, 1, name="se2")
    x = net.emit(op.multiply(x, net.emit(op.sigmoid(gate))))
    down = net.emit(op.nn.max_pool2d(x, (2, 2), (2, 2)))
    wide = net.conv(down, 8, groups=2, name="grouped")
    wide = net.emit(op.multiply(wide, net.emit(op.sigmoid(wide))))
    up = net.emit(op.nn.relu(net.conv_transpose(wide, 8, 2, strides=[2, 2], groups=2, name="up")))
    x = net.emit(op.concat([up, x], axis=1))
    x = net.emit(op.nn.leakyrelu(x, 0.1))
    x = net.emit(op.nn.relu(net.emit(op.nn.softmax(net.conv(x, 8, name="mid"), axis=1))))
    x = net.emit(op.nn.avg_pool2d(net.emit(op.nn.relu(net.conv(x, 8, name="late"))), (2, 2), (2, 2)))
    return net.module(net.dense(net.emit(op.reshape(x, (1, 512))), 10, name="fc"))


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4), (2, 3)], ids=lambda b: f"W{b[0]}A{b[1]}")
def test_simulation_agrees_with_the_integer_network(bits: tuple[int, int]) -> None:
    mod = varied_network()
    regions = find_regions(mod)
    feeds = [random_feed(mod, seed) for seed in range(6)]
    plan = plan_quantization(mod, feeds, weight_bits=bits[0], activation_bits=bits[1], regions=regions)
    lowered = lower_to_integer(mod, plan, regions)
    simulated = list(evaluate_plan(TorchInterpreter(mod), plan, regions, feeds))
    exact = [next(iter(TorchInterpreter(mod).run(feed).values())).numpy() for feed in feeds]
    for feed, result, real in zip(feeds, simulated, exact, strict=True):
        ours = next(iter(result.values())).numpy()
        integer = next(iter(run_reference(lowered, feed).values()))
        # A value on the edge between two integers may fall either way; such a step is far below what quantization
        # itself costs.
        assert np.abs(ours - integer).mean() < 0.1 * np.abs(real - integer).mean() + 1e-5


def test_parameters_of_the_interpreter_are_put_back() -> None:
    net = Net((1, 3, 8, 8))
    mod = net.module(net.conv(net.emit(relax.op.nn.relu(net.conv(net.input, 4, name="a"))), 2, name="b"))
    interpreter = TorchInterpreter(mod)
    before = {name: (w.clone(), b.clone()) for name, (w, b) in interpreter.params.items()}
    feed = random_feed(mod)
    plan = plan_quantization(mod, [feed], weight_bits=4, activation_bits=4)
    list(evaluate_plan(interpreter, plan, find_regions(mod), [feed]))
    for name, (weight, bias) in before.items():
        assert torch.equal(interpreter.params[name][0], weight) and torch.equal(interpreter.params[name][1], bias)


def test_every_reader_sees_the_rounded_values() -> None:
    net = Net((1, 3, 8, 8))
    x = net.emit(relax.op.nn.relu(net.conv(net.input, 4, name="a")), "x")
    mod = net.module(net.conv(net.emit(relax.op.nn.max_pool2d(x, (2, 2), (2, 2)), "pool"), 2, name="b"))
    regions = find_regions(mod)
    params = QuantParams(np.float32(0.25), 0, 3, False)
    seen: dict[str, np.ndarray] = {}
    inner = FakeQuantizer(regions, {"x": params})

    def spy(name: str, tensor: torch.Tensor) -> torch.Tensor:
        result = inner(name, tensor)
        seen[name] = result.numpy()
        return result

    TorchInterpreter(mod).run(random_feed(mod), transform=spy)
    for name in ("x", "pool"):
        assert set(np.unique(seen[name] / 0.25)) <= set(range(8))
    assert len(np.unique(seen["b"])) > 8
    assert graph.shape_of(mod["main"].params[0]) == (1, 3, 8, 8)
