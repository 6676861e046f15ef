"""Keeping results: one JSON file per benchmark with date, machine and versions, so that a table in the README can
be traced to a run.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("lpsn-tvm", "apache-tvm", "torch", "onnxruntime", "openvino", "nncf", "numpy")


def machine() -> dict[str, Any]:
    """CPU model, its vector extensions, cores and memory."""
    info: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    try:
        cpu = Path("/proc/cpuinfo").read_text()
        info["cpu"] = next(
            (line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "unknown"
        )
        flags = next((line.split(":", 1)[1].split() for line in cpu.splitlines() if line.startswith("flags")), [])
        info["features"] = [f for f in flags if f.startswith(("avx", "amx", "fma"))]
        info["cores"] = cpu.count("processor\t")
        info["memory_GiB"] = round(int(Path("/proc/meminfo").read_text().split()[1]) / 2**20, 1)
    except OSError:
        pass
    return info


def versions() -> dict[str, str]:
    """Versions of the packages that matter, where installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def keep(name: str, results: Any, **settings: Any) -> Path:
    """Write `benchmarks/results/<name>.json` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "results": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
