import numpy as np
import pytest

from lpsn_tvm.graph import Layer
from lpsn_tvm.passes.allocate import allocate, total_macs
from lpsn_tvm.passes.channel_groups import ChannelGroup, Follower, Slot


def conv(name, cin, cout, kernel=1, groups=1):
    weight = np.zeros((cout, cin // groups, kernel, kernel), np.float32)
    shapes = (1, cin, 4, 4), (1, cout, 4, 4)
    return Layer(name, "conv2d", "x", name + ".acc", weight, np.zeros(cout, np.float32), groups, {}, *shapes)


def make_group(name, size, consumer, follower=None):
    index = np.arange(size)[:, None]
    followers = (Follower(follower, index, index),) if follower else ()
    return ChannelGroup(name, size, (Slot(name, index),), (Slot(consumer, index),), followers, (), ())


LAYERS = {"a": conv("a", 3, 20), "dw": conv("dw", 20, 20, 3, 20), "b": conv("b", 20, 40), "c": conv("c", 40, 5)}
GROUPS = [make_group("a", 20, "b", "dw"), make_group("b", 40, "c")]


def test_total_macs_are_those_of_the_sliced_network():
    assert total_macs(LAYERS, GROUPS, {"a": 20, "b": 40}) == sum(layer.macs for layer in LAYERS.values())
    sliced = [conv("a", 3, 10), conv("dw", 10, 10, 3, 10), conv("b", 10, 30), conv("c", 30, 5)]
    assert total_macs(LAYERS, GROUPS, {"a": 10, "b": 30}) == pytest.approx(sum(layer.macs for layer in sliced))


def test_channels_go_where_the_error_per_mac_is_least():
    uniform = {"a": 10, "b": 20}

    def measure(group, counts):
        price = 100.0 if group.name == "a" else 1.0
        return [price * (1 - count / group.size) ** 2 for count in counts]

    kept = allocate(LAYERS, GROUPS, uniform, lambda group, count: count, measure)
    assert total_macs(LAYERS, GROUPS, kept) <= total_macs(LAYERS, GROUPS, uniform)
    assert kept["a"] > 10 and kept["b"] < 20
