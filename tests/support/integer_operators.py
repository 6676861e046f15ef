"""Functions of single integer operators that tests of every target run, by family.

Operators get inputs over the whole range of their container and scales that produce exact ties and saturation, so that
rounding and clamping count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.integer_ops import integer_call


class Operators:
    """A function with one result per added operator, each on inputs of its own."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.calls: list[tuple[str, list[Any], dict[str, Any]]] = []
        self.params: list[Any] = []
        self.feeds: dict[str, np.ndarray] = {}

    def integers(self, shape: tuple[int, ...], dtype: str = "uint8", bits: int = 8) -> Any:
        """A function input with random values of the whole range of `bits`."""
        low, high = (0, 2**bits) if dtype == "uint8" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        return self._input(self.rng.integers(low, high, shape).astype(dtype))

    def floats(self, shape: tuple[int, ...], spread: float) -> Any:
        """A function input with normal values, some exactly between two steps of 1."""
        value = (self.rng.normal(0, spread, shape)).astype(np.float32)
        return self._input(
            np.where(self.rng.random(shape) < 0.3, np.rint(value) + np.float32(0.5), value).astype(np.float32)
        )

    def _input(self, value: np.ndarray) -> Any:
        name = f"x{len(self.params)}"
        self.feeds[name] = value
        self.params.append(relax.Var(name, relax.TensorType(value.shape, str(value.dtype))))
        return self.params[-1]

    def add(self, op: str, tensors: list[Any], attrs: dict[str, Any]) -> None:
        self.calls.append((f"lpsn.{op}", tensors, attrs))

    def layer(
        self,
        op: str,
        x: Any,
        weight_shape: tuple[int, ...],
        channels: int,
        residual: tuple[int, ...] | None = None,
        **attrs: Any,
    ) -> None:
        """A weighted operator whose outputs spread over the range, with many exact ties (powers of two)."""
        weight = self.rng.integers(-128, 128, weight_shape).astype(np.int8)
        fan = float(np.prod(weight_shape)) / channels
        bias = self.rng.integers(-(2**14), 2**14, channels).astype(np.int32)
        scale = np.exp2(np.floor(np.log2(1.0 / (fan**0.5 * 70)) + self.rng.integers(-3, 2, channels))).astype(
            np.float32
        )
        scale[::3] *= np.float32(1.2345678)
        tensors = [x, graph.constant(weight), graph.constant(bias), graph.constant(scale)]
        defaults: dict[str, Any] = {"x_zero_point": 7, "out_zero_point": 120, "qmin": 0, "qmax": 255}
        if residual is not None:
            tensors.append(self.integers(residual))
            defaults |= {"residual_multiplier": 0.5, "residual_zero_point": 99}
        self.add(op, tensors, defaults | attrs)

    def module(self) -> Any:
        builder = relax.BlockBuilder()
        with builder.function("main", self.params):
            with builder.dataflow():
                results = [
                    graph.emit_named(builder, integer_call(op, tensors, attrs), f"{op.removeprefix('lpsn.')}.{index}")
                    for index, (op, tensors, attrs) in enumerate(self.calls)
                ]
                output = builder.emit_output(relax.Tuple(results))
            builder.emit_func_output(output)
        return builder.get()


def convolutions(o: Operators) -> None:
    same = {"strides": (1, 1), "padding": (1, 1, 1, 1)}
    o.layer("conv2d", o.integers((1, 32, 9, 14)), (48, 32, 3, 3), 48, (1, 48, 9, 14), **same)
    o.layer("conv2d", o.integers((2, 3, 11, 13)), (20, 3, 5, 5), 20, strides=(2, 2), padding=(2, 1, 0, 3))
    o.layer(
        "conv2d",
        o.integers((1, 40, 7, 7)),
        (33, 40, 1, 1),
        33,
        strides=(1, 1),
        padding=(0, 0, 0, 0),
        qmin=120,
        qmax=200,
    )
    o.layer(
        "conv2d",
        o.integers((1, 16, 8, 8)),
        (16, 16, 1, 1),
        16,
        strides=(2, 2),
        padding=(0, 0, 0, 0),
        out_dtype="float32",
    )
    o.layer(
        "conv2d", o.integers((1, 16, 9, 9)), (32, 16, 3, 3), 32, strides=(1, 1), padding=(2, 2, 2, 2), dilation=(2, 2)
    )
    o.layer("conv2d", o.integers((1, 12, 6, 6)), (8, 3, 3, 3), 8, groups=4, **same)
    o.layer(
        "conv2d",
        o.integers((1, 8, 6, 6), "int8"),
        (8, 8, 3, 3),
        8,
        **same,
        out_dtype="int8",
        qmin=-128,
        qmax=127,
        out_zero_point=-5,
    )


