"""The C library of host operations: found, or compiled where it lies. Needs Python >= 3.8 and numpy."""

# ruff: noqa: UP045  (runs on Python 3.8)
from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from typing import Optional

VERSION = 1
CFLAGS = ("-std=c99", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
COMPILE_SECONDS = 120
_CODES = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "n": ctypes.c_int64, "f": ctypes.c_float}
SIGNATURES = {
    "quantize": "ppnfiii",
    "dequantize": "ppnifi",
    "dequantize_int32": "ppnfi",
    "scale_int32": "pppnnn",
    "requantize": "ppnifiiii",
    "requantize_half_up": "ppniiii",
    "lookup": "pppniinnni",
    "add": "pppniiffiiiii",
    "add_half_up": "pppniiiiiii",
    "multiply": "pppnniifiiiii",
    "max_pool2d": "ppnnnnnpi",
    "global_avg_pool2d": "ppnnifiiii",
    "global_avg_pool2d_half_up": "ppnniiiii",
    "resize_linear": "ppnnnnnippppii",
    "float_softmax": "ppnnn",
    "conv2d": "ppppppiiiii",
    "dense": "pppppnnniiiii",
    "pack_tiles": "pppi",
    "unpack_tiles": "pppi",
    "unpack_planes": "pppiin",
    "pack_gather": "ppppi",
}


def open_library(folder: str) -> Optional[ctypes.CDLL]:
    """The C library for this machine, or None: prebuilt in `folder`, else compiled from `host_ops.c` if `cc` is here.

    Parameters
    ----------
    folder : str
        Where the bundle lies; what was compiled is kept there for the next start.
    """
    machine = "armv7" if platform.machine().startswith("armv7") else platform.machine()
    prebuilt = os.path.join(folder, f"host_ops-{machine}.so")
    library = _loaded(prebuilt) if os.path.exists(prebuilt) else None
    if library is not None:
        return library
    try:
        with open(os.path.join(folder, "host_ops.c"), "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()[:16]
    except OSError:
        return None
    built = os.path.join(folder, f"host_ops-{machine}-{digest}.so")
    library = _loaded(built) if os.path.exists(built) else None
    return library if library is not None else _compiled(os.path.join(folder, "host_ops.c"), built)


def _loaded(path: str) -> Optional[ctypes.CDLL]:
    """The library, unless it is for another machine, C library or version."""
    try:
        library = ctypes.CDLL(path)
        for name, signature in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [_CODES[code] for code in signature]
            function.restype = ctypes.c_int32 if name in ("conv2d", "dense") else None
        return library if library.host_ops_version() == VERSION else None
    except (OSError, AttributeError):
        return None


def _compiled(source: str, keep: str) -> Optional[ctypes.CDLL]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    folder = tempfile.mkdtemp(prefix="host_ops.")
    target = os.path.join(folder, "host_ops.so")
    command = [compiler, *CFLAGS, source, "-o", target, "-lm"]
    try:
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=COMPILE_SECONDS
        )
        if os.path.exists(os.path.join(os.path.dirname(source), "manifest.json")):  # a bundle, not the package
            shutil.copyfile(target, keep + ".part")
            os.replace(keep + ".part", keep)
    except (OSError, subprocess.SubprocessError):
        pass  # no compiler that works, or a folder that is not writable: what is there is used
    try:
        return _loaded(target) if os.path.exists(target) else None
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a loaded library stays mapped
