"""Whole networks on the accelerator: exact, in any order of its units, saved and loaded, with nothing on the host that
the accelerator can do; and clear errors for what cannot be built.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from vta_graphs import GraphBuilder, host_reasons
from vta_whole import (
    assert_saved_is_same,
    assert_whole_network_is_exact,
    build_with_graph,
    host_layers,
)

import lpsn_tvm
from lpsn_tvm import CompileError, LpsnError, TargetError
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.lowering import lower_graph

MODELS = Path(__file__).resolve().parents[1] / "tutorials" / "models"
pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")
BITS = (8, 4, (4, 8))
# The image's way in and the result's way out.
BORDERS = {"lpsn.quantize", "lpsn.dequantize", "vta.scale"}
# Beyond them: the accelerator has no tables for tanh; what follows a float32 result is float32, too.
HOST = {
    "espcn": BORDERS | {"lpsn.lookup", "lpsn.float_depth_to_space"},
    "espcn_x2": BORDERS | {"lpsn.float_elementwise", "lpsn.float_depth_to_space"},
}
SMALL: dict[str, dict[str, Any]] = {
    "lenet5": {},
    "resnet18": {"size": 32, "classes": 10},
    "mobilenet_v2": {"size": 32, "classes": 10},
    "espcn": {"height": 20, "width": 24},
    "unet": {"size": 16, "base": 4},
}
SHIPPED = ("fashion_resnet14", "fashion_mobilenet", "espcn_x2")


def built(name: str, *, samples: int = 8, **options: Any) -> tuple[Any, Any]:
    """A shipped network, or one of the zoo with calibration data of its shape."""
    from benchmarks import models as zoo

    size = options.pop("size", {})
    if name in SHIPPED:
        if name == "espcn_x2":
            options = {"input_shapes": {"input": (options.get("batch", 1), 1, 40, 48)}} | options
        return build_with_graph(MODELS / f"{name}.onnx", samples=samples, **options)
    model = getattr(zoo, name)(**size)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    return build_with_graph(model, calibration=zoo.smooth_noise((samples, *shape), 7), samples=samples, **options)


def check(name: str, *, interleavings: int = 10, path: Path | None = None, **options: Any) -> Any:
    """Exact, and nothing on the host that has no reason to be there."""
    module, mod = built(name, **options)
    expected = assert_whole_network_is_exact(module, mod, interleavings=interleavings)
    assert all(np.unique(value).size > 1 for value in expected)
    steps = host_layers(module)
    assert {op for op, _ in steps.values()} <= HOST.get(name, BORDERS), steps
    assert all(reason for _, reason in steps.values())
    # One program between the host's steps.
    tables = sum(op == "lpsn.lookup" for op, _ in steps.values())
    assert len(module.network.device_steps) == 1 + tables
    if path is not None:
        assert_saved_is_same(module, path / "network.lpsn")
    return module


@pytest.mark.parametrize(
    ("name", "bits"), [("lenet5", 8), ("lenet5", 4), ("espcn", (4, 8)), ("unet", 8), ("fashion_resnet14", 8)], ids=str
)
def test_small_networks(name: str, bits: Any, tmp_path: Path) -> None:
    check(name, size=SMALL.get(name, {}), bits=bits, path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("sparsity", [None, 0.3, 0.5])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_in_every_form(name: str, bits: Any, sparsity: float | None, batch: int) -> None:
    check(name, size=SMALL[name], bits=bits, sparsity=sparsity, batch=batch)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_networks(name: str, bits: int, batch: int, tmp_path: Path) -> None:
    check(name, bits=bits, batch=batch, path=tmp_path)


@pytest.mark.parametrize("batch", [1, 3])
def test_lenet5_on_the_geometry_of_four_images(batch: int) -> None:
    """4x8: a batch of one leaves three of four lanes empty, and no image may leak into another."""
    check("lenet5", target="vta -preset=pynq-4x8", batch=batch)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_pruned_networks(sparsity: float) -> None:
    module = check("lenet5", sparsity=sparsity, interleavings=2)
    assert module.report.totals["macs"] < built("lenet5")[0].report.totals["macs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet18", {"bits": 4, "batch": 4}),
        ("resnet18", {"sparsity": 0.3}),
        ("resnet18", {"sparsity": 0.5, "bits": (4, 8), "target": "vta"}),
        ("resnet18", {"target": "vta -preset=pynq-0.0.2"}),
        ("mobilenet_v2", {}),
        ("mobilenet_v2", {"bits": 4, "sparsity": 0.5}),
        ("mobilenet_v2", {"batch": 4, "target": "vta -preset=pynq-4x8"}),
        ("espcn", {}),
        ("espcn", {"batch": 4, "sparsity": 0.5}),
        ("espcn", {"bits": (4, 8)}),
        ("unet", {}),
        ("unet", {"bits": 4, "sparsity": 0.3}),
        ("unet", {"batch": 4, "target": "vta -preset=pynq-4x8"}),
    ],
    ids=str,
)
def test_networks_at_full_size(name: str, options: dict[str, Any]) -> None:
    check(name, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lenet5", "unet"])
def test_searched_schedules(name: str, tmp_path: Path) -> None:
    module = check(name, size=SMALL[name], search=1, cache=str(tmp_path), path=tmp_path)
    assert module.cycles <= built(name, size=SMALL[name])[0].cycles


@pytest.mark.slow
def test_an_image_through_resnet18_takes_seconds() -> None:
    module, _ = built("resnet18")
    image = np.zeros((1, 3, 224, 224), np.float32)
    start = time.process_time()
    module.simulate(image)
    assert time.process_time() - start < 10


# --- what cannot be built


def model_of(weight: np.ndarray, bias: np.ndarray, shape: tuple[int, ...], **attrs: Any) -> onnx.ModelProto:
    """One convolution behind another."""
    ones = np.eye(shape[1], dtype=np.float32)[:, :, None, None]
    constants = [numpy_helper.from_array(v, n) for v, n in ((ones, "one"), (weight, "w"), (bias, "b"))]
    nodes = [
        helper.make_node("Conv", ["x", "one"], ["y"], name="first"),
        helper.make_node("Conv", ["y", "w", "b"], ["z"], name="layer", **attrs),
        helper.make_node("Relu", ["z"], ["out"], name="relu"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "net", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_config(path: Path, **keys: int) -> str:
    file = path / "vta_config.json"
    file.write_text(json.dumps(PRESETS["pynq"].to_json() | keys))
    return f"vta -config={file}"


def test_kernels_larger_than_the_weight_buffer(tmp_path: Path) -> None:
    """9 x 9 taps, 32 weight tiles: cut, not refused."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.1, (20, 16, 9, 9)).astype(np.float32)
    model = model_of(weight, np.zeros(20, np.float32), (1, 16, 12, 12), pads=[4] * 4)
    target = write_config(tmp_path, LOG_WGT_BUFF_SIZE=13)
    assert_whole_network_is_exact(*build_with_graph(model, target=target), interleavings=2)


