"""Measuring candidates: built in worker processes here, timed in a worker process here or, through TVM's RPC tracker,
on other machines. A candidate that crashes, hangs or does not compile is a failed trial with its reason.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lpsn_tvm import compat
from lpsn_tvm.artifact import Artifact
from lpsn_tvm.errors import TuningError
from lpsn_tvm.schedules.template import REMAKERS, Config, Template
from lpsn_tvm.targets.backend import Backend
from lpsn_tvm.tuning.measurer import Comparison, Measurer
from lpsn_tvm.tuning.network_timing import ROUNDS
from lpsn_tvm.tuning.place import LocalPlace, Place
from lpsn_tvm.tuning.workers import Call, Settings, WorkerPool

BUILD_SECONDS, RUN_SECONDS = 60.0, 30.0
"""A candidate may take so long to be compiled (alone), and to be measured."""
NETWORK_SECONDS = 600.0
"""For whole networks: two of them are loaded, and timed in turn."""
MOST_WORKERS = 16
"""Each takes a few hundred MB; a batch of trials is not larger."""
BATCH = {"llvm": 1, "cuda": 8}
"""Most candidates compiled in one call: for GPUs, most of nvcc's time does not depend on how many there are."""


def measurer_for(backend: Backend, tracker: str | None = None, *, threads: int = 1) -> Measurer:
    """What measures kernels of a backend.

    Parameters
    ----------
    backend : Backend
        Of llvm or cuda; its `device` is what is measured on.
    tracker : str, optional
        "HOST:PORT" or "HOST:PORT/KEY" of a tracker that `lpsn-tvm rpc-tracker` started, the key being what servers
        were started with (by default the backend's name); without, this machine measures.
    threads : int
        Threads that a kernel for CPUs runs with.

    Raises
    ------
    TuningError
        The backend has no kernels to tune, there is no such device, or it is another one than the backend is for.
    """
    if os.name != "posix":
        raise TuningError("worker processes need Linux or macOS; records from there can be used here", where="tuning")
    if backend.name not in BATCH:
        raise TuningError(f"kernels of {backend.name} are not tuned; what can be: {', '.join(BATCH)}")
    place: Place
    if tracker is None:
        place = LocalPlace(backend.name, threads)
    else:
        from lpsn_tvm.tuning.rpc_client import RemotePlace

        place = RemotePlace(backend.name, tracker)
    measurer = KernelMeasurer(backend, place)
    try:
        measurer.check_device()
    except BaseException:
        measurer.close()
        raise
    return measurer


