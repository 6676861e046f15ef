"""Accuracy of compiled modules on the 10,000 Fashion-MNIST test images, through the public `build` (some minutes).

    python benchmarks/accuracy.py [--seeds 3]

Calibration: 512 training images without labels, drawn per seed. Results go to benchmarks/results/accuracy.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials" / "models")]

CASES: dict[str, dict[str, Any]] = {
    "float": {"bits": None, "sparsity": None},
    "W8A8": {"bits": 8, "sparsity": None},
    "W4A8": {"bits": (4, 8), "sparsity": None},
    "W4A4": {"bits": 4, "sparsity": None},
    "30 % removed, float": {"bits": None, "sparsity": 0.3},
    "30 % removed, W8A8": {"bits": 8, "sparsity": 0.3},
    "30 % removed, W4A4": {"bits": 4, "sparsity": 0.3},
    "50 % removed, float": {"bits": None, "sparsity": 0.5},
    "50 % removed, nonuniform, float": {"bits": None, "sparsity": 0.5, "allocation": "nonuniform"},
    "50 % removed, nonuniform, W8A8": {"bits": 8, "sparsity": 0.5, "allocation": "nonuniform"},
    "50 % removed, nonuniform, W4A4": {"bits": 4, "sparsity": 0.5, "allocation": "nonuniform"},
    "auto, W8A8": {"bits": 8, "sparsity": "auto"},
    "auto, W4A4": {"bits": 4, "sparsity": "auto"},
}


def main() -> None:
    import train

    import lpsn_tvm
    from benchmarks import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    pool, (images, labels) = train.fashion_mnist("train")[0], train.fashion_mnist("t10k")
    results: dict[str, dict[str, Any]] = {}
    for network in ("resnet14", "mobilenet"):
        model = ROOT / "tutorials" / "models" / f"fashion_{network}.onnx"
        for name, case in CASES.items():
            percents, macs, seconds = [], 0.0, 0.0
            for seed in range(1 if name == "float" else options.seeds):
                chosen = np.sort(np.random.default_rng(seed).choice(len(pool), 512, replace=False))
                start = time.perf_counter()
                module = lpsn_tvm.build(
                    model,
                    calibration=pool[chosen],
                    align=1,
                    batch=100,
                    seed=seed,
                    measure=False,
                    progress=False,
                    **case,
                )
                seconds = time.perf_counter() - start
                percents.append(100 * float((np.asarray(module(images)).argmax(1) == labels).mean()))
                before, after = module.report.totals["macs"]
                macs = after / before
            row = {"accuracy": percents, "mean": float(np.mean(percents)), "macs": macs, "seconds": seconds}
            results.setdefault(network, {})[name] = row
            below = results[network]["float"]["mean"] - row["mean"]
            print(
                f"{network:10s} {name:34s} {row['mean']:6.2f}  {below:5.2f} below float  MACs x{macs:.2f}", flush=True
            )
    print("kept in", record.keep("accuracy", results, images=512, seeds=options.seeds).name)


if __name__ == "__main__":
    main()
