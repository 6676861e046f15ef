"""Whole networks on the accelerator: cycles per layer, utilization, DRAM traffic, milliseconds at 100 MHz; simulated.

    python benchmarks/vta.py [--networks lenet5 resnet18] [--bits 8 4] [--sparsity 0 0.3 0.5] [--layers]

Every figure comes from the package's own cycle models "rtl" (8 bytes per cycle) and "pynq" (4 bytes per cycle, ALU
immediates at 2 cycles: calibrated on a PYNQ-Z1 at 100 MHz, off by -13 to +20 % on single layers); no board was at hand.
Each module runs one image through the strict simulator (its rules checked; equality with the numpy reference is the
tests' business). Published figures beside: LeNet-5 from a stand-alone compiler for the same accelerator (6,752 GEMM
micro-operations, 43,564 RTL cycles). Single layers against TVM's published board times: `benchmarks/vta_layers.py`.
Results go to benchmarks/results/vta.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PUBLISHED_LENET5 = {"gemm_uops": 6752, "cycles": 43564}
SAMPLES = 32
CASES = ("lenet5", "resnet18")


def measure(network: str, bits: int, sparsity: float) -> dict[str, Any]:
    """Build one module cold and warm, simulate one image, count."""
    import lpsn_tvm
    from benchmarks.models import VTA_NETWORKS, smooth_noise

    model = VTA_NETWORKS[network]()
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:])
    calibration = smooth_noise((SAMPLES, *shape), 7)
    module, seconds = None, {}
    # Only the plain network is built three times: without a cache, filling it, and from it.
    times = (("cold", False), ("first", None), ("cached", None)) if bits == 8 and not sparsity else (("first", None),)
    for name, cache in times:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = lpsn_tvm.build(
                model, target="vta", bits=bits, sparsity=sparsity or None, calibration=calibration,
                measure=False, progress=False, **({} if cache is None else {"cache": cache}),
            )  # fmt: skip
        seconds[name] = time.perf_counter() - start
        seconds[f"{name}, accelerator only"] = module.report.seconds.get("compile", 0.0)
    assert module is not None
    image = smooth_noise((1, *shape), 99)
    start = time.perf_counter()
    runs = {name: module.simulate(image, model=name) for name in ("rtl", "pynq")}
    counters, profile = runs["pynq"].counters, module.profile()
    return {
        "network": network,
        "bits": bits,
        "sparsity": sparsity,
        "config": profile.config,
        "programs": profile.programs,
        "host": {step.name: step.reason for step in profile.steps if step.place == "host"},
        "cycles": profile.cycles,
        "ms": profile.milliseconds,
        "utilization": {name: profile.utilization(name) for name in profile.cycles},
        "gemm_uops": counters["gemm_uops"],
        "reset_uops": counters["reset_uops"],
        "alu_uops": counters["alu_uops"],
        "dram_bytes": {name: value for name, value in counters.items() if "_bytes_" in name},
        "stalls": {name: value for name, value in counters.items() if name.endswith("_wait")},
        "macs": module.report.totals["macs"],
        "arena_bytes": profile.peak_arena_bytes,
        "build_seconds": seconds,
        "simulate_seconds": (time.perf_counter() - start) / 2,
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "layers": [
            {"name": s.name, "cycles": s.cycles, "macs": s.macs, "dram_bytes": s.dram_bytes}
            for s in profile.steps
            if s.place == "accelerator"
        ],
    }


def show(row: dict[str, Any], layers: bool) -> None:
    """One line, and the layers below it."""
    print(
        f"{row['network']:10s} {row['bits']} bits, {row['sparsity']:4.0%} removed: "
        f"{row['cycles']['rtl']:>11,} rtl {row['cycles']['pynq']:>11,} pynq cycles = {row['ms']['rtl']:8.3f} / "
        f"{row['ms']['pynq']:8.3f} ms, use {row['utilization']['rtl']:4.0%} / {row['utilization']['pynq']:4.0%}, "
        f"{row['gemm_uops']:,} GEMM uops, {sum(row['dram_bytes'].values()) / 2**20:.2f} MiB moved, "
        f"build {', '.join(f'{name} {value:.0f} s' for name, value in row['build_seconds'].items())}, "
        f"simulation {row['simulate_seconds']:.1f} s, "
        f"host: {', '.join(row['host']) or 'nothing'}",
        flush=True,
    )
    if row["network"] == "lenet5" and row["bits"] == 8 and not row["sparsity"]:
        print(f"{'':10s} published: {PUBLISHED_LENET5['gemm_uops']:,} uops, {PUBLISHED_LENET5['cycles']:,} rtl cycles")
    for layer in row["layers"] if layers else ():
        print(f"    {layer['name']:30s} {layer['cycles']['rtl']:>10,} {layer['cycles']['pynq']:>10,}", flush=True)


def kept_before(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of earlier runs that this one did not measure anew."""
    from benchmarks import record

    path = record.RESULTS / "vta.json"
    old = json.loads(path.read_text())["results"] if path.exists() else []
    measured = {(row["network"], row["bits"], row["sparsity"]) for row in rows}
    return [row for row in old if (row["network"], row["bits"], row["sparsity"]) not in measured]


def main() -> None:
    from benchmarks import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(CASES))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.3, 0.5])
    parser.add_argument("--layers", action="store_true", help="print every layer")
    parser.add_argument("--no-keep", action="store_true", help="do not write the JSON file")
    options = parser.parse_args()
    rows = []
    for network in options.networks:
        for bits in options.bits:
            for sparsity in options.sparsity:
                rows.append(measure(network, bits, sparsity))
                show(rows[-1], options.layers)
    if not options.no_keep:
        record.keep("vta", [*kept_before(rows), *rows], samples=SAMPLES, published_lenet5=PUBLISHED_LENET5)


if __name__ == "__main__":
    main()
