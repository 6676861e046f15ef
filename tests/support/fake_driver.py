"""A stand-in for the CUDA driver, compiled on the spot: host memory, launches through the emulation, a log of calls."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cuda_emulation import compile_kernel

from lpsn_tvm.targets.cuda_program import KernelLaunch

SOURCE = Path(__file__).parent / "fake_cuda" / "driver.c"
_LAUNCHER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.POINTER(ctypes.c_uint64), ctypes.c_int
)


class FakeDriver:
    """The library, and what tests ask of it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "libcuda_for_tests.so"
        compiler = shutil.which("gcc") or shutil.which("cc")
        assert compiler is not None
        subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(self.path), str(SOURCE)], check=True)
        self.library = ctypes.CDLL(str(self.path))
        self.library.fake_log.restype = ctypes.c_char_p
        self._kept: list[Any] = []
        self.errors: list[Exception] = []
        self.reset()

    def reset(self, number: int = 86, devices: int = 1) -> None:
        self.library.fake_reset(number, devices)
        self.errors.clear()

    @property
    def calls(self) -> list[str]:
        return self.library.fake_log().decode().split()

    @property
    def allocations(self) -> int:
        return int(self.library.fake_allocated())

    def fail(self, name: str, status: int) -> None:
        self.library.fake_fail(name.encode(), status)

    def run_source(self, source: str, launches: Sequence[KernelLaunch]) -> None:
        """From now on launches run `source` in the emulation; `launches` tell how large each buffer is."""
        counts = {launch.kernel: len(launch.arguments) for launch in launches}
        entries = [f"{name}={count}".encode() for name, count in counts.items()]
        table = (ctypes.c_char_p * (len(entries) + 1))(*entries, None)
        self.library.fake_set_parameter_counts(table)
        order = iter(())

        def launched(name: bytes, sizes: Any, shared: int, values: Any, count: int) -> None:
            nonlocal order
            try:
                launch = next(order, None)
                if launch is None:
                    order = iter(launches)
                    launch = next(order)
                assert launch.kernel == name.decode()
                views: dict[tuple[int, int], np.ndarray] = {}
                arguments = []
                for address, place in zip(values[:count], launch.arguments, strict=True):
                    key = (address, place.size)
                    if key not in views:
                        views[key] = np.frombuffer((ctypes.c_uint8 * place.size).from_address(address), np.uint8)
                    arguments.append(views[key])
                compile_kernel(source, launch.kernel)(tuple(sizes[:3]), tuple(sizes[3:6]), shared, *arguments)
            except Exception as error:  # A callback cannot raise; the test looks here.
                self.errors.append(error)

        callback = _LAUNCHER(launched)
        self._kept += [table, callback]
        self.library.fake_set_launcher(callback)
