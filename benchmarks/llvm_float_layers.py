"""Float layers of the llvm backend against ONNX Runtime float, one thread, interleaved in one process, minima.

Run: python benchmarks/llvm_float_layers.py [--repeat 30] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import onnx
import onnxruntime
import tvm
from onnx import TensorProto, helper, numpy_helper

from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.schedules.llvm.conv2d_float import conv2d_float
from lpsn_tvm.schedules.llvm.depthwise_float import depthwise_float
from lpsn_tvm.targets.backend import get_backend

LAYERS = [
    # channels in, out, height, width, kernel, stride, groups
    (3, 64, 224, 224, 7, 2, 1),
    (64, 64, 56, 56, 3, 1, 1),
    (64, 128, 56, 56, 3, 2, 1),
    (64, 128, 56, 56, 1, 2, 1),
    (128, 128, 28, 28, 3, 1, 1),
    (256, 256, 14, 14, 3, 1, 1),
    (512, 512, 7, 7, 3, 1, 1),
    (64, 256, 56, 56, 1, 1, 1),
    (256, 64, 56, 56, 1, 1, 1),
    (16, 16, 32, 32, 3, 1, 1),
    (64, 64, 8, 8, 3, 1, 1),
    (512, 512, 2, 2, 3, 1, 1),
    (32, 32, 112, 112, 3, 1, 32),
    (96, 96, 112, 112, 3, 2, 96),
    (144, 144, 56, 56, 3, 1, 144),
    (960, 960, 7, 7, 3, 1, 960),
    (24, 144, 56, 56, 1, 1, 1),
    (320, 1280, 7, 7, 1, 1, 1),
    (1, 64, 240, 320, 5, 1, 1),
    (64, 32, 240, 320, 3, 1, 1),
    (32, 9, 240, 320, 3, 1, 1),
]


def peer(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, groups: int) -> Any:
    """One convolution + ReLU in ONNX Runtime; its change of layout is inside, ours is not."""
    kernel = weight.shape[2]
    nodes = [
        helper.make_node(
            "Conv",
            ["x", "w", "b"],
            ["c"],
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[kernel // 2] * 4,
            group=groups,
        ),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weight.shape[0], "h", "w"])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(layer: tuple[int, ...], repeat: int) -> dict[str, Any]:
    """Minimal milliseconds of both, and the largest relative difference."""
    channels, out, height, width, kernel, stride, groups = layer
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, channels, height, width)).astype(np.float32)
    weight = rng.standard_normal((out, channels // groups, kernel, kernel)).astype(np.float32)
    bias = rng.standard_normal(out).astype(np.float32)
    backend = get_backend("llvm")
    attrs = {
        "strides": (stride, stride),
        "padding": (kernel // 2,) * 4,
        "dilation": (1, 1),
        "groups": groups,
        "low": 0.0,
        "high": float("inf"),
    }
    offered = (TensorSpec(x.shape, "float32", 16),)
    builders = (depthwise_float, conv2d_float)
    kernel_made = next(
        k for k in (b(offered, {"weight": weight, "bias": bias}, attrs, backend.geometry) for b in builders) if k
    )
    function = tvm.compile(kernel_made.build(), target=backend.target)["main"]
    result = tvm.runtime.tensor(np.zeros(kernel_made.out.memory_shape, np.float32))
    arguments = [tvm.runtime.tensor(a) for a in (kernel_made.inputs[0].pack(x), *kernel_made.constants)] + [result]
    session = peer(x, weight, bias, stride, groups)
    theirs = session.run(None, {"x": x})[0]
    function(*arguments)
    error = float(np.abs(kernel_made.out.unpack(result.numpy()) - theirs).max() / np.abs(theirs).max())
    times: dict[str, list[float]] = {"ours": [], "onnxruntime": []}
    for _ in range(repeat):
        start = time.perf_counter()
        function(*arguments)
        middle = time.perf_counter()
        session.run(None, {"x": x})
        times["ours"].append(middle - start)
        times["onnxruntime"].append(time.perf_counter() - middle)
    ours, other = (min(times[name]) * 1e3 for name in ("ours", "onnxruntime"))
    flops = 2 * theirs.size * (channels // groups) * kernel * kernel
    return {
        "layer": list(layer),
        "ours_ms": ours,
        "onnxruntime_ms": other,
        "ratio": ours / other,
        "gflops": flops / ours / 1e6,
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{'in out h w k stride groups':34} {'ours ms':>9} {'ORT ms':>9} {'ratio':>6} {'GFLOP/s':>8} {'error':>8}")
    for layer in LAYERS:
        row = measure(layer, options.repeat)
        rows.append(row)
        name = " ".join(map(str, layer))
        figures = f"{row['ours_ms']:9.3f} {row['onnxruntime_ms']:9.3f} {row['ratio']:6.2f} {row['gflops']:8.1f}"
        print(f"{name:34} {figures} {row['error']:8.1e}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
