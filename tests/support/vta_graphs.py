"""Integer graphs for the accelerator, operator by operator, with random constants; and their check: lowered operators
in numpy against `quant`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from vta_lowered import run_lowered

from lpsn_tvm import float_ops, quant
from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.schedules.vta.ops import TileOp
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.integer_graph import IntegerGraph, Node
from lpsn_tvm.targets.vta.lowering import lower_graph
from lpsn_tvm.targets.vta.network import HostStep, LoweredNetwork

OPERATORS = quant.OPERATORS | float_ops.OPERATORS


@dataclass
class GraphBuilder:
    """Adds operators whose integers have as many bits as the configuration; every method returns the variable."""

    config: VtaConfig
    seed: int = 0
    inputs: list[TensorInfo] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.limit = 1 << (self.config.out_bits - 1)

    def input(self, *shape: int, bits: int | None = None) -> str:
        """A quantized network input."""
        name = f"x{len(self.inputs)}"
        limit = self.limit if bits is None else 1 << (bits - 1)
        self.inputs.append(TensorInfo(name, shape, "float32"))
        self.values[name] = self.rng.integers(-limit, limit, shape).astype(np.float32)
        attrs = {"inv_scale": 1.0, "scale": 1.0, "zero_point": 0, "qmin": -limit, "qmax": limit - 1}
        return self.add("lpsn.quantize", (name,), attrs | {"out_dtype": "int8"}, f"{name}.q")

    def add(self, op: str, operands: tuple[Any, ...], attrs: dict[str, Any], name: str | None = None) -> str:
        name = name or f"{op.removeprefix('lpsn.')}.{len(self.nodes)}"
        arguments = [self.values[o] if isinstance(o, str) else o for o in operands]
        result = OPERATORS[op](*arguments, **attrs)
        self.nodes.append(Node(name, op, operands, attrs, result.shape, str(result.dtype)))
        self.values[name] = result
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def clamp(self, **attrs: Any) -> dict[str, Any]:
        return {"qmin": -self.limit, "qmax": self.limit - 1, "out_dtype": "int8", "rounding": "half_up"} | attrs

    def layer_constants(self, weight_shape: tuple[int, ...], outputs: int, shifts: tuple[int, int]) -> Any:
        limit = 1 << (self.config.wgt_bits - 1)
        weight = self.rng.integers(-limit, limit, weight_shape).astype(np.int8)
        bias = self.rng.integers(-300, 300, outputs).astype(np.int32)
        scale = np.exp2(-self.rng.integers(shifts[0], shifts[1] + 1, outputs).astype(np.float64))
        return weight, bias, scale.astype(np.float32)

    def conv2d(
        self,
        x: str,
        outputs: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        padding: int | tuple[int, int, int, int] | None = None,
        groups: int = 1,
        dilation: int | tuple[int, int] = 1,
        shifts: tuple[int, int] = (6, 9),
        residual: str | None = None,
        **attrs: Any,
    ) -> str:
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:
            padding = (kh // 2, kw // 2, kh // 2, kw // 2)
        geometry = {
            "strides": (stride, stride),
            "padding": (padding,) * 4 if isinstance(padding, int) else padding,
            "dilation": (dilation, dilation) if isinstance(dilation, int) else dilation,
            "groups": groups,
            "residual_shift": self.config.wgt_bits - 2,
        }
        constants = self.layer_constants((outputs, self.shape(x)[1] // groups, kh, kw), outputs, shifts)
        operands = (x, *constants) if residual is None else (x, *constants, residual)
        return self.add("lpsn.conv2d", operands, self.clamp(**geometry) | attrs)

    def conv2d_transpose(
        self, x: str, outputs: int, kernel: int, stride: int, padding: int, output_padding: int = 0, groups: int = 1
    ) -> str:
        geometry = {
            "strides": (stride, stride),
            "padding": (padding,) * 4,
            "dilation": (1, 1),
            "output_padding": (output_padding,) * 2,
            "groups": groups,
        }
        constants = self.layer_constants((self.shape(x)[1], outputs // groups, kernel, kernel), outputs, (6, 8))
        return self.add("lpsn.conv2d_transpose", (x, *constants), self.clamp(**geometry))

    def dense(self, x: str, outputs: int, shifts: tuple[int, int] = (6, 9), **attrs: Any) -> str:
        constants = self.layer_constants((self.shape(x)[1], outputs), outputs, shifts)
        return self.add("lpsn.dense", (x, *constants), self.clamp() | attrs)

    def sum(self, a: str, b: str, exponents: tuple[int, int] = (0, 0), **attrs: Any) -> str:
        multipliers = {"a_multiplier": 2.0 ** exponents[0], "b_multiplier": 2.0 ** exponents[1]}
        zeros = {f"{side}_zero_point": 0 for side in ("a", "b", "out")}
        return self.add("lpsn.add", (a, b), self.clamp(**multipliers, **zeros) | attrs)

    def requantize(self, x: str, exponent: int) -> str:
        attrs = self.clamp(multiplier=2.0**exponent, in_zero_point=0, out_zero_point=0)
        return self.add("lpsn.requantize", (x,), attrs)

    def concat(self, *parts: str, axis: int = 1, exponents: tuple[int, ...] | None = None) -> str:
        multipliers = tuple(2.0**e for e in exponents or (0,) * len(parts))
        attrs = self.clamp(axis=axis, multipliers=multipliers, zero_points=(0,) * len(parts), out_zero_point=0)
        return self.add("lpsn.concat", parts, attrs)

    def max_pool2d(self, x: str, kernel: int = 2, stride: int = 2, padding: int = 0, ceil_mode: bool = False) -> str:
        geometry = {"kernel": (kernel,) * 2, "strides": (stride,) * 2, "padding": (padding,) * 4, "dilation": (1, 1)}
        return self.add("lpsn.max_pool2d", (x,), geometry | {"ceil_mode": ceil_mode})

    def avg_pool2d(self, x: str, kernel: int, stride: int, padding: int = 0, **attrs: Any) -> str:
        geometry = {"kernel": (kernel,) * 2, "strides": (stride,) * 2, "padding": (padding,) * 4}
        common = self.clamp(in_zero_point=0, out_zero_point=0, multiplier=1.0, ceil_mode=False, count_include_pad=False)
        return self.add("lpsn.avg_pool2d", (x,), common | geometry | attrs)

    def global_avg_pool2d(self, x: str, exponent: int = 0) -> str:
        height, width = self.shape(x)[2:]
        multiplier = float(np.float32(2.0**exponent / (height * width)))
        attrs = self.clamp(in_zero_point=0, out_zero_point=0, multiplier=multiplier)
        return self.add("lpsn.global_avg_pool2d", (x,), attrs)

    def resize(self, x: str, factor: int) -> str:
        height, width = self.shape(x)[2:]
        rows, columns = (tuple(i // factor for i in range(e * factor)) for e in (height, width))
        return self.add("lpsn.resize_nearest", (x,), {"rows": rows, "columns": columns})

    def pad(self, x: str, *pads: int) -> str:
        return self.add("lpsn.pad", (x,), {"pad_width": pads, "value": 0, "mode": "constant"})

    def slice(self, x: str, axis: int, begin: int, end: int, step: int = 1) -> str:
        attrs = {"axes": (axis,), "begin": (begin,), "end": (end,), "strides": (step,)}
        return self.add("lpsn.strided_slice", (x,), attrs)

    def depth_to_space(self, x: str, block: int, mode: str = "DCR") -> str:
        return self.add("lpsn.depth_to_space", (x,), {"block_size": block, "mode": mode})

    def reshape(self, x: str, *shape: int) -> str:
        return self.add("lpsn.reshape", (x,), {"shape": shape})

    def dequantize(self, x: str) -> str:
        return self.add("lpsn.dequantize", (x,), {"scale": 0.5, "zero_point": 0})

    def graph(self, *outputs: str) -> IntegerGraph:
        return IntegerGraph(tuple(self.inputs), tuple(self.nodes), outputs)

    def check(self, *outputs: str) -> LoweredNetwork:
        """Lower, run in numpy, compare every output and everything else that the host sees."""
        network = lower_graph(self.graph(*outputs), self.config)
        found = run_lowered(network, {info.name: self.values[info.name] for info in self.inputs})
        for name in [*outputs, *(name for name in found if name in self.values)]:
            np.testing.assert_array_equal(found[name], self.values[name], err_msg=name)
        return network


def host_reasons(network: LoweredNetwork) -> dict[str, str]:
    """Operators on the host and why."""
    return {step.output: step.reason for step in network.steps if isinstance(step, HostStep)}


def tile_ops(network: LoweredNetwork) -> list[TileOp]:
    """Operators on the accelerator."""
    return [step for step in network.steps if isinstance(step, TileOp)]


def extended(b: GraphBuilder, pool: list[str], data: st.DataObject) -> str:
    """One more operator on variables that are there."""
    source = data.draw(st.sampled_from(pool))
    _, c, h, w = b.shape(source)
    alike = [v for v in pool if b.shape(v)[2:] == (h, w)]
    same = data.draw(st.sampled_from([v for v in alike if b.shape(v) == b.shape(source)]))
    other, is_small = data.draw(st.sampled_from(alike)), h * w < 100
    choices = {
        "conv": lambda: b.conv2d(source, data.draw(st.integers(1, 24)), min(h, w, 3)),
        "residual": lambda: b.conv2d(source, c, 1, residual=same, residual_multiplier=0.5, residual_shift=2),
        "depthwise": lambda: b.conv2d(source, c, min(h, w, 3), groups=c),
        "sum": lambda: b.sum(source, same, (data.draw(st.integers(-3, 3)), -1)),
        "concat": lambda: b.concat(source, other, exponents=(0, -1)),
        "copy": lambda: b.concat(source, other),
        "slice": lambda: b.slice(source, 1, c // 3, c),
        "crop": lambda: b.slice(source, 2, h // 3, h),
        "pool": lambda: b.max_pool2d(source, 3, 1, 1),
        "average": lambda: b.avg_pool2d(source, 3, 2, 1),
        "resize": lambda: b.resize(source, 2) if is_small else source,
        "shuffle": lambda: b.depth_to_space(source, 2) if c % 4 == 0 and is_small else source,
    }
    return choices[data.draw(st.sampled_from(sorted(choices)))]()
