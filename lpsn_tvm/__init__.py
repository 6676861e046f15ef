"""lpsn_tvm: from a trained ONNX network and a few hundred samples to a small, fast, low-precision module for the
hardware it must run on.

    import lpsn_tvm
    module = lpsn_tvm.build("model.onnx", target="llvm", bits=8, calibration=images)
    y = module(x)

Importing this package imports neither tvm, torch nor onnx; they are loaded when a build needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_LAZY = {
    "build": "lpsn_tvm.driver",
    "compare_rankings": "lpsn_tvm.analysis",
    "load": "lpsn_tvm.loading",
    "Artifact": "lpsn_tvm.artifact",
    "CalibrationSet": "lpsn_tvm.calibration",
    "Recipe": "lpsn_tvm.recipe",
    "Records": "lpsn_tvm.records",
    "Report": "lpsn_tvm.report",
    "Backend": "lpsn_tvm.targets.backend",
    **{
        name: "lpsn_tvm.errors"
        for name in (
            "LpsnError",
            "ArtifactError",
            "CalibrationError",
            "CompileError",
            "ModelError",
            "PruneError",
            "QuantizeError",
            "RecipeError",
            "TargetError",
            "TuningError",
            "UnsupportedOpError",
        )
    },
}

if TYPE_CHECKING:
    from lpsn_tvm.analysis import compare_rankings
    from lpsn_tvm.artifact import Artifact
    from lpsn_tvm.calibration import CalibrationSet
    from lpsn_tvm.driver import build
    from lpsn_tvm.errors import (
        ArtifactError,
        CalibrationError,
        CompileError,
        LpsnError,
        ModelError,
        PruneError,
        QuantizeError,
        RecipeError,
        TargetError,
        TuningError,
        UnsupportedOpError,
    )
    from lpsn_tvm.loading import load
    from lpsn_tvm.recipe import Recipe
    from lpsn_tvm.records import Records
    from lpsn_tvm.report import Report
    from lpsn_tvm.targets.backend import Backend

__all__ = [
    "Artifact",
    "ArtifactError",
    "Backend",
    "CalibrationError",
    "CalibrationSet",
    "CompileError",
    "LpsnError",
    "ModelError",
    "PruneError",
    "QuantizeError",
    "Recipe",
    "RecipeError",
    "Records",
    "Report",
    "TargetError",
    "TuningError",
    "UnsupportedOpError",
    "build",
    "compare_rankings",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
