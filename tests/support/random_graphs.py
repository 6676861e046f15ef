"""Random small CNNs as ONNX models, for differential and property tests.

    model = random_model(seed)                           # any of BLOCKS
    model = random_model(seed, blocks=("conv", "residual", "pool"))

    @given(models())
    def test_something(model): ...

Weights are scaled so that activations stay near unit variance. Input "input" is [1, C, H, W] float32; outputs are
"output" and perhaps "output2".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper


class Choices(Protocol):
    """Where random decisions come from: a seed, or hypothesis (which then shrinks them)."""

    def integer(self, low: int, high: int) -> int: ...

    def pick(self, options: Sequence[Any]) -> Any: ...


class SeededChoices:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]


class DrawnChoices:
    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))


class Net:
    """A network under construction. `x` is the current tensor, `shapes` knows all of them (NCHW)."""

    def __init__(self, choices: Choices, shape: tuple[int, int, int, int]) -> None:
        self.choices = choices
        self.rng = np.random.default_rng(choices.integer(0, 2**16))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {"input": shape}
        self.x = "input"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[self.x]

    def constant(self, value: np.ndarray) -> str:
        name = f"const.{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, *shape: int, fan: int) -> str:
        return self.constant((self.rng.standard_normal(shape) * (1.5 / fan) ** 0.5).astype(np.float32))

    def node(self, op: str, inputs: Sequence[str], **attrs: Any) -> str:
        name = f"/net/{op.lower()}.{len(self.nodes)}"
        out = f"{name}_out"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=name, **attrs))
        # Shape inference by ONNX itself: one node at a time, so that every block knows what it got.
        self.shapes[out] = self._infer(self.nodes[-1])
        return out

    def _infer(self, node: onnx.NodeProto) -> tuple[int, ...]:
        known = {i.name: i for i in self.initializers}
        inputs = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, self.shapes[n])
            for n in dict.fromkeys(node.input)
            if n in self.shapes
        ]
        outputs = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in node.output]
        used = [known[n] for n in dict.fromkeys(node.input) if n in known]
        graph = helper.make_graph([node], "one", inputs, outputs, used)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        for extra, info in zip(node.output[1:], inferred.graph.output[1:], strict=True):
            self.shapes[extra] = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        return tuple(d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim)

    def same_shape(self) -> list[str]:
        """Earlier tensors of the current shape."""
        return [name for name, shape in self.shapes.items() if shape == self.shape and name != self.x]

    # --- pieces ---

    def conv(
        self,
        x: str,
        out: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        pads: Any = None,
        bias: bool = True,
    ) -> str:
        channels = self.shapes[x][1]
        same = dilation * (kernel - 1) // 2
        inputs = [x, self.weight(out, channels // groups, kernel, kernel, fan=kernel * kernel * channels // groups)]
        if bias:
            inputs.append(self.constant((0.1 * self.rng.standard_normal(out)).astype(np.float32)))
        return self.node(
            "Conv",
            inputs,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            dilations=[dilation] * 2,
            group=groups,
            pads=list(pads or [same] * 4),
        )

    def batch_norm(self, x: str) -> str:
        n = self.shapes[x][1]
        vectors = [
            self.rng.uniform(0.5, 1.5, n),
            self.rng.normal(0, 0.2, n),
            self.rng.normal(0, 0.2, n),
            self.rng.uniform(0.5, 1.5, n),
        ]
        return self.node("BatchNormalization", [x, *(self.constant(v.astype(np.float32)) for v in vectors)])

    def activate(self, x: str, kind: str) -> str:
        if kind == "none":
            return x
        if kind == "Clip":
            return self.node("Clip", [x, self.constant(np.float32(0)), self.constant(np.float32(6))])
        if kind == "LeakyRelu":
            return self.node("LeakyRelu", [x], alpha=0.1)
        if kind == "PRelu":
            slope = self.rng.uniform(0.05, 0.4, (self.shapes[x][1], 1, 1))
            return self.node("PRelu", [x, self.constant(slope.astype(np.float32))])
        if kind == "HardSigmoid":
            return self.node("HardSigmoid", [x], alpha=1 / 6, beta=0.5)
        if kind == "SiLU":
            return self.node("Mul", [x, self.node("Sigmoid", [x])])
        return self.node(kind, [x])


RELUS = ("Relu", "Clip", "none")
ACTIVATIONS = (*RELUS, "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "SiLU")


def _conv(net: Net) -> None:
    c, (channels, height) = net.choices, net.shape[1:3]
    kernel = c.pick((1, 3, 3, 5))
    dilation = c.pick((1, 1, 2)) if kernel == 3 else 1
    groups = 2 if channels % 2 == 0 and c.integer(0, 4) == 0 else 1
    same = dilation * (kernel - 1) // 2
    pads = [same] * 4 if c.integer(0, 3) else [same, max(same - 1, 0), same + 1, same]
    stride = 2 if height >= 8 and c.integer(0, 3) == 0 else 1
    has_norm = bool(c.integer(0, 1))
    x = net.conv(
        net.x,
        2 * c.integer(2, 6),
        kernel,
        stride=stride,
        dilation=dilation,
        groups=groups,
        pads=pads,
        bias=not has_norm or bool(c.integer(0, 1)),
    )
    net.x = net.activate(net.batch_norm(x) if has_norm else x, c.pick(RELUS))


def _depthwise(net: Net) -> None:
    x = net.conv(
        net.x, net.shape[1], 3, groups=net.shape[1], stride=2 if net.shape[2] >= 8 and net.choices.integer(0, 1) else 1
    )
    net.x = net.activate(net.batch_norm(x), net.choices.pick(RELUS))


def _transposed(net: Net) -> None:
    c, channels = net.choices, net.shape[1]
    if net.shape[2] > 10:
        return
    kernel, stride = c.pick(((2, 2), (3, 2), (4, 2), (3, 1)))
    extra = c.integer(0, stride - 1)
    groups = 2 if channels % 2 == 0 and c.integer(0, 3) == 0 else 1
    out = 2 * c.integer(2, 4)
    pad = c.integer(0, (kernel - 1) // 2)
    weight = net.weight(
        channels, out // groups, kernel, kernel, fan=kernel * kernel * channels // groups // stride**2 or 1
    )
    bias = net.constant((0.1 * net.rng.standard_normal(out)).astype(np.float32))
    net.x = net.node(
        "ConvTranspose",
        [net.x, weight, bias],
        kernel_shape=[kernel] * 2,
        strides=[stride] * 2,
        group=groups,
        pads=[pad] * 4,
        output_padding=[extra] * 2,
    )


def _pool(net: Net) -> None:
    c, height = net.choices, net.shape[2]
    if height < 4:
        return
    kind = c.pick(("MaxPool", "AveragePool"))
    kernel, pad = c.pick(((2, 0), (3, 1), (3, 0)))
    stride = c.pick((1, 2))
    # A window that starts beyond the input is dropped by some implementations and kept by others: hang over only where
    # none does.
    hangs = (height + 2 * pad - kernel) % stride != 0
    attrs: dict[str, Any] = {"ceil_mode": int(hangs and c.integer(0, 1) and (height + pad) % stride != 0)}
    if kind == "AveragePool":
        attrs["count_include_pad"] = 0 if attrs["ceil_mode"] else c.integer(0, 1)
    net.x = net.node(kind, [net.x], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, **attrs)


def _residual(net: Net) -> None:
    skip, channels = net.x, net.shape[1]
    x = net.activate(net.conv(net.x, 2 * net.choices.integer(2, 5), 3), "Relu")
    x = net.batch_norm(net.conv(x, channels, 3, bias=False))
    operands = [x, skip] if net.choices.integer(0, 1) else [skip, x]
    net.x = net.activate(net.node("Add", operands), net.choices.pick(RELUS))


def _add(net: Net) -> None:
    others = net.same_shape()
    if others:
        net.x = net.node("Add", [net.x, net.choices.pick(others)])


def _concat(net: Net) -> None:
    others = [n for n, s in net.shapes.items() if len(s) == 4 and s[2:] == net.shape[2:] and s[1] <= 12 and n != net.x]
    if others and net.shape[1] <= 24:
        net.x = net.node("Concat", [net.x, net.choices.pick(others)], axis=1)


def _split(net: Net) -> None:
    channels = net.shape[1]
    if channels < 4:
        return
    at = net.choices.integer(1, channels - 1)
    parts = [
        net.node(
            "Slice", [net.x, net.constant(np.array([a])), net.constant(np.array([b])), net.constant(np.array([1]))]
        )
        for a, b in ((0, at), (at, channels))
    ]
    net.x = net.node("Concat", [net.activate(parts[1], "Relu"), parts[0]], axis=1)


def _squeeze_excite(net: Net) -> None:
    channels = net.shape[1]
    x = net.node("GlobalAveragePool", [net.x])
    x = net.activate(net.conv(x, 4, 1), "Relu")
    x = net.activate(net.conv(x, channels, 1), net.choices.pick(("Sigmoid", "HardSigmoid")))
    net.x = net.node("Mul", [net.x, x])


def _resize(net: Net) -> None:
    if net.shape[2] > 10:
        return
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    attrs = net.choices.pick((
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
    ))  # fmt: skip
    net.x = net.node("Resize", [net.x, "", scales], **attrs)


def _pad(net: Net) -> None:
    mode = net.choices.pick(("constant", "reflect", "edge"))
    if net.shape[2] < 3 or net.shape[3] < 3:
        return
    amounts = [net.choices.integer(0, 2) for _ in range(4)]
    pads = net.constant(np.array([0, 0, *amounts[:2], 0, 0, *amounts[2:]], np.int64))
    net.x = net.node("Pad", [net.x, pads], mode=mode)


def _depth_to_space(net: Net) -> None:
    if net.shape[1] % 4 == 0 and net.shape[2] <= 10:
        net.x = net.node("DepthToSpace", [net.x], blocksize=2, mode=net.choices.pick(("DCR", "CRD")))


def _shuffle(net: Net) -> None:
    n, channels, height, width = net.shape
    if channels % 2:
        return
    shape = net.constant(np.array([n, 2, channels // 2, height, width], np.int64))
    x = net.node("Reshape", [net.x, shape])
    x = net.node("Transpose", [x], perm=[0, 2, 1, 3, 4])
    net.x = net.node("Reshape", [x, net.constant(np.array([n, channels, height, width], np.int64))])


def _activation(net: Net) -> None:
    net.x = net.activate(net.x, net.choices.pick(ACTIVATIONS))


def _instance_norm(net: Net) -> None:
    n = net.shape[1]
    if net.shape[2] * net.shape[3] < 4:
        return
    vectors = [net.rng.uniform(0.5, 1.5, n), net.rng.normal(0, 0.2, n)]
    net.x = net.node("InstanceNormalization", [net.x, *(net.constant(v.astype(np.float32)) for v in vectors)])


def _constant_arithmetic(net: Net) -> None:
    op = net.choices.pick(("Add", "Mul", "Sub", "Div"))
    value = net.rng.uniform(0.5, 1.5, (1, net.shape[1], 1, 1)).astype(np.float32)
    net.x = net.node(op, [net.x, net.constant(value)])


BLOCKS: dict[str, Callable[[Net], None]] = {
    "conv": _conv,
    "depthwise": _depthwise,
    "transposed": _transposed,
    "pool": _pool,
    "residual": _residual,
    "add": _add,
    "concat": _concat,
    "split": _split,
    "squeeze_excite": _squeeze_excite,
    "resize": _resize,
    "pad": _pad,
    "depth_to_space": _depth_to_space,
    "shuffle": _shuffle,
    "activation": _activation,
    "instance_norm": _instance_norm,
    "constant_arithmetic": _constant_arithmetic,
}


def build_model(choices: Choices, blocks: Sequence[str] = tuple(BLOCKS), max_blocks: int = 6) -> onnx.ModelProto:
    """A network of 1 to `max_blocks` blocks and a head, decided by `choices`."""
    size = choices.integer(6, 12)
    net = Net(choices, (1, choices.pick((1, 3, 4)), size, size + choices.integer(0, 2)))
    if choices.integer(0, 3):
        net.x = net.activate(net.conv(net.x, 8, 3), "Relu")
    for _ in range(choices.integer(1, max_blocks)):
        BLOCKS[choices.pick(blocks)](net)
    outputs = [net.x]
    head = choices.pick(("none", "conv", "pooled", "flat"))
    if head == "conv":
        outputs = [net.conv(net.x, 3, 1)]
    elif head != "none":
        x = net.node("GlobalAveragePool", [net.x]) if head == "pooled" else net.x
        x = net.node("Flatten", [x])
        width = net.shapes[x][1]
        bias = net.constant((0.1 * net.rng.standard_normal(5)).astype(np.float32))
        outputs = [net.node("Gemm", [x, net.weight(5, width, fan=width), bias], transB=1)]
    if choices.integer(0, 7) == 0 and net.x not in (outputs[0], "input"):
        outputs.append(net.x)
    return _finish(net, outputs)


def _finish(net: Net, outputs: list[str]) -> onnx.ModelProto:
    # Output names by renaming would be nicer to read, an Identity also serves a network that returns its input.
    names = [f"output{i + 1 if i else ''}" for i in range(len(outputs))]
    identities = [helper.make_node("Identity", [o], [n], name=f"/{n}") for n, o in zip(names, outputs, strict=True)]
    nodes = [*net.nodes, *identities]
    infos = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, net.shapes[o]) for n, o in zip(names, outputs, strict=True)
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, net.shapes["input"])]
    graph = helper.make_graph(nodes, "random_cnn", inputs, infos, net.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def random_model(seed: int, blocks: Sequence[str] = tuple(BLOCKS), max_blocks: int = 6) -> onnx.ModelProto:
    """The network of a seed."""
    return build_model(SeededChoices(seed), blocks, max_blocks)


def random_input(model: onnx.ModelProto, batch: int = 1, seed: int = 0) -> np.ndarray:
    """float32[batch, C, H, W] standard normal values for the model's input."""
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(seed).standard_normal((batch, *shape[1:])).astype(np.float32)


@st.composite
def models(draw: Any, blocks: Sequence[str] = tuple(BLOCKS), max_blocks: int = 6) -> onnx.ModelProto:
    """Hypothesis strategy; shrinks to fewer and simpler blocks."""
    return build_model(DrawnChoices(draw), blocks, max_blocks)
