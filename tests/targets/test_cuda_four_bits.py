"""Networks of few bits on GPUs: whole networks of 4-bit weights and activations, and what weights occupy."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from cuda_programs import run_module
from small_graphs import Net, random_feed, range_params, simple_plan
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets.cuda import cuda_backend
from lpsn_tvm.targets.cuda_build import generate

op = relax.op
SLOW = pytest.mark.slow
ARCHITECTURES = ("sm_80", *(pytest.param(arch, marks=SLOW) for arch in ("sm_75", "sm_86", "sm_89", "sm_90")))


def _backend(arch: str) -> Any:
    return cuda_backend({"kind": "cuda", "arch": arch})


def residual(net: Net) -> Any:
    """A strided block with a shortcut of its own, a block without, pooling and a classifier."""
    x = net.emit(op.nn.relu(net.conv(net.input, 40, name="stem")))
    x = net.emit(op.nn.max_pool2d(x, (3, 3), strides=(2, 2), padding=(1, 1, 1, 1)))
    inner = net.emit(op.nn.relu(net.conv(x, 72, strides=(2, 2))))
    x = net.emit(op.nn.relu(net.emit(op.add(net.conv(inner, 72), net.conv(x, 72, kernel=1, strides=(2, 2))))))
    inner = net.emit(op.nn.relu(net.conv(x, 40, kernel=1)))
    x = net.emit(op.nn.relu(net.emit(op.add(net.conv(inner, 72), x))))
    pooled = net.emit(op.reshape(net.emit(op.mean(x, [2, 3], True)), (6, 72)))
    return net.dense(pooled, 10, name="classes")


def up_and_joined(net: Net) -> Any:
    """Groups, a depthwise layer, a transposed one, a concatenation with an 8-bit part."""
    x = net.emit(op.nn.relu(net.conv(net.input, 64, strides=(2, 2))))
    y = net.emit(op.nn.relu(net.conv(x, 64, groups=2)))
    y = net.emit(op.clip(net.conv(y, 64, groups=64), 0, 6))
    y = net.emit(op.nn.relu(net.conv_transpose(y, 36, strides=(2, 2))))
    return net.conv(net.emit(op.concat([y, net.input], 1)), 5, name="last")


NETWORKS = {"residual": (residual, (6, 3, 17, 15)), "up_and_joined": (up_and_joined, (1, 3, 10, 12))}


def _lowered(name: str, bits: int) -> Any:
    """4-bit weights; activations of `bits`, network inputs of 8."""
    body, shape = NETWORKS[name]
    net = Net(shape)
    mod = net.module(body(net))
    plan = simple_plan(mod, 4, bits)
    plan.activations["input"] = range_params(random_feed(mod)["input"], 8)  # type: ignore[index]
    return lower_to_integer(mod, plan)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_four_bits_equal_the_reference(name: str, arch: str) -> None:
    lowered = _lowered(name, 4)
    feeds = random_feed(lowered, 1)
    (want,) = run_reference(lowered, feeds).values()
    (got,) = run_module(_backend(arch), lowered, feeds)
    np.testing.assert_array_equal(got, want)
    assert want.std() > 0


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_only_inputs_of_four_bits_take_four_bit_products(arch: str) -> None:
    """The first layer reads 8 bits, so does every layer of a network with 8-bit activations."""
    name = {"sm_75": "lpsn_mma_u4_k32", "sm_80": "lpsn_mma_u4_k64"}.get(arch, "lpsn_mma_u4")
    narrow, wide = (generate(_backend(arch), _lowered("residual", bits))[0].source for bits in (4, 8))
    assert (name in narrow) == (arch != "sm_90")
    assert "lpsn_mma_u8" in narrow and "lpsn_mma_u8" in wide and "lpsn_mma_u4" not in wide


@cache
def _resnet18(weight_bits: int, activation_bits: int) -> Any:
    """ResNet-18 for 1000 classes."""
    from benchmarks import models
    from lpsn_tvm.frontend import import_model, load_model
    from lpsn_tvm.passes.canonicalize import canonicalize

    mod = canonicalize(import_model(load_model(models.resnet18(size=224, classes=1000))).mod)
    return lower_to_integer(mod, simple_plan(mod, weight_bits, activation_bits))


def _constants(arch: str, weight_bits: int, activation_bits: int) -> tuple[int, int, int]:
    """Bytes of the weights in device memory, of all constants there, and weights of the network."""
    network, backend = _resnet18(weight_bits, activation_bits), _backend(arch)
    lowered = backend.lower(network)
    held = [
        graph.constant_value(argument)
        for _, value in graph.bindings(lowered)
        if graph.op_name(value) == "relax.call_tir"
        for argument in value.args[1].fields
        if graph.is_constant(argument)
    ]
    weights = sum(array.nbytes for array in held if array.dtype.itemsize == 1 and array.size > 64)
    count = sum(weight.size for weight in _weights(network))
    return weights, len(generate(backend, lowered)[1].constants), count


def _weights(lowered: Any) -> list[np.ndarray]:
    calls = [value for _, value in graph.bindings(lowered) if graph.op_name(value) in ("lpsn.conv2d", "lpsn.dense")]
    return [graph.constant_value(call.args[2]) for call in calls]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_weights_of_four_bits_take_half_the_memory(arch: str) -> None:
    """Of ResNet-18: a byte each or half of one, little more for what tiles round up."""
    wide, wide_all, count = _constants(arch, 8, 8)
    assert count == 11_678_912 and count <= wide < 1.03 * count
    for activation_bits in (8, 4):
        narrow, narrow_all, _ = _constants(arch, 4, activation_bits)
        assert count / 2 <= narrow < 0.515 * count
        # Biases and scales stay as they are, 8 bytes for each of 5800 channels; nothing else is held.
        assert 46_400 <= narrow_all - narrow < 60_000 and 46_400 <= wide_all - wide < 60_000
