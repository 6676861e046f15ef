"""A stand-in for the module `pynq` on a board with the VTA accelerator, for tests of the runner. Python 3.8 and numpy.

What a real board punishes is punished here: device memory is another copy of the data (a missed flush or invalidate
gives wrong data), `Overlay` wants a .hwh file, nothing works before a bitstream is loaded, the done register keeps its
value until the next instruction runs, a start needs all the registers. Programs run in this package's simulator, in
a process of its own (`simulate_board.py`). Options are a JSON object in the environment variable FAKE_PYNQ:

    python            interpreter that has lpsn_tvm
    config            vta_config.json of the bitstream
    never_finishes    done stays 0
    root              False: registers are out of reach
    memory            bytes that can be allocated
    clock             FCLK0 cannot be changed from this
    log               file to which events are appended, one a line
"""

import json
import os
import struct
import subprocess
import tempfile

import numpy as np

OPTIONS = {"never_finishes": False, "root": True, "memory": 1 << 27, "clock": None, "log": None}
OPTIONS.update(json.loads(os.environ["FAKE_PYNQ"]))
os.geteuid = lambda: 0 if OPTIONS["root"] else 1000
BASES = {"pynq": 0x43C00000, "ultra96": 0xA0000000}
FIRST_ADDRESS = 0x10000000
STALE_READS = 3


def log(event):
    if OPTIONS["log"]:
        with open(OPTIONS["log"], "a") as file:
            file.write(event + "\n")


class _Device:
    def __init__(self):
        self.loaded = False
        self.next_address = FIRST_ADDRESS
        self.allocated = {}  # address -> device copy
        self.used = 0
        self.server = None
        self.reset()

    def reset(self):
        self.registers, self.done, self.pending, self.stale, self.hung = {}, 0, None, 0, False

    def download(self, path):
        log("download " + os.path.basename(path))
        self.reset()
        self.loaded = True

    def write(self, address, value):
        base = BASES[OPTIONS["config"]["TARGET"]]
        self.registers[address - base] = value
        if address - base == 0x0000 and value & 1:
            self.pending = "fetch"
        starts = [self.registers.get(unit) for unit in (0x1000, 0x2000, 0x3000)]
        if self.pending == "fetch" and address - base == 0x3000 and starts == [0x81] * 3:
            self.pending, self.stale = "start", STALE_READS

    def read(self, address):
        if address - BASES[OPTIONS["config"]["TARGET"]] != 0x2018:
            return 0
        if self.pending == "start":
            if self.stale:
                self.stale -= 1
                return self.done
            self.pending = None
            self.run()
        return self.done

    def run(self):
        """What the accelerator does between start and done."""
        if OPTIONS["never_finishes"] or self.hung:
            self.done = 0
            return
        bases = [self.registers.get(o) for o in (0x1010, 0x1018, 0x2020, 0x2028, 0x3010)]
        if bases != [0] * 5:
            log(f"error base registers are {bases}")
            self.hung = True
            return
        count, address = self.registers[0x10], self.registers[0x18]
        self.done = 0
        if count == 1:  # a NOP without FINISH
            return
        answer = self.ask({"address": address, "count": count})
        if "error" in answer:
            log("error " + answer["error"])
            self.hung = True
            return
        self.done = 1

    def ask(self, request):
        """Run a program on the device's memory in the simulator's process."""
        if self.server is None:
            self.folder = tempfile.TemporaryDirectory()
            script = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "simulate_board.py")
            environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
            self.server = subprocess.Popen(
                [OPTIONS["python"], script, self.folder.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                universal_newlines=True,
                bufsize=1,
                env=environment,
                cwd=OPTIONS.get("cwd"),
            )
        request["config"] = OPTIONS["config"]
        request["memory"] = {}
        for address, data in self.allocated.items():
            request["memory"][str(address)] = int(data.size)
            data.tofile(os.path.join(self.folder.name, str(address)))
        self.server.stdin.write(json.dumps(request) + "\n")
        answer = json.loads(self.server.stdout.readline())
        for address in answer.get("written", []):
            self.allocated[int(address)][:] = np.fromfile(os.path.join(self.folder.name, address), np.uint8)
        return answer


DEVICE = _Device()


class PynqBuffer(np.ndarray):
    """The host's copy; `flush` and `invalidate` are the only ways to and from the device's."""

    def flush(self):
        DEVICE.allocated[self.device_address][:] = self.view(np.ndarray)

    def invalidate(self):
        self.view(np.ndarray)[:] = DEVICE.allocated[self.device_address]


def allocate(shape, dtype="u4", target=None):
    if not DEVICE.loaded:
        raise RuntimeError("no bitstream is loaded")
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    DEVICE.used += size
    if DEVICE.used > OPTIONS["memory"]:
        raise RuntimeError("Failed to allocate memory!")
    buffer = np.full(shape, 0xA5, dtype).view(PynqBuffer)
    buffer.device_address = DEVICE.next_address + 16  # not at a page's start
    DEVICE.allocated[buffer.device_address] = np.full(size, 0x5A, np.uint8)
    DEVICE.next_address += -(-(size + 64) // 4096) * 4096
    return buffer


class Bitstream:
    def __init__(self, bitfile_name, dtbo=None, partial=False, device=None):
        if not os.path.isfile(bitfile_name):
            raise OSError(f"Bitstream file {bitfile_name} does not exist.")
        self.bitfile_name = bitfile_name

    def download(self, parser=None):
        DEVICE.download(self.bitfile_name)


class Overlay(Bitstream):
    def __init__(self, bitfile_name, dtbo=None, download=True):
        super().__init__(bitfile_name)
        if not os.path.exists(os.path.splitext(bitfile_name)[0] + ".hwh"):
            raise OSError(f"Cannot find HWH file for {bitfile_name}.")
        log("overlay")
        if download:
            self.download()


class _Clocks:
    def __init__(self):
        self._mhz = 50.0

    @property
    def fclk0_mhz(self):
        return OPTIONS["clock"] or self._mhz

    @fclk0_mhz.setter
    def fclk0_mhz(self, value):
        log(f"clock {value:g}")
        self._mhz = value


Clocks = _Clocks()


class MMIO:
    def __init__(self, base_addr, length=4, device=None):
        if os.geteuid() != 0:
            raise OSError("Root permissions required.")
        if not DEVICE.loaded:
            raise RuntimeError("no bitstream is loaded: the bus would hang")
        self.base, self.length = base_addr, length

    def write(self, offset, data):
        if type(data) is not int or not 0 <= offset < self.length or offset % 4:
            raise ValueError("Data type must be int or bytes.")
        struct.pack("<I", data)
        DEVICE.write(self.base + offset, data)

    def read(self, offset=0, length=4):
        return DEVICE.read(self.base + offset)
