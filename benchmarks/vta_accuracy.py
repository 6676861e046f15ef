"""Accuracy of integer networks for hardware that requantizes by shifting, bit for bit as the accelerator computes them.

    python -m benchmarks.vta_accuracy [resnet14 mobilenet espcn] [--cases W8A8 W4A4 ...] [--seeds 3] [--images 10000]

Results are kept case by case; a run with other cases or networks, but as many seeds and images, adds to what is there.
512 unlabelled training images calibrate; the 10,000 test images (chelsea and flower) judge. The integer graph is
executed by the reference operators; only the convolutions' sums come from torch, in float32 where every partial sum is
below 2**24 and so exact, else in float64.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.quantize import SAMPLES, canonical, training_module
from benchmarks.record import RESULTS, keep
from lpsn_tvm import quant
from lpsn_tvm.calibration import CalibrationSet
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.passes.plan_quantization import plan_quantization
from lpsn_tvm.quant import QuantPlan, QuantScheme
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets.vta.config import preset
from lpsn_tvm.targets.vta.scheme import vta_scheme

Kept = Callable[[str, str, Any], None]
"""Takes network, case and row."""
BATCH = 250
EIGHT, FOUR = "1x16_i8w8a32_15_15_18_17", "1x16_i4w4a32_15_14_17_17"
CASES: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "W8A8": (EIGHT, (8, 8), {}),
    "W8A8, powers of two": (EIGHT, (8, 8), {"power_of_two": True}),
    "W4A8": (EIGHT, (4, 8), {}),
    "W4A8, powers of two": (EIGHT, (4, 8), {"power_of_two": True}),
    "W4A4, no offset": (FOUR, (4, 4), {"has_activation_offset": False}),
    "W4A4": (FOUR, (4, 4), {}),
    "W4A4, powers of two": (FOUR, (4, 4), {"power_of_two": True}),
}
"""Name -> configuration, bits, fields of the scheme that are replaced."""


def scheme_of(case: str) -> QuantScheme:
    """The scheme of a case."""
    from dataclasses import replace

    configuration, bits, changes = CASES[case]
    return replace(vta_scheme(preset(configuration), bits), **changes)


def exact_accumulate(
    x: Any, weight: Any, strides: Any, padding: Any, dilation: Any, groups: int, pad: int
) -> quant.Array:
    """`quant`'s int32 convolution by torch."""
    largest = int(np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(axis=1).max(initial=0)) * 128
    kind = torch.float32 if largest < 1 << 24 else torch.float64
    top, left, bottom, right = padding
    data = torch.nn.functional.pad(
        torch.from_numpy(np.ascontiguousarray(x)).to(kind), (left, right, top, bottom), value=pad
    )
    kernel = torch.from_numpy(np.ascontiguousarray(weight)).to(kind)
    with torch.no_grad():
        total = torch.nn.functional.conv2d(
            data, kernel, stride=tuple(strides), dilation=tuple(dilation), groups=int(groups)
        )
    return total.numpy().astype(np.int32)


@contextmanager
def fast_sums() -> Iterator[None]:
    """Within, `quant.conv2d` sums with `exact_accumulate`."""
    slow = quant._accumulate_conv2d
    quant._accumulate_conv2d = exact_accumulate
    try:
        yield
    finally:
        quant._accumulate_conv2d = slow


def outputs(mod: Any, plan: QuantPlan, scheme: QuantScheme, images: np.ndarray) -> np.ndarray:
    """First output of the integer network, bit for bit."""
    lowered = lower_to_integer(mod, plan, scheme=scheme)
    name = mod["main"].params[0].name
    size = int(mod["main"].params[0].ty.shape[0])
    with fast_sums():
        parts = [
            next(iter(run_reference(lowered, {name: images[i : i + size]}).values()))
            for i in range(0, len(images), size)
        ]
    return np.concatenate(parts)


def float_outputs(mod: Any, images: np.ndarray) -> np.ndarray:
    from benchmarks.quantize import outputs as simulated

    return np.concatenate(list(simulated(mod, None, [images[i : i + BATCH] for i in range(0, len(images), BATCH)])))


