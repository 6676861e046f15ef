"""Taking the times of built candidates, in a worker process on the machine that has the device.

A network leaves the caches in a certain state: a layer's input has just been written, its weights were last read one
run ago. So before each timed call everything is swept out of the cache that belongs to the core (or the GPU), and the
inputs are written anew.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lpsn_tvm.errors import TuningError
from lpsn_tvm.schedules.kernel import Array
from lpsn_tvm.tuning.candidate_file import CandidateFile, random_input

SEED = 2026
FLOAT_TOLERANCE = 1e-5
"""Float kernels that add in another order differ by rounding: relative to the largest value."""


@dataclass(frozen=True)
class Effort:
    """How long a candidate is measured.

    Parameters
    ----------
    warmups : int
        Calls that do not count, at least.
    warm_seconds : float
        They go on for so long: a device that was idle runs at a lower clock.
    least, most : int
        Timed calls.
    seconds : float
        No more calls are made after this time, once there are `least`.
    """

    warmups: int = 2
    warm_seconds: float = 0.01
    least: int = 5
    most: int = 40
    seconds: float = 0.2


ROUND = Effort(warmups=1, warm_seconds=0.0, least=3, most=5, seconds=0.05)
"""One turn of a configuration in a comparison."""


class Subject(Protocol):
    """A candidate that is loaded and has its arguments."""

    def sample(self) -> float:
        """Seconds of one call."""
        ...

    def output(self) -> Array:
        """What one call writes, in logical shape, into memory that held something else before."""
        ...


def prepare(kind: str) -> None:
    """Import what timing needs, before anybody waits for an answer."""
    if kind == "cuda":
        import lpsn_tvm.tuning.cuda_timing
    else:
        import lpsn_tvm.tuning.llvm_timing  # noqa: F401
        from lpsn_tvm.runtime import load_ffi

        load_ffi()


def execute(command: str, kind: str, files: Sequence[str] = (), rounds: int = 1) -> Any:
    """What is asked of the machine with the device: the one entry point, here and through RPC.

    Parameters
    ----------
    command : str
        "describe": what the machine is. "measure": seconds of the one file. "compare": see `compare`. "networks": see
        `network_timing.files_in_turn`.
    kind : str
        "llvm" or "cuda".
    files : sequence of str
        Paths of candidate files; for "networks", of module files.
    rounds : int
        For "compare" and "networks".

    Raises
    ------
    TuningError
        No such command.
    """
    if command == "describe":
        return describe(kind)
    if command == "networks":
        from lpsn_tvm.tuning.network_timing import files_in_turn

        return files_in_turn(files, rounds)
    candidates = [CandidateFile.read(Path(path)) for path in files]
    if any(candidate.kind != kind for candidate in candidates):
        raise TuningError(f"a candidate is not of kind {kind}")
    if command == "measure":
        return measure(load_subject(candidates[0]))
    if command == "compare":
        return compare(candidates, rounds)
    raise TuningError(f"there is no command {command!r}; known: describe, measure, compare, networks")


def describe(kind: str) -> dict[str, Any]:
    """Name and features of the device."""
    if kind == "cuda":
        from lpsn_tvm.tuning.cuda_timing import describe_gpu

        return describe_gpu()
    from lpsn_tvm.runtime import cpu_features

    features = cpu_features()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # Not Linux: the plain name has to do.
    return {
        "name": f"CPU {name}",
        "machine": platform.machine(),
        "features": None if features is None else sorted(features),
    }


def load_subject(candidate: CandidateFile) -> Subject:
    """Load a candidate and give it random inputs, equal ones for all candidates of a kernel."""
    inputs = [
        random_input(spec, candidate.input_range if index == 0 else None, SEED + index)
        for index, spec in enumerate(candidate.inputs)
    ]
    if candidate.kind == "cuda":
        from lpsn_tvm.tuning.cuda_timing import CudaSubject

        return CudaSubject(candidate, inputs)
    from lpsn_tvm.tuning.llvm_timing import LlvmSubject

    return LlvmSubject(candidate, inputs)


def measure(subject: Subject, effort: Effort | None = None) -> list[float]:
    """Seconds of several calls."""
    effort = effort or Effort()
    count, end = 0, time.perf_counter() + effort.warm_seconds
    while count < effort.warmups or time.perf_counter() < end:
        subject.sample()
        count += 1
    seconds: list[float] = []
    end = time.perf_counter() + effort.seconds
    while len(seconds) < effort.most and (len(seconds) < effort.least or time.perf_counter() < end):
        seconds.append(subject.sample())
    return seconds


def compare(candidates: Sequence[CandidateFile], rounds: int) -> dict[str, list[Any]]:
    """Times of several configurations of one kernel, in turn, and whether they compute the same.

    Parameters
    ----------
    candidates : sequence of CandidateFile
        The first is what the others' outputs are compared with.
    rounds : int
        In each round every configuration is measured once (the median of a few calls); every round starts with
        another one, so that what drifts, such as a clock, meets all of them.

    Returns
    -------
    dict
        "seconds": per configuration one value per round; "is_equal": per configuration, whether its output equals the
        first one's bit for bit (float: within rounding).
    """
    subjects = [load_subject(candidate) for candidate in candidates]
    outputs = [subject.output() for subject in subjects]
    seconds: list[list[float]] = [[] for _ in subjects]
    for turn in range(rounds):
        for step in range(len(subjects)):
            index = (turn + step) % len(subjects)
            seconds[index].append(statistics.median(measure(subjects[index], ROUND)))
    return {"seconds": seconds, "is_equal": [is_equal(output, outputs[0]) for output in outputs]}


def is_equal(output: Array, reference: Array) -> bool:
    """Whether two outputs agree: integers bit for bit, floats within the rounding of another order of additions."""
    if output.shape != reference.shape or output.dtype != reference.dtype:
        return False
    if output.dtype.kind != "f":
        return bool(np.array_equal(output, reference))
    largest = max(1.0, float(np.abs(reference[np.isfinite(reference)]).max(initial=0)))
    return bool(np.allclose(output, reference, rtol=0, atol=FLOAT_TOLERANCE * largest, equal_nan=True))
