"""Speed and correctness on an NVIDIA GPU against torch eager, torch.compile and TensorRT.

    python benchmarks/cuda.py                                    # where a GPU, nvcc, torch and this package are
    python benchmarks/cuda.py --prepare kit/ --target "cuda -arch=sm_90"       # anywhere: build what will be measured
    python benchmarks/cuda.py --kit kit/                         # GPU machine with torch, numpy and onnx only
    ... --check                                                  # only whether every module is exact
    ... --networks all --batches 2 --check                       # those of the other benchmarks, too

Networks: ResNet-18, ResNet-50, MobileNetV2, ESPCN; batch 1, 8, 64; ours as W8A8, W4A8, W4A4 (on Hopper 4 bits are
storage), each whole and with 30 and 50 % of the channels removed. Peers run the same network in fp16, channels last,
batch norm folded: torch eager, torch.compile in mode max-autotune (which records CUDA graphs) for exactly this batch
size, TensorRT where it is installed, as a CUDA graph. Every contender reads a tensor on the GPU and leaves one there.
All of one network and batch are timed in one process, one after the other round by round; a time is a burst of calls
between two events. Printed are medians and medians of per-round ratios; before that each module has to give the
expected output bit for bit.

The roofline of every kernel is the larger of its bytes by the copy bandwidth and its operations by the 8-bit matrix
rate, both measured first in the same process (`torch.Tensor.copy_`, `torch._int_mm`); its share is that time by its
own, which may exceed 100 % where operands stay in the second-level cache or products are of 4 bits. Results go to
benchmarks/results/cuda.json.

Not run on a GPU so far: everything that needs one, which is why there is no results/cuda.json and no table. That is
* every kernel (results are checked in emulation, instructions and spills in machine code);
* the driver calls, CUDA graphs, streams, and the exchange of tensors with torch, cupy and DLPack;
* tile choices and the cost model behind them; tuning on a GPU, so no records are shipped for any;
* this script's measuring part: peers, roofline, first call after load.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:
    # This folder may not stay: `import cuda` (NVIDIA's bindings) would find this file.
    sys.path[0] = str(HERE.parent)

from benchmarks import cuda_kit
from benchmarks.cuda_kit import BATCHES, NETWORKS, VARIANTS, Case
from lpsn_tvm.errors import LpsnError
from lpsn_tvm.targets.cuda_driver import Driver

EAGER, COMPILED, TENSORRT = "torch eager fp16", "torch.compile fp16", "TensorRT fp16"
Call = Callable[[], object]
TOLERANCE = 1e-5


def torch_peers(network: str, batch: int) -> dict[str, Call]:
    """The same network in fp16 by torch, eager and compiled."""
    import torch

    from benchmarks.torch_network import TorchNetwork

    model = cuda_kit.all_networks()[network]()
    module = TorchNetwork(model).eval().half().cuda().to(memory_format=torch.channels_last)
    shape = cuda_kit.input_shape(model, batch)
    x = torch.randn(shape, device="cuda", dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    return {EAGER: _without_gradients(module, x), COMPILED: _without_gradients(compiled(module), x)}


def compiled(module: Any, backend: Any = "inductor") -> Any:
    """The module compiled for the shapes that it will be called with, whatever was compiled before.

    All networks share one `forward`. Left alone, torch takes the second one's batch size for a symbol, which costs it
    speed, and gives up after the eighth.
    """
    import torch

    torch.compiler.reset()
    return torch.compile(module, mode="max-autotune", backend=backend, fullgraph=True, dynamic=False)


def _without_gradients(module: Any, x: Any) -> Call:
    import torch

    def call() -> object:
        with torch.inference_mode():
            return module(x)

    return call


def tensorrt_peer(network: str, batch: int) -> dict[str, Call]:
    """TensorRT in fp16 from the same ONNX file, as a CUDA graph; nothing where it is not installed."""
    try:
        import tensorrt as trt
    except ImportError:
        return {}
    import torch

    model = cuda_kit.all_networks()[network]()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    definition = builder.create_network(0)
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse(model.SerializeToString()):
        raise RuntimeError(f"TensorRT cannot read {network}: {parser.get_error(0)}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.set_flag(trt.BuilderFlag.FP16)
    shape = cuda_kit.input_shape(model, batch)
    profile.set_shape(definition.get_input(0).name, shape, shape, shape)
    config.add_optimization_profile(profile)
    engine = trt.Runtime(logger).deserialize_cuda_engine(builder.build_serialized_network(definition, config))
    context = engine.create_execution_context()
    x = torch.randn(shape, device="cuda")
    context.set_input_shape(engine.get_tensor_name(0), shape)
    y = torch.empty(tuple(context.get_tensor_shape(engine.get_tensor_name(1))), device="cuda")
    for index, tensor in enumerate((x, y)):
        context.set_tensor_address(engine.get_tensor_name(index), tensor.data_ptr())
    return {TENSORRT: recorded(lambda: context.execute_async_v3(torch.cuda.current_stream().cuda_stream), (x, y))}


def recorded(call: Call, kept: object) -> Call:
    """A call as a CUDA graph, like the other contenders'; `kept` lives as long as the result."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            # What a first run allocates and chooses cannot be recorded.
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    held = (graph, call, kept)
    return lambda: held[0].replay()


