"""Accuracy after channel removal on Fashion-MNIST: every score, order and allocation, 512 unlabelled training images,
10,000 test images.

    python benchmarks/prune.py [--networks resnet14 mobilenet] [--seeds 0 1 2] [--all]

Writes `benchmarks/results/prune.json`. The test images are read for the accuracies only.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import RESULTS, keep
from lpsn_tvm.calibration import CalibrationSet
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.graph import find_layers, shape_of
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.prune import prune
from lpsn_tvm.passes.ranking import compare_rankings

FASHION = Path("/usr/share/datasets/fashion-mnist")
NETWORKS = {"resnet14": "fashion_resnet14.onnx", "mobilenet": "fashion_mobilenet.onnx"}
CALIBRATION_IMAGES = 512
METHODS: dict[str, dict[str, Any]] = {
    "output error, greedy": {},
    "output error, greedy, nonuniform": {"allocation": "nonuniform"},
}
COMPARISONS: dict[str, dict[str, Any]] = {
    "one-shot mean activation, no re-solve": {"score": "mean_activation", "order": "one_shot", "resolve": False},
    "one-shot mean activation": {"score": "mean_activation", "order": "one_shot"},
    "greedy mean activation (the paper)": {"score": "mean_activation"},
    "random": {"score": "random"},
    "output error, one-shot": {"order": "one_shot"},
}


def fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float32[N, 1, 28, 28] in [0, 1] and labels; split is "train" or "t10k"."""
    with gzip.open(FASHION / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32) / 255
    with gzip.open(FASHION / f"{split}-labels-idx1-ubyte.gz") as file:
        return images, np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)


def accuracy(mod: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest output is the label."""
    interpreter = TorchInterpreter(mod)
    hits = 0
    for start in range(0, len(images), 500):
        feeds = {interpreter.inputs[0]: images[start : start + 500]}
        scores = next(iter(interpreter.run(feeds).values()))
        hits += int((scores.argmax(dim=1).numpy() == labels[start : start + 500]).sum())
    return hits / len(images)


def macs(mod: Any) -> int:
    """Multiply-accumulates per image."""
    return sum(layer.macs for layer in find_layers(mod).values())


def run_network(file: str, seeds: list[int], methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All methods at 30 % and 50 % on one network."""
    mod = canonicalize(import_model(load_model(ROOT / "tutorials" / "models" / file, batch=1)).mod)
    signature = {param.name: shape_of(param) for param in mod["main"].params}
    images, _ = fashion_mnist("train")
    test = fashion_mnist("t10k")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result: dict[str, Any] = {"date": date, "float accuracy": accuracy(mod, *test), "macs": macs(mod), "runs": []}
    print(f"{file}: float {result['float accuracy']:.4f}, {macs(mod) / 1e6:.1f} MMAC", flush=True)
    for seed in seeds:
        chosen = np.random.default_rng(seed).permutation(len(images))[:CALIBRATION_IMAGES]
        calibration = CalibrationSet.from_any(images[chosen], signature, batch=32)
        for name, options in methods.items():
            for sparsity in (0.3, 0.5):
                wall, cpu = time.perf_counter(), time.process_time()
                pruned = prune(mod, calibration, sparsity=sparsity, align=1, seed=seed, **options)
                seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
                run = {
                    "method": name,
                    "sparsity": sparsity,
                    "seed": seed,
                    "accuracy": accuracy(pruned.mod, *test),
                    "macs": macs(pruned.mod) / macs(mod),
                    "seconds": {key: round(value, 1) for key, value in seconds.items()},
                    "channels": {r.name: [r.before, r.after] for r in pruned.layers if not r.reason},
                }
                run["points below float"] = round(100 * (result["float accuracy"] - run["accuracy"]), 2)
                result["runs"].append(run)
                print(
                    f"  {name}, {sparsity}, seed {seed}: {run['accuracy']:.4f} ({run['points below float']} below), "
                    f"MACs x{run['macs']:.2f}, {seconds['cpu']:.0f} s CPU",
                    flush=True,
                )
    rankings = compare_rankings(mod, calibration, seed=seeds[0])
    result["ranking, greedy against one-shot"] = [vars(change) for change in rankings]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--all", action="store_true", help="also the scores and orders that are there for comparison")
    options = parser.parse_args()
    methods = {**METHODS, **(COMPARISONS if options.all else {})}
    # Networks that are not run this time keep what was measured before.
    path = RESULTS / "prune.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    results |= {name: run_network(NETWORKS[name], options.seeds, methods) for name in options.networks}
    settings = {"images": CALIBRATION_IMAGES, "seeds": options.seeds, "align": 1, "test images": 10000}
    print("written to", keep("prune", results, **settings))


if __name__ == "__main__":
    main()
