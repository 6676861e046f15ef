"""A small network of two convolutions between host steps, assembled for any configuration."""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.schedules.vta.emit import default_schedule, emit
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Scalar, Span, Store, Tap, TileOp, Vector
from lpsn_tvm.targets.vta.assemble_network import assemble
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.layout import TileLayout
from lpsn_tvm.targets.vta.network import HostStep, LoweredNetwork, SymbolicTensor, VtaNetwork

SIZE = 5


def conv1x1(name: str, source: str, output: str, inputs: int, outputs: int, limit: int) -> TileOp:
    """A pointwise convolution with bias, shift and ReLU, on SIZE x SIZE pixels."""
    span = Span(0, 1, SIZE)
    gemm = Gemm(
        Plane.dense(source, 0, 1, inputs, SIZE, SIZE),
        (Tap(span, span, span, span, 0),),
        f"{name}.weight",
        0,
        inputs,
        1,
        inputs,
        (0,) * outputs,
    )
    vector = Vector("add", f"{name}.bias", 0)
    store = Store(Plane.dense(output, 0, 1, outputs, SIZE, SIZE))
    steps = (gemm, vector, Scalar("shr", 4), Scalar("max", 0), Scalar("min", limit), store)
    return TileOp(name, 1, outputs, SIZE, SIZE, steps)


def two_convolutions(config: VtaConfig, *, split: bool = False) -> VtaNetwork:
    """data -> quantize -> conv1 -> conv2 -> dequantize; with `split`, a host step sits between the convolutions."""
    rng = np.random.default_rng(0)
    block, limit, low = config.block_in, (1 << (config.inp_bits - 1)) - 1, 1 << (config.wgt_bits - 1)

    def tensor(value: str, channels: int) -> SymbolicTensor:
        shape = (config.batch, channels, SIZE, SIZE)
        return SymbolicTensor(value, TileLayout(shape, config.batch, block, config.inp_bits))

    def constants(blocks: int, high: int, *shape: int) -> Any:
        return rng.integers(-high, high, (blocks, *shape))

    quantize = {"inv_scale": 4.0, "zero_point": 0, "qmin": -limit - 1, "qmax": limit, "out_dtype": "int8"}
    second = "relu.tensor" if split else "middle"
    host = HostStep("lpsn.reshape", ("a",), "b", {"shape": (config.batch, 2 * block, SIZE, SIZE)}, {}, "test")
    return assemble(
        LoweredNetwork(
            config,
            (TensorInfo("data", (config.batch, block, SIZE, SIZE)),),
            ("y",),
            {
                "first": tensor("q", block),
                "middle": tensor("a", 2 * block),
                "relu.tensor": tensor("b", 2 * block),
                "last": tensor("r", block),
            },
            {f"conv{i}.weight": constants(2, low, block, block).astype(np.int8) for i in (1, 2)},
            {f"conv{i}.bias": constants(3 - i, 99, config.batch, block).astype(np.int32) for i in (1, 2)},
            (
                HostStep("lpsn.quantize", ("data",), "q", quantize),
                conv1x1("conv1", "first", "middle", 1, 2, limit),
                *((host,) if split else ()),
                conv1x1("conv2", second, "last", 2, 1, limit),
                HostStep("lpsn.dequantize", ("r",), "y", {"scale": 0.5, "zero_point": 0}),
            ),
        ),
        emit=emit,
        choose=default_schedule,
    )
