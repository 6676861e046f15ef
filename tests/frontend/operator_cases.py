"""One branch of a network per operator and attribute: name -> function (net, x [1, 8, 9, 7]) -> value name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.onnx_nets import OnnxNet

Case = Callable[[OnnxNet, str], str]


def conv(channels: int = 6, kernel: int = 3, group: int = 1, bias: bool = True, **attrs: Any) -> Case:
    def build(net: OnnxNet, x: str) -> str:
        operands = [x, net.weight(channels, 8 // group, kernel, kernel)] + ([net.weight(channels)] if bias else [])
        return str(net.add("Conv", *operands, group=group, **attrs))

    return build


def deconv(channels: int = 6, kernel: int = 3, group: int = 1, bias: bool = True, **attrs: Any) -> Case:
    def build(net: OnnxNet, x: str) -> str:
        operands = [x, net.weight(8, channels // group, kernel, kernel)] + ([net.weight(channels)] if bias else [])
        return str(net.add("ConvTranspose", *operands, group=group, **attrs))

    return build


def op(name: str, **attrs: Any) -> Case:
    return lambda net, x: str(net.add(name, x, **attrs))


def op_const(name: str, value: Any, *, first: bool = False, **attrs: Any) -> Case:
    def build(net: OnnxNet, x: str) -> str:
        constant = net.const(value)
        return str(net.add(name, *((constant, x) if first else (x, constant)), **attrs))

    return build


def op_ints(name: str, *values: Any, **attrs: Any) -> Case:
    """Operands that are int64 constants; None for one that is left out."""
    return lambda net, x: str(net.add(name, x, *("" if v is None else net.const(v, "int64") for v in values), **attrs))


def flat(net: OnnxNet, x: str) -> str:
    pooled = net.add("GlobalAveragePool", x)
    return str(net.add("Flatten", pooled))


def gemm(trans_b: int, **attrs: Any) -> Case:
    return lambda net, x: str(
        net.add(
            "Gemm",
            flat(net, x),
            net.weight(5, 8) if trans_b else net.weight(8, 5),
            net.weight(5),
            transB=trans_b,
            **attrs,
        )
    )


def gemm_trans_a(net: OnnxNet, x: str) -> str:
    column = net.add("Transpose", flat(net, x), perm=[1, 0])
    return str(net.add("Gemm", column, net.weight(8, 5), transA=1))


def matmul(net: OnnxNet, x: str) -> str:
    return str(net.add("Add", net.add("MatMul", flat(net, x), net.weight(8, 5)), net.weight(5)))


def matmul_wide(net: OnnxNet, x: str) -> str:
    return str(net.add("Add", net.add("MatMul", x, net.weight(7, 5)), net.weight(5)))


def attention(net: OnnxNet, x: str) -> str:
    return str(net.add("MatMul", x, net.add("Transpose", x, perm=[0, 1, 3, 2])))


def batch_norm(net: OnnxNet, x: str, channels: int = 8) -> str:
    variance = net.const(np.abs(net.rng.standard_normal(channels)) + 0.5)
    return str(
        net.add(
            "BatchNormalization",
            x,
            net.weight(channels),
            net.weight(channels),
            net.weight(channels),
            variance,
            epsilon=1e-3,
        )
    )


def conv_batch_norm(net: OnnxNet, x: str) -> str:
    return str(net.add("Relu", batch_norm(net, conv(channels=6, bias=False)(net, x), 6)))


def deconv_batch_norm(net: OnnxNet, x: str) -> str:
    return batch_norm(net, deconv(channels=6, group=2, strides=[2, 2])(net, x), 6)


def dense_batch_norm(net: OnnxNet, x: str) -> str:
    return batch_norm(net, gemm(1)(net, x), 5)


def flat_batch_norm(net: OnnxNet, x: str) -> str:
    return str(net.add("Relu", batch_norm(net, flat(net, x))))


def shared_batch_norm(net: OnnxNet, x: str) -> str:
    """The convolution has a second reader, so that the batch norm becomes a layer of its own."""
    c = conv(channels=8, pads=[1, 1, 1, 1])(net, x)
    return str(net.add("Add", net.add("Relu", batch_norm(net, c)), c))


def instance_norm(net: OnnxNet, x: str) -> str:
    return str(net.add("InstanceNormalization", x, net.weight(8), net.weight(8)))


def squeeze_excite(net: OnnxNet, x: str) -> str:
    pooled = net.add("GlobalAveragePool", x)
    small = net.add("Relu", net.add("Conv", pooled, net.weight(4, 8, 1, 1), net.weight(4)))
    gate = net.add("HardSigmoid", net.add("Conv", small, net.weight(8, 4, 1, 1), net.weight(8)), alpha=1 / 6, beta=0.5)
    return str(net.add("Mul", x, gate))


def silu(net: OnnxNet, x: str) -> str:
    return str(net.add("Mul", x, net.add("Sigmoid", x)))


def relu6(net: OnnxNet, x: str) -> str:
    return str(net.add("Clip", net.add("Mul", x, net.const(5.0)), net.const(0.0), net.const(6.0)))


def clip(low: float | None, high: float | None) -> Case:
    return lambda net, x: str(net.add("Clip", x, *("" if bound is None else net.const(bound) for bound in (low, high))))


def min_max(net: OnnxNet, x: str) -> str:
    return str(net.add("Min", net.add("Max", x, net.const(-0.5)), net.const([0.75])))


def split_concat(net: OnnxNet, x: str) -> str:
    a, b, c = net.add("Split", x, net.const([2, 5, 1], "int64"), outputs=3, axis=1)
    return str(net.add("Concat", c, a, net.add("Relu", b), axis=1))


def split_even(net: OnnxNet, x: str) -> str:
    a, b = net.add("Split", x, outputs=2, axis=-3)
    return str(net.add("Add", a, b))


def channel_shuffle(net: OnnxNet, x: str) -> str:
    wide = net.add("Reshape", x, net.const([0, 2, 4, 9, 7], "int64"))
    return str(net.add("Reshape", net.add("Transpose", wide, perm=[0, 2, 1, 3, 4]), net.const([0, -1, 9, 7], "int64")))


def pixel_shuffle_by_hand(net: OnnxNet, x: str) -> str:
    wide = net.add("Reshape", x, net.const([1, 2, 2, 2, 9, 7], "int64"))
    return str(
        net.add("Reshape", net.add("Transpose", wide, perm=[0, 1, 4, 2, 5, 3]), net.const([1, 2, 18, 14], "int64"))
    )


def conv_depth_to_space(net: OnnxNet, x: str) -> str:
    return str(net.add("DepthToSpace", net.add("Relu", conv(channels=12)(net, x)), blocksize=2, mode="DCR"))


def space_to_depth(net: OnnxNet, x: str) -> str:
    even = net.add("Slice", x, net.const([0, 0], "int64"), net.const([8, 6], "int64"), net.const([2, 3], "int64"))
    return str(net.add("SpaceToDepth", even, blocksize=2))


def resize(mode: str, coordinates: str, *, scales: Any = None, sizes: Any = None, **attrs: Any) -> Case:
    def build(net: OnnxNet, x: str) -> str:
        operands = ["", net.const(scales)] if scales is not None else ["", "", net.const(sizes, "int64")]
        return str(net.add("Resize", x, *operands, mode=mode, coordinate_transformation_mode=coordinates, **attrs))

    return build


def pad(widths: list[int], value: float | None = None, **attrs: Any) -> Case:
    def build(net: OnnxNet, x: str) -> str:
        operands = [net.const(widths, "int64")] + ([] if value is None else [net.const(value)])
        return str(net.add("Pad", x, *operands, **attrs))

    return build


def padded_conv(net: OnnxNet, x: str) -> str:
    return conv(pads=[1, 0, 0, 1])(net, pad([0, 0, 1, 2, 0, 0, 0, 1])(net, x))


def padded_max_pool(net: OnnxNet, x: str) -> str:
    return str(
        net.add(
            "MaxPool", pad([0, 0, 1, 1, 0, 0, 1, 1])(net, str(net.add("Relu", x))), kernel_shape=[3, 3], strides=[2, 2]
        )
    )


def channels_last(net: OnnxNet, x: str) -> str:
    """What tf2onnx leaves: transposes around every convolution, bias and activation between them."""
    last = net.add("Transpose", x, perm=[0, 2, 3, 1])
    first = net.add("Transpose", last, perm=[0, 3, 1, 2])
    c = net.add("Transpose", conv(channels=6, bias=False)(net, str(first)), perm=[0, 2, 3, 1])
    r = net.add("Relu", net.add("Add", c, net.weight(6)))
    pooled = net.add("ReduceMean", r, axes=[1, 2], keepdims=0)
    return str(net.add("Add", net.add("MatMul", pooled, net.weight(6, 4)), net.weight(4)))


def channels_last_flatten(net: OnnxNet, x: str) -> str:
    last = net.add("Transpose", conv(channels=6)(net, x), perm=[0, 2, 3, 1])
    return str(net.add("Gemm", net.add("Flatten", net.add("Relu", last)), net.weight(7 * 5 * 6, 4), net.weight(4)))


def conv1d(net: OnnxNet, x: str) -> str:
    flat1d = net.add("Reshape", x, net.const([1, 8, 63], "int64"))
    c = net.add("Conv", flat1d, net.weight(6, 8, 3), net.weight(6), strides=[2], pads=[1, 0], dilations=[2])
    return str(net.add("MaxPool", c, kernel_shape=[3], strides=[2], pads=[1, 1]))


def prelu(*shape: int) -> Case:
    return lambda net, x: str(net.add("PRelu", x, net.weight(*shape)))


CASES: dict[str, Case] = {
    "conv": conv(pads=[1, 1, 1, 1]),
    "conv-no-bias": conv(bias=False),
    "conv-grouped": conv(channels=6, group=2),
    "conv-depthwise": conv(channels=8, group=8, pads=[1, 1, 1, 1]),
    "conv-depthwise-multiplier": conv(channels=16, group=8),
    "conv-dilated": conv(dilations=[2, 3], pads=[2, 3, 2, 3]),
    "conv-asymmetric": conv(pads=[0, 1, 2, 0], strides=[2, 1]),
    "conv-same-upper": conv(auto_pad="SAME_UPPER", strides=[2, 2]),
    "conv-same-lower": conv(auto_pad="SAME_LOWER", strides=[2, 2], kernel=4),
    "conv-valid": conv(auto_pad="VALID"),
    "conv1d": conv1d,
    "deconv": deconv(strides=[2, 2]),
    "deconv-no-bias": deconv(bias=False, strides=[2, 2], pads=[1, 1, 1, 1]),
    "deconv-output-padding": deconv(strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    "deconv-grouped": deconv(group=2, strides=[2, 2], pads=[1, 0, 0, 1]),
    "deconv-dilated": deconv(dilations=[2, 2]),
    "deconv-output-shape": deconv(strides=[2, 2], output_shape=[18, 14]),
    "deconv-same": deconv(strides=[2, 2], auto_pad="SAME_UPPER"),
    "gemm": gemm(0),
    "gemm-trans-b": gemm(1),
    "gemm-alpha-beta": gemm(1, alpha=0.5, beta=2.0),
    "gemm-trans-a": gemm_trans_a,
    "matmul": matmul,
    "matmul-wide": matmul_wide,
    "matmul-two-tensors": attention,
    "batch-norm": lambda net, x: batch_norm(net, x),
    "batch-norm-conv": conv_batch_norm,
    "batch-norm-deconv": deconv_batch_norm,
    "batch-norm-dense": dense_batch_norm,
    "batch-norm-flat": flat_batch_norm,
    "batch-norm-shared": shared_batch_norm,
    "instance-norm": instance_norm,
    "squeeze-excite": squeeze_excite,
    "max-pool": op("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "max-pool-ceil": op("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    "max-pool-ceil-pad": op("MaxPool", kernel_shape=[3, 3], strides=[2, 3], pads=[1, 0, 1, 0], ceil_mode=1),
    "max-pool-ceil-drops-a-window": op("MaxPool", kernel_shape=[2, 2], strides=[3, 3], pads=[0, 0, 1, 1], ceil_mode=1),
    "max-pool-dilated": op("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]),
    "max-pool-same": op("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    "max-pool-after-zero-pad": padded_max_pool,
    "avg-pool": op("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "avg-pool-count": op("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    "avg-pool-ceil": op("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    "avg-pool-ceil-drops-a-window": op(
        "AveragePool", kernel_shape=[2, 2], strides=[3, 3], pads=[0, 0, 1, 1], ceil_mode=1
    ),
    "avg-pool-ceil-count": op(
        "AveragePool", kernel_shape=[3, 3], strides=[2, 3], pads=[1, 0, 1, 0], ceil_mode=1, count_include_pad=1
    ),
    "avg-pool-same": op("AveragePool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER"),
    "avg-pool-global": op("AveragePool", kernel_shape=[9, 7]),
    "global-avg-pool": op("GlobalAveragePool"),
    "global-max-pool": op("GlobalMaxPool"),
    "reduce-mean": op("ReduceMean", axes=[-1, 2], keepdims=0),
    "reduce-mean-keep": op("ReduceMean", axes=[2, 3], keepdims=1),
    "reduce-max-channels": op("ReduceMax", axes=[1]),
    "add": lambda net, x: str(net.add("Add", x, net.add("Relu", x))),
    "sub": lambda net, x: str(net.add("Sub", net.add("Relu", x), x)),
    "mul": lambda net, x: str(net.add("Mul", x, net.add("Tanh", x))),
    "div": lambda net, x: str(net.add("Div", x, net.add("Exp", x))),
    "sum3": lambda net, x: str(net.add("Sum", x, net.add("Relu", x), net.add("Tanh", x))),
    "mean2": lambda net, x: str(net.add("Mean", x, net.add("Relu", x))),
    "scalar-sub": op_const("Sub", 0.5),
    "scalar-rsub": op_const("Sub", 0.5, first=True),
    "scalar-div": op_const("Div", 3.0),
    "scalar-rdiv": lambda net, x: str(net.add("Div", net.const(2.0), net.add("Exp", x))),
    "channel-mul": op_const("Mul", np.linspace(0.5, 2, 8).reshape(8, 1, 1)),
    "channel-affine": lambda net, x: str(
        net.add("Add", net.add("Mul", x, net.weight(1, 8, 1, 1)), net.weight(1, 8, 1, 1))
    ),
    "row-add": op_const("Add", np.linspace(-1, 1, 7)),
    "pow": op_const("Pow", 2.0),
    "concat": lambda net, x: str(net.add("Concat", x, net.add("Relu", x), axis=1)),
    "split-concat": split_concat,
    "split-even": split_even,
    "slice": op_ints("Slice", [1, -5], [100, -1], [1, 2], [2, 1]),
    "slice-reverse": op_ints("Slice", [-1], [-100], [3], [-1]),
    "gather": op_ints("Gather", [3, 1, 6], axis=1),
    "gather-index": op_ints("Gather", 2, axis=1),
    "pad-constant": pad([0, 0, 1, 2, 0, 0, 0, 1], 0.5),
    "pad-reflect": pad([0, 0, 1, 2, 0, 0, 3, 1], mode="reflect"),
    "pad-edge": pad([0, 0, 1, 2, 0, 0, 3, 1], mode="edge"),
    "pad-channels": pad([0, 2, 0, 0, 0, 1, 0, 0]),
    "pad-crop": pad([0, 0, -1, 1, 0, 0, 2, -2]),
    "pad-conv": padded_conv,
    "resize-nearest": resize("nearest", "asymmetric", scales=[1, 1, 2, 3], nearest_mode="floor"),
    "resize-nearest-half-pixel": resize("nearest", "half_pixel", scales=[1, 1, 2, 2]),
    "resize-nearest-down": resize("nearest", "half_pixel", sizes=[1, 8, 4, 5]),
    "resize-nearest-align": resize("nearest", "align_corners", sizes=[1, 8, 13, 11], nearest_mode="round_prefer_ceil"),
    "resize-linear": resize("linear", "half_pixel", scales=[1, 1, 2, 2]),
    "resize-linear-align": resize("linear", "align_corners", sizes=[1, 8, 17, 10]),
    "resize-linear-asymmetric": resize("linear", "asymmetric", sizes=[1, 8, 18, 21]),
    "resize-linear-pytorch": resize("linear", "pytorch_half_pixel", sizes=[1, 8, 5, 20]),
    "resize-cubic": resize("cubic", "half_pixel", scales=[1, 1, 2, 2]),
    "depth-to-space-crd": op("DepthToSpace", blocksize=2, mode="CRD"),
    "depth-to-space-dcr": op("DepthToSpace", blocksize=2, mode="DCR"),
    "depth-to-space-dcr-conv": conv_depth_to_space,
    "depth-to-space-by-hand": pixel_shuffle_by_hand,
    "space-to-depth": space_to_depth,
    "channel-shuffle": channel_shuffle,
    "reshape": op_ints("Reshape", [0, -1]),
    "flatten": op("Flatten", axis=2),
    "transpose": op("Transpose", perm=[0, 2, 3, 1]),
    "squeeze-unsqueeze": lambda net, x: str(
        net.add("Unsqueeze", net.add("Squeeze", x, net.const([0], "int64")), net.const([0, -1], "int64"))
    ),
    "expand": lambda net, x: str(net.add("Expand", net.add("GlobalAveragePool", x), net.const([1, 8, 3, 2], "int64"))),
    "tile": op_ints("Tile", [1, 1, 2, 3]),
    "relu": op("Relu"),
    "relu6": relu6,
    "clip-low": clip(0.25, None),
    "clip-high": clip(None, 0.25),
    "min-max": min_max,
    "leaky-relu": op("LeakyRelu", alpha=0.2),
    "prelu-channels": prelu(8, 1, 1),
    "prelu-one": prelu(1),
    "prelu-elements": prelu(8, 9, 7),
    "sigmoid": op("Sigmoid"),
    "hard-sigmoid": op("HardSigmoid"),
    "hard-swish": op("HardSwish"),
    "silu": silu,
    "tanh": op("Tanh"),
    "elu": op("Elu", alpha=0.7),
    "selu": op("Selu"),
    "celu": op("Celu", alpha=1.5),
    "softplus": op("Softplus"),
    "softsign": op("Softsign"),
    "softmax": op("Softmax", axis=1),
    "log-softmax": op("LogSoftmax"),
    "lrn": op("LRN", size=5),
    "group-norm-by-layer-norm": lambda net, x: str(net.add("LayerNormalization", x, net.weight(7), net.weight(7))),
    "channels-last": channels_last,
    "channels-last-flatten": channels_last_flatten,
}

LEGACY_CASES: dict[str, Case] = {
    "clip": op("Clip", min=-0.5, max=0.5),
    "clip-low": op("Clip", min=0.0),
    "pad": op("Pad", pads=[0, 0, 1, 2, 0, 0, 0, 1], mode="reflect"),
    "slice": op("Slice", axes=[1, 2], starts=[1, 0], ends=[5, -1]),
    "split": lambda net, x: str(
        net.add("Concat", *reversed(net.add("Split", x, outputs=2, axis=1, split=[3, 5])), axis=1)
    ),
    "upsample": op_const("Upsample", [1, 1, 2, 2], mode="nearest"),
    "upsample-linear": op_const("Upsample", [1, 1, 2, 3], mode="linear"),
    "squeeze": lambda net, x: str(net.add("Squeeze", net.add("GlobalAveragePool", x), axes=[2, 3])),
    "unsqueeze": op("Unsqueeze", axes=[1]),
    "softmax": op("Softmax", axis=1),
    "dropout": op("Dropout", ratio=0.3),
    "reduce-sum": op("ReduceSum", axes=[1], keepdims=0),
    "depth-to-space": op("DepthToSpace", blocksize=2),
    "gemm": gemm(1),
    "batch-norm": lambda net, x: batch_norm(net, x),
}
