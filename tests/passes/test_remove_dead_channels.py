"""Dead channels leave without changing the outputs, and only dead ones leave."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.canonicalize import canonicalize, verify_canonical
from lpsn_tvm.passes.channel_groups import ChannelGroups, find_channel_groups
from lpsn_tvm.passes.constant_channels import constant_channels
from lpsn_tvm.passes.remove_channels import remove_channels
from lpsn_tvm.passes.remove_dead_channels import dead_units, remove_dead_channels
from tests.support.channel_nets import NETS, make
from tests.support.random_graphs import models
from tests.support.small_graphs import Net, random_feed

op = relax.op
NOT_ZERO = {"per_channel", "channels_last", "padded_shortcut", "transposed"}
"""Networks whose constants or grouped transposed layers write something else than zero where their input is zero."""


def kill(mod: Any, seed: int, with_bias: bool, side: str) -> tuple[Any, ChannelGroups, dict[str, np.ndarray]]:
    """Zero the writers' rows (bias kept or not) or the readers' columns of random units; the masks say which."""
    rng = np.random.default_rng(seed)
    layers, groups = graph.find_layers(mod), find_channel_groups(mod)
    params = {name: (layer.weight.copy(), layer.bias.copy()) for name, layer in layers.items()}
    masks = {}
    for group in groups.groups:
        dead = rng.random(group.size) < 0.4
        dead[rng.integers(group.size)] = False
        masks[group.name] = dead
        if side == "readers":
            for slot in group.consumers:
                weight = params[slot.layer][0]
                columns = slot.index[dead].ravel()
                if layers[slot.layer].kind == "conv2d":
                    weight[:, np.unique(columns % weight.shape[1])] = 0
                else:
                    weight[columns] = 0
            continue
        written = [(s.layer, s.index) for s in group.producers]
        for name, index in written + [(f.layer, f.written) for f in group.followers if not with_bias]:
            weight, bias = params[name]
            rows = index[dead].ravel()
            bias[rows] *= with_bias
            if layers[name].kind == "conv2d":
                weight[rows] = 0
            elif layers[name].groups == 1:
                weight[:, rows] = 0
    return remove_channels(mod, {}, params), groups, masks


def outputs(mod: Any) -> np.ndarray:
    """All outputs, one behind the other."""
    return np.concatenate([value.numpy().ravel() for value in TorchInterpreter(mod).run(random_feed(mod, 1)).values()])


@pytest.mark.parametrize("side", ["writers", "readers"])
@pytest.mark.parametrize("name", sorted(set(NETS) - NOT_ZERO))
def test_dead_units_are_found_and_leave(name: str, side: str) -> None:
    mod, groups, masks = kill(make(name), 0, False, side)
    found = dead_units(mod, groups)
    for group, mask in masks.items():
        assert not (mask & ~found.get(group, np.zeros_like(mask))).any(), group
    small = remove_dead_channels(mod)
    macs = [sum(layer.macs for layer in graph.find_layers(m).values()) for m in (small, mod)]
    assert macs[0] < macs[1]
    np.testing.assert_allclose(outputs(small), outputs(mod), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(NETS)), st.integers(0, 10**6), st.booleans(), st.sampled_from(["writers", "readers"]))
def test_outputs_stay(name: str, seed: int, with_bias: bool, side: str) -> None:
    mod, _, _ = kill(make(name, seed % 5), seed, with_bias, side)
    np.testing.assert_allclose(outputs(remove_dead_channels(mod)), outputs(mod), rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(models(), st.integers(0, 10**6), st.booleans(), st.sampled_from(["writers", "readers"]))
def test_outputs_of_random_models_stay(model: onnx.ModelProto, seed: int, with_bias: bool, side: str) -> None:
    mod, _, _ = kill(canonicalize(import_model(load_model(model)).mod), seed, with_bias, side)
    small = remove_dead_channels(mod)
    verify_canonical(small)
    np.testing.assert_allclose(outputs(small), outputs(mod), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_dead_in_a_living_network(name: str) -> None:
    mod = make(name)
    assert dead_units(mod) == {}
    assert remove_dead_channels(mod) is mod


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(NETS)), st.integers(0, 10**6), st.booleans())
def test_known_values_are_what_comes_out(name: str, seed: int, with_bias: bool) -> None:
    mod, _, _ = kill(make(name, seed % 5), seed, with_bias, "writers")
    interpreter = TorchInterpreter(mod)
    names = [step.name for step in interpreter.steps]
    values = interpreter.run(random_feed(mod, seed), fetch=names)
    known = constant_channels(mod)
    for variable in names:
        value = np.broadcast_to(known[variable], values[variable].shape)
        sure = ~np.isnan(value)
        np.testing.assert_allclose(values[variable].numpy()[sure], value[sure], rtol=1e-4, atol=1e-5, err_msg=variable)


def build(bias: np.ndarray, padding: int) -> Any:
    """`a` (its rows 0 and 2 zero) -> relu -> `b`."""
    net = Net((1, 3, 6, 6))
    weight = net.rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    weight[[0, 2]] = 0
    a = net.emit(op.nn.conv2d(net.input, graph.constant(weight), padding=1), "a.acc")
    a = net.emit(op.nn.relu(net.emit(op.add(a, graph.constant(bias.reshape(1, 4, 1, 1))), "a")), "r")
    return net.module(net.conv(a, 5, name="b", padding=[padding] * 4))


@pytest.mark.parametrize(
    ("bias", "padding", "dead"),
    [([0, 1, 0, 1], 1, [0, 2]), ([-1, 1, -2, 1], 1, [0, 2]), ([0.5, 1, -2, 1], 1, [2]), ([0.5, 1, 2, 1], 0, [0, 2])],
    ids=["zero", "relu makes it zero", "padding would show", "folded into the bias"],
)
def test_constant_channels_are_folded_where_exact(bias: list[float], padding: int, dead: list[int]) -> None:
    mod = build(np.array(bias, np.float32), padding)
    assert np.flatnonzero(dead_units(mod)["a"]).tolist() == dead
    np.testing.assert_allclose(outputs(remove_dead_channels(mod)), outputs(mod), rtol=1e-5, atol=1e-5)


def test_golden() -> None:
    mod = build(np.array([0, 1, 0, 1], np.float32), 1)
    keep = np.array([False, True, False, True])
    tvm.ir.assert_structural_equal(remove_dead_channels(mod), remove_channels(mod, {"a": keep}))


def test_one_unit_survives_where_all_are_dead() -> None:
    net = Net((1, 3, 6, 6))
    zeros = np.zeros((4, 3, 3, 3), np.float32)
    a = net.emit(op.nn.conv2d(net.input, graph.constant(zeros), padding=1), "a.acc")
    a = net.emit(op.add(a, graph.constant(np.zeros((1, 4, 1, 1), np.float32))), "a")
    mod = net.module(net.conv(a, 5, name="b"))
    small = remove_dead_channels(mod)
    assert graph.find_layers(small)["a"].out_channels == 1
    np.testing.assert_allclose(outputs(small), outputs(mod))


def test_removal_spreads_backwards() -> None:
    """When the only reader of a channel leaves, the channel leaves too."""
    net = Net((1, 3, 6, 6))
    a = net.conv(net.input, 4, name="a")
    b = net.conv(a, 4, name="b")
    mod = net.module(net.conv(b, 2, name="c"))
    layers = graph.find_layers(mod)
    b_weight, c_weight = layers["b"].weight.copy(), layers["c"].weight.copy()
    b_weight[1:, 0] = 0
    c_weight[:, 0] = 0
    mod = remove_channels(mod, {}, {"b": (b_weight, layers["b"].bias), "c": (c_weight, layers["c"].bias)})
    small = graph.find_layers(remove_dead_channels(mod))
    assert (small["a"].out_channels, small["b"].out_channels) == (3, 3)