def classifier(network: str, cases: list[str], seeds: int, count: int, kept: Kept, **options: Any) -> None:
    """Top-1 accuracy in percent per case."""
    train = training_module()
    images, labels = (array[:count] for array in train.fashion_mnist("t10k"))
    pool, _ = train.fashion_mnist("train")
    file = f"fashion_{network}.onnx"
    mod, batched = canonical(file), canonical(file, (BATCH, 1, 28, 28))
    reference = 100 * float((float_outputs(mod, images).argmax(axis=1) == labels).mean())
    print(f"{network}: float {reference:.2f} %", flush=True)
    kept(network, "float", reference)
    for case in cases:
        found, start = [], time.perf_counter()
        for seed in range(seeds):
            chosen = np.random.default_rng(seed).permutation(len(pool))[:SAMPLES]
            calibration = CalibrationSet.from_any(pool[chosen], {"input": (1, 1, 28, 28)})
            plan = make_plan(mod, calibration, case, seed=seed, **options)
            predicted = outputs(batched, plan, scheme_of(case), images).argmax(axis=1)
            found.append(100 * float((predicted == labels).mean()))
        spent = (time.perf_counter() - start) / seeds
        kept(network, case, {"accuracy": found, "below float": reference - float(np.mean(found)), "seconds": spent})
        shown = " ".join(f"{value:.2f}" for value in found)
        print(f"  {case:24s} {np.mean(found):.2f} % ({np.mean(found) - reference:+.2f}): {shown}", flush=True)


def make_plan(mod: Any, calibration: Any, case: str, **options: Any) -> QuantPlan:
    _, bits, _ = CASES[case]
    return plan_quantization(
        mod, calibration, weight_bits=bits[0], activation_bits=bits[1], scheme=scheme_of(case), **options
    )


def super_resolution(cases: list[str], kept: Kept, **options: Any) -> None:
    """PSNR in dB on chelsea and flower per case; calibrated on 64 x 64 crops of the training photographs."""
    train = training_module()
    rng = np.random.default_rng(0)
    small = [train.halve(y) for y in train.photographs("train").values()]
    crops = []
    for number in range(96):
        image = small[number % len(small)]
        i, j = (int(rng.integers(0, extent - 63)) for extent in image.shape)
        crops.append(image[i : i + 64, j : j + 64])
    calibration = CalibrationSet.from_any(np.stack(crops)[:, None], {"input": (1, 1, 64, 64)})
    tests: Mapping[str, Any] = {n: (train.halve(y)[None, None], y) for n, y in train.photographs("test").items()}
    modules = {name: canonical("espcn_x2.onnx", low.shape) for name, (low, _) in tests.items()}
    mod = canonical("espcn_x2.onnx", (1, 1, 64, 64))
    reference = {n: train.psnr(np.clip(float_outputs(modules[n], low)[0, 0], 0, 1), y) for n, (low, y) in tests.items()}
    kept("espcn", "float", reference)
    print("espcn_x2: float", reference, flush=True)
    for case in cases:
        plan = make_plan(mod, calibration, case, **options)
        found = {
            n: train.psnr(np.clip(outputs(modules[n], plan, scheme_of(case), low)[0, 0], 0, 1), y)
            for n, (low, y) in tests.items()
        }
        kept("espcn", case, found)
        print(f"  {case:24s}", found, flush=True)


def keeper(settings: dict[str, Any], dry: bool) -> Kept:
    """Adds a row to the results file, which begins anew where its settings were others."""
    path = RESULTS / "vta_accuracy.json"

    def kept(network: str, case: str, row: Any) -> None:
        if dry:
            return
        old = json.loads(path.read_text()) if path.exists() else {}
        results: dict[str, Any] = old["results"] if old.get("settings") == settings else {}
        results.setdefault(network, {})[case] = row
        keep("vta_accuracy", results, **settings)

    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet14", "mobilenet", "espcn"])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--dry", action="store_true", help="do not write the results file")
    arguments = parser.parse_args()
    kept = keeper({"samples": SAMPLES, "seeds": arguments.seeds, "images": arguments.images}, arguments.dry)
    for network in arguments.networks:
        if network == "espcn":
            super_resolution(arguments.cases, kept)
        else:
            classifier(network, arguments.cases, arguments.seeds, arguments.images, kept)


if __name__ == "__main__":
    main()
