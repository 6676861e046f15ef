"""Random small CNNs: the float path (import, canonical form, torch) against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from random_graphs import models, random_input, random_model

from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.canonicalize import canonicalize


def check(model: onnx.ModelProto) -> None:
    x = random_input(model, batch=2)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    expected = [
        np.concatenate(parts)
        for parts in zip(*(session.run(None, {"input": x[i : i + 1]}) for i in range(2)), strict=True)
    ]
    interpreter = TorchInterpreter(canonicalize(import_model(load_model(model)).mod))
    actual = list(interpreter.run({interpreter.inputs[0]: x}).values())
    assert len(actual) == len(set(id(e) for e in expected))
    for ours, theirs in zip(actual, expected, strict=True):
        assert tuple(ours.shape) == theirs.shape
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(theirs).max())))


@given(models())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_float_path_equals_onnx_runtime(model: onnx.ModelProto) -> None:
    check(model)


# 11, 372: a flatten joined with the last reshape of a DCR depth-to-space; 116: the zero bias of a layer with one
# channel.
@pytest.mark.parametrize("seed", [11, 61, 116, 372])
def test_graphs_that_once_failed(seed: int) -> None:
    check(random_model(seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    "resnet20 vgg11 mobilenet_v2 espcn densenet121 preact_resnet18 unet frrn cyclegan_generator resnet18".split(),
)
def test_known_networks_equal_onnx_runtime(name: str) -> None:
    from benchmarks import models as zoo

    model = getattr(zoo, name)()
    x = random_input(model)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {model.graph.input[0].name: x})[0]
    interpreter = TorchInterpreter(canonicalize(import_model(load_model(model)).mod))
    actual = interpreter.run({interpreter.inputs[0]: x})[interpreter.outputs[0]].numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_many_seeds(start: int) -> None:
    for seed in range(start, start + 100):
        check(random_model(seed))
