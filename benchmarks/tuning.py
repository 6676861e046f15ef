"""What tuning gains on this machine's CPU: a network with default kernels against the same network tuned, interleaved
in one process.

    python benchmarks/tuning.py [--networks resnet18] [--bits 8] [--tune 4m] [--threads 1] [--seconds 20]

Kept: for each network, kernels with a choice, trials, records accepted, medians, and the median over rounds of (tuned /
default). Where the whole network did not gain, the build keeps the defaults and the ratio is 1 but for noise. Results
go to benchmarks/results/tuning.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import models
from benchmarks.cpu import interleave
from benchmarks.record import keep

SAMPLES = 16


def compare(network: str, bits: int | None, budget: str, threads: int, seconds: float) -> dict[str, Any]:
    """Build a network with and without tuning, check that outputs are equal, time both in turn."""
    import lpsn_tvm
    from lpsn_tvm.runtime import set_num_threads

    model = getattr(models, network)()
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    data = np.random.default_rng(0).standard_normal((SAMPLES, *shape[1:])).astype(np.float32)
    options: dict[str, Any] = {
        "bits": bits, "calibration": data, "sparsity": None, "num_threads": threads, "measure": False,
    }  # fmt: skip
    default = lpsn_tvm.build(model, **options)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tuned = lpsn_tvm.build(model, tune=budget, cache=folder, **options)
        trials = sum(len(path.read_text().splitlines()) for path in Path(folder).rglob("database_tuning_record.json"))
    spent = time.perf_counter() - start
    outputs = [np.asarray(module(data[:1])) for module in (default, tuned)]
    if bits is not None and not np.array_equal(*outputs):
        raise SystemExit(f"{network}: the tuned module computes something else")
    set_num_threads(threads)
    runs = {name: _prepared(module, data[:1]) for name, module in (("default", default), ("tuned", tuned))}
    times = interleave(runs, seconds, threads)
    ratios = np.array(times["tuned"]) / np.array(times["default"])
    result = {
        "default_ms": float(np.median(times["default"])),
        "tuned_ms": float(np.median(times["tuned"])),
        "tuned_over_default": float(np.median(ratios)),
        "tuned_over_default_quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
        "rounds": len(ratios),
        "kernels_with_a_choice": default.report.tuning["choices"],
        "trials": trials,
        "seconds_of_tuned_build": round(spent, 1),
        "records": [
            {
                "template": record.template,
                "config": dict(record.config),
                "tuned_over_default": record.seconds / record.default_seconds,
            }
            for record in tuned.records or ()
        ],
        "notes": [note for note in tuned.report.notes if note.startswith("tun")],
    }
    print(
        f"{network}: default {result['default_ms']:.3f} ms, tuned {result['tuned_ms']:.3f} ms, ratio "
        f"{result['tuned_over_default']:.3f}; {len(result['records'])} records after {trials} trials; {result['notes']}"
    )
    return result


def _prepared(module: Any, data: np.ndarray) -> Any:
    """A call without conversions from numpy."""
    tensors = module.executable.prepare([data])
    return lambda: module.executable.run(tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18"])
    parser.add_argument("--bits", type=int, default=8, help="32 is float")
    parser.add_argument("--tune", default="4m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--note", default="", help="What else ran on the machine, for the record.")
    arguments = parser.parse_args()
    bits = None if arguments.bits == 32 else arguments.bits
    results = {
        network: compare(network, bits, arguments.tune, arguments.threads, arguments.seconds)
        for network in arguments.networks
    }
    settings = {name: value for name, value in vars(arguments).items() if name != "networks"}
    print(keep("tuning", results, **settings))


if __name__ == "__main__":
    main()
