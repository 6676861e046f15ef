"""Accuracy of closed-form quantization, no training: Fashion-MNIST classifiers and super-resolution, simulated
exactly as the integer network rounds.

    python -m benchmarks.quantize [resnet14 mobilenet espcn] [--bits 8,8 4,8 4,4 ...]

512 unlabelled training images calibrate; the 10,000 test images (chelsea and flower) judge. Needs the data that
tutorials/models/train.py needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import keep
from lpsn_tvm.calibration import CalibrationSet
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.fake_quantize import evaluate_plan
from lpsn_tvm.passes.plan_quantization import plan_quantization
from lpsn_tvm.passes.regions import find_regions
from lpsn_tvm.quant import QuantPlan

MODELS = Path(__file__).resolve().parents[1] / "tutorials" / "models"
SAMPLES = 512
BITS = ((8, 8), (4, 8), (4, 4), (3, 3), (2, 8), (2, 4))


def training_module() -> Any:
    """tutorials/models/train.py: where the data is read and the networks come from."""
    spec = importlib.util.spec_from_file_location("train", MODELS / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def canonical(name: str, shape: tuple[int, ...] | None = None) -> Any:
    model = load_model(MODELS / name, input_shapes={"input": shape} if shape else None)
    return canonicalize(import_model(model).mod)


def outputs(mod: Any, plan: QuantPlan | None, batches: list[np.ndarray]) -> Iterator[np.ndarray]:
    """First output for every batch, of the float network or of the plan."""
    interpreter = TorchInterpreter(mod)
    name = interpreter.inputs[0]
    if plan is None:
        results: Any = (interpreter.run({name: batch}) for batch in batches)
    else:
        results = evaluate_plan(interpreter, plan, find_regions(mod), ({name: batch} for batch in batches))
    for result in results:
        yield next(iter(result.values())).numpy()


def timed_plan(mod: Any, calibration: CalibrationSet, bits: tuple[int, int], **options: Any) -> tuple[QuantPlan, float]:
    start = time.perf_counter()
    plan = plan_quantization(mod, calibration, weight_bits=bits[0], activation_bits=bits[1], **options)
    return plan, time.perf_counter() - start


def classifier(file: str, choices: list[tuple[int, int]], seeds: int, **options: Any) -> dict[str, Any]:
    """Top-1 accuracy on the test set per choice of bits, over `seeds` draws of calibration images."""
    train = training_module()
    images, labels = train.fashion_mnist("t10k")
    pool, _ = train.fashion_mnist("train")
    mod = canonical(file)
    batches = [images[i : i + 250] for i in range(0, len(images), 250)]

    def accuracy(plan: QuantPlan | None) -> float:
        predicted = np.concatenate([out.argmax(axis=1) for out in outputs(mod, plan, batches)])
        return float((predicted == labels).mean())

    rows: dict[str, Any] = {"float": accuracy(None)}
    print(f"{file}: float {rows['float']:.4f}", flush=True)
    for bits in choices:
        found, seconds = [], []
        for seed in range(seeds):
            index = np.random.default_rng(seed).permutation(len(pool))[:SAMPLES]
            calibration = CalibrationSet.from_any(pool[index], {"input": (1, 1, 28, 28)})
            plan, spent = timed_plan(mod, calibration, bits, seed=seed, **options)
            found.append(accuracy(plan))
            seconds.append(spent)
        rows[f"W{bits[0]}A{bits[1]}"] = {
            "accuracy": found,
            "drop": rows["float"] - float(np.mean(found)),
            "seconds": min(seconds),
        }
        print(
            f"  W{bits[0]}A{bits[1]}: {np.mean(found):.4f} ({100 * (np.mean(found) - rows['float']):+.2f} points), "
            f"{min(seconds):.1f} s",
            flush=True,
        )
    return rows


def super_resolution(file: str, choices: list[tuple[int, int]], **options: Any) -> dict[str, Any]:
    """PSNR in dB on chelsea and flower per choice of bits; calibrated on 64 x 64 crops of the training photographs."""
    train = training_module()
    rng = np.random.default_rng(0)
    small = [train.halve(y) for y in train.photographs("train").values()]
    crops = []
    for number in range(96):
        image = small[number % len(small)]
        i, j = (int(rng.integers(0, extent - 63)) for extent in image.shape)
        crops.append(image[i : i + 64, j : j + 64])
    calibration = CalibrationSet.from_any(np.stack(crops)[:, None], {"input": (1, 1, 64, 64)})
    tests = {name: (train.halve(y)[None, None], y) for name, y in train.photographs("test").items()}
    modules = {name: canonical(file, low.shape) for name, (low, _) in tests.items()}
    mod = canonical(file, (1, 1, 64, 64))

    def quality(plan: QuantPlan | None) -> dict[str, float]:
        return {
            name: train.psnr(np.clip(next(outputs(modules[name], plan, [low]))[0, 0], 0, 1), high)
            for name, (low, high) in tests.items()
        }

    rows: dict[str, Any] = {"float": quality(None)}
    print(f"{file}: float {rows['float']}", flush=True)
    for bits in choices:
        plan, seconds = timed_plan(mod, calibration, bits, **options)
        found = quality(plan)
        rows[f"W{bits[0]}A{bits[1]}"] = {"psnr": found, "seconds": seconds}
        change = ", ".join(
            f"{name} {value:.2f} dB ({value - rows['float'][name]:+.3f})" for name, value in found.items()
        )
        print(f"  W{bits[0]}A{bits[1]}: {change}, {seconds:.1f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", default=["resnet14", "mobilenet", "espcn"])
    parser.add_argument("--bits", nargs="+", default=[f"{w},{a}" for w, a in BITS])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--option", nargs="*", default=[], help="name=value handed to plan_quantization")
    parser.add_argument("--dry", action="store_true", help="do not write the results file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    choices = [(int(item.split(",")[0]), int(item.split(",")[1])) for item in arguments.bits]
    options = {
        key: int(value) if value.isdigit() else value for key, value in (item.split("=") for item in arguments.option)
    }
    results: dict[str, Any] = {}
    for model in arguments.models:
        if model == "espcn":
            results[model] = super_resolution("espcn_x2.onnx", choices, **options)
        else:
            results[model] = classifier(f"fashion_{model}.onnx", choices, arguments.seeds, **options)
    if not arguments.dry:
        print(keep("quantize", results, samples=SAMPLES, options=options))


if __name__ == "__main__":
    main()