def depthwise_and_transposed(o: Operators) -> None:
    o.layer("conv2d", o.integers((1, 32, 12, 12)), (32, 1, 3, 3), 32, groups=32, strides=(1, 1), padding=(1, 1, 1, 1))
    o.layer(
        "conv2d",
        o.integers((1, 19, 9, 13)),
        (19, 1, 5, 5),
        19,
        groups=19,
        strides=(2, 2),
        padding=(2, 2, 2, 2),
        qmin=120,
    )
    o.layer("conv2d", o.integers((1, 8, 7, 7)), (16, 1, 3, 3), 16, groups=8, strides=(1, 1), padding=(1, 1, 1, 1))
    o.layer("conv2d_transpose", o.integers((1, 16, 5, 6)), (16, 24, 2, 2), 24, strides=(2, 2), padding=(0, 0, 0, 0))
    o.layer(
        "conv2d_transpose",
        o.integers((1, 10, 5, 6)),
        (10, 6, 4, 3),
        6,
        strides=(2, 3),
        padding=(1, 0, 2, 1),
        output_padding=(1, 0),
    )
    o.layer(
        "conv2d_transpose", o.integers((1, 8, 4, 4)), (8, 3, 3, 3), 6, strides=(1, 1), padding=(1, 1, 1, 1), groups=2
    )


def dense_layers(o: Operators) -> None:
    o.layer("dense", o.integers((1, 64)), (64, 10), 10, out_dtype="float32")
    o.layer("dense", o.integers((3, 100)), (100, 33), 33, (3, 33), qmin=120)
    o.layer("dense", o.integers((2, 7), "int8"), (7, 5), 5, out_dtype="int8", qmin=-8, qmax=7, out_zero_point=0)


def elementwise(o: Operators) -> None:
    result = {"out_zero_point": 100, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}
    pair = {"a_multiplier": 0.5, "b_multiplier": 1.5, "a_zero_point": 128, "b_zero_point": 3}
    o.add("add", [o.integers((1, 20, 5, 7)), o.integers((1, 20, 5, 7))], pair | result)
    o.add("add", [o.integers((1, 20, 5, 7)), o.integers((1, 20, 1, 1))], pair | result | {"qmin": 100, "qmax": 150})
    o.add(
        "multiply",
        [o.integers((1, 20, 5, 7)), o.integers((1, 20, 1, 1))],
        {"multiplier": 2.0**-7, "a_zero_point": 128, "b_zero_point": 3} | result,
    )
    o.add("requantize", [o.integers((1, 20, 5, 7), "int8")], {"multiplier": 2.5, "in_zero_point": -3} | result)
    o.add(
        "quantize",
        [o.floats((1, 3, 9, 9), 90.0)],
        {"inv_scale": 1.0, "zero_point": 100, "qmin": 0, "qmax": 255, "out_dtype": "uint8"},
    )
    o.add(
        "quantize",
        [o.floats((1, 3, 9, 9), 6.0)],
        {"inv_scale": 1.0, "zero_point": 0, "qmin": -8, "qmax": 7, "out_dtype": "int8"},
    )
    o.add("dequantize", [o.integers((1, 20, 5, 7))], {"scale": 0.0123, "zero_point": 77})
    o.add(
        "lookup", [o.integers((1, 20, 5, 7)), graph.constant(o.rng.integers(0, 256, 256).astype(np.uint8))], {"qmin": 0}
    )
    o.add(
        "lookup",
        [o.integers((1, 17), "int8", 4), graph.constant(o.rng.integers(-8, 8, 16).astype(np.int8))],
        {"qmin": -8},
    )
    o.add(
        "channel_lookup",
        [o.integers((1, 20, 5, 7)), graph.constant(o.rng.integers(0, 256, (20, 256)).astype(np.uint8))],
        {"qmin": 0},
    )


