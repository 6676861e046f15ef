"""What the CUDA driver's errors mean for a user, and what to do."""

from __future__ import annotations

from lpsn_tvm.errors import ArtifactError

OUT_OF_MEMORY = 2
_DEAD = (
    "a kernel failed, in this module or in what ran before it; the GPU context of this process is dead, for torch too: "
    "restart the process, with LPSN_TVM_STEPWISE=1 to find the layer or under compute-sanitizer to find the access"
)
_OTHER_BUILD = "build the module for this GPU, with -arch=sm_<its compute capability>"
ADVICE = {
    1: "",
    OUT_OF_MEMORY: "free device memory or build for a smaller batch",
    3: "the driver was not started in this process; after fork() it cannot be",
    34: "the library is a stub that comes with the toolkit: install the driver, or take the stub off LD_LIBRARY_PATH",
    46: "another process uses the GPU exclusively",
    100: "no GPU is visible; see CUDA_VISIBLE_DEVICES and nvidia-smi",
    200: "the machine code is for another GPU, or newer than the driver: update the driver, or " + _OTHER_BUILD,
    209: "the machine code is for another GPU, or newer than the driver: update the driver, or " + _OTHER_BUILD,
    218: "update the driver, or " + _OTHER_BUILD,
    221: "install the driver's PTX compiler (libnvidia-ptxjitcompiler), or " + _OTHER_BUILD,
    222: "the module was built with a newer CUDA than the driver knows: update the driver, or " + _OTHER_BUILD,
    223: "translation of PTX is switched off (CUDA_DISABLE_PTX_JIT): " + _OTHER_BUILD,
    500: "the module's machine code has no such kernel: the file does not fit its own description",
    701: "a kernel needs more registers or shared memory than the GPU has: " + _OTHER_BUILD,
    802: "the system is not ready: on machines with NVSwitch the fabric manager must run",
    803: "the driver's kernel module and its library are of different versions: reboot, or reinstall the driver",
    804: "the forward-compatibility library does not work with this GPU: take it off LD_LIBRARY_PATH",
    900: "a graph is being recorded in this thread: call the module once before recording",
}
"""CUresult -> advice."""
ADVICE |= dict.fromkeys((214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721), _DEAD)


class DriverError(ArtifactError):
    """A call of the CUDA driver failed.

    Parameters
    ----------
    status : int
        The CUresult.
    message : str
    name : str
        The entry point. Launches run later than they are called, so what is reported may be an earlier one's failure.
    """

    def __init__(self, status: int, message: str, name: str) -> None:
        super().__init__(message, where=name)
        self.status = status
        self.message = message


def explain(status: int, reason: str) -> str:
    """The driver's own words, and what to do about it."""
    advice = ADVICE.get(status)
    return f"the CUDA driver reports error {status}, {reason}" + (f": {advice}" if advice else "")


def is_dead(error: BaseException) -> bool:
    """Whether the process cannot use the GPU any more."""
    return isinstance(error, DriverError) and ADVICE.get(error.status) == _DEAD
