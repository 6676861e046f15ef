"""Eight convolutions of ResNet-18 on the accelerator: searched schedules, bit-exact, against published board times.

    python benchmarks/vta_layers.py [--layers 256->256 ...] [--tables published channelwise] [--budget 3] [--no-check]

"published" is the workload of TVM's tuning logs for a PYNQ-Z1 at 100 MHz: convolution, SHR by 8, clip to 0..127;
"channelwise" has a bias and one shift per channel, as quantized networks do. Printed: cycles of the "rtl" and "pynq"
models (each with the schedule found for it), milliseconds at 100 MHz, GEMM micro-operations, utilization of the array,
the lower bound, KiB moved. The array's share of its peak counts products with padding as the tables do, which programs
skip: it may exceed 100 %. Results go to benchmarks/results/vta_layers.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
CLOCK_HZ = 100e6


@dataclass(frozen=True)
class Layer:
    """A convolution and the best time published for the board, in milliseconds."""

    channels: int
    out: int
    size: int
    kernel: int
    stride: int
    board_ms: float

    @property
    def name(self) -> str:
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{self.channels}->{self.out} {self.size}x{self.size} k{self.kernel}{stride}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        return self.out_size**2 * self.out * self.channels * self.kernel**2


LAYERS = (
    Layer(256, 256, 14, 3, 1, 4.934),
    Layer(128, 256, 28, 3, 2, 2.669),
    Layer(512, 512, 7, 3, 1, 7.348),
    Layer(64, 64, 56, 3, 1, 5.699),
    Layer(128, 128, 28, 3, 1, 5.183),
    Layer(64, 128, 56, 3, 2, 2.966),
    Layer(256, 512, 14, 3, 2, 3.994),
    Layer(64, 128, 56, 1, 2, 1.349),
)


def span(tap: int, layer: Layer) -> tuple[Any, Any]:
    """Output and input positions of one kernel row (or column), those inside the image only."""
    from lpsn_tvm.schedules.vta.ops import Span

    inside = [i for i in range(layer.out_size) if 0 <= i * layer.stride + tap - layer.padding < layer.size]
    return (
        Span(inside[0], 1, len(inside)),
        Span(inside[0] * layer.stride + tap - layer.padding, layer.stride, len(inside)),
    )


def tile_op(layer: Layer, table: str, config: Any) -> Any:
    """The layer as a `TileOp` over the regions "input", "weight", "bias", "shift" and "output"."""
    from lpsn_tvm.schedules.vta import ops

    fan_in, blocks = -(-layer.channels // config.block_in), -(-layer.out // config.block_out)
    taps = []
    for r in range(layer.kernel):
        for s in range(layer.kernel):
            (dst_y, src_y), (dst_x, src_x) = span(r, layer), span(s, layer)
            taps.append(ops.Tap(dst_y, dst_x, src_y, src_x, r * layer.kernel + s))
    count = layer.kernel**2
    source = ops.Plane.dense("input", 0, 1, fan_in, layer.size, layer.size)
    out = ops.Plane.dense("output", 0, 1, blocks, layer.out_size, layer.out_size)
    gemm = ops.Gemm(source, tuple(taps), "weight", 0, fan_in * count, count, fan_in, (0,) * blocks)
    if table == "published":
        requantize: tuple[Any, ...] = (ops.Scalar("shr", 8),)
    else:
        requantize = (ops.Vector("add", "bias", 0), ops.Vector("shr", "shift", 0))
    clip = (ops.Scalar("max", 0), ops.Scalar("min", 127))
    steps = (gemm, *requantize, *clip, ops.Store(out))
    return ops.TileOp(layer.name, 1, blocks, layer.out_size, layer.out_size, steps, layer.macs)


@dataclass(frozen=True)
class Data:
    """Random operands of a layer."""

    x: Array
    weight: Array
    bias: Array
    shift: Array


def random_data(layer: Layer, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (layer.out, layer.channels, layer.kernel, layer.kernel)).astype(np.int8)
    x = rng.integers(-128, 128, (1, layer.channels, layer.size, layer.size)).astype(np.int8)
    bias = rng.integers(-20000, 20000, layer.out).astype(np.int32)
    return Data(x, weight, bias, rng.integers(6, 12, layer.out).astype(np.int32))


def expected(layer: Layer, table: str, data: Data) -> Array:
    """int8[1, O, H, W] by a direct convolution in float64, exact for these integers."""
    pad = layer.padding
    x = np.pad(data.x[0].astype(np.float64), ((0, 0), (pad, pad), (pad, pad)))
    acc = np.zeros((layer.out, layer.out_size, layer.out_size))
    stop = (layer.out_size - 1) * layer.stride + 1
    for r in range(layer.kernel):
        for s in range(layer.kernel):
            patch = x[:, r : r + stop : layer.stride, s : s + stop : layer.stride]
            acc += np.tensordot(data.weight[:, :, r, s].astype(np.float64), patch, 1)
    total = acc.astype(np.int64)
    if table == "published":
        total >>= 8
    else:
        total = (total + data.bias[:, None, None]) >> data.shift[:, None, None]
    return np.clip(total, 0, 127).astype(np.int8)[None]


def blocked(values: Array, block: int) -> Array:
    """[N, C, H, W] -> [N, C / block, H, W, block]."""
    n, channels, height, width = values.shape
    padded = np.pad(values, ((0, 0), (0, -channels % block), (0, 0), (0, 0)))
    return padded.reshape(n, -1, block, height, width).transpose(0, 1, 3, 4, 2)


def regions(layer: Layer, data: Data, config: Any) -> dict[str, bytes]:
    """Bytes of the input regions (BATCH 1)."""
    out, channels, kernel, _ = data.weight.shape
    weight = data.weight.reshape(
        out // config.block_out, config.block_out, channels // config.block_in, config.block_in, kernel, kernel
    )
    return {
        "input": blocked(data.x, config.block_in).tobytes(),
        "weight": weight.transpose(0, 2, 4, 5, 1, 3).tobytes(),
        "bias": data.bias.tobytes(),
        "shift": data.shift.tobytes(),
    }


def is_bit_exact(op: Any, schedule: Any, layer: Layer, table: str, config: Any) -> bool:
    """Whether the strict simulator computes what the direct convolution does."""
    from lpsn_tvm.schedules.vta.emit import emit
    from lpsn_tvm.targets.vta.builder import ProgramBuilder
    from lpsn_tvm.targets.vta.program import link
    from lpsn_tvm.targets.vta.simulator import simulate

    data, builder = random_data(layer), ProgramBuilder(config)
    contents = regions(layer, data, config)
    wanted = expected(layer, table, data)
    for name, content in contents.items():
        builder.region(name, len(content), data=content)
    builder.region("output", wanted.size, access="w")
    emit(builder, op, schedule)
    result = simulate(link(builder.finish()), model=None, functional=True, strict=True)
    return result.memory["output"] == blocked(wanted, config.block_out).tobytes()


def measure(layer: Layer, table: str, config: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One row: search for both models, counters of the schedule found for the board."""
    from lpsn_tvm.targets.vta.search import find_schedule, time_schedule

    op = tile_op(layer, table, config)
    start = time.perf_counter()
    found = {
        model: find_schedule(op, config, model=model, cache=options.cache, budget_seconds=options.budget)
        for model in ("rtl", "pynq")
    }
    seconds = time.perf_counter() - start
    board = time_schedule(op, found["pynq"].schedule, config, "pynq")
    ms = board.cycles / CLOCK_HZ * 1e3
    exact = {
        model: is_bit_exact(op, result.schedule, layer, table, config)
        for model, result in found.items()
        if options.check
    }
    return {
        "layer": layer.name,
        "rtl_cycles": found["rtl"].cycles,
        "pynq_cycles": board.cycles,
        "pynq_ms": ms,
        "published_ms": layer.board_ms,
        "ratio": ms / layer.board_ms,
        "gops": 2 * layer.macs / (ms * 1e-3) / 1e9,
        "gemm_uops": board.counters["gemm_uops"],
        "macs_per_cycle_of_peak": layer.macs / board.cycles / (config.block_in * config.block_out * config.batch),
        "bound": found["pynq"].bound,
        "rtl_bound": found["rtl"].bound,
        "dram_bytes": board.dram_bytes,
        "default_cycles": found["pynq"].default_cycles,
        "bit_exact": exact,
        "search_seconds": round(seconds, 2),
        "candidates": {model: result.candidates_tried for model, result in found.items()},
        "schedules": {model: result.schedule.to_json() for model, result in found.items()},
    }


