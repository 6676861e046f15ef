"""Whole networks for GPUs, pruned and quantized as `build` does it: their generated source, run launch by launch in the
emulation, returns the reference's numbers.

Bit for bit, with two exceptions that the tests name: a network whose last operator is a float function (tanh) agrees
to its last bits, and in random networks with float functions in between every operator is checked on the module's own
operands, because one value that falls on the other side of a rounding boundary changes all that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cuda_programs import network, run_module
from each_operator import check_each_operator, is_exact, with_all_outputs
from random_graphs import BLOCKS, random_input, random_model
from small_graphs import random_feed
from table_nets import activated_network

from benchmarks import models as zoo
from lpsn_tvm import graph
from lpsn_tvm.passes.fuse_tables import fuse_tables
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets import get_backend
from lpsn_tvm.targets.cuda_build import generate

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90")
EVERY_FAMILY = ("sm_61", "sm_75", "sm_80", "sm_90")
"""Dot products, matrix instructions without asynchronous copies, with them and of 4 bits, without those of 4 bits."""
BITS = (8, (4, 8), 4)
FAST: dict[str, dict[str, int]] = {
    "resnet20": {"size": 8},
    "cyclegan_generator": {"size": 16, "blocks": 1, "base": 8},
    "espcn": {"height": 10, "width": 12},
}
SIZES: dict[str, dict[str, int]] = {
    "resnet18": {"size": 64, "classes": 10},
    "resnet50": {"size": 64, "classes": 10},
    "resnet20": {},
    "vgg11": {},
    "espcn": {"height": 24, "width": 32},
    "densenet121": {"size": 64, "classes": 10},
    "mobilenet_v2": {"size": 64, "classes": 10},
    "preact_resnet18": {},
    "unet": {"size": 64},
    "frrn": {"size": 64},
    "cyclegan_generator": {"size": 64, "blocks": 3, "base": 16},
}


def check(mod: Any, arch: str, batch_seed: int = 1) -> None:
    feeds = random_feed(mod, batch_seed)
    want = list(run_reference(mod, feeds).values())
    got = run_module(get_backend(f"cuda -arch={arch}"), mod, feeds, checked=False)
    for result, value in zip(got, want, strict=True):
        tolerance = 0.0 if is_exact(mod) else 1e-6 * float(np.ptp(value))
        np.testing.assert_allclose(result, value, rtol=0, atol=tolerance)
        assert np.unique(value).size > 1, "the check would not notice an error"


def built(name: str, sizes: dict[str, int], bits: Any, sparsity: float | None = 0.3, **options: Any) -> Any:
    model = getattr(zoo, name)(**sizes)
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    data = np.random.default_rng(1).random((4, *shape[1:])).astype(np.float32)
    return network(model, bits=bits, sparsity=sparsity, align=1, calibration=data, **options)


@pytest.mark.parametrize("name", FAST)
def test_small_networks(name: str) -> None:
    check(built(name, FAST[name], 8), "sm_86")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SIZES)
def test_every_network_on_every_architecture(name: str, arch: str) -> None:
    check(built(name, SIZES[name], 8), arch)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(4, 8), 4], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_every_network_in_few_bits(name: str, bits: Any) -> None:
    check(built(name, SIZES[name], bits), "sm_86")


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_large_images(name: str, bits: Any, sparsity: float) -> None:
    check(built(name, {}, bits, sparsity), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_batches(name: str) -> None:
    check(built(name, SIZES[name], 8, batch=3), "sm_80")


def operators(mod: Any) -> list[str]:
    """Operators in order, as lowering sees them; layers that end in a table with a "+ table"."""
    calls = [value for _, value in graph.bindings(fuse_tables(mod)) if graph.op_name(value)]
    return [graph.op_name(call) + (" + table" if "table" in graph.call_attrs(call) else "") for call in calls]


@pytest.mark.parametrize(
    ("bits", "arch"),
    [(8, "sm_86"), *(pytest.param(bits, arch, marks=pytest.mark.slow) for bits in BITS for arch in EVERY_FAMILY)],
    ids=str,
)
def test_activations_are_tables_of_layers(bits: Any, arch: str) -> None:
    model = activated_network()
    mod = network(model, bits=bits, sparsity=0.3, align=1, calibration=random_input(model, batch=4))
    found = operators(mod)
    assert "lpsn.lookup" not in found
    assert found.count("lpsn.conv2d + table") == 4
    assert found.count("lpsn.conv2d_transpose + table") == found.count("lpsn.dense + table") == 1
    assert any(graph.op_name(call) and len(call.args) > 5 for _, call in graph.bindings(mod)), "no residual"
    _, plan = generate(get_backend(f"cuda -arch={arch}"), mod)
    assert not any("lookup" in launch.kernel for launch in plan.launches)
    check(mod, arch)


def test_espcn_has_no_launch_for_its_activations() -> None:
    mod = built("espcn", FAST["espcn"], 8)
    assert operators(mod)[:4] == ["lpsn.quantize", "lpsn.conv2d + table", "lpsn.conv2d + table", "lpsn.conv2d"]
    _, plan = generate(get_backend("cuda -arch=sm_86"), mod)
    assert not any("lookup" in launch.kernel for launch in plan.launches)
    assert sum("conv2d" in launch.kernel for launch in plan.launches) == 3


def check_seed(seed: int, blocks: Sequence[str] = tuple(BLOCKS)) -> Any:
    """The integer network of a seed."""
    rng = np.random.default_rng(seed)
    model = random_model(seed, blocks)
    bits = ((8, 8), (4, 8), (4, 4), (2, 3))[rng.integers(4)]
    data = random_input(model, batch=4, seed=1) if rng.integers(4) else None
    mod = network(
        model, bits=bits, sparsity=(None, 0.3, 0.5)[rng.integers(3)], calibration=data, align=(1, 4)[rng.integers(2)]
    )
    arch = ARCHITECTURES[rng.integers(len(ARCHITECTURES))]
    if is_exact(mod):
        feeds = random_feed(mod, 5)
        want = run_reference(mod, feeds).values()
        got = run_module(get_backend(f"cuda -arch={arch}"), mod, feeds, checked=False)
        for result, value in zip(got, want, strict=True):
            np.testing.assert_array_equal(result, value)
    everything, names = with_all_outputs(mod)
    feeds = random_feed(everything, 5)
    values = run_module(get_backend(f"cuda -arch={arch}"), everything, feeds, checked=False)
    check_each_operator(mod, {**feeds, **dict(zip(names, values, strict=True))})
    return mod


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed: int) -> None:
    check_seed(seed)


@pytest.mark.parametrize("seed", [21, 24])
def test_random_networks_with_tables(seed: int) -> None:
    """A convolution and a transposed one of 8 bits."""
    assert any("table" in name for name in operators(check_seed(seed)))


TABLED = ("conv", "depthwise", "transposed", "residual", "activation", "activation", "activation")
"""Blocks of which many layers with tables are made."""


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 1080, 20))
def test_many_random_networks_with_tables(start: int) -> None:
    found = [name for seed in range(start, start + 20) for name in operators(check_seed(seed, TABLED))]
    assert sum("table" in name for name in found) > 10


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 400, 25))
def test_many_random_networks(start: int) -> None:
    for seed in range(start, start + 25):
        check_seed(seed)