class KernelMeasurer:
    """The `Measurer` of kernels that are built from templates.

    Parameters
    ----------
    backend : Backend
    place : Place
        Where the device is.
    workers : int, optional
        Processes that compile; by default one per processor, up to `MOST_WORKERS`.
    build_seconds, run_seconds : float
        How long a candidate may take.
    """

    def __init__(
        self,
        backend: Backend,
        place: Place,
        *,
        workers: int | None = None,
        build_seconds: float = BUILD_SECONDS,
        run_seconds: float = RUN_SECONDS,
    ) -> None:
        self.backend, self.place = backend, place
        self.build_seconds, self.run_seconds = build_seconds, run_seconds
        self._target = {"kind": backend.name, "target": backend.tvm_target, "arch": backend.device}
        self._pool = WorkerPool(workers or _processors(), Settings(prepare=Call("lpsn_tvm.tuning.build:prepare")))
        self._folder = Path(tempfile.mkdtemp(prefix="lpsn_tvm_tuning_"))
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._description: Mapping[str, Any] | None = None

    def describe(self) -> Mapping[str, Any]:
        """What the device's machine says of it.

        Raises
        ------
        TuningError
            There is none.
        """
        if self._description is None:
            outcome = self.place.submit("describe", (), 1, self.run_seconds).result()
            if outcome.error:
                raise TuningError(f"there is nothing to measure on: {outcome.error}", where=self.backend.name)
            self._description = dict(outcome.value)
        return self._description

    def check_device(self) -> None:
        """Refuse a device that cannot run what is built.

        Raises
        ------
        TuningError
            Says what is needed and what is there.
        """
        found = self.describe()
        if self.backend.name == "cuda":
            wanted = self.backend.device
            if wanted.rstrip("af") != f"sm_{found['number']}":
                raise TuningError(f"tuning for {wanted} needs such a GPU; {found['name']} is sm_{found['number']}")
            return
        from lpsn_tvm.targets.llvm import required_features

        if found["machine"] != platform.machine():
            raise TuningError(
                f"{found['name']} is of another architecture ({found['machine']}) than this machine "
                f"({platform.machine()}), whose linker makes the kernels: tune on a machine of that kind"
            )
        missing = sorted(set(required_features(self.backend.target)) - set(found["features"] or ()))
        if missing and found["features"] is not None:
            raise TuningError(f"the target needs CPU features that {found['name']} lacks: {', '.join(missing)}")

    @property
    def machine(self) -> str:
        """What a record says about where it was measured."""
        return str(self.describe()["name"])

    def builder(self) -> Any:
        """MetaSchedule's `Builder`: makes the kernel of a candidate in a worker process."""
        from tvm.ir.utils import derived_object
        from tvm.s_tir import meta_schedule as ms

        from lpsn_tvm.tuning.space import read_candidate

        compat.pass_interrupts()
        measurer = self

        @derived_object
        class TemplateBuilder(ms.builder.PyBuilder):  # type: ignore[misc]
            """Builds what the candidates' annotations say."""

            def build(self, build_inputs: Any) -> Any:
                """One result per input."""
                found = [read_candidate(item.mod) for item in build_inputs]
                jobs = [measurer.job(item.template, item.workload, item.config) for item in found]
                results = zip(jobs, measurer.build(jobs), strict=True)
                return [
                    ms.builder.BuilderResult(None, error) if error else ms.builder.BuilderResult(job["path"], None)
                    for job, error in results
                ]

        return TemplateBuilder()

    def runner(self) -> Any:
        """MetaSchedule's `Runner`: times what the builder made; one median per candidate."""
        from tvm.ir.utils import derived_object
        from tvm.s_tir import meta_schedule as ms

        compat.pass_interrupts()
        measurer = self

        def future(outcome: Any) -> Any:
            def result() -> Any:
                value, error = outcome.value, outcome.error
                return ms.runner.RunnerResult(None if error else [float(np.median(value))], error or None)

            return ms.runner.RunnerFuture(lambda: True, result)

        @derived_object
        class TemplateRunner(ms.runner.PyRunner):  # type: ignore[misc]
            """Times candidate files."""

            def run(self, runner_inputs: Any) -> Any:
                """One future per input; all are done: what is compiled meanwhile would disturb the times."""
                paths = [str(item.artifact_path) for item in runner_inputs]
                return [future(outcome) for outcome in measurer.time(paths)]

        return TemplateRunner()

    def job(self, template: str, workload: Mapping[str, Any], config: Config) -> dict[str, Any]:
        """What a worker needs to build a candidate; a folder of its own, because MetaSchedule removes the folder."""
        folder = tempfile.mkdtemp(dir=self._folder)
        return {
            "remaker": REMAKERS[template],
            "workload": dict(workload),
            "config": dict(config),
            "path": str(Path(folder) / "candidate.zip"),
            "constants": None,
            "out": None,
        }

    def build(self, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
        """Build candidates; why each could not be built, or ""."""
        size = min(BATCH[self.backend.name], -(-len(jobs) // self._pool.size) or 1)
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        errors = self._build_batches(batches)
        # Of a batch that took its worker along, only one candidate may be to blame.
        doubtful = (
            [i for i, error in enumerate(errors) if error.startswith(("crashed", "timed out"))] if size > 1 else []
        )
        for index, error in zip(doubtful, self._build_batches([[jobs[i]] for i in doubtful]), strict=True):
            errors[index] = error
        return [f"does not compile: {e}" if e.startswith(("crashed", "timed out")) else e for e in errors]

    def _build_batches(self, batches: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
        calls = [
            Call("lpsn_tvm.tuning.build:build", {"candidates": list(batch), "target": self._target})
            for batch in batches
        ]
        futures = [
            self._pool.submit(call, self.build_seconds * len(batch)) for call, batch in zip(calls, batches, strict=True)
        ]
        errors: list[str] = []
        for outcome, batch in zip([future.result() for future in futures], batches, strict=True):
            errors += [outcome.error] * len(batch) if outcome.error else list(outcome.value)
        return errors

    def time(self, paths: Sequence[str]) -> list[Any]:
        """Outcomes of measuring files: seconds of several calls each."""
        futures = [self.place.submit("measure", (path,), 1, self.run_seconds) for path in paths]
        return [future.result() for future in futures]

    def compare(self, template: Template, configs: Sequence[Config], rounds: int) -> Comparison:
        """Time configurations in turn, round by round, in one process, on equal inputs and the template's constants.

        Parameters
        ----------
        template : Template
            With the network's constants.
        configs : sequence of Config
            The first is what the others are compared with.
        rounds : int
            How often each is measured.
        """
        jobs = [self._job_with_constants(template, config) for config in configs]
        errors = self.build(jobs)
        built = [index for index, error in enumerate(errors) if not error]
        outcome = self._compare_files(jobs, built, rounds)
        if outcome.error and len(built) > 1:
            # One of them took the process along: find out which, and compare the others.
            for index in built:
                errors[index] = self._compare_files(jobs, [index], 1).error
            built = [index for index in built if not errors[index]]
            outcome = self._compare_files(jobs, built, rounds)
        for index in built:
            errors[index] = outcome.error
        return self._comparison(len(jobs), errors, built, outcome.value)

    def time_networks(self, old: Artifact, new: Artifact) -> tuple[list[float], list[float]]:
        """Seconds per run of two modules on the device, in turn: one value per round each.

        Raises
        ------
        TuningError
            One of them could not be run there; says why.
        """
        paths = []
        for name, module in (("old.lpsn", old), ("new.lpsn", new)):
            paths.append(str(module.save(Path(tempfile.mkdtemp(dir=self._folder)) / name)))
        outcome = self.place.submit("networks", paths, ROUNDS, NETWORK_SECONDS).result()
        if outcome.error:
            raise TuningError(outcome.error)
        before, after = outcome.value["seconds"]
        return before, after

    def _comparison(self, count: int, errors: list[str], built: Sequence[int], value: Any) -> Comparison:
        seconds: list[tuple[float, ...]] = [() for _ in range(count)]
        equal = [False] * count
        if value is not None:
            for index, times, is_equal in zip(built, value["seconds"], value["is_equal"], strict=True):
                # Without the first configuration there is nothing to be equal to.
                seconds[index], equal[index] = tuple(times), bool(is_equal) and built[0] == 0
        return Comparison(tuple(seconds), tuple(equal), tuple(errors))

    def _compare_files(self, jobs: Sequence[Mapping[str, Any]], which: Sequence[int], rounds: int) -> Any:
        paths = tuple(str(jobs[index]["path"]) for index in which)
        timeout = self.run_seconds * max(1, len(paths))
        return self.place.submit("compare", paths, rounds, timeout).result()

    def _job_with_constants(self, template: Template, config: Config) -> dict[str, Any]:
        kernel = template.make(config)
        job = self.job(template.name, dict(template.workload), config)
        path = Path(job["path"]).with_name("constants.npz")
        np.savez(path, *kernel.constants, allow_pickle=False)
        return {**job, "constants": str(path), "out": asdict(kernel.out)}

    def close(self) -> None:
        """End worker processes and remove their files."""
        self.place.close()
        self._pool.close()
        self._cleanup()


def _processors() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MOST_WORKERS)
