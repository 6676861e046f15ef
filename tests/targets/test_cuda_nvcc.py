"""nvcc as a process: what goes wrong is said, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.cuda_compile import compile_cubin, start_nvcc

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing")
SOURCE = 'extern "C" __global__ void twice(int* x) { x[threadIdx.x] *= 2; }'
Stand = Callable[[str], Path]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Puts a shell script in nvcc's place; its files go to the folder that is returned."""

    def put(script: str) -> Path:
        binaries, files = tmp_path / "bin", tmp_path / "files"
        binaries.mkdir()
        files.mkdir()
        (binaries / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
        (binaries / "nvcc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{binaries}:/usr/bin:/bin")
        monkeypatch.setattr("tempfile.tempdir", str(files))
        return files

    return put


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(path: Path) -> int:
    stop = time.monotonic() + 60
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < stop
        time.sleep(0.02)
    return int(path.read_text())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'kernels.cu(3): error: expected a ;' >&2; exit 2", r"could not compile the kernels: kernels.cu\(3\)"),
        ("exit 3", "ended with status 3"),
        ("kill -9 $$", "was ended while it compiled .SIGKILL.*too little memory"),
        ("echo \"nvcc error   : 'cicc' died due to signal 9 (Kill signal)\" >&2; exit 9", "'cicc' died.*too little"),
        ("echo 'fatal error: x.ptx: No space left on device' >&2; exit 1", "no space is left in .*TMPDIR"),
        ("exit 0", "could not compile"),
    ],
)
def test_failures_say_what_happened(stand_in: Stand, script: str, message: str) -> None:
    files = stand_in(script)
    with pytest.raises(CompileError, match=message) as caught:
        compile_cubin(SOURCE, "sm_86")
    assert "sm_86" in str(caught.value)
    assert not list(files.iterdir())


def test_a_folder_that_cannot_be_written(stand_in: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    files = stand_in("exit 0")
    monkeypatch.setattr("tempfile.tempdir", str(files / "missing"))
    with pytest.raises(CompileError, match=r"no place for the compiler's files: .*TMPDIR names another"):
        compile_cubin(SOURCE, "sm_86")


def test_nothing_is_left_when_the_caller_gives_up(stand_in: Stand, tmp_path: Path) -> None:
    """Neither nvcc nor what it started, which does not hear of the caller's Ctrl-C."""
    files = stand_in(f"sleep 100 & echo $! > {tmp_path}/child; wait")

    def interrupted() -> None:
        with start_nvcc(SOURCE, "sm_86"):
            wait_for(tmp_path / "child")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    stop = time.monotonic() + 60
    while is_running(wait_for(tmp_path / "child")) and time.monotonic() < stop:
        time.sleep(0.02)
    assert not is_running(wait_for(tmp_path / "child"))
    assert not list(files.iterdir())


def test_ctrl_c_while_waiting(stand_in: Stand, tmp_path: Path) -> None:
    # Its caller has begun to wait before anybody knows of it: a signal while a process starts finds nobody to end it.
    files = stand_in(f"sleep 0.5; echo $$ > {tmp_path}/child; sleep 100")
    code = "from lpsn_tvm.targets.cuda_compile import compile_cubin; compile_cubin('', 'sm_86')"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"TMPDIR": str(files)},
        stderr=subprocess.PIPE,
    )
    child = wait_for(tmp_path / "child")
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert not is_running(child)
    assert not list(files.iterdir())


@needs_nvcc
def test_machine_code_of_several_architectures_at_once() -> None:
    with start_nvcc(SOURCE, "sm_80") as first, start_nvcc(SOURCE, "sm_90", with_ptx=True) as second:
        (cubin, report), (fatbinary, _) = first.result(), second.result()
    assert cubin.startswith(b"\x7fELF")
    assert "Used" in report
    # The magic number of a fatbinary, and PTX inside: as text or compressed it makes the file larger than code alone.
    assert fatbinary[:4] == bytes.fromhex("50ed55ba")
    assert len(fatbinary) > len(cubin)


@needs_nvcc
def test_temporary_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    compile_cubin(SOURCE, "sm_80")
    assert not list(tmp_path.iterdir())
