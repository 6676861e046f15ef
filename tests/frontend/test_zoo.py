"""The networks of the benchmark zoo, at a small size: ONNX Runtime against the canonical module."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import models
from lpsn_tvm import graph
from tests.support.onnx_nets import canonical, max_error

SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"size": 64, "classes": 10},
    "resnet20": {},
    "vgg11": {},
    "mobilenet_v2": {"size": 64, "classes": 10},
    "espcn": {"height": 24, "width": 32},
    "densenet121": {"size": 64, "classes": 10},
    "preact_resnet18": {},
    "unet": {"size": 32},
    "frrn": {"size": 32},
    "cyclegan_generator": {"size": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALL))
def test_canonical_network_equals_onnx_runtime(name: str) -> None:
    assert max_error(getattr(models, name)(**SMALL[name])) < 1e-4


def test_mobilenet_has_its_layers_and_nothing_else() -> None:
    mod = canonical(models.mobilenet_v2(size=64, classes=10))
    operators = {graph.op_name(value) for _, value in graph.bindings(mod)} - {""}
    assert operators == {"relax.nn.conv2d", "relax.add", "relax.clip", "relax.mean", "relax.reshape", "relax.matmul"}
    assert len(graph.find_layers(mod)) == 53
