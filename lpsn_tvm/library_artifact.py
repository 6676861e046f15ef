"""The module of a CPU: a shared library and its constants, run by TVM's runtime.

The library is native code: load only files from a source you trust, as with any program. Nothing is executed before
digest, format and CPU features have been checked.
"""

from __future__ import annotations

import io
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lpsn_tvm.artifact import Artifact, shared_fields
from lpsn_tvm.packing import bits_needed, common_shift, pack, unpack
from lpsn_tvm.runtime import Executable, check_machine, set_num_threads

LIBRARY, PARAMS = "library.so", "params.bin"


@dataclass(kw_only=True)
class LibraryArtifact(Artifact):
    """A compiled network for CPUs; see `Artifact`.

    Parameters
    ----------
    library : bytes
        Shared library.
    params : sequence of ndarray
        Constants of the library, in order.
    cpu_features : sequence of str
        Features that the library needs.
    machine : str
        Processor architecture that it was compiled for.
    """

    kind = "library"

    library: bytes = field(repr=False)
    params: Sequence[np.ndarray] = field(repr=False)
    cpu_features: Sequence[str] = ()
    machine: str = field(default_factory=platform.machine)
    _executable: Executable | None = field(default=None, repr=False)

    @property
    def executable(self) -> Executable:
        """The loaded library (loaded on first use)."""
        if self._executable is None:
            check_machine(self.cpu_features, self.machine, "module")
            self._executable = Executable(self.library, self.params)
            set_num_threads(self.recipe.num_threads)
        return self._executable

    def prepare(self, num_threads: int | None = None) -> None:
        """Load the library; run it with `num_threads` threads."""
        self.executable  # noqa: B018  (loading sets the recipe's number)
        if num_threads:
            set_num_threads(num_threads)

    def execute(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """One batch through the library."""
        return self.executable(arrays)

    def benchmark(self, *, repeats: int = 30, warmup: int = 5) -> float:
        """Median milliseconds of one run on constant data of the compiled batch size, conversions from numpy left
        out.
        """
        tensors = self.executable.prepare([np.full(info.shape, 0.5, info.dtype) for info in self.inputs])
        times = []
        for index in range(warmup + repeats):
            start = time.perf_counter()
            self.executable.run(tensors)
            if index >= warmup:
                times.append(time.perf_counter() - start)
        return float(np.median(times)) * 1e3

    def details(self) -> dict[str, Any]:
        """What `lpsn-tvm inspect` shows beside the report."""
        return super().details() | {"cpu_features": list(self.cpu_features)}

    def pack(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Machine, features, library, and the constants in as few bits as they need."""
        payload, entries = io.BytesIO(), []
        for array in self.params:
            shift = common_shift(array)
            values = array >> shift if shift else array
            bits = bits_needed(values)
            data = pack(values, bits)
            entries.append(
                {
                    "shape": list(array.shape),
                    "dtype": str(array.dtype),
                    "bits": bits,
                    "shift": shift,
                    "offset": payload.tell(),
                    "size": len(data),
                }
            )
            payload.write(data)
        manifest = {"machine": self.machine, "cpu_features": list(self.cpu_features), "params": entries}
        return manifest, {LIBRARY: self.library, PARAMS: payload.getvalue()}

    @classmethod
    def unpack(cls, manifest: Mapping[str, Any], members: Mapping[str, bytes], where: str) -> LibraryArtifact:
        """Inverse of `pack`; refuses what this machine's CPU cannot run."""
        check_machine(manifest["cpu_features"], manifest["machine"], where)
        return cls(
            **shared_fields(manifest),
            library=members[LIBRARY],
            params=[_parameter(members[PARAMS], entry) for entry in manifest["params"]],
            cpu_features=tuple(manifest["cpu_features"]),
            machine=manifest["machine"],
        )


def _parameter(blob: bytes, entry: Mapping[str, Any]) -> np.ndarray:
    """One array of `params.bin`."""
    data = blob[entry["offset"] : entry["offset"] + entry["size"]]
    values = unpack(data, tuple(entry["shape"]), entry["dtype"], entry["bits"])
    return values << entry["shift"] if entry["shift"] else values
