"""NVIDIA's compiler as a process: started, waited for, and never left behind.

All its temporary files lie in one folder, which goes whatever happens: an error, Ctrl-C, or a caller that no longer
wants the result.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType

from lpsn_tvm.errors import CompileError


@cache
def known_architectures(compiler: str) -> frozenset[str]:
    """Architectures that an nvcc compiles for, "sm_80"; empty where it does not say."""
    done = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=False)
    return frozenset(done.stdout.split()) if done.returncode == 0 else frozenset()


@cache
def toolkit_version(compiler: str) -> str:
    """CUDA version of an nvcc, "13.0"; "" where it does not say."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else ""


def refusal(compiler: str, arch: str) -> str:
    """What to say where an nvcc does not know an architecture."""
    return (
        f"{compiler} does not compile for {arch}: CUDA 13 begins at sm_75; older GPUs need nvcc of CUDA 12, newer ones "
        "a newer toolkit"
    )


class Nvcc:
    """One run of nvcc in the background; use it as a context manager.

    Parameters
    ----------
    source : str
        CUDA C++.
    options : sequence of str
        Architecture, kind of output, flags.
    where : str
        For messages.

    Raises
    ------
    CompileError
        nvcc is not installed, or there is no place for its files.
    """

    def __init__(self, source: str, options: Sequence[str], where: str) -> None:
        self.where = where
        compiler = shutil.which("nvcc")
        if compiler is None:
            raise CompileError(
                "compiling CUDA kernels needs nvcc (CUDA toolkit 12 or later), it is not installed", where=where
            )
        self.compiler = compiler
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="lpsn_tvm_", ignore_cleanup_errors=True)
            try:
                self._start(source, options)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise CompileError(
                f"no place for the compiler's files: {error.strerror or error}; TMPDIR names another folder",
                where=where,
            ) from error

    def _start(self, source: str, options: Sequence[str]) -> None:
        path = self._path("kernels.cu")
        path.write_text(source)
        command = [self.compiler, *options, "-o", str(self._path("out")), str(path)]
        environment = os.environ | {"TMPDIR": self._folder.name, "LC_ALL": "C"}
        with self._path("messages").open("wb") as messages:
            # A group of its own: nvcc starts further compilers, and all of them have to be ended together.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / name

    def result(self) -> tuple[bytes, str]:
        """(machine code, what nvcc and ptxas reported); waits.

        Raises
        ------
        CompileError
            nvcc refuses the source, was ended, or could not write.
        """
        assert self._process is not None
        status = self._process.wait()
        messages = self._path("messages").read_text(errors="replace")
        out = self._path("out")
        if status or not out.exists():
            raise CompileError(self._reason(status, messages), where=self.where)
        return out.read_bytes(), messages

    def _reason(self, status: int, messages: str) -> str:
        if "nsupported gpu architecture" in messages:
            return refusal(self.compiler, self.where)
        if "No space left on device" in messages:
            return f"no space is left in {tempfile.gettempdir()} for the compiler's files; TMPDIR names another folder"
        if status < 0 or "died due to signal" in messages:
            name = signal.Signals(-status).name if status < 0 else messages.strip().splitlines()[-1]
            return f"nvcc was ended while it compiled ({name}); is there too little memory?"
        lines = [line for line in messages.splitlines() if "error" in line] or [messages[-300:].strip()]
        return f"nvcc could not compile the kernels: {lines[0] or f'it ended with status {status}'}"

    def close(self) -> None:
        """End the compiler if it still runs, and remove its files."""
        if self._process is not None:
            # The leader may have ended before those it started.
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # All of them have ended.
            self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Nvcc:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
