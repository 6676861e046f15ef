"""`timing.execute` in a worker process whose driver is the stand-in; imports no TVM."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpsn_tvm.targets import cuda_driver
from lpsn_tvm.targets.cuda_program import KernelLaunch
from lpsn_tvm.tuning import cuda_timing, timing
from lpsn_tvm.tuning.candidate_file import CandidateFile

LIBRARY = "LPSN_TEST_CUDA_LIBRARY"
_kept: list[Any] = []


def _tell_parameters(launches: Sequence[KernelLaunch]) -> None:
    """The stand-in does not read machine code."""
    counts = [f"{launch.kernel}={len(launch.arguments)}".encode() for launch in launches]
    _kept.append((ctypes.c_char_p * (len(counts) + 1))(*counts, None))
    if launches:
        ctypes.CDLL(cuda_driver.LIBRARY).fake_set_parameter_counts(_kept[-1])


def execute(command: str, kind: str, files: Sequence[str] = (), rounds: int = 1) -> Any:
    """`timing.execute` in a worker whose driver is the stand-in."""
    cuda_driver.LIBRARY = os.environ[LIBRARY]
    cuda_timing.LEAST_SWEEP_BYTES = 1 << 20
    programs = [CandidateFile.read(Path(path)).program for path in files]
    _tell_parameters([launch for program in programs if program for launch in program.launches])
    return timing.execute(command, kind, files, rounds)
