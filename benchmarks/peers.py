"""The tools that we are measured against, each as a callable `run(x) -> y` on the same ONNX model."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

Run = Callable[[np.ndarray], np.ndarray]


def onnxruntime_float(model: onnx.ModelProto, threads: int) -> Run:
    """ONNX Runtime, float32, all graph optimizations."""
    return _session(model.SerializeToString(), threads)


def _session(model: bytes | str, threads: int) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def quantize_onnxruntime(model: onnx.ModelProto, calibration: np.ndarray, path: Path) -> Path:
    """ONNX Runtime static quantization: QDQ, u8 activations, s8 weights per channel, min-max."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().setLevel(logging.ERROR)
    name = model.graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self.samples, None)
            return None if sample is None else {name: sample[None]}

    with tempfile.TemporaryDirectory() as folder:
        source, prepared = Path(folder) / "float.onnx", Path(folder) / "prepared.onnx"
        onnx.save(model, source)
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return path


def onnxruntime_int8(model: onnx.ModelProto, calibration: np.ndarray, threads: int) -> Run:
    """ONNX Runtime on its own statically quantized model."""
    with tempfile.TemporaryDirectory() as folder:
        path = quantize_onnxruntime(model, calibration, Path(folder) / "int8.onnx")
        return _session(path.read_bytes(), threads)


def openvino_int8(model: onnx.ModelProto, calibration: np.ndarray, threads: int, batch: int = 1) -> Run:
    """OpenVINO on a model quantized by NNCF (mixed preset, default statistics)."""
    import nncf
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    core = ov.Core()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        onnx.save(model, path)
        graph = core.read_model(path)
    graph.reshape([batch, *calibration.shape[1:]])
    quantized = nncf.quantize(
        graph, nncf.Dataset([sample[None] for sample in calibration]), subset_size=len(calibration)
    )
    compiled = core.compile_model(
        quantized, "CPU", {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()

    def run(x: np.ndarray) -> np.ndarray:
        request.infer([x])
        return request.get_output_tensor(0).data

    return run
