"""The accelerator on a PYNQ board: bitstream, clock, memory that both sides see, registers.

Register map of the HLS design: four blocks 0x1000 apart, fetch, load, compute, store. The base addresses of the data
registers stay 0, since instructions carry physical addresses. Needs Python >= 3.8, numpy and pynq.

Source: the public VTA hardware repository (hw_spec.h, its PYNQ driver); pynq.readthedocs.io.
"""

# ruff: noqa: UP035, UP045  (runs on Python 3.8)
from __future__ import annotations

import importlib
import os
import re
import sys
import time
from typing import Any, Mapping, Optional

import numpy as np

REGISTER_BASES = {"pynq": 0x43C00000, "ultra96": 0xA0000000}
FPGA_PARTS = {"pynq": "7z", "ultra96": "zu"}
BLOCKS = ("fetch", "load", "compute", "store")
BLOCK_BYTES = 0x1000
CONTROL, START, AUTO_RESTART = 0x00, 0x01, 0x81
FETCH_COUNT, FETCH_ADDRESS = 0x10, 0x18
DATA_BASES = {"load": (0x10, 0x18), "compute": (0x20, 0x28), "store": (0x10,)}
COMPUTE_DONE = 0x18
PAGE = 4096
NOP_BYTES = 16  # all zero: LOAD of no micro-operations, in both instruction sets
CLEAR_SECONDS = 1.0
BIT_FILE_START = b"\x00\x09\x0f\xf0"


class BoardError(Exception):
    """Something about the board, the bitstream or the bundle: one line that says what, and what to do."""


class BoardTimeout(BoardError):
    """The accelerator did not finish."""


class DeviceMemory:
    """Memory that the accelerator sees: `array` (uint8) is the host's view, `address` the physical byte address.

    Between writing `array` and a start lies `flush`, between the end and reading it `invalidate`.
    """

    def __init__(self, buffer: Any, size: int) -> None:
        start = -buffer.device_address % PAGE
        self.buffer = buffer
        self.array = np.asarray(buffer)[start : start + size]
        self.address = int(buffer.device_address) + start

    def write(self, data: Any, offset: int = 0) -> None:
        """Copy bytes in and make the device see them."""
        values = np.frombuffer(data, np.uint8)
        self.array[offset : offset + values.size] = values
        self.buffer.flush()

    def read(self) -> Any:
        """A copy of what the device left."""
        self.buffer.invalidate()
        return self.array.copy()


