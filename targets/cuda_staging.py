"""Page-locked host memory that copies between numpy arrays and the device go through.

The driver copies pageable memory through such memory of its own, and waits for the stream before it does. Here the host
fills one piece while the device reads the ones before it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np

from lpsn_tvm.targets.cuda_driver import Driver

PIECE_BYTES = 4 << 20
PIECES = 4

Part = tuple[np.ndarray, int]
"""(bytes of the host's array, device address)."""


class Staging:
    """A ring of pieces, free at the beginning and at the end of every transfer.

    Parameters
    ----------
    driver : Driver
    largest : int
        Bytes of the largest array: pieces are no larger.
    taken : list
        Grows by what has to be given back.
    """

    def __init__(self, driver: Driver, largest: int, taken: list[tuple[str, int]]) -> None:
        self._driver = driver
        self._size = max(min(largest, PIECE_BYTES), 1)
        self._events = []
        for _ in range(PIECES):
            self._events.append(driver.event(has_time=False))
            taken.append(("cuEventDestroy_v2", self._events[-1]))
        start = driver.allocate_host(PIECES * self._size)
        taken.append(("cuMemFreeHost", start))
        self._addresses = [start + index * self._size for index in range(PIECES)]
        self._views = [
            np.ctypeslib.as_array((ctypes.c_uint8 * self._size).from_address(address)) for address in self._addresses
        ]

    def _pieces(self, parts: Sequence[Part]) -> Iterator[tuple[np.ndarray, int]]:
        for array, address in parts:
            for start in range(0, array.nbytes, self._size):
                yield array[start : start + self._size], address + start

    def upload(self, parts: Sequence[Part], stream: int) -> None:
        """Copy to the device; the arrays may change when this returns, the copies are under way. The stream must be
        waited for before the next transfer.
        """
        driver = self._driver
        pieces = list(self._pieces(parts))
        for index, (source, address) in enumerate(pieces):
            slot = index % PIECES
            if index >= PIECES:
                driver.wait_here(self._events[slot])
            self._views[slot][: source.nbytes] = source
            driver.to_device(address, self._addresses[slot], source.nbytes, stream)
            if len(pieces) > PIECES:
                driver.record(self._events[slot], stream)

    def download(self, parts: Sequence[Part], stream: int) -> None:
        """Copy from the device, and wait for it and all that came before it on the stream."""
        driver = self._driver
        pieces = list(self._pieces(parts))
        for index, (target, address) in enumerate(pieces):
            slot = index % PIECES
            if index >= PIECES:
                driver.wait_here(self._events[slot])
                self._take(slot, pieces[index - PIECES][0])
            driver.to_host(self._addresses[slot], address, target.nbytes, stream)
            if len(pieces) > PIECES:
                driver.record(self._events[slot], stream)
        driver.synchronize(stream)
        for index in range(max(len(pieces) - PIECES, 0), len(pieces)):
            self._take(index % PIECES, pieces[index][0])

    def _take(self, slot: int, target: np.ndarray) -> None:
        target[...] = self._views[slot][: target.nbytes]
