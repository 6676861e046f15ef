"""A worker of `benchmarks/cuda_kernels.py` on a machine without a GPU where only numpy is: the driver is the stand-in,
kernels run in the emulation, which does not look at races and bounds here.

    python tests/support/stand_in_worker.py KIT FILE_OF_NAMES
"""

from __future__ import annotations

import functools
import importlib.abc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class _Absent(importlib.abc.MetaPathFinder):
    """What a GPU machine need not have."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] in ("tvm", "tvm_ffi", "torch", "onnx", "scipy", "typer", "rich", "PIL"):
            raise ModuleNotFoundError(name)


def main(kit: str, names: str) -> None:
    """Run cases of a kit."""
    import fake_driver
    from stand_in_gpu import StandInDevice

    from benchmarks import cuda_kernels, kernel_kit
    from lpsn_tvm.targets import cuda_driver

    fake_driver.compile_kernel = functools.partial(fake_driver.compile_kernel, checked=False)  # type: ignore
    with tempfile.TemporaryDirectory() as scratch:
        fake = fake_driver.FakeDriver(Path(scratch))
        fake.reset(number=90)
        cuda_driver.LIBRARY = str(fake.path)
        cuda_kernels.KernelDevice = lambda index, has_guards: StandInDevice(fake, has_guards=has_guards)  # type: ignore
        kernel_kit.read_binary = lambda folder, source, arch: kernel_kit.read_source(folder, source).encode()
        listed = json.loads(Path(names).read_text())
        cuda_kernels.work(Path(kit), listed, "sm_90", 0, 600.0, has_guards=True)


if __name__ == "__main__":
    sys.meta_path.insert(0, _Absent())
    sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
    main(*sys.argv[1:])
