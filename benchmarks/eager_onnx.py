"""A writer of ONNX networks that runs every operator on a sample as it is added."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper


def smooth_noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 images with a spectrum that falls with frequency, mean 0, deviation about 1 per sample."""
    rng = np.random.default_rng(seed)
    n, c, h, w = shape
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None, :]
    falloff = 1.0 / np.maximum(np.sqrt(fy**2 + fx**2), 1.0 / max(h, w))
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((n, c, h, w))) * falloff).real
    field = 0.7 * field[:, :1] + 0.3 * field if c > 1 else field
    field -= field.mean(axis=(1, 2, 3), keepdims=True)
    return (field / field.std(axis=(1, 2, 3), keepdims=True)).astype(np.float32)


class Net:
    """Writes ONNX nodes and runs them on a sample at the same time. Values are named by their node."""

    def __init__(
        self, name: str, shape: tuple[int, int, int], seed: int, dynamic_batch: bool = True, samples: int = 4
    ) -> None:
        self.name, self.rng, self.shape = name, np.random.default_rng(seed), shape
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.values: dict[str, torch.Tensor] = {"input": torch.from_numpy(smooth_noise((samples, *shape), seed + 1))}
        self.count: dict[str, int] = {}
        self.batch: str | int = "N" if dynamic_batch else 1

    def fresh(self, kind: str) -> str:
        self.count[kind] = self.count.get(kind, 0) + 1
        return f"{kind}{self.count[kind]}"

    def weight(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], value: torch.Tensor, name: str | None = None, **attrs: object) -> str:
        name = name or self.fresh(op.lower())
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attrs))
        self.values[name] = value
        return name

    def channels(self, x: str) -> int:
        return int(self.values[x].shape[1])

    def conv(
        self,
        x: str,
        out: int,
        kernel: int = 3,
        stride: int = 1,
        pad: int | None = None,
        groups: int = 1,
        bias: bool = False,
        dilation: int = 1,
        name: str | None = None,
        gain: float = 2.0,
    ) -> str:
        name = name or self.fresh("conv")
        pad = (kernel - 1) * dilation // 2 if pad is None else pad
        shape = (out, self.channels(x) // groups, kernel, kernel)
        w = (self.rng.standard_normal(shape) * np.sqrt(gain / (shape[1] * kernel * kernel))).astype(np.float32)
        inputs = [x, self.weight(name + ".weight", w)]
        b = (self.rng.standard_normal(out) * 0.1).astype(np.float32) if bias else None
        if b is not None:
            inputs.append(self.weight(name + ".bias", b))
        y = F.conv2d(
            self.values[x],
            torch.from_numpy(w),
            None if b is None else torch.from_numpy(b),
            stride,
            pad,
            dilation,
            groups,
        )
        return self.node(
            "Conv",
            inputs,
            y,
            name,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[pad] * 4,
            group=groups,
            dilations=[dilation] * 2,
        )

    def conv_transpose(
        self, x: str, out: int, kernel: int, stride: int, pad: int, output_pad: int = 0, bias: bool = False
    ) -> str:
        name = self.fresh("convtranspose")
        w = (
            self.rng.standard_normal((self.channels(x), out, kernel, kernel))
            * np.sqrt(2.0 * stride * stride / (self.channels(x) * kernel * kernel))
        ).astype(np.float32)
        inputs = [x, self.weight(name + ".weight", w)]
        b = (self.rng.standard_normal(out) * 0.1).astype(np.float32) if bias else None
        if b is not None:
            inputs.append(self.weight(name + ".bias", b))
        y = F.conv_transpose2d(
            self.values[x], torch.from_numpy(w), None if b is None else torch.from_numpy(b), stride, pad, output_pad
        )
        return self.node(
            "ConvTranspose",
            inputs,
            y,
            name,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[pad] * 4,
            output_padding=[output_pad] * 2,
        )

    def norm(self, x: str) -> str:
        """Batch norm with the statistics of the sample, and a scale and shift as training leaves them."""
        name, v, c = self.fresh("bn"), self.values[x], self.channels(x)
        mean, var = v.mean(dim=(0, 2, 3)), v.var(dim=(0, 2, 3), unbiased=False) + 1e-3
        gamma = (self.rng.uniform(0.5, 1.5, c)).astype(np.float32)
        beta = (self.rng.standard_normal(c) * 0.2).astype(np.float32)
        arrays = {"scale": gamma, "bias": beta, "mean": mean.numpy(), "var": var.numpy()}
        inputs = [x] + [self.weight(f"{name}.{key}", value) for key, value in arrays.items()]
        y = F.batch_norm(v, mean, var, torch.from_numpy(gamma), torch.from_numpy(beta), False, 0.0, 1e-5)
        return self.node("BatchNormalization", inputs, y, name, epsilon=1e-5)

    def instance_norm(self, x: str) -> str:
        name, c = self.fresh("instancenorm"), self.channels(x)
        inputs = [
            x,
            self.weight(name + ".scale", np.ones(c, np.float32)),
            self.weight(name + ".bias", np.zeros(c, np.float32)),
        ]
        return self.node("InstanceNormalization", inputs, F.instance_norm(self.values[x]), name, epsilon=1e-5)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x], F.relu(self.values[x]))

    def relu6(self, x: str) -> str:
        name = self.fresh("clip")
        low, high = self.weight(name + ".min", np.float32(0)), self.weight(name + ".max", np.float32(6))
        return self.node("Clip", [x, low, high], self.values[x].clamp(0, 6), name)

    def tanh(self, x: str) -> str:
        return self.node("Tanh", [x], self.values[x].tanh())

    def add(self, a: str, b: str) -> str:
        return self.node("Add", [a, b], self.values[a] + self.values[b])

    def concat(self, *xs: str) -> str:
        return self.node("Concat", list(xs), torch.cat([self.values[x] for x in xs], 1), axis=1)

    def max_pool(self, x: str, kernel: int, stride: int, pad: int = 0) -> str:
        return self.node(
            "MaxPool",
            [x],
            F.max_pool2d(self.values[x], kernel, stride, pad),
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[pad] * 4,
        )

    def avg_pool(self, x: str, kernel: int, stride: int) -> str:
        return self.node(
            "AveragePool",
            [x],
            F.avg_pool2d(self.values[x], kernel, stride),
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
        )

    def upsample(self, x: str, factor: int = 2, mode: str = "nearest") -> str:
        name = self.fresh("resize")
        scales = self.weight(name + ".scales", np.array([1, 1, factor, factor], np.float32))
        y = F.interpolate(self.values[x], scale_factor=factor, mode="nearest" if mode == "nearest" else "bilinear")
        attrs = (
            dict(coordinate_transformation_mode="asymmetric", nearest_mode="floor")
            if mode == "nearest"
            else dict(coordinate_transformation_mode="half_pixel")
        )
        return self.node("Resize", [x, "", scales], y, name, mode=mode, **attrs)

    def reflect_pad(self, x: str, p: int) -> str:
        name = self.fresh("pad")
        pads = self.weight(name + ".pads", np.array([0, 0, p, p, 0, 0, p, p], np.int64))
        return self.node("Pad", [x, pads], F.pad(self.values[x], (p, p, p, p), mode="reflect"), name, mode="reflect")

    def depth_to_space(self, x: str, block: int) -> str:
        return self.node("DepthToSpace", [x], F.pixel_shuffle(self.values[x], block), blocksize=block, mode="CRD")

    def head(self, x: str, classes: int) -> str:
        pooled = self.node("GlobalAveragePool", [x], self.values[x].mean(dim=(2, 3), keepdim=True))
        return self.linear(self.node("Flatten", [pooled], self.values[pooled].flatten(1), axis=1), classes)

    def linear(self, x: str, out: int) -> str:
        name = self.fresh("fc")
        w = (self.rng.standard_normal((out, self.channels(x))) * np.sqrt(1.0 / self.channels(x))).astype(np.float32)
        b = (self.rng.standard_normal(out) * 0.1).astype(np.float32)
        y = self.values[x] @ torch.from_numpy(w).T + torch.from_numpy(b)
        return self.node(
            "Gemm", [x, self.weight(name + ".weight", w), self.weight(name + ".bias", b)], y, name, transB=1
        )

    def conv_bn_relu(
        self,
        x: str,
        out: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: Callable[[str], str] | None = None,
    ) -> str:
        y = self.norm(self.conv(x, out, kernel, stride, groups=groups))
        return (act or self.relu)(y)

    def model(self, output: str) -> onnx.ModelProto:
        shape = list(self.values[output].shape)
        graph = helper.make_graph(
            [*self.nodes, helper.make_node("Identity", [output], ["output"], name="output_identity")],
            self.name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [self.batch, *self.shape])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, [self.batch, *shape[1:]])],
            self.initializers,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="lpsn_tvm benchmarks"
        )
        onnx.checker.check_model(model)
        return model
