"""Latency on the CPU against ONNX Runtime and OpenVINO, one process, interleaved, medians; time and memory of
quantizing ResNet-18.

    python benchmarks/cpu.py [--networks resnet18 ...] [--threads 1 2] [--seconds 6] [--no-peers] [--calibration]

Every contender runs once per round; rounds repeat until the time is up, so that drift of the machine hits all alike.
Printed: median milliseconds, and the median over rounds of (contender / ONNX Runtime int8) in parentheses. Results go
to benchmarks/results/cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BASE = "onnxruntime int8"
BURST = 3
PAUSE = 0.1


def interleave(runs: dict[str, Callable[[], object]], seconds: float, threads: int) -> dict[str, list[float]]:
    """Milliseconds of each contender, round by round: the median of a burst of calls after one that is not counted.

    With several threads a pause goes before each burst: every tool's idle workers spin for a while in wait for the next
    call, on the cores that the next contender needs.
    """
    for run in runs.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < stop or len(times[next(iter(runs))]) < 10:
        for name, run in runs.items():
            if threads > 1:
                time.sleep(PAUSE)
            run()
            burst = []
            for _ in range(BURST):
                start = time.perf_counter()
                run()
                burst.append((time.perf_counter() - start) * 1e3)
            times[name].append(float(np.median(burst)))
    return times


def contenders(network: str, threads: int, with_peers: bool) -> dict[str, Callable[[], object]]:
    """name -> a call without arguments, all on the same input."""
    import lpsn_tvm
    from benchmarks import models, peers
    from lpsn_tvm.runtime import set_num_threads

    model = models.LATENCY_NETWORKS[network]()
    shape = tuple(d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim)
    calibration, x = models.smooth_noise((16, *shape[1:]), 5), models.smooth_noise(shape, 6)
    runs: dict[str, Callable[[], object]] = {}
    common = dict(
        target="llvm", calibration=calibration, sparsity=None, num_threads=threads, measure=False, progress=False
    )
    for name, bits in (("ours float", None), ("ours W8A8", 8)):
        module = lpsn_tvm.build(model, bits=bits, **common)
        executable = module.executable
        tensors = executable.prepare([x])
        runs[name] = lambda e=executable, t=tensors: e.run(t)
    set_num_threads(threads)
    if with_peers:
        for name, run in (
            ("onnxruntime float", peers.onnxruntime_float(model, threads)),
            (BASE, peers.onnxruntime_int8(model, calibration, threads)),
        ):
            runs[name] = lambda r=run: r(x)
        try:
            openvino = peers.openvino_int8(model, calibration, threads)
            runs["openvino int8"] = lambda: openvino(x)
        except ImportError:
            print("openvino or nncf is not installed; left out", file=sys.stderr)
    return runs


def measure(network: str, threads: int, seconds: float, with_peers: bool) -> dict[str, dict[str, float]]:
    """Median and the ratio to each reference, for every contender."""
    times = interleave(contenders(network, threads, with_peers), seconds, threads)
    result = {}
    for name, values in times.items():
        row = {"median_ms": float(np.median(values)), "min_ms": float(np.min(values)), "rounds": len(values)}
        for reference, key in ((BASE, "ratio_to_ort_int8"), ("onnxruntime float", "ratio_to_ort_float")):
            if reference in times:
                row[key] = float(np.median(np.asarray(values) / np.asarray(times[reference])))
        result[name] = row
    return result


CALIBRATION_SCRIPT = r"""
import sys, time, json, re, pathlib
def peak_MiB():  # since exec; getrusage would report what the parent held at the fork
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text()).group(1)) / 1024
sys.path.insert(0, {root!r})
import numpy as np
from benchmarks import models
model = models.resnet18()
images = np.load({images!r}, mmap_mode="r")
import lpsn_tvm
before = peak_MiB()
start = time.perf_counter()
options = dict(target="llvm", bits=8, sparsity={sparsity!r}, measure=False, progress=False)
module = lpsn_tvm.build(model, calibration=images, **options)
seconds = time.perf_counter() - start
print(json.dumps(dict(seconds=seconds, peak_MiB=peak_MiB(), before_MiB=before, stages=module.report.seconds)))
"""
PEER_SCRIPT = r"""
import sys, time, json, re, tempfile, pathlib
def peak_MiB():
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text()).group(1)) / 1024
sys.path.insert(0, {root!r})
import numpy as np
from benchmarks import models, peers
model = models.resnet18()
images = np.load({images!r}, mmap_mode="r")
start = time.perf_counter()
if {peer!r} == "onnxruntime":
    with tempfile.TemporaryDirectory() as folder:
        peers.quantize_onnxruntime(model, images, pathlib.Path(folder) / "q.onnx")
else:
    peers.openvino_int8(model, images, 2)
print(json.dumps(dict(seconds=time.perf_counter() - start, peak_MiB=peak_MiB())))
"""


def calibration_cost(with_peers: bool, count: int = 512) -> dict[str, dict[str, float]]:
    """Seconds and peak memory for ResNet-18 with `count` images of 224 x 224, each contender in its own process."""
    import tempfile

    from benchmarks import models

    root = str(Path(__file__).resolve().parents[1])
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "images.npy")
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, 3, 224, 224))
        for index in range(0, count, 16):
            out[index : index + 16] = models.smooth_noise((16, 3, 224, 224), 1000 + index)[: count - index]
        out.flush()
        scripts = {
            "ours: quantize + compile": CALIBRATION_SCRIPT.format(root=root, images=path, sparsity=None),
            "ours: prune 50 % + quantize + compile": CALIBRATION_SCRIPT.format(root=root, images=path, sparsity=0.5),
        }
        if with_peers:
            scripts["onnxruntime: quantize"] = PEER_SCRIPT.format(root=root, images=path, peer="onnxruntime")
            scripts["nncf: quantize + compile"] = PEER_SCRIPT.format(root=root, images=path, peer="openvino")
        for name, script in scripts.items():
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
            if done.returncode:
                print(f"{name} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            result[name] = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"{name:42s} {result[name]['seconds']:7.1f} s  peak {result[name]['peak_MiB']:7.0f} MiB", flush=True)
    return result


def main() -> None:
    from benchmarks import models, record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(models.LATENCY_NETWORKS))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=6.0, help="per contender")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--calibration", action="store_true", help="also time and memory of quantizing ResNet-18 with 512 images"
    )
    parser.add_argument("--keep", default="cpu", help="name of the result file")
    options = parser.parse_args()
    results: dict[str, object] = {}
    for network in options.networks:
        for threads in options.threads:
            rows = measure(network, threads, options.seconds, not options.no_peers)
            results[f"{network}, {threads} thread{'s' if threads > 1 else ''}"] = rows
            print(f"{network}, {threads} thread(s)")
            for name, row in rows.items():
                ratio = (
                    f"  ({row['ratio_to_ort_int8']:.2f}x ORT int8, {row['ratio_to_ort_float']:.2f}x ORT float)"
                    if "ratio_to_ort_int8" in row
                    else ""
                )
                print(f"  {name:20s} {row['median_ms']:9.3f} ms{ratio}", flush=True)
    if options.calibration:
        results["calibration"] = calibration_cost(not options.no_peers)
    print("kept in", record.keep(options.keep, results, seconds_per_contender=options.seconds).name)


if __name__ == "__main__":
    main()