def poolings(o: Operators) -> None:
    average = {
        "in_zero_point": 13,
        "out_zero_point": 100,
        "multiplier": 1.5,
        "qmin": 0,
        "qmax": 255,
        "out_dtype": "uint8",
    }
    window = {"kernel": (3, 2), "strides": (2, 1), "padding": (1, 0, 0, 1)}
    o.add("max_pool2d", [o.integers((1, 32, 9, 9))], {"kernel": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1)})
    o.add("max_pool2d", [o.integers((1, 5, 8, 7), "int8")], window | {"ceil_mode": True})
    o.add(
        "max_pool2d",
        [o.integers((1, 5, 9, 9))],
        {"kernel": (2, 2), "strides": (1, 1), "padding": (0, 0, 0, 0), "dilation": (2, 2)},
    )
    o.add(
        "avg_pool2d",
        [o.integers((1, 32, 9, 9))],
        average | {"kernel": (2, 2), "strides": (2, 2), "padding": (0, 0, 0, 0)},
    )
    o.add("avg_pool2d", [o.integers((1, 5, 8, 7))], average | window | {"ceil_mode": True})
    o.add("avg_pool2d", [o.integers((1, 5, 8, 7))], average | window | {"count_include_pad": True})
    o.add("global_avg_pool2d", [o.integers((2, 33, 7, 7))], average | {"multiplier": 2.0**-5})


def moves(o: Operators) -> None:
    o.add(
        "concat",
        [o.integers((1, 16, 4, 5)), o.integers((1, 7, 4, 5))],
        {
            "axis": 1,
            "multipliers": (1.0, 0.5),
            "zero_points": (9, 30),
            "out_zero_point": 9,
            "qmin": 0,
            "qmax": 255,
            "out_dtype": "uint8",
        },
    )
    o.add("resize_nearest", [o.integers((1, 20, 3, 4))], {"rows": (0, 0, 1, 2, 2), "columns": (3, 1, 0)})
    o.add(
        "resize_linear",
        [o.integers((1, 20, 3, 4))],
        {
            "rows": (0, 1, 1, 2, 2, 2),
            "row_weights": (64, 64, 32, 96, 128, 0),
            "columns": (0, 1, 2, 3),
            "column_weights": (96, 32, 1, 127),
            "qmin": 0,
            "qmax": 255,
        },
    )
    o.add("pad", [o.integers((1, 20, 3, 4))], {"pad_width": (1, 2, 0, 3), "value": 17})
    o.add("pad", [o.integers((1, 5, 4, 4))], {"pad_width": (1, 2, 3, 0), "value": 0, "mode": "reflect"})
    o.add(
        "strided_slice",
        [o.integers((1, 20, 6, 6))],
        {"axes": (1, 3), "begin": (3, 5), "end": (17, -1), "strides": (2, -2)},
    )
    o.add("depth_to_space", [o.integers((1, 32, 3, 4))], {"block_size": 2, "mode": "DCR"})
    o.add("depth_to_space", [o.integers((1, 36, 3, 4))], {"block_size": 3, "mode": "CRD"})
    o.add("reshape", [o.integers((2, 20, 3, 4))], {"shape": (2, 240)})
    o.add("transpose", [o.integers((1, 20, 3, 4))], {"axes": (0, 3, 1, 2)})


FAMILIES = {f.__name__: f for f in (convolutions, depthwise_and_transposed, dense_layers, elementwise, poolings, moves)}
