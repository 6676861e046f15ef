"""Single int8 layers on one thread: our kernels, untuned, against ONNX Runtime's QLinearConv (uint8 x int8, per
channel).

    python benchmarks/llvm_layers.py [--layers resnet18 mobilenet_v2] [--rounds 60] [--target llvm]

Both run in one process, alternating; minima are printed (the machine may be shared). ONNX Runtime converts layouts at
the borders of a model: where a layer's output can be its input, a chain of four is timed and divided; the others are
marked "single".
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TVM_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

CHAIN = 4


@dataclass(frozen=True)
class Layer:
    channels: int
    size: int
    out: int
    kernel: int = 3
    stride: int = 1
    depthwise: bool = False

    @property
    def groups(self) -> int:
        return self.channels if self.depthwise else 1

    @property
    def name(self) -> str:
        kind = "depthwise " if self.depthwise else ""
        return f"{kind}{self.channels}->{self.out} {self.kernel}x{self.kernel} s{self.stride} @{self.size}"

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        return self.out_size**2 * self.out * self.channels // self.groups * self.kernel**2


LAYERS = {
    "resnet18": [
        Layer(3, 224, 64, 7, 2),
        Layer(64, 56, 64),
        Layer(64, 56, 128, 3, 2),
        Layer(64, 56, 128, 1, 2),
        Layer(128, 28, 128),
        Layer(128, 28, 256, 3, 2),
        Layer(128, 28, 256, 1, 2),
        Layer(256, 14, 256),
        Layer(256, 14, 512, 3, 2),
        Layer(256, 14, 512, 1, 2),
        Layer(512, 7, 512),
    ],
    "mobilenet_v2": [
        Layer(3, 224, 32, 3, 2),
        Layer(32, 112, 32, depthwise=True),
        Layer(32, 112, 16, 1),
        Layer(16, 112, 96, 1),
        Layer(96, 112, 96, 3, 2, True),
        Layer(96, 56, 24, 1),
        Layer(24, 56, 144, 1),
        Layer(144, 56, 144, depthwise=True),
        Layer(144, 28, 32, 1),
        Layer(192, 28, 192, depthwise=True),
        Layer(384, 14, 64, 1),
        Layer(64, 14, 384, 1),
        Layer(576, 14, 576, depthwise=True),
        Layer(960, 7, 960, depthwise=True),
        Layer(160, 7, 960, 1),
        Layer(320, 7, 1280, 1),
    ],
    "odd": [
        Layer(64, 53, 64),
        Layer(48, 37, 80),
        Layer(64, 13, 64),
        Layer(256, 4, 256),
        Layer(512, 2, 512),
        Layer(64, 19, 64, 5),
        Layer(96, 23, 96, 5, depthwise=True),
        Layer(64, 47, 64, 1),
    ],
}


def values(layer: Layer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    per_group = layer.channels // layer.groups
    x = rng.integers(0, 256, (1, layer.channels, layer.size, layer.size)).astype(np.uint8)
    weight = rng.integers(-127, 128, (layer.out, per_group, layer.kernel, layer.kernel)).astype(np.int8)
    bias = rng.integers(-500, 500, layer.out).astype(np.int32)
    scale = (rng.random(layer.out) * 4e-3 / np.sqrt(per_group) / layer.kernel + 1e-5).astype(np.float32)
    return x, weight, bias, scale


def ours(layer: Layer, target: str) -> Callable[[], object]:
    import tvm

    from lpsn_tvm.schedules.kernel import TensorSpec
    from lpsn_tvm.schedules.llvm.weights import input_block
    from lpsn_tvm.targets import get_backend

    backend = get_backend(target)
    x, weight, bias, scale = values(layer)
    block = input_block(layer.channels) if layer.channels < 16 else 16
    spec = TensorSpec(x.shape, "uint8", block)
    attrs = {
        "strides": (layer.stride,) * 2,
        "padding": (layer.kernel // 2,) * 4,
        "groups": layer.groups,
        "out_zero_point": 128,
    }
    attrs["x_zero_point"] = 128
    constants = {"weight": weight, "bias": bias, "scale": scale}
    kernels = (builder((spec,), constants, attrs, backend.geometry) for builder in backend.rules["lpsn.conv2d"])
    kernel = next(kernel for kernel in kernels if kernel is not None)
    run = tvm.compile(tvm.IRModule({"main": kernel.build()}), target=backend.target)["main"]
    arguments = [tvm.runtime.tensor(array) for array in (spec.pack(x), *kernel.constants)]
    out = tvm.runtime.tensor(np.zeros(kernel.out.memory_shape, np.uint8))
    return lambda: run(*arguments, out)


def onnxruntime(layer: Layer) -> tuple[Callable[[], object], int]:
    """A call and how many layers it runs."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    x, weight, bias, scale = values(layer)
    count = CHAIN if layer.channels == layer.out and layer.size == layer.out_size else 1
    constants = {
        "xs": np.float32(1),
        "xz": np.uint8(128),
        "w": weight,
        "ws": scale,
        "wz": np.zeros(layer.out, np.int8),
        "b": bias,
    }
    nodes = [
        helper.make_node(
            "QLinearConv",
            [f"x{i}", "xs", "xz", "w", "ws", "wz", "xs", "xz", "b"],
            [f"x{i + 1}"],
            group=layer.groups,
            kernel_shape=[layer.kernel] * 2,
            strides=[layer.stride] * 2,
            pads=[layer.kernel // 2] * 4,
        )
        for i in range(count)
    ]
    shape = [1, layer.out, layer.out_size, layer.out_size]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x0", TensorProto.UINT8, list(x.shape))],
        [helper.make_tensor_value_info(f"x{count}", TensorProto.UINT8, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x0": x}), count


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=sorted(LAYERS), default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--target", default="llvm")
    options = parser.parse_args()
    print(f"{'layer':36} {'ours ms':>8} {'ort ms':>8} {'ratio':>6} {'GMAC/s':>7}")
    for layer in [layer for name in options.layers for layer in LAYERS[name]]:
        run = ours(layer, options.target)
        peer, count = onnxruntime(layer)
        times = [(seconds(run), seconds(peer)) for _ in range(options.rounds + 5)][5:]
        mine, theirs = min(t[0] for t in times) * 1e3, min(t[1] for t in times) * 1e3 / count
        note = "" if count > 1 else "  single"
        rate = layer.macs / mine / 1e6
        print(f"{layer.name:36} {mine:8.3f} {theirs:8.3f} {mine / theirs:6.2f} {rate:7.0f}{note}", flush=True)


if __name__ == "__main__":
    main()
