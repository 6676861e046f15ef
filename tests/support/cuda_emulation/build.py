"""Translate, compile with g++ and keep the library of one CUDA source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from cuda_emulation.translate import kernels, translate

_FOLDER = Path(__file__).resolve().parent
_RUNTIME = ("runtime", "warp_ops", "checks")
_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-fvisibility=hidden",
    "-w",
    f"-I{_FOLDER / 'include'}",
)


def compiler() -> str | None:
    """Path of g++, None where there is none."""
    return shutil.which("g++")


_KEEP_SECONDS = 3 * 24 * 3600


@cache
def _cache() -> Path:
    """Folder of compiled files. It lives beside other temporary files, and belongs to this user alone."""
    folder = Path(tempfile.gettempdir()) / f"lpsn-cuda-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    for path in folder.glob("*.*"):
        try:
            if time.time() - path.stat().st_mtime > _KEEP_SECONDS:
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # another process was quicker
            continue
    return folder


def _run(arguments: list[str], folder: str) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stderr[:4000]}")


@cache
def _own_digest() -> str:
    files = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("include/*")])
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _build(suffix: str, steps: Sequence[Sequence[str]], source: str = "") -> Path:
    """The file `out` that the last step writes, from the cache if the same steps ran before on the same `kernel.cpp`.

    Steps run in a folder of their own, so that processes that build the same thing do not disturb each other.
    """
    key = "\0".join([_own_digest(), source, *(argument for step in steps for argument in step)])
    target = _cache() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{suffix}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
        (Path(scratch) / "kernel.cpp").write_text(source)
        for step in steps:
            _run(list(step), scratch)
        (Path(scratch) / "out").replace(target)
    return target


def _runtime_object(name: str) -> Path:
    return _build(".o", [["g++", *_FLAGS, "-O3", "-c", str(_FOLDER / f"{name}.cpp"), "-o", "out"]])


def build_library(source: str, *, arch: int, checked: bool, contract: bool) -> Path:
    """Shared library with every kernel of a CUDA source.

    Parameters
    ----------
    source : str
        CUDA C++.
    arch : int
        Value of `__CUDA_ARCH__` / 10, for example 80.
    checked : bool
        Instrument every memory access, see `checks.cpp`.
    contract : bool
        Let the compiler fuse products and sums, as nvcc does unless told `-fmad=false`.
    """
    exports = "\n".join(f"EMU_EXPORT({name})" for name in kernels(source))
    text = f'#include "emulation.hpp"\n{translate(source)}\n{exports}\n'
    flags = [*_FLAGS, f"-D__CUDA_ARCH__={arch * 10}"]
    flags += ["-O2", "-ffp-contract=fast", "-mfma"] if contract else ["-O1", "-ffp-contract=off"]
    flags += ["-fsanitize=thread", "-fsanitize=alignment,bounds,float-cast-overflow"] if checked else []
    # Linked without -fsanitize: its calls end in `checks.cpp`, not in the sanitizer's own library.
    compiled = ["g++", *flags, "-c", "kernel.cpp", "-o", "kernel.o"]
    objects = [str(_runtime_object(name)) for name in _RUNTIME]
    linked = ["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,noexecstack", "kernel.o", *objects, "-o", "out"]
    return _build(".so", [compiled, linked], text)
