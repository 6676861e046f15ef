"""Physical removal equals a network whose readers have zeros in the removed columns."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from benchmarks import models as network_zoo
from lpsn_tvm import graph
from lpsn_tvm.errors import PruneError
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.canonicalize import canonicalize, verify_canonical
from lpsn_tvm.passes.channel_groups import ChannelGroups, find_channel_groups
from lpsn_tvm.passes.remove_channels import remove_channels
from tests.support.channel_nets import NETS, make
from tests.support.random_graphs import models
from tests.support.small_graphs import Net, random_feed

op = relax.op


def random_masks(groups: ChannelGroups, seed: int, fraction: float = 0.5) -> dict[str, np.ndarray]:
    """At least one unit of every group is kept."""
    rng = np.random.default_rng(seed)
    masks = {}
    for group in groups.groups:
        masks[group.name] = rng.random(group.size) >= fraction
        masks[group.name][rng.integers(group.size)] = True
    return masks


def output(interpreter: TorchInterpreter, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """All outputs, one behind the other."""
    return np.concatenate([value.numpy().ravel() for value in interpreter.run(feeds).values()])


def zeroed(mod: Any, groups: ChannelGroups, masks: dict[str, np.ndarray]) -> TorchInterpreter:
    """The dense network with every reader's columns of removed units set to zero."""
    interpreter = TorchInterpreter(mod)
    layers = graph.find_layers(mod)
    for name, mask in masks.items():
        for slot in groups[name].consumers:
            layer = layers[slot.layer]
            weight, bias = interpreter.params[slot.layer]
            columns = slot.index[~mask].ravel()
            if layer.kind == "conv2d":
                weight = weight.clone()
                weight[:, np.unique(columns % weight.shape[1])] = 0
            else:
                weight = weight.clone()
                weight[columns] = 0
            interpreter.set_params(slot.layer, weight, bias)
    return interpreter


def check(mod: Any, masks: dict[str, np.ndarray]) -> Any:
    groups = find_channel_groups(mod)
    small = remove_channels(mod, masks)
    relax.analysis.well_formed(small)
    tvm.ir.assert_structural_equal(small["main"].body.body.ty, mod["main"].body.body.ty)
    feeds = random_feed(mod, 3)
    expected = output(zeroed(mod, groups, masks), feeds)
    np.testing.assert_allclose(output(TorchInterpreter(small), feeds), expected, rtol=1e-4, atol=1e-4)
    variables = {var.name: var for var, _ in graph.bindings(small)}
    for name, (axis, mask) in groups.kept(masks).items():
        assert graph.shape_of(variables[name])[axis] == mask.sum(), name
    return small


@pytest.mark.parametrize("name", NETS)
def test_equals_zeroed_columns(name: str) -> None:
    mod = make(name)
    groups = find_channel_groups(mod)
    assert groups.groups
    for seed in range(3):
        check(mod, random_masks(groups, seed))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(NETS)), st.integers(0, 10**6), st.floats(0, 1))
def test_equals_zeroed_columns_for_random_masks(name: str, seed: int, fraction: float) -> None:
    mod = make(name, seed % 7)
    check(mod, random_masks(find_channel_groups(mod), seed, fraction))


@pytest.mark.parametrize("name", NETS)
def test_all_kept_changes_nothing(name: str) -> None:
    mod = make(name)
    masks = {g.name: np.ones(g.size, bool) for g in find_channel_groups(mod).groups}
    tvm.ir.assert_structural_equal(remove_channels(mod, masks), mod)


@pytest.mark.parametrize("name", NETS)
def test_removal_in_two_steps_is_removal_in_one(name: str) -> None:
    mod = make(name)
    masks = random_masks(find_channel_groups(mod), 5)
    step = mod
    for group, mask in masks.items():
        step = remove_channels(step, {group: mask})
    tvm.ir.assert_structural_equal(step, remove_channels(mod, masks))


