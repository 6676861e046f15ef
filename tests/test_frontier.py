from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from small_graphs import Net
from tvm import relax

from lpsn_tvm.errors import CalibrationError, ModelError
from lpsn_tvm.frontier import Frontier, layer_inputs
from lpsn_tvm.interpreter import TorchInterpreter


def residual_net(channels: int = 4) -> TorchInterpreter:
    """conv1 -> relu1 -> conv2 -> relu2 -> conv3 -> add(relu1) = sum -> mean = pool; relu1 lives across two layers."""
    net = Net((1, 3, 6, 6))
    relu1 = net.emit(relax.op.nn.relu(net.conv(net.input, channels, name="conv1")), "relu1")
    relu2 = net.emit(relax.op.nn.relu(net.conv(relu1, channels, name="conv2")), "relu2")
    total = net.emit(relax.op.add(net.conv(relu2, channels, name="conv3"), relu1), "sum")
    return TorchInterpreter(net.module(net.emit(relax.op.mean(total, [2, 3], True), "pool")))


def data(sizes: tuple[int, ...] = (3, 2)) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"input": rng.standard_normal((n, 3, 6, 6)).astype(np.float32)} for n in sizes]


def whole(interpreter: TorchInterpreter, name: str) -> torch.Tensor:
    return torch.cat([interpreter.run(feeds, fetch=[name])[name] for feeds in data()])


def test_advance_holds_only_what_is_read_later() -> None:
    interpreter = residual_net()
    frontier = Frontier(interpreter, data())
    held = []
    for name in ("conv1", "relu1", "relu2", "sum", "pool"):
        frontier.advance(name)
        held.append(set(frontier.held))
        torch.testing.assert_close(torch.cat(list(frontier.batches(name))), whole(interpreter, name))
    assert held == [{"conv1"}, {"relu1"}, {"relu1", "relu2"}, {"sum"}, {"pool"}]


def test_stops_are_layer_inputs_then_outputs() -> None:
    assert layer_inputs(residual_net()) == ["input", "relu1", "relu2", "pool"]


def test_parameters_count_when_the_cut_passes() -> None:
    """A layer changed before its output is computed counts, one changed after does not."""
    interpreter = residual_net()
    frontier = Frontier(interpreter, data())
    frontier.advance("relu1")
    weight, bias = interpreter.params["conv2"]
    interpreter.set_params("conv2", weight * 0, bias * 0)
    interpreter.set_params("conv1", interpreter.params["conv1"][0] * 7, interpreter.params["conv1"][1])
    frontier.advance("relu2")
    assert float(torch.cat(list(frontier.batches("relu2"))).abs().max()) == 0.0
    torch.testing.assert_close(torch.cat(list(frontier.batches("relu1"))), whole(residual_net(), "relu1"))


def test_looking_ahead_moves_nothing() -> None:
    interpreter = residual_net()
    frontier = Frontier(interpreter, data())
    frontier.advance("relu1")
    torch.testing.assert_close(torch.cat(list(frontier.batches("pool"))), whole(interpreter, "pool"))
    assert frontier.held == ("relu1",)


def test_a_passed_value_is_an_error() -> None:
    frontier = Frontier(residual_net(), data())
    frontier.advance("sum")
    for action in (
        frontier.advance,
        lambda name: list(frontier.batches(name)),
        lambda name: frontier.map_value(name, abs),
    ):
        with pytest.raises(ModelError, match="relu2"):
            action("relu2")
    with pytest.raises(ModelError, match="nonsense"):
        frontier.advance("nonsense")


def test_fork_shares_tensors_and_goes_its_own_way() -> None:
    frontier = Frontier(residual_net(), data())
    frontier.advance("relu1")
    other_net = residual_net()
    other_net.set_params("conv2", other_net.params["conv2"][0] * 0, other_net.params["conv2"][1] * 0)
    fork = frontier.fork(other_net)
    assert fork._values[0]["relu1"] is frontier._values[0]["relu1"]
    fork.advance("sum")
    frontier.advance("sum")
    assert not torch.equal(next(iter(fork.batches("sum"))), next(iter(frontier.batches("sum"))))


def test_channels_can_be_removed_from_held_values() -> None:
    """Prune conv1's channels after relu1 was computed, go on with a rebuilt graph."""
    frontier = Frontier(residual_net(), data())
    frontier.advance("relu1")
    keep = np.array([0, 2, 3])
    dense = residual_net()
    small = residual_net(channels=3)
    for name in ("conv1", "conv2", "conv3"):
        weight, bias = dense.params[name]
        small.set_params(name, weight[keep] if name == "conv1" else weight[keep][:, keep], bias[keep])
    frontier.keep_channels("relu1", keep)
    frontier.rebase(small)
    frontier.advance("pool")
    expected = torch.cat([small.run(feeds)["pool"] for feeds in data()])
    torch.testing.assert_close(torch.cat(list(frontier.batches("pool"))), expected)


def test_transform_is_applied_once_to_every_value() -> None:
    counts: dict[str, int] = {}

    def count(name: str, tensor: torch.Tensor) -> torch.Tensor:
        counts[name] = counts.get(name, 0) + 1
        return tensor

    frontier = Frontier(residual_net(), data(), transform=count)
    for name in ("relu1", "relu2", "pool"):
        frontier.advance(name)
    assert counts == dict.fromkeys(("input", "conv1", "relu1", "conv2", "relu2", "conv3", "sum", "pool"), 2)


def test_half_precision_halves_memory_and_spares_large_values() -> None:
    full, half = Frontier(residual_net(), data()), Frontier(residual_net(), data(), dtype=torch.float16)
    assert half.nbytes * 2 == full.nbytes
    half.advance("pool")
    torch.testing.assert_close(next(iter(half.batches("pool"))), next(iter(full.batches("pool"))), rtol=1e-2, atol=1e-2)
    half.map_value("pool", lambda t: t * 0 + 1e9)
    assert next(iter(half.batches("pool"))).isfinite().all()


def test_max_samples_is_what_the_budget_holds() -> None:
    interpreter = residual_net()
    # The largest cut at a layer's input: relu1 and relu2, 4 x 6 x 6 floats each.
    budget = 5 * 2 * 4 * 36 * 4
    assert Frontier.max_samples(interpreter, budget) == 5
    assert Frontier.max_samples(interpreter, budget, dtype=torch.float16) == 10
    assert Frontier.max_samples(interpreter, budget, stops=["pool"]) == budget // (4 * 3 * 36)
    frontier = Frontier(interpreter, data(), budget)
    for name in layer_inputs(interpreter):
        frontier.advance(name)


def test_budget_is_an_error_that_says_how_many_fit() -> None:
    frontier = Frontier(residual_net(), data(), memory_budget=5000)
    with pytest.raises(CalibrationError, match=r"budget.*samples fit"):
        frontier.advance("relu2")
    with pytest.raises(CalibrationError, match="budget"):
        Frontier(residual_net(), data(), memory_budget=100)
    with pytest.raises(CalibrationError, match="no calibration"):
        Frontier(residual_net(), [])


def test_batches_are_released_as_they_are_read() -> None:
    """Nothing of the source and nothing between two cuts stays: memory is that of the cut."""
    refs: list[weakref.ref[np.ndarray]] = []

    def source() -> Iterator[dict[str, np.ndarray]]:
        for feeds in data((2,) * 4):
            refs.append(weakref.ref(feeds["input"]))
            yield feeds

    frontier = Frontier(residual_net(), source())
    frontier.advance("relu1")
    gc.collect()
    assert [r() for r in refs] == [None] * 4
    assert frontier.nbytes == 8 * 4 * 36 * 4
