"""Translate, compile with g++ and keep the library of one CUDA source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
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


@cache
def _cache() -> Path:
    """Folder of compiled files. It lives beside other temporary files, and belongs to this user alone."""
    folder = Path(tempfile.gettempdir()) / f"lpsn-cuda-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stderr[:4000]}")


@cache
def _own_digest() -> str:
    files = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("include/*")])
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _build(key: str, suffix: str, command: list[str], source: str | None = None) -> Path:
    """The file that `command` (plus `-o FILE`) makes, from the cache if `key` was built before.

    The command writes to a name of its own, so that processes that build the same thing do not disturb each other.
    """
    digest = hashlib.sha256("\0".join([key, _own_digest(), suffix, *command, source or ""]).encode()).hexdigest()[:32]
    target = _cache() / f"{digest}{suffix}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
        written = Path(scratch) / f"out{suffix}"
        if source is not None:
            path = Path(scratch) / "kernel.cpp"
            path.write_text(source)
            command = [*command, str(path)]
        _run([*command, "-o", str(written)])
        written.replace(target)
    return target


def _runtime_object(name: str) -> Path:
    return _build(name, ".o", ["g++", *_FLAGS, "-O3", "-c", str(_FOLDER / f"{name}.cpp")])


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
    kernel = _build("kernel", ".o", ["g++", *flags, "-c"], text)
    objects = [str(kernel), *(str(_runtime_object(name)) for name in _RUNTIME)]
    return _build("library", ".so", ["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,noexecstack", *objects])