class PynqBoard:
    """A board with a bitstream.

    Parameters
    ----------
    config : mapping
        vta_config.json: TARGET ("pynq" | "ultra96") and clock_mhz are read.
    bitstream : str
        .bit file; a .hwh file of the same name beside it is used if it is there.

    Raises
    ------
    BoardError
        The file is no bitstream for this board, pynq is missing, or the user is not root.
    """

    def __init__(self, config: Mapping[str, Any], bitstream: str) -> None:
        self.config = config
        self.hardware = str(config["TARGET"])
        self.bitstream = os.path.abspath(bitstream)
        _check_bitstream(self.bitstream, self.hardware)
        self.pynq = _import_pynq()
        if os.geteuid() != 0:
            raise BoardError(
                "the registers of the accelerator can be reached by root only: start this with sudo (with the"
                " environment of pynq: `sudo -i`, then `source /etc/profile.d/pynq_venv.sh` where that file exists)"
            )
        self._loaded: Any = None
        self._blocks: Any = {}
        self._nop: Optional[DeviceMemory] = None

    def load(self) -> None:
        """Load the bitstream, which resets the accelerator, and set its clock."""
        try:
            if self._loaded is not None:
                self._loaded.download()
            elif os.path.exists(os.path.splitext(self.bitstream)[0] + ".hwh"):
                self._loaded = self.pynq.Overlay(self.bitstream)  # downloads it, too
            else:
                self._loaded = self.pynq.Bitstream(self.bitstream)
                self._loaded.download()
        except Exception as error:  # pynq raises many kinds
            raise BoardError(f"{self.bitstream} could not be loaded: {error}") from error
        self._set_clock()
        base = REGISTER_BASES[self.hardware]
        self._blocks = {
            name: self.pynq.MMIO(base + index * BLOCK_BYTES, BLOCK_BYTES) for index, name in enumerate(BLOCKS)
        }

    def _set_clock(self) -> None:
        """FCLK0 as the bundle was compiled for: a bitstream without metadata leaves whatever was set before."""
        clocks, wanted = getattr(self.pynq, "Clocks", None), float(self.config["clock_mhz"])
        if clocks is None:
            clocks = importlib.import_module("pynq.ps").Clocks
        clocks.fclk0_mhz = wanted
        if abs(float(clocks.fclk0_mhz) - wanted) > 0.02 * wanted:
            raise BoardError(f"clock FCLK0 is {clocks.fclk0_mhz} MHz, {wanted} was asked for: reboot the board")

    def allocate(self, size: int) -> DeviceMemory:
        """`size` bytes of contiguous memory at a multiple of 4096, zero."""
        try:
            buffer = self.pynq.allocate(shape=(max(size, 1) + PAGE,), dtype=np.uint8)
        except Exception as error:  # MemoryError, RuntimeError, OSError by version
            raise BoardError(
                f"{size} bytes of contiguous memory could not be allocated ({error}): end other programs that use"
                " pynq.allocate, or give the kernel more (cma=...)"
            ) from error
        if buffer.device_address + buffer.nbytes > 1 << 32:
            raise BoardError(
                f"memory at {buffer.device_address:#x} lies above 4 GiB, where the accelerator cannot read"
            )
        buffer[:] = 0
        return DeviceMemory(buffer, size)

    def execute(self, address: int, count: int, timeout: float) -> float:
        """Run `count` instructions at a physical address; seconds until done.

        Raises
        ------
        BoardTimeout
            Not done within `timeout` seconds.
        """
        self._clear_done()
        begin = time.perf_counter()
        self._start(address, count)
        if not self._wait(1, timeout):
            raise BoardTimeout(self._timeout_message(timeout))
        return time.perf_counter() - begin

    def _start(self, address: int, count: int) -> None:
        self._blocks["fetch"].write(FETCH_COUNT, int(count))
        self._blocks["fetch"].write(FETCH_ADDRESS, int(address))
        for block, offsets in DATA_BASES.items():
            for offset in offsets:
                self._blocks[block].write(offset, 0)
        self._blocks["fetch"].write(CONTROL, START)
        for block in BLOCKS[1:]:
            self._blocks[block].write(CONTROL, AUTO_RESTART)

    def _wait(self, done: int, timeout: float) -> bool:
        """Whether the done register gets that value in time."""
        end = time.perf_counter() + timeout
        while self._blocks["compute"].read(COMPUTE_DONE) != done:
            if time.perf_counter() > end:
                return False
        return True

    def _clear_done(self) -> None:
        """The register keeps the 1 of the last program until the compute unit takes its next instruction: read too
        early, it would end the next program before it began. One NOP without FINISH clears it.
        """
        if self._blocks["compute"].read(COMPUTE_DONE) == 0:
            return
        if self._nop is None:
            self._nop = self.allocate(NOP_BYTES)
            self._nop.write(bytes(NOP_BYTES))
        self._start(self._nop.address, 1)
        if not self._wait(0, CLEAR_SECONDS):
            raise BoardTimeout(self._timeout_message(CLEAR_SECONDS, "stayed at the 1 of the last program"))

    def _timeout_message(self, timeout: float, what: str = "never became 1") -> str:
        base = REGISTER_BASES[self.hardware]
        done = base + BLOCKS.index("compute") * BLOCK_BYTES + COMPUTE_DONE
        fetch = int(self._blocks["fetch"].read(CONTROL))
        return (
            f"the accelerator did not finish within {timeout:g} s: register {done:#x} (compute, done) {what},"
            f" {base:#x} (fetch, control) reads {fetch:#x}; check that {os.path.basename(self.bitstream)} is a VTA"
            f" bitstream for this board with its blocks at {base:#x}, and its clock (FCLK0"
            f" {self.config['clock_mhz']:g} MHz)"
        )


def _check_bitstream(path: str, hardware: str) -> None:
    """It is there, is a .bit file and is for a chip of this family."""
    if not os.path.isfile(path):
        raise BoardError(f"bitstream {path} does not exist")
    with open(path, "rb") as file:
        head = file.read(256)
    if not path.endswith(".bit") or not head.startswith(BIT_FILE_START):
        raise BoardError(f"{path} is not a bitstream (.bit file)")
    part: Optional[Any] = re.search(rb"b\x00.([0-9a-z-]+)\x00", head[13:], re.DOTALL)
    name = part.group(1).decode() if part else ""
    if name.startswith("xc"):
        name = name[2:]
    if name and not name.startswith(FPGA_PARTS[hardware]):
        raise BoardError(f"{path} is for the chip {name}; the bundle was compiled for {hardware}")


def _import_pynq() -> Any:
    try:
        return importlib.import_module("pynq")
    except ImportError as error:
        raise BoardError(
            f"the module pynq cannot be imported by {sys.executable} ({error}): run this on a board with a PYNQ image;"
            " on images 2.7 and later become root (`sudo -i`) and `source /etc/profile.d/pynq_venv.sh` first"
        ) from error
