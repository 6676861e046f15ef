"""Random integer networks for the accelerator: layers of any shape behind one another, on any build of the hardware.

    graph, outputs = random_network(SeededChoices(seed), config)
    network = programs_of(graph.graph(*outputs), config, seed)

Operators get extreme constants (weights and inputs over the whole range, shifts from 0 to 22), so saturation, wrapping
and rounding count. Sizes go beyond what fits small buffers, so tiles are cut along every axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from random_graphs import Choices
from vta_graphs import GraphBuilder

from lpsn_tvm.schedules.vta.emit import candidates, default_schedule, emit
from lpsn_tvm.schedules.vta.ops import TileOp
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.targets.vta.assemble_network import assemble
from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig
from lpsn_tvm.targets.vta.integer_graph import IntegerGraph
from lpsn_tvm.targets.vta.lowering import lower_graph
from lpsn_tvm.targets.vta.network import VtaNetwork

CONFIGS: dict[str, VtaConfig] = PRESETS | {
    # Buffers so small that every layer is cut into many tiles.
    "small": VtaConfig(log_uop_buff_size=12, log_inp_buff_size=10, log_wgt_buff_size=13, log_acc_buff_size=12),
    "small-0.0.2": VtaConfig(
        log_uop_buff_size=12, log_inp_buff_size=11, log_wgt_buff_size=14, log_acc_buff_size=12, isa_version="0.0.2"
    ),
    "small-4x8": replace(
        PRESETS["pynq-4x8"], log_uop_buff_size=12, log_inp_buff_size=11, log_wgt_buff_size=12, log_acc_buff_size=13
    ),
    "small-i4": replace(
        PRESETS["pynq-i4"], log_uop_buff_size=12, log_inp_buff_size=10, log_wgt_buff_size=13, log_acc_buff_size=12
    ),
    "2x32": VtaConfig(log_batch=1, log_block_in=5, log_block_out=5),
    "1x8": VtaConfig(log_block_in=3, log_block_out=3, log_inp_buff_size=14, log_wgt_buff_size=16, log_acc_buff_size=16),
}
"""The presets and other builds: odd geometries and little memory."""

MOST_PIXELS = 900
MOST_CHANNELS = 70


class RandomNetwork:
    """A network under construction: every operator reads variables that are there."""

    def __init__(self, choices: Choices, config: VtaConfig) -> None:
        self.choices = choices
        self.b = GraphBuilder(config, choices.integer(0, 2**16))
        size = choices.pick((1, 4, 7, 12, 20))
        shape = (choices.pick((1, 1, 2, 5)), choices.pick((1, 3, 16, 21, 40)), size, size + choices.integer(0, 5))
        bits = 7 if config.inp_bits < 8 and choices.integer(0, 1) else None
        self.pool = [self.b.input(*shape, bits=bits)]

    def extend(self) -> None:
        """One operator on one of the youngest variables."""
        source = self.choices.pick(self.pool[-3:])
        kinds = IMAGE_OPERATORS if len(self.b.shape(source)) == 4 else FLAT_OPERATORS
        result = kinds[self.choices.pick(sorted(kinds))](self, source)
        if result is not None and result not in self.pool:
            self.pool.append(result)

    def outputs(self) -> list[str]:
        """Leaves as float32, and perhaps one variable that others read."""
        read = {name for node in self.b.nodes for name in node.variables}
        wanted = [name for name in self.pool if name not in read]
        if self.choices.integer(0, 3) == 0:
            wanted.append(self.choices.pick(self.pool))
        return [self.b.dequantize(name) for name in dict.fromkeys(wanted)]

    # --- what operators need ---

    def image(self, x: str) -> tuple[int, int, int]:
        _, channels, height, width = self.b.shape(x)
        return channels, height, width

    def shifts(self) -> tuple[int, int]:
        return self.choices.pick(((0, 0), (6, 9), (7, 7), (3, 12), (13, 16), (16, 22)))

    def clamp(self) -> dict[str, Any]:
        """The whole range, ReLU, or a clip to something odd."""
        top = self.b.limit - 1
        return self.choices.pick(({}, {"qmin": 0}, {"qmin": 0, "qmax": top // 2}, {"qmin": -3, "qmax": 2}))

    def alike(self, x: str) -> list[str]:
        """Variables of the same shape."""
        return [name for name in self.pool if self.b.shape(name) == self.b.shape(x)]


def _axis(net: RandomNetwork, extent: int) -> tuple[int, int, int, int, int]:
    """Kernel, stride, dilation and two pads of a window that reaches at least one position."""
    c = net.choices
    kernel, stride = c.pick((1, 1, 2, 3, 3, 5, 7)), c.pick((1, 1, 1, 2, 3))
    dilation = c.pick((1, 1, 1, 2, 3)) if kernel > 1 else 1
    reach = dilation * (kernel - 1) + 1
    before = c.integer(0, min(reach - 1, 6))
    after = max(c.integer(0, min(reach - 1, 6)), reach - extent - before)
    return kernel, stride, dilation, before, after


def _window(net: RandomNetwork, x: str) -> dict[str, Any]:
    _, height, width = net.image(x)
    (kh, sh, dh, top, bottom), (kw, sw, dw, left, right) = _axis(net, height), _axis(net, width)
    return {
        "kernel": (kh, kw),
        "strides": (sh, sw),
        "dilation": (dh, dw),
        "padding": (top, left, bottom, right),
    }


def _conv(net: RandomNetwork, x: str) -> str:
    c, channels = net.choices, net.image(x)[0]
    groups = c.pick([g for g in (1, 1, 2, 3, 4) if channels % g == 0])
    outputs = groups * c.integer(1, MOST_CHANNELS // groups)
    window = _window(net, x)
    kernel, padding = window.pop("kernel"), window.pop("padding")
    return net.b.conv2d(x, outputs, kernel, padding=padding, shifts=net.shifts(), **window | net.clamp(), groups=groups)


def _depthwise(net: RandomNetwork, x: str) -> str:
    channels, times = net.image(x)[0], net.choices.pick((1, 1, 1, 2))
    window = _window(net, x)
    kernel, padding = window.pop("kernel"), window.pop("padding")
    outputs = channels * (times if channels * times <= MOST_CHANNELS else 1)
    return net.b.conv2d(
        x, outputs, kernel, padding=padding, groups=channels, shifts=net.shifts(), **window | net.clamp()
    )


def _residual(net: RandomNetwork, x: str) -> str:
    c, (channels, _, _) = net.choices, net.image(x)
    residual = c.pick(net.alike(x))
    low, high = c.pick(((7, 7), (6, 9), (14, 17)))
    exponent = c.integer(-low, 2)
    attrs = {"residual_multiplier": 2.0**exponent, "residual_shift": net.b.config.wgt_bits - 2} | net.clamp()
    return net.b.conv2d(x, channels, c.pick((1, 3)), shifts=(low, high), residual=residual, **attrs)


def _pooled_conv(net: RandomNetwork, x: str) -> str | None:
    y = net.b.conv2d(x, net.choices.integer(1, 40), 3, padding=1, shifts=net.shifts(), **net.clamp())
    return _max_pool(net, y)


def _max_pool(net: RandomNetwork, x: str) -> str | None:
    _, height, width = net.image(x)
    kernel, stride, padding = net.choices.pick(((2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 2, 0), (5, 1, 2)))
    if kernel > min(height, width):
        return None
    hangs = any((e + 2 * padding - kernel) % stride and (e + padding) % stride for e in (height, width))
    return net.b.max_pool2d(x, kernel, stride, padding, bool(hangs and net.choices.integer(0, 1)))


def _avg_pool(net: RandomNetwork, x: str) -> str | None:
    c, (_, height, width) = net.choices, net.image(x)
    kernel, stride, padding = c.pick(((2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2)))
    if kernel > min(height, width):
        return None
    return net.b.avg_pool2d(
        x, kernel, stride, padding, count_include_pad=bool(c.integer(0, 1)), multiplier=c.pick((1.0, 2.0, 0.5))
    )


def _transposed(net: RandomNetwork, x: str) -> str | None:
    c, (channels, height, width) = net.choices, net.image(x)
    kernel, stride = c.pick(((2, 2), (3, 2), (4, 2), (3, 1), (5, 3), (1, 2)))
    if height * width * stride**2 > MOST_PIXELS:
        return None
    groups = c.pick([g for g in (1, 1, 2, 3) if channels % g == 0])
    padding = c.integer(0, (kernel - 1) // 2) if min(height, width) > 1 else 0
    return net.b.conv2d_transpose(
        x, groups * c.integer(1, 30 // groups), kernel, stride, padding, c.integer(0, stride - 1), groups
    )


def _sum(net: RandomNetwork, x: str) -> str:
    c = net.choices
    return net.b.sum(x, c.pick(net.alike(x)), (c.integer(-8, 3), c.integer(-8, 3)), **net.clamp())


def _concat(net: RandomNetwork, x: str) -> str | None:
    c, shape = net.choices, net.b.shape(x)
    others = [n for n in net.pool if len(net.b.shape(n)) == 4 and net.b.shape(n)[::2] == shape[::2]]
    others = [n for n in others if net.b.shape(n)[3] == shape[3] and net.b.shape(n)[1] + shape[1] <= 2 * MOST_CHANNELS]
    if not others:
        return None
    parts = [x, c.pick(others)] if c.integer(0, 1) else [c.pick(others), x]
    return net.b.concat(*parts, exponents=c.pick(((0, 0), (0, -1), (1, -2))))


def _resize(net: RandomNetwork, x: str) -> str | None:
    _, height, width = net.image(x)
    factor = net.choices.pick((2, 3))
    return net.b.resize(x, factor) if height * width * factor**2 <= MOST_PIXELS else None


def _slice(net: RandomNetwork, x: str) -> str:
    axis = net.choices.pick((1, 1, 2, 3))
    extent = net.b.shape(x)[axis]
    begin = net.choices.integer(0, extent - 1)
    return net.b.slice(x, axis, begin, net.choices.integer(begin + 1, extent), net.choices.pick((1, 1, 2)))


def _depth_to_space(net: RandomNetwork, x: str) -> str | None:
    channels, height, width = net.image(x)
    block = net.choices.pick((2, 3))
    if channels % block**2 or height * width * block**2 > MOST_PIXELS:
        return None
    return net.b.depth_to_space(x, block, net.choices.pick(("DCR", "CRD")))


def _pad(net: RandomNetwork, x: str) -> str:
    return net.b.pad(x, *(net.choices.integer(0, 3) for _ in range(4)))


def _flatten(net: RandomNetwork, x: str) -> str | None:
    n, channels, height, width = net.b.shape(x)
    return net.b.reshape(x, n, channels * height * width) if channels * height * width <= 2000 else None


def _dense(net: RandomNetwork, x: str) -> str:
    return net.b.dense(x, net.choices.integer(1, MOST_CHANNELS), net.shifts(), **net.clamp())


def _requantize(net: RandomNetwork, x: str) -> str:
    return net.b.requantize(x, net.choices.integer(-9, 4))


Operator = Callable[[RandomNetwork, str], "str | None"]
IMAGE_OPERATORS: dict[str, Operator] = {
    "conv": _conv,
    "conv again": _conv,
    "depthwise": _depthwise,
    "residual": _residual,
    "pooled conv": _pooled_conv,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "global_avg_pool": lambda net, x: net.b.global_avg_pool2d(x, net.choices.integer(-2, 3)),
    "transposed": _transposed,
    "sum": _sum,
    "concat": _concat,
    "resize": _resize,
    "slice": _slice,
    "depth_to_space": _depth_to_space,
    "pad": _pad,
    "flatten": _flatten,
    "requantize": _requantize,
}
FLAT_OPERATORS: dict[str, Operator] = {"dense": _dense, "sum": _sum, "requantize": _requantize}


def random_network(choices: Choices, config: VtaConfig, most: int = 6) -> tuple[GraphBuilder, list[str]]:
    """A network of 1 to `most` operators, and its outputs."""
    net = RandomNetwork(choices, config)
    for _ in range(choices.integer(1, most)):
        net.extend()
    return net.b, net.outputs()


def programs_of(graph: IntegerGraph, config: VtaConfig, seed: int | None = None) -> VtaNetwork:
    """The programs of a graph, with default schedules or (`seed`) with any that fits."""
    lowered = lower_graph(graph, config)
    if seed is None:
        return assemble(lowered, emit=emit, choose=default_schedule)
    rng = np.random.default_rng(seed)

    def choose(op: TileOp, config: VtaConfig) -> Schedule:
        found = list(candidates(op, config))
        return found[int(rng.integers(len(found)))] if found else default_schedule(op, config)

    return assemble(lowered, emit=emit, choose=choose)
