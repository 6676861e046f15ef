"""A GPU for single kernels that is the stand-in for the driver: launches run in the emulation. As a script, a worker of
`benchmarks/cuda_kernels.py` on it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np
from fake_driver import FakeDriver

from benchmarks import cuda_kernels, kernel_kit
from benchmarks.kernel_device import KernelDevice
from lpsn_tvm.targets import cuda_driver
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


def main(kit: str, names: str) -> None:
    """Run cases of a kit."""
    folder = Path(kit)
    with tempfile.TemporaryDirectory() as scratch:
        fake = FakeDriver(Path(scratch))
        fake.reset(number=90)
        cuda_driver.LIBRARY = str(fake.path)
        cuda_kernels.KernelDevice = lambda index, has_guards: StandInDevice(fake, has_guards=has_guards)  # type: ignore
        kernel_kit.read_binary = lambda f, source, arch: kernel_kit.read_source(f, source).encode()
        cuda_kernels.work(folder, json.loads(Path(names).read_text()), "sm_90", 0, 600.0, has_guards=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