@settings(max_examples=15, deadline=None)
@given(models(), st.integers(0, 10**6))
def test_equals_zeroed_columns_on_random_models(model: onnx.ModelProto, seed: int) -> None:
    mod = canonicalize(import_model(load_model(model)).mod)
    verify_canonical(check(mod, random_masks(find_channel_groups(mod), seed)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v2", "densenet121", "preact_resnet18", "unet", "frrn", "cyclegan_generator", "espcn"],
)
def test_real_networks(name: str) -> None:
    """Every layer but the last is in a group, half of all units can leave, the analysis takes less than a second."""
    mod = canonicalize(import_model(load_model(getattr(network_zoo, name)())).mod)
    started = time.process_time()
    groups = find_channel_groups(mod)
    assert time.process_time() - started < 1.0
    assert len(groups.frozen) == 1 and "graph output" in next(iter(groups.frozen.values()))
    covered = {s.layer for g in groups.groups for s in g.producers}
    covered |= {f.layer for g in groups.groups for f in g.followers}
    assert covered | set(groups.frozen) == set(graph.find_layers(mod))
    verify_canonical(check(mod, random_masks(groups, 0)))


def test_golden() -> None:
    def build(keep: list[int]) -> Any:
        rng = np.random.default_rng(0)
        w1, b1 = rng.normal(size=(4, 3, 3, 3)).astype(np.float32), rng.normal(size=(1, 4, 1, 1)).astype(np.float32)
        w2, b2 = rng.normal(size=(4, 1, 3, 3)).astype(np.float32), rng.normal(size=(1, 4, 1, 1)).astype(np.float32)
        w3, b3 = rng.normal(size=(64, 5)).astype(np.float32), rng.normal(size=(5,)).astype(np.float32)
        features = np.arange(64).reshape(4, 16)[keep].ravel()
        net = Net((1, 3, 4, 4))
        a = net.emit(op.nn.conv2d(net.input, graph.constant(w1[keep]), padding=1), "a.acc")
        a = net.emit(op.add(a, graph.constant(b1[:, keep])), "a")
        d = net.emit(op.nn.conv2d(a, graph.constant(w2[keep]), padding=1, groups=len(keep)), "d.acc")
        d = net.emit(op.add(d, graph.constant(b2[:, keep])), "d")
        flat = net.emit(op.reshape(net.emit(op.nn.relu(d), "r"), (1, 16 * len(keep))), "flat")
        y = net.emit(op.matmul(flat, graph.constant(w3[features])), "y.acc")
        return net.module(net.emit(op.add(y, graph.constant(b3)), "y"))

    before, expected = build([0, 1, 2, 3]), build([1, 3])
    after = remove_channels(before, {"a": np.array([False, True, False, True])})
    tvm.ir.assert_structural_equal(after, expected)
    assert [v.name for v, _ in graph.bindings(after)] == [v.name for v, _ in graph.bindings(before)]


@pytest.mark.parametrize("reduced", [False, True], ids=["full layout", "reduced layout"])
@pytest.mark.parametrize("name", ["residual", "flatten", "transposed", "grouped"])
def test_new_parameters(name: str, reduced: bool) -> None:
    mod = make(name)
    masks = random_masks(find_channel_groups(mod), 1)
    source = graph.find_layers(remove_channels(mod, masks) if reduced else mod)
    params = {n: (layer.weight * 2, layer.bias + 1) for n, layer in source.items()}
    after = graph.find_layers(remove_channels(mod, masks, params))
    for layer_name, layer in graph.find_layers(remove_channels(mod, masks)).items():
        np.testing.assert_array_equal(after[layer_name].weight, layer.weight * 2)
        np.testing.assert_array_equal(after[layer_name].bias, layer.bias + 1)


def test_errors() -> None:
    mod = make("residual")
    keep = np.ones(8, bool)
    for masks, message in [
        ({"nothing": keep}, "groups are"),
        ({"last": keep}, "graph output"),
        ({"a": keep[:3]}, r"must be bool\[8\]"),
        ({"a": np.ones(8, np.int64)}, "must be bool"),
        ({"a": ~keep}, "at least 1"),
    ]:
        with pytest.raises(PruneError, match=message):
            remove_channels(mod, masks)
    bias = np.zeros(8, np.float32)
    with pytest.raises(PruneError, match="a: the new weight is"):
        remove_channels(mod, {"a": np.arange(8) < 4}, {"a": (np.zeros((5, 3, 3, 3), np.float32), bias)})
    with pytest.raises(PruneError, match="a: the new bias has 7"):
        remove_channels(mod, {"a": np.arange(8) < 4}, {"a": (np.zeros((8, 3, 3, 3), np.float32), bias[:7])})
    with pytest.raises(PruneError, match="no such layer"):
        remove_channels(mod, {}, {"zzz": (bias, bias)})
