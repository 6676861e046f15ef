"""Modules for the GPU benchmark, built anywhere: each with inputs and the outputs that it must give, bit for bit unless
operators compute in float (`is_inexact` in kit.json: exp and sums may round otherwise).

A kit is a folder: `kit.json` (what is in it, seconds per build) and per case a module file and an .npz with input and
expected output. Expected outputs come from the same integer network compiled for this machine's CPU, whose equality
with the numpy definition is the tests' business.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 16
NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "espcn")
BATCHES = (1, 8, 64)


@dataclass(frozen=True)
class Variant:
    """How a network is compressed."""

    name: str
    bits: int | tuple[int, int]
    sparsity: float | None = None


VARIANTS = (
    Variant("W8A8", 8),
    Variant("W4A8", (4, 8)),
    Variant("W4A4", 4),
    Variant("W8A8, 30 % removed", 8, 0.3),
    Variant("W8A8, 50 % removed", 8, 0.5),
    Variant("W4A8, 30 % removed", (4, 8), 0.3),
    Variant("W4A8, 50 % removed", (4, 8), 0.5),
    Variant("W4A4, 30 % removed", 4, 0.3),
    Variant("W4A4, 50 % removed", 4, 0.5),
)


@dataclass(frozen=True)
class Case:
    """One module of a kit."""

    network: str
    variant: Variant
    batch: int

    @property
    def stem(self) -> str:
        """File name without suffix."""
        bits = self.variant.bits if isinstance(self.variant.bits, int) else "w{}a{}".format(*self.variant.bits)
        return f"{self.network}-{bits}-{self.variant.sparsity or 0:g}-b{self.batch}"


def all_networks() -> dict[str, Any]:
    """Every network that has a maker: those of the other benchmarks and ResNet-50."""
    from benchmarks import models

    return {
        **models.LATENCY_NETWORKS,
        **models.VTA_NETWORKS,
        **models.STRUCTURE_NETWORKS,
        "resnet50": models.resnet50,
    }


def input_shape(model: Any, batch: int) -> tuple[int, ...]:
    """Shape of the only input."""
    return (batch, *(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]))


def prepare(folder: Path, cases: Iterable[Case], target: str) -> dict[str, Any]:
    """Build every case that is not there yet and write the list of all."""
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "kit.json"
    kit: dict[str, Any] = read_index(folder, "cases") if index.exists() else {"target": target, "cases": {}}
    if kit["target"] != target:
        raise SystemExit(f"{folder} is for {kit['target']!r}, not for {target!r}; take another folder")
    models: dict[str, Any] = {}
    for case in cases:
        if case.stem in kit["cases"]:
            continue
        if case.network not in models:
            models[case.network] = all_networks()[case.network]()
        seconds, is_inexact = _build(folder, case, models[case.network], target)
        kit["cases"][case.stem] = {
            "network": case.network,
            "variant": dataclasses.asdict(case.variant),
            "batch": case.batch,
            "build_seconds": seconds,
            "is_inexact": is_inexact,
        }
        index.write_text(json.dumps(kit, indent=1) + "\n")
        print(f"{case.stem:32s} built in {sum(seconds.values()):6.1f} s", flush=True)
    return kit


def _build(folder: Path, case: Case, model: Any, target: str) -> tuple[dict[str, float], bool]:
    import lpsn_tvm
    from benchmarks import models
    from lpsn_tvm import graph
    from lpsn_tvm.targets import get_backend

    backend = get_backend(target)
    shape = input_shape(model, case.batch)
    # Two different images, however large the batch.
    x = np.resize(models.smooth_noise((2, *shape[1:]), 6), shape)
    expected: dict[str, Any] = {}

    def maker(chosen: Any, mod: Any, parts: Any, progress: Any) -> Any:
        expected["y"] = get_backend("llvm").build(mod, parts)(x)
        expected["is_inexact"] = any(graph.is_inexact(value) for _, value in graph.bindings(mod))
        start = time.perf_counter()
        artifact = backend.maker(chosen, mod, parts, progress)
        expected["seconds"] = time.perf_counter() - start
        return artifact

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = lpsn_tvm.build(
            model,
            target=dataclasses.replace(backend, maker=maker),
            bits=case.variant.bits,
            sparsity=case.variant.sparsity,
            batch=case.batch,
            calibration=models.smooth_noise((SAMPLES, *shape[1:]), 5),
            measure=False,
            progress=False,
        )
    module.save(folder / f"{case.stem}.lpsn")
    np.savez(folder / f"{case.stem}.npz", x=x[:2], y=np.asarray(expected["y"])[:2])
    before = sum(seconds for name, seconds in module.report.seconds.items() if name != "compile")
    return {"before": before, "compile": float(expected["seconds"])}, bool(expected["is_inexact"])


def read_index(folder: Path, entry: str) -> dict[str, Any]:
    """What a kit says of itself; ends the program with a word on it where that has no such entry."""
    try:
        index: dict[str, Any] = json.loads((folder / "kit.json").read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is no kit ({error}); --prepare {folder} makes one") from error
    if entry not in index:
        raise SystemExit(f"{folder} is a kit for another script: kit.json has no {entry!r}")
    return index


def load(folder: Path) -> dict[Case, dict[str, Any]]:
    """Cases of a kit and what is known of each."""
    kit = read_index(folder, "cases")
    cases = {}
    for entry in kit["cases"].values():
        bits = entry["variant"]["bits"]
        variant = Variant(
            entry["variant"]["name"], bits if isinstance(bits, int) else tuple(bits), entry["variant"]["sparsity"]
        )
        cases[Case(entry["network"], variant, entry["batch"])] = entry
    return cases
