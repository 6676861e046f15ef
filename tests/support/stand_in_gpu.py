"""A GPU for single kernels that is the stand-in for the driver: launches run in the emulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fake_driver import FakeDriver

from benchmarks.kernel_device import KernelDevice
from lpsn_tvm.targets.cuda_program import KernelLaunch, Place


class StandInDevice(KernelDevice):
    """What it takes for machine code is CUDA source."""

    def __init__(self, fake: FakeDriver, *, has_guards: bool = True) -> None:
        self.fake = fake
        super().__init__(has_guards=has_guards)

    def run(self, binary: bytes, launches: Sequence[Any], buffers: Mapping[Any, np.ndarray]) -> None:
        described = []
        for one in launches:
            places = tuple(Place("input", i, buffers[name].nbytes) for i, name in enumerate(one.arguments))
            described.append(KernelLaunch(one.kernel, one.grid, one.block, one.shared_bytes, places))
        self.fake.run_source(binary.decode(), described)
        super().run(binary, launches, buffers)
        assert not self.fake.errors, self.fake.errors
        assert not self.fake.violations, self.fake.violations
