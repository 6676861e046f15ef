from __future__ import annotations

import numpy as np
import pytest
import torch
from small_graphs import Net
from tvm import relax

from lpsn_tvm.errors import CalibrationError, ModelError, UnsupportedOpError
from lpsn_tvm.interpreter import Constant, TorchInterpreter
from lpsn_tvm.interpreter_shapes import adapted_shape


def classifier(channels: int = 8, dead_branch: bool = False) -> tuple[TorchInterpreter, np.ndarray]:
    """conv -> relu -> conv -> (+) -> relu -> mean -> flatten -> dense, and five samples."""
    net = Net((1, 3, 8, 8))
    first = net.emit(relax.op.nn.relu(net.conv(net.input, channels, name="conv1")), "relu1")
    if dead_branch:
        net.emit(relax.op.nn.relu(first), "dead")
    second = net.conv(first, channels, name="conv2")
    total = net.emit(relax.op.nn.relu(net.emit(relax.op.add(second, first), "sum")), "relu2")
    flat = net.emit(relax.op.reshape(net.emit(relax.op.mean(total, [2, 3], True), "pool"), (1, channels)), "flat")
    mod = net.module(net.dense(flat, 5, name="fc"))
    return TorchInterpreter(mod), np.random.default_rng(1).standard_normal((5, 3, 8, 8)).astype(np.float32)


def test_steps_name_operators_inputs_and_layers() -> None:
    interpreter, _ = classifier()
    step = interpreter.by_name["conv1.acc"]
    assert (step.op, step.inputs, step.layer) == ("relax.nn.conv2d", ("input",), "conv1")
    assert interpreter.inputs == ("input",)
    assert interpreter.outputs == ("fc",), "the alias that emit_output binds is seen through"
    assert interpreter.consumers("relu1") == ("conv2.acc", "sum")
    assert set(interpreter.params) == {"conv1", "conv2", "fc"}


def test_batch_may_differ_from_the_traced_one() -> None:
    interpreter, x = classifier()
    whole = interpreter.run({"input": x})["fc"]
    single = torch.cat([interpreter.run({"input": x[i : i + 1]})["fc"] for i in range(5)])
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)


def test_fetch_returns_intermediate_values_in_order() -> None:
    interpreter, x = classifier()
    values = interpreter.run({"input": x}, fetch=["relu1", "conv1", "conv1.acc", "input"])
    assert list(values) == ["relu1", "conv1", "conv1.acc", "input"]
    bias = interpreter.params["conv1"][1].reshape(1, -1, 1, 1)
    torch.testing.assert_close(values["conv1.acc"] + bias, values["conv1"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.relu(values["conv1"]), values["relu1"])


def test_feeds_may_be_intermediate_values() -> None:
    interpreter, x = classifier()
    values = interpreter.run({"input": x}, fetch=["relu1", "fc"])
    seen: list[str] = []
    again = interpreter.run({"relu1": values["relu1"]}, transform=lambda name, t: (seen.append(name), t)[1])["fc"]
    torch.testing.assert_close(again, values["fc"])
    assert "relu1" not in seen and "conv1" not in seen, "what was fed in the middle was transformed when it was made"


def test_transform_sees_inputs_and_results_and_changes_what_follows() -> None:
    interpreter, x = classifier()
    seen: list[str] = []
    interpreter.run({"input": x}, transform=lambda name, t: (seen.append(name), t)[1])
    assert seen == ["input", "conv1", "relu1", "conv2", "sum", "relu2", "pool", "flat", "fc"]
    zeroed = interpreter.run({"input": x}, transform=lambda name, t: t * 0 if name == "flat" else t)["fc"]
    torch.testing.assert_close(zeroed, interpreter.params["fc"][1].expand(5, 5))


def test_parameters_are_read_when_a_layer_runs() -> None:
    interpreter, x = classifier()
    weight, bias = interpreter.params["fc"]
    before = interpreter.run({"input": x})["fc"]
    interpreter.set_params("fc", 2 * weight, 2 * bias.numpy())
    torch.testing.assert_close(interpreter.run({"input": x})["fc"], 2 * before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="nonsense"):
        interpreter.set_params("nonsense", weight, bias)


def test_apply_layer_equals_the_layer_in_the_graph() -> None:
    interpreter, x = classifier()
    values = interpreter.run({"input": x}, fetch=["relu1", "conv2"])
    torch.testing.assert_close(interpreter.apply_layer("conv2", values["relu1"]), values["conv2"])


def test_sliced_channels_pass_through_flatten() -> None:
    """Channels removed in `params` alone: mean, flatten and dense follow."""
    interpreter, x = classifier()
    keep = torch.tensor([0, 2, 3, 6])
    for name in ("conv1", "conv2"):
        weight, bias = interpreter.params[name]
        interpreter.set_params(name, weight[keep] if name == "conv1" else weight[keep][:, keep], bias[keep])
    weight, bias = interpreter.params["fc"]
    interpreter.set_params("fc", weight[keep], bias)
    assert interpreter.run({"input": x}, fetch=["flat", "fc"])["flat"].shape == (5, 4)


def test_depthwise_layer_may_lose_channels() -> None:
    net = Net((1, 6, 5, 5))
    mod = net.module(net.conv(net.input, 6, name="dw", groups=6))
    interpreter = TorchInterpreter(mod)
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 5)).astype(np.float32)
    full = interpreter.run({"input": x})["dw"]
    weight, bias = interpreter.params["dw"]
    interpreter.set_params("dw", weight[1:4], bias[1:4])
    torch.testing.assert_close(interpreter.run({"input": x[:, 1:4]})["dw"], full[:, 1:4])


