"""Hand-made networks of 1x1 convolutions and host steps, and their meaning in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm import quant
from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.schedules.vta.emit import default_schedule, emit
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Scalar, Span, Store, Tap, TileOp, Vector
from lpsn_tvm.targets.vta.assemble_network import assemble
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.layout import TileLayout, ceil_div, vector_tiles
from lpsn_tvm.targets.vta.network import HostStep, LoweredNetwork, SymbolicTensor, VtaNetwork

HEIGHT, WIDTH, SHIFT = 5, 6, 6
CLAMP = {"multiplier": 2.0, "in_zero_point": 0, "out_zero_point": 0, "qmin": -5, "qmax": 7, "out_dtype": "int8"}


class Pointwise:
    """A network of 1x1 convolutions under construction, and its meaning in numpy."""

    def __init__(self, config: VtaConfig, channels: int = 20) -> None:
        self.config, self.rng = config, np.random.default_rng(3)
        self.shapes = {"x": channels}
        self.tensors: dict[str, SymbolicTensor] = {}
        self.weights: dict[str, Any] = {}
        self.vectors: dict[str, Any] = {}
        self.steps: list[TileOp | HostStep] = []
        self.meaning: list[tuple[str, str, Any]] = []
        self.plane("x")

    def plane(self, name: str) -> Plane:
        config = self.config
        layout = TileLayout((1, self.shapes[name], HEIGHT, WIDTH), config.batch, config.block_in, config.inp_bits)
        self.tensors.setdefault(name, SymbolicTensor(name, layout))
        return Plane.dense(name, 0, layout.batches, layout.blocks, HEIGHT, WIDTH)

    def conv(self, name: str, source: str, channels: int) -> None:
        config, fan_in = self.config, self.shapes[source]
        low, high = -(1 << (config.wgt_bits - 1)), (1 << (config.wgt_bits - 1)) - 1
        weight = self.rng.integers(low, high + 1, (channels, fan_in)).astype(np.int8)
        bias = self.rng.integers(-500, 500, channels).astype(np.int32)
        self.shapes[name] = channels
        rows, columns = ceil_div(channels, config.block_out), ceil_div(fan_in, config.block_in)
        padded = np.zeros((rows * config.block_out, columns * config.block_in), np.int8)
        padded[:channels, :fan_in] = weight
        tiles = padded.reshape(rows, config.block_out, columns, config.block_in).transpose(0, 2, 1, 3)
        self.weights[f"{name}.weight"] = tiles.reshape(-1, config.block_out, config.block_in)
        self.vectors[f"{name}.bias"] = vector_tiles(bias + (1 << (SHIFT - 1)), config.batch, config.block_out)
        whole = Tap(Span(0, 1, HEIGHT), Span(0, 1, WIDTH), Span(0, 1, HEIGHT), Span(0, 1, WIDTH), 0)
        top = (1 << (config.out_bits - 1)) - 1
        gemm = Gemm(self.plane(source), (whole,), f"{name}.weight", 0, columns, 1, columns, (0,) * rows)
        steps = (
            gemm,
            Vector("add", f"{name}.bias", 0),
            Scalar("shr", SHIFT),
            Scalar("max", -top - 1),
            Scalar("min", top),
            Store(self.plane(name)),
        )
        self.steps.append(TileOp(name, 1, rows, HEIGHT, WIDTH, steps, channels * fan_in * HEIGHT * WIDTH))
        attrs = {"strides": (1, 1), "padding": (0,) * 4, "qmin": -top - 1, "qmax": top, "out_dtype": "int8"}
        scale = np.full(channels, 2.0**-SHIFT, np.float32)
        self.meaning.append(
            (
                name,
                source,
                lambda x: quant.conv2d(x, weight[:, :, None, None], bias, scale, rounding="half_up", **attrs),
            )
        )

    def host(self, name: str, source: str) -> None:
        self.shapes[name] = self.shapes[source]
        self.steps.append(HostStep("lpsn.requantize", (source,), name, CLAMP | {"rounding": "half_up"}, {}, "a test"))
        self.meaning.append((name, source, lambda x: quant.requantize(x, rounding="half_up", **CLAMP)))

    def lowered(self, *outputs: str) -> LoweredNetwork:
        info = TensorInfo("x", (1, self.shapes["x"], HEIGHT, WIDTH), "int8")
        return LoweredNetwork(
            self.config, (info,), outputs, self.tensors, self.weights, self.vectors, tuple(self.steps)
        )

    def evaluate(self, x: np.ndarray) -> dict[str, np.ndarray]:
        values = {"x": x}
        for name, source, function in self.meaning:
            values[name] = function(values[source])
        return values

    def feed(self) -> np.ndarray:
        low = -(1 << (self.config.inp_bits - 1))
        return self.rng.integers(low, -low, (1, self.shapes["x"], HEIGHT, WIDTH)).astype(np.int8)


def split(config: VtaConfig) -> Pointwise:
    """a, b, host h, d after h, c after a: two programs, since c does not need the host."""
    net = Pointwise(config)
    net.conv("a", "x", 40)
    net.conv("b", "a", 24)
    net.host("h", "b")
    net.conv("d", "h", 33)
    net.conv("c", "a", 16)
    return net


def assembled(network: LoweredNetwork) -> VtaNetwork:
    return assemble(network, emit=emit, choose=default_schedule)
