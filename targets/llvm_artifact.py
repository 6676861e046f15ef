"""Modules for CPUs: compiled and wrapped, and timed beside the dense float network."""

from __future__ import annotations

import statistics
from typing import Any

from lpsn_tvm.library_artifact import LibraryArtifact
from lpsn_tvm.passes.fuse_float import fuse_float
from lpsn_tvm.progress import ProgressCallback
from lpsn_tvm.report import Report
from lpsn_tvm.targets.backend import Backend, Parts


def make_artifact(backend: Backend, mod: Any, parts: Parts, progress: ProgressCallback) -> LibraryArtifact:
    """The module of a network, whole in one library."""
    compiled = backend.compile(backend.lower(mod))
    return LibraryArtifact(
        inputs=parts.inputs,
        outputs=parts.outputs,
        recipe=parts.recipe,
        report=parts.report,
        target=backend.tvm_target,
        sources=parts.sources,
        library=compiled.library,
        params=compiled.params,
        cpu_features=compiled.cpu_features,
    )


def measure(backend: Backend, artifact: LibraryArtifact, dense: Any, *, rounds: int = 5) -> None:
    """Compile the dense network in float and time both in turn; medians of rounds go into
    `artifact.report.milliseconds`.
    """
    compiled = backend.compile(backend.lower(fuse_float(dense)))
    reference = LibraryArtifact(
        inputs=artifact.inputs,
        outputs=artifact.outputs,
        recipe=artifact.recipe,
        report=Report(),
        target=artifact.target,
        library=compiled.library,
        params=compiled.params,
        cpu_features=compiled.cpu_features,
    )
    pairs = [(reference.benchmark(repeats=7, warmup=2), artifact.benchmark(repeats=7, warmup=2)) for _ in range(rounds)]
    artifact.report.milliseconds = {
        "float": statistics.median(pair[0] for pair in pairs),
        "module": statistics.median(pair[1] for pair in pairs),
    }