@pytest.mark.parametrize("search", [0.5, False])
def test_an_operator_that_fits_under_no_schedule_is_named(tmp_path: Path, search: Any) -> None:
    """Two accumulators: not even the three partial sums of one tile."""
    weight = np.ones((16, 16, 3, 3), np.float32)
    model = model_of(weight, np.zeros(16, np.float32), (1, 16, 12, 12))
    target = write_config(tmp_path, LOG_ACC_BUFF_SIZE=7)
    with pytest.raises(CompileError, match=r"under no schedule: needs \d+ tiles of ACC; the accelerator has 2"):
        lpsn_tvm.build(model, target=target, sparsity=None, search=search, cache=False, measure=False)


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"LOG_ACC_BUFF_SIZE": 20}, "acc"),
        ({"LOG_BLOCK_IN": 5}, "LOG_BLOCK is 4 but LOG_BLOCK_IN is 5"),
        ({"LOG_INP_WIDTH": 2}, "output width"),
        ({"LOG_BUS_WIDTH": 8}, "bus word"),
        ({"LOG_WGT_BUFF_SIZE": 8}, "WGT"),
        ({"LOG_BATCH": -1}, "range"),
    ],
    ids=str,
)
def test_impossible_geometry(tmp_path: Path, keys: dict[str, int], rule: str) -> None:
    model = model_of(np.ones((16, 16, 3, 3), np.float32), np.zeros(16, np.float32), (1, 16, 12, 12))
    with pytest.raises(TargetError, match=rule):
        lpsn_tvm.build(model, target=write_config(tmp_path, **keys))


def test_a_huge_bias_gets_a_coarser_unit() -> None:
    """Scales grow with the bias, so that it fits int32 and the result is exact."""
    weight = np.full((16, 16, 1, 1), 1e-7, np.float32)
    bias = np.linspace(-1e12, 1e12, 16, dtype=np.float32)
    module, mod = build_with_graph(model_of(weight, bias, (1, 16, 6, 6)))
    assert_whole_network_is_exact(module, mod, interleavings=1)


@pytest.mark.slow
def test_sums_that_leave_int32_are_refused() -> None:
    """140,000 products of 127 * 127 each."""
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((1, 4, 187, 187)) < 0.5, 1, -1).astype(np.float32)
    model = model_of(weight, np.zeros(1, np.float32), (1, 4, 187, 187))
    with pytest.raises(LpsnError, match=r"layer: .*int32"):
        lpsn_tvm.build(model, target="vta", sparsity=None, search=False, samples=1)


def test_averages_that_leave_int32_run_on_the_host() -> None:
    b = GraphBuilder(PRESETS["pynq"])
    x = b.conv2d(b.input(1, 1, 400, 400), 2, 1)
    y = b.dequantize(b.global_avg_pool2d(x))
    assert "int32" in host_reasons(lower_graph(b.graph(y), b.config))[b.nodes[-2].name]
