"""Who is tied to whom, and what is left whole and why."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.errors import PruneError
from lpsn_tvm.passes.channel_groups import ChannelGroups, find_channel_groups
from tests.support.channel_nets import make
from tests.support.small_graphs import Net

op = relax.op


def summary(groups: ChannelGroups) -> dict[str, tuple[int, set[str], set[str], set[str]]]:
    return {
        g.name: (g.size, {s.layer for s in g.producers}, {s.layer for s in g.consumers}, {f.layer for f in g.followers})
        for g in groups.groups
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("residual", {"a": (8, {"a", "b2", "c"}, {"b1", "c", "last"}, {"dw"}), "b1": (6, {"b1"}, {"b2"}, set())}),
        (
            "dense_block",
            {
                "a": (4, {"a"}, {"b", "c", "last"}, set()),
                "b": (6, {"b"}, {"c", "last"}, set()),
                "c": (5, {"c"}, {"last"}, set()),
            },
        ),
        ("split", {"a": (4, {"a"}, {"b", "last"}, set()), "a#2": (6, {"a", "b"}, {"last"}, set())}),
        (
            "squeeze_excitation",
            {"a": (8, {"a", "expand"}, {"reduce", "last"}, set()), "reduce": (4, {"reduce"}, {"expand"}, set())},
        ),
        ("grouped", {"a": (4, {"a"}, {"positions"}, set()), "positions": (3, {"positions"}, {"last"}, {"whole"})}),
        ("multiplier", {"a": (6, {"a"}, {"last"}, {"dw"})}),
        ("depth_to_space", {"a": (4, {"a"}, {"last"}, set())}),
        ("flatten", {"a": (6, {"a"}, {"fc1"}, set()), "fc1": (7, {"fc1"}, {"fc2"}, set())}),
        ("rows", {"a": (6, {"a", "b"}, {"last"}, set())}),
        ("shuffle", {"a": (6, {"a"}, {"last"}, set())}),
        (
            "depth_to_space_elsewhere",
            {"a": (6, {"a", "gate"}, {"gate", "last"}, set()), "b": (2, {"b"}, {"last"}, set())},
        ),
        ("channels_last", {"a": (8, {"a"}, {"last"}, set())}),
    ],
)
def test_members(name: str, expected: dict[str, tuple[int, set[str], set[str], set[str]]]) -> None:
    found = find_channel_groups(make(name))
    assert summary(found) == expected
    last = "fc2" if name == "flatten" else "last"
    assert found.frozen[last] == f"the graph output {last!r} reads it"


def test_index_maps() -> None:
    groups = find_channel_groups(make("dense_block"))
    slots = {s.layer: s.index.ravel().tolist() for s in groups["b"].consumers}
    assert slots == {"c": [4, 5, 6, 7, 8, 9], "last": [4, 5, 6, 7, 8, 9]}
    assert {s.layer: s.index.ravel().tolist() for s in groups["c"].consumers} == {"last": [10, 11, 12, 13, 14]}
    flat = find_channel_groups(make("flatten"))["a"]
    assert flat.consumers[0].index.tolist() == np.arange(96).reshape(6, 16).tolist()
    assert next(v for v in flat.values if v.name == "flat").index[1].tolist() == list(range(16, 32))


@pytest.mark.parametrize(
    ("name", "unit"),
    [("depth_to_space", [1, 5, 9, 13]), ("depth_to_space_crd", [4, 5, 6, 7]), ("gather", [1, 5, 9, 13])],
)
def test_depth_to_space_units(name: str, unit: list[int]) -> None:
    group = find_channel_groups(make(name))["a"]
    assert group.producers[0].index[1].tolist() == unit
    assert group.consumers[0].index.ravel().tolist() == [0, 1, 2, 3]


def test_grouped_units() -> None:
    groups = find_channel_groups(make("grouped"))
    assert groups["a"].consumers[0].index.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    # `whole` ties neighbours in pairs, `positions` ties p with p + 6: units are pairs in both halves.
    assert groups["positions"].producers[0].index.tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_values_follow_the_channel_axis() -> None:
    values = {v.name: v for v in find_channel_groups(make("channels_last"))["a"].values}
    assert (values["a"].axis, values["nhwc"].axis, values["shift"].axis) == (1, 3, 3)


def test_padding_is_no_group_of_its_own() -> None:
    groups = find_channel_groups(make("padded_shortcut"))
    assert groups["a"].size == 4 and {s.layer for s in groups["a"].producers} == {"a", "b", "c"}
    # Channels that the shortcut pads with zeros are written by `b` and `c` alone, those of the constant by `c`.
    assert summary(groups)["b"] == (4, {"b", "c"}, {"c", "last"}, set())
    assert groups["b"].producers[0].index.ravel().tolist() == [0, 1, 6, 7]
    assert summary(groups)["c"] == (2, {"c"}, {"last"}, set())


def net_of(build: object) -> ChannelGroups:
    net = Net((1, 3, 8, 8))
    return find_channel_groups(net.module(build(net)))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        (lambda x: op.nn.softmax(x, 1), "nn.softmax 'x' mixes the channels"),
        (lambda x: op.mean(x, [1], True), "mean 'x' mixes the channels"),
        (lambda x: op.tile(x, (1, 2, 1, 1)), "tile 'x' cannot be followed"),
        (lambda x: op.strided_slice(x, [1], [0], [8], [2]), "strided_slice 'x' takes channels with stride 2"),
    ],
    ids=["softmax", "channel mean", "unknown", "every second channel"],
)
def test_left_whole_with_a_reason(operator: object, reason: str) -> None:
    def build(net: Net) -> object:
        x = net.emit(operator(net.conv(net.input, 8, name="a")), "x")  # type: ignore[operator]
        return net.conv(x, 3, name="last")

    groups = net_of(build)
    assert groups.frozen["a"] == reason
    with pytest.raises(PruneError, match="left whole"):
        groups["a"]


def test_addend_of_the_graph_input_is_left_whole() -> None:
    groups = net_of(lambda net: net.conv(net.emit(op.add(net.conv(net.input, 3, name="a"), net.input)), 4, name="last"))
    assert groups.frozen["a"] == "shares channels with the graph input 'input'"


def test_spatial_gate_does_not_tie_channels() -> None:
    def build(net: Net) -> object:
        a = net.conv(net.input, 8, name="a")
        gate = net.emit(op.sigmoid(net.conv(a, 1, name="gate")))
        return net.conv(net.emit(op.multiply(a, gate), "gated"), 3, name="last")

    groups = net_of(build)
    assert groups["a"].size == 8
    assert "spreads" in groups.frozen["gate"]


def test_two_outputs() -> None:
    net = Net((1, 3, 8, 8))
    a = net.conv(net.input, 8, name="a")
    groups = find_channel_groups(net.module(a, net.conv(net.emit(op.nn.relu(a)), 4, name="b")))
    assert not groups.groups and set(groups.frozen) == {"a", "b"}


def test_layers_are_covered_and_index_maps_are_partitions() -> None:
    for name in ("residual", "split", "transposed", "per_channel"):
        mod = make(name)
        groups = find_channel_groups(mod)
        members = {s.layer for g in groups.groups for s in g.producers} | {
            f.layer for g in groups.groups for f in g.followers
        }
        assert members | set(groups.frozen) == set(graph.find_layers(mod))
        for layer, found in graph.find_layers(mod).items():
            index = [s.index for g in groups.groups for s in g.producers if s.layer == layer]
            index += [f.written for g in groups.groups for f in g.followers if f.layer == layer]
            if index:
                assert sorted(np.concatenate([i.ravel() for i in index])) == list(range(found.out_channels)), layer
