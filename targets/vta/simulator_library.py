"""Finding or building the compiled core of the simulator.

The package's wheel brings it as `_simulator*.so`. Where that is missing or older than its sources (a checkout), the
system's C++ compiler builds it once into the user's cache, under the digest of the sources.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from lpsn_tvm.cache import cache_directory
from lpsn_tvm.errors import TargetError

HERE = Path(__file__).parent
SOURCES = HERE / "simulator_src"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=default")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled core, loaded once. Calls through it release the interpreter lock.

    Raises
    ------
    TargetError
        There is no built core, and no compiler to build it.
    """
    path = _extension() or _cached()
    try:
        core = ctypes.CDLL(str(path))
    except OSError as error:
        raise TargetError(f"cannot load {path}: {error}; delete it and try again", where="VTA simulator") from error
    core.vta_simulate.argtypes = [ctypes.c_void_p]
    core.vta_simulate.restype = ctypes.c_int
    core.vta_abi.restype = ctypes.c_int64
    return core


def _extension() -> Path | None:
    """The extension that was installed with the package, unless sources beside it are newer."""
    newest = max((path.stat().st_mtime for path in _source_files()), default=0.0)
    for path in sorted(HERE.glob("_simulator*")):
        if path.suffix in {".so", ".pyd", ".dylib"} and path.stat().st_mtime >= newest:
            return path
    return None


def _source_files() -> list[Path]:
    return sorted(path for path in SOURCES.glob("*") if path.suffix in {".cpp", ".hpp"})


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/lpsn_tvm/vta`, else `~/.cache/lpsn_tvm/vta`."""
    return cache_directory("vta")


def _cached() -> Path:
    digest = hashlib.sha256(" ".join((*_FLAGS, platform.machine())).encode())
    for path in _source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cache_folder() / f"simulator-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        _build(target)
    return target


def _build(target: Path) -> None:
    """Compile into a temporary file of the same folder and rename it: processes that start together do not collide."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    sources = [str(path) for path in _source_files() if path.suffix == ".cpp"]
    if compiler is None or not sources:
        raise TargetError(
            "its compiled core is missing and there is no C++ compiler to build it: install the binary wheel of this "
            "package, or a compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)",
            where="VTA simulator",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [*compiler.split(), *_FLAGS, "-o", name, *sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TargetError(f"{compiler} cannot build its core:\n{done.stderr[-2000:]}", where="VTA simulator")
        os.chmod(name, 0o755)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
