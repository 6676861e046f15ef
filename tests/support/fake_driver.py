"""A stand-in for the CUDA driver, compiled on the spot: it enforces the rules of the API, does work as late as they
allow, and runs kernels in the emulation; device memory is host memory.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cuda_emulation import compile_kernel

from lpsn_tvm.targets.cuda_program import KernelLaunch, Place

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
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-pthread", "-o", str(self.path), str(SOURCE)], check=True)
        self.library = ctypes.CDLL(str(self.path))
        self.library.fake_log.restype = self.library.fake_violations.restype = ctypes.c_char_p
        self.library.fake_base.restype, self.library.fake_base.argtypes = ctypes.c_uint64, (ctypes.c_uint64,)
        self.library.fake_register.argtypes = ctypes.c_uint64, ctypes.c_size_t
        self.library.fake_memory_used.restype = ctypes.c_size_t
        self.library.fake_set_memory.argtypes = (ctypes.c_size_t,)
        self._kept: list[Any] = []
        self.errors: list[Exception] = []
        self._at_rest = 0
        self.reset()

    def reset(self, number: int = 86, devices: int = 1) -> None:
        """Begin a test, or another machine in it."""
        if self.live != self._at_rest:
            # What the tests before left in reference cycles is given back now, and not while this one counts.
            gc.collect()
            self._at_rest = self.live
        self.library.fake_reset(number, devices)
        self.errors.clear()

    def forget_source(self) -> None:
        """As before the first `run_source`."""
        self.library.fake_set_parameter_counts(None)
        self.library.fake_set_launcher(None)

    @property
    def calls(self) -> list[str]:
        return self.library.fake_log().decode().split()

    @property
    def violations(self) -> list[str]:
        return self.library.fake_violations().decode().splitlines()

    @property
    def live(self) -> int:
        """Contexts, streams, events, modules, graphs and allocations that were not given back."""
        return int(self.library.fake_live())

    @property
    def memory_used(self) -> int:
        """Bytes of device memory that are allocated."""
        return int(self.library.fake_memory_used())

    def fail(self, name: str, status: int) -> None:
        self.library.fake_fail(name.encode(), status)

    def set_memory(self, size: int) -> None:
        self.library.fake_set_memory(size)

    def interleave(self) -> None:
        """While one stream is waited for the others go on, too, as far as they do not wait themselves."""
        self.library.fake_set_interleaved(1)

    def be_quiet(self) -> None:
        """Take no notes and run no kernels: what is left is the caller's own time."""
        self.library.fake_set_quiet(1)

    def register(self, array: np.ndarray) -> np.ndarray:
        """An array that counts as device memory from now on; kept."""
        self._kept.append(array)
        self.library.fake_register(array.ctypes.data, max(array.nbytes, 1))
        return array

    def run_source(self, source: str, launches: Sequence[KernelLaunch], outputs: Collection[Place] = ()) -> None:
        """From now on launches run `source` in the emulation; `launches` tell how large each buffer is, `outputs` which
        of them may lie anywhere.
        """
        counts = {launch.kernel: len(launch.arguments) for launch in launches}
        entries = [f"{name}={count}".encode() for name, count in counts.items()]
        table = (ctypes.c_char_p * (len(entries) + 1))(*entries, None)
        self.library.fake_set_parameter_counts(table)

        def launched(name: bytes, sizes: Any, shared: int, values: Any, count: int) -> None:
            try:
                addresses = list(values[:count])
                launch = self._described(launches, outputs, name.decode(), sizes[:6], addresses)
                views: dict[tuple[int, int], np.ndarray] = {}
                arguments = []
                for address, place in zip(addresses, launch.arguments, strict=True):
                    key = (address, place.size)
                    if key not in views:
                        views[key] = np.frombuffer((ctypes.c_uint8 * place.size).from_address(address), np.uint8)
                    arguments.append(views[key])
                compile_kernel(source, launch.kernel)(launch.grid, launch.block, shared, *arguments)
            except Exception as error:  # A callback cannot raise; the test looks here.
                self.errors.append(error)

        callback = _LAUNCHER(launched)
        self._kept += [table, callback]
        self.library.fake_set_launcher(callback)

    def _described(
        self,
        launches: Sequence[KernelLaunch],
        outputs: Collection[Place],
        name: str,
        sizes: Sequence[int],
        addresses: Sequence[int],
    ) -> KernelLaunch:
        """The launch that this is: of the same kernel, over places that fit the addresses."""
        offsets = [address - self.library.fake_base(address) for address in addresses]

        def fits(place: Place, offset: int) -> bool:
            return place.region == "input" or offset == place.offset or place in outputs

        for launch in launches:
            if launch.kernel == name and [*launch.grid, *launch.block] == list(sizes):
                if all(map(fits, launch.arguments, offsets)):
                    return launch
        raise AssertionError(f"no launch of {name} over {offsets}")
