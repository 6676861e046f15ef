"""Tuning as a part of a build: what is measured on, where trials are kept, and whether the whole network gained."""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lpsn_tvm.artifact import Artifact
from lpsn_tvm.budget import Budget
from lpsn_tvm.cache import cache_directory
from lpsn_tvm.errors import TuningError
from lpsn_tvm.progress import ProgressCallback
from lpsn_tvm.records import Records
from lpsn_tvm.runtime import core_count
from lpsn_tvm.targets.backend import Backend, Parts
from lpsn_tvm.tuning.cost_model import check_xgboost
from lpsn_tvm.tuning.measure import measurer_for
from lpsn_tvm.tuning.measurer import Measurer
from lpsn_tvm.tuning.network_timing import in_turn
from lpsn_tvm.tuning.tuner import tune


def check_tunable(backend: Backend, tracker: str | None) -> None:
    """Refuse before any long work what could not be tuned.

    Raises
    ------
    TuningError
        No such device here (or at the tracker), no kernels that offer a choice, or the cost model's library is
        missing; says what is needed.
    """
    check_xgboost()
    if backend.name == "cuda" and "," in backend.tvm_target:
        raise TuningError(
            "tuning is for one architecture: tune for each of them, and build with the records", where="cuda"
        )
    measurer_for(backend, tracker).close()


def tune_network(backend: Backend, mod: Any, parts: Parts, artifact: Artifact, progress: ProgressCallback) -> Artifact:
    """Tune a network's kernels as its recipe says, and build it again if that pays.

    Parameters
    ----------
    backend : Backend
        With the records that `artifact` was built with.
    mod : IRModule
        What `artifact` was built from.
    parts : Parts
        Its recipe says how long, on what, with how many threads, and where trials are kept.
    artifact : Artifact
        The network as it is without tuning; what comes back where tuning does not make it faster.
    progress : callable (stage, done, total)
        One stage for all and one per task.

    Returns
    -------
    Artifact
        Its `records` are what tuning found.
    """
    recipe, tracker = parts.recipe, parts.recipe.tracker
    budget = Budget.parse("" if recipe.tune is None else recipe.tune)
    with _directory(recipe.cache, backend.device) as folder:
        measurer = measurer_for(backend, tracker, threads=recipe.num_threads or core_count())
        with contextlib.closing(measurer):
            found = tune(backend, mod, budget, folder, measurer, progress, seed=recipe.seed)
            if not len(found):
                artifact.report.notes.append("tuning found no kernel that is clearly faster than its default")
                return _with_records(artifact, found)
            report = replace(parts.report, notes=list(parts.report.notes))
            better = replace(backend, records=backend.records.merge(found))
            new = better.build(mod, replace(parts, report=report), progress)
            if tracker is None:
                # Nothing of the tuning runs beside the network.
                measurer.close()
            return _faster(artifact, new, found, None if tracker is None else measurer)


def _with_records(artifact: Artifact, found: Records) -> Artifact:
    if artifact.sources is not None:
        artifact.sources = replace(artifact.sources, records=found)
    return artifact


def _faster(old: Artifact, new: Artifact, found: Records, measurer: Measurer | None) -> Artifact:
    """The new network where it was seen to be no slower, else the old one; a note says why."""
    try:
        ratio = time_ratio(old, new, measurer)
        problem = f"the network took {ratio:.3f} times as long with them" if ratio > 1 else ""
    except TuningError as error:
        problem = f"the network could not be timed with them ({error})"
    if problem:
        old.report.notes.append(f"tuning found {len(found)} faster kernels, but {problem}: it stays as it was")
        return _with_records(old, Records())
    new.report.notes.append(f"tuned: {len(found)} kernels; the network takes {ratio:.3f} of the time before (measured)")
    return _with_records(new, found)


def time_ratio(old: Artifact, new: Artifact, measurer: Measurer | None = None) -> float:
    """Median new time / median old time, taken in turn, here or on a measurer's device."""
    before, after = in_turn((old, new)) if measurer is None else measurer.time_networks(old, new)
    return statistics.median(after) / statistics.median(before)


@contextlib.contextmanager
def _directory(cache: bool | str, device: str) -> Iterator[Path]:
    """Where trials are kept: one database per device, because each is read whole."""
    if cache is False:
        with tempfile.TemporaryDirectory(prefix="lpsn_tvm_") as folder:
            yield Path(folder)
        return
    root = cache_directory("tuning") if cache is True else Path(cache) / "tuning"
    yield root / hashlib.sha256(device.encode()).hexdigest()[:16]
