"""A candidate for CPUs with its arguments; TVM's runtime is all that it needs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from lpsn_tvm.runtime import aligned_tensor, load_ffi
from lpsn_tvm.schedules.kernel import Array
from lpsn_tvm.tuning.candidate_file import CandidateFile

CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
DEFAULT_CACHE_BYTES = 2 << 20
JUNK = 0x5A


@cache
def cache_bytes() -> int:
    """Size of the cache that a core has for itself (its second level)."""
    try:
        text = CACHE.read_text().strip()
    except OSError:
        return DEFAULT_CACHE_BYTES
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
    return int(text.rstrip("KM") or 0) * unit or DEFAULT_CACHE_BYTES


@cache
def _sweepers() -> tuple[Array, Array]:
    # Together twice the cache: copying one to the other leaves nothing else in it.
    return np.zeros(cache_bytes(), np.uint8), np.ones(cache_bytes(), np.uint8)


class LlvmSubject:
    """A loaded library, its inputs, constants and output."""

    def __init__(self, candidate: CandidateFile, inputs: Sequence[Array]) -> None:
        ffi = load_ffi()
        with tempfile.TemporaryDirectory(prefix="lpsn_tvm_") as folder:
            path = Path(folder) / "library.so"
            path.write_bytes(candidate.library)
            self._library = ffi.load_module(str(path))
        self._main = self._library["main"]
        self._spec = candidate.out
        self._originals = inputs
        tensors = [aligned_tensor(ffi, array) for array in inputs]
        self._inputs = [np.from_dlpack(tensor) for tensor in tensors]
        out = aligned_tensor(ffi, np.zeros(candidate.out.memory_shape, candidate.out.dtype))
        self._output = np.from_dlpack(out)
        self._arguments = (*tensors, *(aligned_tensor(ffi, array) for array in candidate.constants), out)

    def sample(self) -> float:
        """Seconds of one call whose inputs have just been written and whose weights are not in the core's cache."""
        np.copyto(*_sweepers())
        for own, original in zip(self._inputs, self._originals, strict=True):
            np.copyto(own, original)
        start = time.perf_counter()
        self._main(*self._arguments)
        return time.perf_counter() - start

    def output(self) -> Array:
        """What one call writes, in logical shape."""
        self._output.view(np.uint8).fill(JUNK)
        self._main(*self._arguments)
        return self._spec.unpack(self._output.copy())
