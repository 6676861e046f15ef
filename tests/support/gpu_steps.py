"""A program on the GPU beside the same program in the emulation, launch by launch: where do they part?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda_programs import Memory, run_launches

from lpsn_tvm.targets.cuda_program import KernelLaunch, Place
from lpsn_tvm.targets.cuda_runner import Runner


def first_difference(
    runner: Runner, source: str, arrays: Sequence[np.ndarray], launches: Sequence[KernelLaunch] | None = None
) -> str | None:
    """The first launch after which a buffer of the GPU differs from the emulation's, and how; None where all agree.

    Parameters
    ----------
    runner : Runner
        On a GPU; its memory is used.
    source : str
        CUDA source of the program.
    arrays : sequence of ndarray
        Inputs of the compiled batch size.
    launches : sequence of KernelLaunch, optional
        What the emulation runs; the program's own by default.
    """
    program, driver = runner.program, runner.driver
    memory = Memory(program.arena_bytes, program.constants, arrays)
    runner(arrays)
    junk = np.full(program.arena_bytes, 0xCD, np.uint8)
    with driver.using(runner.context):
        for place, address in _buffers(runner).items():
            if place.region == "arena":
                # As the emulation's, so that what is never written agrees, too.
                driver.to_device(address, junk.ctypes.data, place.size, runner.stream)
                driver.synchronize(runner.stream)
        for prepared, launch in zip(runner.graphs.launches, launches or program.launches, strict=True):
            runner.graphs.launch_alone(prepared, runner.own_addresses, runner.stream)
            driver.synchronize(runner.stream)
            run_launches(source, [launch], memory)
            for place, address in zip(launch.arguments, prepared.values, strict=True):
                got = np.empty(place.size, np.uint8)
                driver.to_host(got.ctypes.data, int(address), place.size, runner.stream)
                driver.synchronize(runner.stream)
                wrong = np.flatnonzero(got != memory[place])
                if wrong.size:
                    return _told(launch, place, got, memory[place], wrong)
    return None


def _buffers(runner: Runner) -> dict[Place, int]:
    found: dict[Place, int] = {}
    for prepared in runner.graphs.launches:
        prepared.point_to(runner.own_addresses)
        found |= dict(zip(prepared.launch.arguments, map(int, prepared.values), strict=True))
    return found


def _told(launch: KernelLaunch, place: Place, got: np.ndarray, want: np.ndarray, wrong: Any) -> str:
    first = int(wrong[0])
    return (
        f"layer {launch.name!r}, kernel {launch.kernel}: {wrong.size} of {place.size} bytes of {place.region} at "
        f"{place.offset} differ, first byte {first}: {int(got[first])} instead of {int(want[first])}"
    )
