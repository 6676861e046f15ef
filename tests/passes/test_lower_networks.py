"""The networks of the benchmarks: they lower in seconds, region by region within a step, and export to ONNX."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime
import pytest
import small_graphs
from small_graphs import check_regions, simple_plan

from benchmarks import models as zoo
from lpsn_tvm import graph
from lpsn_tvm.export import to_onnx
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.reference import run_reference

# Network -> (smaller size than in the benchmarks, operators that may stay float).
NETWORKS: dict[str, tuple[dict[str, int], set[str]]] = {
    "resnet20": ({}, set()),
    "vgg11": ({}, set()),
    "espcn": ({"height": 48, "width": 64}, {"relax.nn.pixel_shuffle"}),
    "mobilenet_v2": ({"size": 96}, set()),
    "preact_resnet18": ({}, set()),
    "densenet121": ({"size": 64}, set()),
    "unet": ({"size": 64}, set()),
    "frrn": ({"size": 64}, set()),
    "cyclegan_generator": ({"size": 64}, {"relax.nn.instance_norm", "relax.nn.relu", "relax.add", "relax.tanh"}),
}
FAST = ("resnet20", "espcn")


def run(model: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    # Without fusion ONNX Runtime computes the pairs in float: the definition of what the model means.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def test_network_lowers_and_exports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, allowed = NETWORKS[name]
    mod = canonicalize(import_model(load_model(getattr(zoo, name)(**size))).mod)
    (param,) = mod["main"].params
    feeds = {param.name: zoo.smooth_noise(graph.shape_of(param), 3)}
    monkeypatch.setattr(small_graphs, "random_feed", lambda *_: feeds)
    plan = simple_plan(mod)
    start = time.process_time()
    lowered = lower_to_integer(mod, plan)
    assert time.process_time() - start < 10
    stayed = {graph.op_name(value) for _, value in graph.bindings(lowered) if graph.op_name(value).startswith("relax.")}
    assert stayed <= allowed
    assert check_regions(mod, plan, lowered, feeds) > 0
    (want,) = run_reference(lowered, feeds).values()
    (real,) = run_reference(mod, feeds).values()
    np.testing.assert_allclose(run(to_onnx(mod), feeds), real, atol=1e-3 * float(np.std(real)))
    difference = run(to_onnx(mod, plan=plan), feeds) - want
    # Linear resizing rounds ties up here and to even there; what that moves stays well below the rounding noise itself.
    assert np.sqrt(np.mean(difference**2)) < max(0.05 * np.std(real), 0.6 * np.sqrt(np.mean((want - real) ** 2)))