def show(row: dict[str, Any]) -> None:
    exact = "yes" if row["bit_exact"] and all(row["bit_exact"].values()) else "NO" if row["bit_exact"] else "-"
    cycles = f"{row['layer']:22} {row['rtl_cycles']:9} {row['pynq_cycles']:9} {row['pynq_ms']:7.3f}"
    board = f"{row['published_ms']:6.3f} {row['ratio']:6.3f} {row['gops']:5.1f} {row['gemm_uops']:8}"
    rest = f"{row['macs_per_cycle_of_peak']:6.1%} {row['bound']:8} {row['dram_bytes'] / 1024:7.0f} {exact:>5}"
    print(f"{cycles} {board} {rest} {row['search_seconds']:6.1f}", flush=True)


def main() -> None:
    from benchmarks import record
    from lpsn_tvm.targets.vta.config import preset

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=[""], help="parts of layer names")
    parser.add_argument(
        "--tables", nargs="+", choices=("published", "channelwise"), default=["published", "channelwise"]
    )
    parser.add_argument("--config", default="pynq")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of search per layer and model")
    parser.add_argument("--cache", action="store_true", help="use the schedule cache")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not compute the results")
    parser.add_argument("--keep", default="vta_layers", help="name of the result file")
    options = parser.parse_args()
    config = preset(options.config)
    layers = [layer for layer in LAYERS if any(part in layer.name for part in options.layers)]
    results: dict[str, Any] = {}
    for table in options.tables:
        print(table)
        print(
            f"{'layer':22} {'rtl':>9} {'pynq':>9} {'ms':>7} {'board':>6} {'ratio':>6} {'GOPS':>5} {'uops':>8} "
            f"{'peak':>6} {'bound':>8} {'KiB':>7} {'exact':>5} {'search':>6}"
        )
        results[table] = []
        for layer in layers:
            results[table].append(measure(layer, table, config, options))
            show(results[table][-1])
        mean = float(np.exp(np.mean([np.log(row["ratio"]) for row in results[table]])))
        print(f"geometric mean of ratios {mean:.3f}, worst {max(row['ratio'] for row in results[table]):.3f}")
    print("kept in", record.keep(options.keep, results, config=config.name, budget_seconds=options.budget).name)
    wrong = [row["layer"] for rows in results.values() for row in rows if not all(row["bit_exact"].values())]
    if wrong:
        raise SystemExit(f"not bit-exact: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