def burst(call: Call, count: int) -> float:
    """Milliseconds per call of `count` calls in a row."""
    import torch

    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / count


def interleave(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every contender, round by round; a burst takes about 20 ms."""
    import time

    counts = {}
    for name, call in calls.items():
        burst(call, 5)
        counts[name] = max(3, int(20 / max(burst(call, 5), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < stop or len(times[next(iter(calls))]) < 10:
        for name, call in calls.items():
            times[name].append(burst(call, counts[name]))
    return times


def check(folder: Path, cases: dict[Case, Any]) -> dict[str, str]:
    """Whether every module gives the expected output, through numpy and on the device; what is wrong, by case. Only
    where operators compute in float may it differ, by `TOLERANCE` of its range.
    """
    import torch

    import lpsn_tvm

    wrong = {}
    for case in cases:
        module = lpsn_tvm.load(folder / f"{case.stem}.lpsn")
        arrays = np.load(folder / f"{case.stem}.npz", allow_pickle=False)
        x = np.resize(arrays["x"], (case.batch, *arrays["x"].shape[1:]))
        expected = np.resize(arrays["y"], (case.batch, *arrays["y"].shape[1:]))
        worst = 0.0
        for name, got in (("numpy", module(x)), ("torch", module(torch.from_numpy(x).cuda()).cpu().numpy())):
            if np.array_equal(got, expected):
                continue
            difference = float(np.abs(got - expected).max())
            worst = max(worst, difference)
            if not (cases[case].get("is_inexact") and difference <= TOLERANCE * np.ptp(expected)):
                count = int((got != expected).sum())
                wrong[f"{case.stem}, {name}"] = f"{count} of {got.size} values differ, by {difference:.3g} at most"
        verdict = f"close, {worst:.3g}" if worst else "exact"
        print(f"{case.stem:32s} {'WRONG' if any(case.stem in key for key in wrong) else verdict}", flush=True)
    return wrong


def limits() -> dict[str, float]:
    """Copy bandwidth in bytes per second (read and written) and 8-bit matrix rate in operations per second."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randint(-128, 127, (8192, 8192), dtype=torch.int8, device="cuda")
    b = torch.randint(-128, 127, (8192, 8192), dtype=torch.int8, device="cuda").t()
    times = interleave({"copy": lambda: target.copy_(source), "product": lambda: torch._int_mm(a, b)}, 1.0)
    return {
        "bytes_per_second": 2 * source.numel() / float(np.median(times["copy"])) * 1e3,
        "operations_per_second": 2 * 8192**3 / float(np.median(times["product"])) * 1e3,
    }


FIRST_CALL = """
import sys, time
sys.path.insert(0, {root!r})
import numpy as np, lpsn_tvm
x = np.zeros({shape!r}, np.float32)
start = time.perf_counter()
module = lpsn_tvm.load({path!r})
loaded = time.perf_counter()
module(x)
print(loaded - start, time.perf_counter() - loaded)
"""


def first_call(path: Path, shape: tuple[int, ...]) -> dict[str, float]:
    """Seconds of load and of the first call in a fresh process, the driver's start included."""
    script = FIRST_CALL.format(root=str(HERE.parent), shape=shape, path=str(path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    load, call = map(float, done.stdout.split())
    return {"load_seconds": load, "first_call_seconds": call}


def measure(
    folder: Path, network: str, batch: int, cases: dict[Case, Any], bounds: dict[str, float], options: Any
) -> dict[str, Any]:
    """One network at one batch size: every contender's median, and how many times faster than each peer."""
    import torch

    import lpsn_tvm

    calls: dict[str, Call] = {}
    modules = {}
    for case in cases:
        if (case.network, case.batch) == (network, batch):
            module = lpsn_tvm.load(folder / f"{case.stem}.lpsn")
            x = np.load(folder / f"{case.stem}.npz", allow_pickle=False)["x"]
            tensor = torch.from_numpy(np.resize(x, (batch, *x.shape[1:]))).cuda()
            modules[case.variant.name], calls[case.variant.name] = module, lambda m=module, t=tensor: m(t)
    if not options.no_peers:
        calls |= torch_peers(network, batch) | tensorrt_peer(network, batch)
    times = interleave(calls, options.seconds)
    rows: dict[str, Any] = {}
    for name, values in times.items():
        rows[name] = {"median_ms": float(np.median(values)), "min_ms": min(values), "rounds": len(values)}
        for peer in (EAGER, COMPILED, TENSORRT, "W8A8"):
            if peer in times and peer != name:
                ratio = np.median(np.asarray(times[peer]) / np.asarray(values))
                rows[name][f"times_faster_than {peer}"] = float(ratio)
        if name in modules:
            rows[name]["programs"] = modules[name].details()["programs"]
            rows[name]["kernels"] = kernels(modules[name], bounds)
    return rows


def kernels(module: Any, bounds: dict[str, float]) -> list[dict[str, Any]]:
    """Every kernel's time, work and share of its roofline."""
    return [
        {**dataclasses.asdict(kernel), "roofline_share": kernel.roofline_share(**bounds)} for kernel in module.profile()
    ]


def show(network: str, batch: int, rows: dict[str, Any]) -> None:
    """Print one table."""
    print(f"{network}, batch {batch}")
    for name, row in rows.items():
        ratios = [f"{row[f'times_faster_than {p}']:.2f}x {p}" for p in (COMPILED, TENSORRT, "W8A8")
                  if f"times_faster_than {p}" in row]  # fmt: skip
        held = max((program["constant_bytes"] for program in row.get("programs", ())), default=0)
        ratios += [f"{held / 1e6:.2f} MB of weights and constants"] if held else []
        print(f"  {name:22s} {row['median_ms']:9.4f} ms  {', '.join(ratios)}", flush=True)
    print(f"  {'kernels of W8A8':40s} {'ms':>9s} {'MB':>9s} {'GOP':>9s}  roofline")
    for kernel in rows.get("W8A8", {}).get("kernels", ()):
        print(
            f"  {kernel['layer'][-40:]:40s} {kernel['milliseconds']:9.4f} {kernel['bytes'] / 1e6:9.3f} "
            f"{kernel['operations'] / 1e9:9.3f}  {kernel['roofline_share']:7.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="build the modules, measure nothing")
    parser.add_argument("--kit", type=Path, metavar="DIR", help="measure modules that --prepare has built")
    parser.add_argument(
        "--target", default="cuda", help='default: this machine\'s GPU; --prepare: e.g. "cuda -arch=sm_90"'
    )
    known = list(cuda_kit.all_networks())
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=[*known, "all"])
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--variants", nargs="*", default=[v.name for v in VARIANTS], choices=[v.name for v in VARIANTS])
    parser.add_argument("--seconds", type=float, default=2.0, help="per contender")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--check", action="store_true", help="only whether modules are exact")
    parser.add_argument("--keep", default="cuda", help="name of the result file")
    options = parser.parse_args()
    variants = [variant for variant in VARIANTS if variant.name in options.variants]
    networks = known if "all" in options.networks else options.networks
    wanted = [Case(n, v, b) for n in networks for b in options.batches for v in variants]
    if options.prepare:
        cuda_kit.prepare(options.prepare, wanted, options.target)
        return
    try:
        Driver.open()
        need_torch()
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.kit or Path(scratch)
            if not options.kit:
                cuda_kit.prepare(folder, wanted, options.target)
            there = cuda_kit.load(folder)
            run(folder, {case: there[case] for case in wanted if case in there}, options)
    except LpsnError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def need_torch() -> None:
    """Ends the program where torch cannot use the GPU that the driver sees."""
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise SystemExit(f"torch {torch.__version__}, {built}, cannot use a GPU here; the driver can")


def run(folder: Path, cases: dict[Case, Any], options: Any) -> None:
    """Everything that needs the GPU."""
    import torch

    from benchmarks import record

    if not cases:
        raise SystemExit("the kit has none of the cases asked for")
    wrong = check(folder, cases)
    for name, what in wrong.items():
        print(f"{name}: {what}", file=sys.stderr)
    if options.check or wrong:
        raise SystemExit(1 if wrong else 0)
    bounds = limits()
    gpu = torch.cuda.get_device_name()
    copies, products = bounds["bytes_per_second"] / 1e12, bounds["operations_per_second"] / 1e12
    print(f"{gpu}: copies {copies:.2f} TB/s, 8-bit products {products:.0f} TOPS")
    results: dict[str, Any] = {"exact": sorted(case.stem for case in cases), "limits": bounds}
    for network, batch in dict.fromkeys((case.network, case.batch) for case in cases):
        rows = measure(folder, network, batch, cases, bounds, options)
        results[f"{network}, batch {batch}"] = rows
        show(network, batch, rows)
    for case in cases:
        if case.batch == 1 and case.variant == VARIANTS[0]:
            shape = np.load(folder / f"{case.stem}.npz", allow_pickle=False)["x"].shape[1:]
            results[f"first call, {case.network}"] = first_call(folder / f"{case.stem}.lpsn", (1, *shape))
    print("kept in", record.keep(options.keep, results, gpu=gpu, seconds_per_contender=options.seconds).name)


if __name__ == "__main__":
    main()