def test_only_needed_steps_run() -> None:
    interpreter, x = classifier(dead_branch=True)
    seen: list[str] = []
    interpreter.run({"input": x}, fetch=["relu1"], transform=lambda name, t: (seen.append(name), t)[1])
    assert seen == ["input", "conv1", "relu1"]
    assert "dead" not in [step.name for step in interpreter.useful]


def test_constants_have_keys() -> None:
    net = Net((1, 3, 4, 4))
    mod = net.module(net.emit(relax.op.multiply(net.input, relax.const(np.float32([2.0]))), "twice"))
    interpreter = TorchInterpreter(mod)
    assert interpreter.steps[0].inputs == ("input", Constant("twice#1"))
    assert interpreter.steps[0].variables == ("input",)


def test_unknown_operator_is_named() -> None:
    net = Net((1, 3, 4, 4))
    mod = net.module(net.emit(relax.op.cumsum(net.input, axis=1), "running"))
    with pytest.raises(UnsupportedOpError, match=r"running.*relax\.cumsum"):
        TorchInterpreter(mod)


def test_missing_and_unknown_feeds_are_named() -> None:
    interpreter, x = classifier()
    with pytest.raises(ModelError, match=r"input.*not fed"):
        interpreter.run({"pool": np.zeros((1, 8, 1, 1), np.float32)}, fetch=["conv2"])
    with pytest.raises(CalibrationError, match="image"):
        interpreter.run({"image": x})
    with pytest.raises(ModelError, match="nowhere"):
        interpreter.run({"input": x}, fetch=["nowhere"])


def test_gradients_reach_parameters_that_ask_for_them() -> None:
    interpreter, x = classifier()
    weight = interpreter.params["conv1"][0].requires_grad_()
    interpreter.run({"input": x})["fc"].square().sum().backward()
    assert weight.grad is not None and float(weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("source", "target", "real", "expected"),
    [
        pytest.param((1, 8, 1, 1), (1, 8), (4, 8, 1, 1), (4, 8), id="batch"),
        pytest.param((1, 8, 3, 3), (1, 72), (4, 5, 3, 3), (4, 45), id="flatten pruned"),
        pytest.param((1, 8), (1, 8, 1, 1), (4, 5), (4, 5, 1, 1), id="squeeze-excitation pruned"),
        pytest.param((1, 8, 3, 5), (1, 2, 2, 2, 3, 5), (4, 8, 3, 5), (4, 2, 2, 2, 3, 5), id="depth to space"),
        pytest.param((1, 1, 28, 28), (1, 784), (4, 1, 28, 28), (4, 784), id="one channel"),
        pytest.param((2, 8, 3, 3), (2, 72), (6, 8, 3, 3), (6, 72), id="traced batch 2"),
        pytest.param((1, 8, 6, 6), (9, 8, 2, 2), (4, 8, 6, 6), (36, 8, 2, 2), id="windows in the batch"),
        pytest.param((1, 8, 3, 3), (1, 2, 4, 3, 3), (4, 6, 3, 3), None, id="pruned shuffle is not defined"),
        pytest.param((1, 4, 1, 1), (4,), (1, 3, 1, 1), (3,), id="all to one"),
    ],
)
def test_reshape_of_other_extents(
    source: tuple[int, ...], target: tuple[int, ...], real: tuple[int, ...], expected: tuple[int, ...] | None
) -> None:
    assert adapted_shape(source, target, real) == expected
