"""A tracker and a server on this machine: kernels for CPUs are really measured through them, and nothing is left."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import fake_gpu
import faulty_templates
import gpu_templates
import numpy as np
import pytest
from fake_driver import FakeDriver
from processes import children_of, gone, is_running
from typer.testing import CliRunner

import lpsn_tvm
from lpsn_tvm.cli import app
from lpsn_tvm.errors import TuningError
from lpsn_tvm.targets.backend import get_backend
from lpsn_tvm.tuning import rpc_client
from lpsn_tvm.tuning.measure import RUN_SECONDS, KernelMeasurer, measurer_for
from lpsn_tvm.tuning.network_timing import ROUNDS
from lpsn_tvm.tuning.rpc_client import RemotePlace
from lpsn_tvm.tuning.rpc_server import listening_socket, parse_address

ROOT = Path(__file__).resolve().parents[2]
FIRST_PORT = 21000
PRCTL = ctypes.CDLL(None).prctl
"""Looked up before processes are forked: another thread may hold the loader's lock then."""


def program(folder: Path, *arguments: str) -> AbstractContextManager[tuple[subprocess.Popen[bytes], str]]:
    """One of the commands, and the first line that it prints; ended in all cases."""
    return started(folder / f"{arguments[0]}.txt", ["-m", "lpsn_tvm.cli", *arguments], {})


def _end_with_parent() -> None:
    """Also when the tests themselves are killed."""
    PRCTL(1, signal.SIGKILL)


@contextmanager
def started(
    log: Path, arguments: list[str], environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-u", *arguments],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        end = time.monotonic() + 120
        while not log.read_text().endswith("\n") and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        yield process, log.read_text().strip()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def port_of(line: str) -> int:
    return int(line.split(",")[0].rsplit(":", 1)[1])


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: Any) -> Iterator[str]:
    with program(tmp_path_factory.mktemp("tracker"), "rpc-tracker", "--port", str(FIRST_PORT)) as (_, line):
        assert line.startswith("tracker at 127.0.0.1:")
        yield f"127.0.0.1:{port_of(line)}"


def serve(folder: Path, tracker: str, key: str) -> Any:
    return program(folder, "rpc-server", "--tracker", tracker, "--key", key, "--port", str(FIRST_PORT))


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any, tracker: str) -> Iterator[subprocess.Popen[bytes]]:
    with serve(tmp_path_factory.mktemp("server"), tracker, "llvm") as (process, line):
        assert line.startswith("server at 127.0.0.1:")
        # It registers right after telling so.
        wait_for_server(tracker, "llvm")
        yield process


def wait_for_server(tracker: str, key: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            RemotePlace("llvm", f"{tracker}/{key}").close()
            return
        except TuningError:
            time.sleep(0.1)


def build(measurer: KernelMeasurer, *modes: str) -> list[str]:
    template = faulty_templates.template()
    jobs = [measurer.job(template.name, template.workload, {"mode": mode}) for mode in modes]
    assert measurer.build(jobs) == [""] * len(modes)
    return [job["path"] for job in jobs]


def test_kernels_are_measured_by_a_server(tracker: str, server: subprocess.Popen[bytes]) -> None:
    measurer = measurer_for(get_backend("llvm"), tracker)
    assert isinstance(measurer, KernelMeasurer)
    assert measurer.machine.startswith("CPU ")
    outcomes = measurer.time(build(measurer, "good", "same"))
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert all(0 < seconds < 1 for outcome in outcomes for seconds in outcome.value)
    compared = measurer.compare(faulty_templates.template(), [{"mode": m} for m in ("good", "wrong", "same")], 2)
    assert compared.is_equal == (True, False, True)
    assert all(len(times) == 2 for times in compared.seconds)
    measurer.close()


def test_a_server_survives_what_candidates_do(tracker: str, server: subprocess.Popen[bytes]) -> None:
    measurer = KernelMeasurer(get_backend("llvm"), RemotePlace("llvm", tracker), workers=1)
    crashes, hangs, good = build(measurer, "crashes", "hangs", "good")
    assert measurer.time([crashes])[0].error.startswith("crashed: SIGABRT")
    measurer.run_seconds = 0.5
    assert measurer.time([hangs])[0].error == "timed out after 0.5 s"
    measurer.run_seconds = RUN_SECONDS
    assert measurer.time([good])[0].value
    measurer.close()


MODEL = ROOT / "tutorials" / "models" / "espcn_x2.onnx"


def module_of(size: int) -> Any:
    data = np.random.default_rng(0).random((2, 1, size, size), dtype=np.float32)
    return lpsn_tvm.build(
        MODEL, calibration=data, sparsity=None, measure=False, num_threads=1, input_shapes={"input": data[:1].shape}
    )


def test_whole_networks_are_timed_by_a_server(tracker: str, server: subprocess.Popen[bytes]) -> None:
    """One with a hundred times the work takes longer; one for another processor is refused, and its reason told."""
    measurer = KernelMeasurer(get_backend("llvm"), RemotePlace("llvm", tracker), workers=1)
    small, large = module_of(8), module_of(80)
    before, after = measurer.time_networks(large, small)
    assert len(before) == len(after) == ROUNDS
    assert all(slow > 2 * fast > 0 for slow, fast in zip(before, after, strict=True))
    with pytest.raises(TuningError, match="needs CPU features that this machine lacks: absent"):
        measurer.time_networks(small, dataclasses.replace(small, cpu_features=("absent",), _executable=None))
    measurer.close()


def test_a_session_ends_before_the_next_is_asked_for(
    tracker: str, server: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one server would not be free before the old session's time is up."""
    monkeypatch.setattr(rpc_client, "HOLD_SECONDS", 0.0)
    request = {"command": "describe", "kind": "llvm", "files": [], "rounds": 1, "timeout": 900.0}

    def ask() -> list[Any]:
        return [rpc_client.execute(parse_address(tracker), "llvm", request) for _ in range(2)]

    asked: Future[list[Any]] = Future()
    threading.Thread(target=lambda: asked.set_result(ask()), daemon=True).start()
    assert [answer["machine"] for answer in asked.result(200)] == [platform.machine()] * 2
    rpc_client.release()


@pytest.mark.slow
def test_sessions_are_given_back_when_idle(tracker: str, server: subprocess.Popen[bytes]) -> None:
    """Two tuners share one server."""
    first, second = (KernelMeasurer(get_backend("llvm"), RemotePlace("llvm", tracker), workers=1) for _ in range(2))
    paths = build(first, "good")
    assert first.time(paths)[0].value
    assert second.time(paths)[0].value
    assert first.time(paths)[0].value
    first.close()
    second.close()
    assert gone([n for child in children_of(server.pid) for n in (child, *children_of(child))]), "sessions ended"
    assert is_running(server.pid)


@pytest.mark.slow
def test_a_server_survives_the_end_of_a_session_process(tmp_path: Path, tracker: str) -> None:
    """As when the kernel runs out of memory; TVM's own server would end here."""
    with serve(tmp_path, tracker, "killed") as (process, _):
        wait_for_server(tracker, "killed")
        measurer = KernelMeasurer(get_backend("llvm"), RemotePlace("llvm", f"{tracker}/killed"), workers=1)
        hangs, good = build(measurer, "hangs", "good")
        future = measurer.place.submit("measure", (hangs,), 1, 60)
        (session,) = wait_for(lambda: children_of(process.pid))
        os.kill(session, signal.SIGKILL)
        assert future.result(60).error
        assert measurer.time([good])[0].value
        measurer.close()


def wait_for(find: Callable[[], list[int]], seconds: float = 120.0) -> list[int]:
    end = time.monotonic() + seconds
    while not find() and time.monotonic() < end:
        time.sleep(0.05)
    return find()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_a_server_leaves_nothing_behind(tmp_path: Path, tracker: str, number: signal.Signals) -> None:
    """While a candidate hangs in it."""
    key = f"hanging{int(number)}"
    with serve(tmp_path, tracker, key) as (process, _):
        wait_for_server(tracker, key)
        measurer = KernelMeasurer(get_backend("llvm"), RemotePlace("llvm", f"{tracker}/{key}"), workers=1)
        (path,) = build(measurer, "hangs")
        future = measurer.place.submit("measure", (path,), 1, 60)
        workers = wait_for(lambda: [worker for session in children_of(process.pid) for worker in children_of(session)])
        sessions = children_of(process.pid)
        assert workers and sessions
        process.send_signal(number)
        process.wait(60)
        assert gone([*sessions, *workers])
        assert future.result(60).error, "the tuner hears of it"
        measurer.close()


SERVER = """
import sys
from lpsn_tvm.tuning.rpc_server import parse_address, serve_device
serve_device("127.0.0.1", 21000, parse_address(sys.argv[1]), "gpu", print, execute="fake_gpu:execute")
"""


@pytest.mark.slow
def test_gpus_are_measured_through_a_server(tmp_path: Path, tracker: str) -> None:
    """The server's worker sees the stand-in for a driver; this process sees none."""
    environment = {fake_gpu.LIBRARY: str(FakeDriver(tmp_path).path)}
    with started(tmp_path / "log.txt", ["-c", SERVER, tracker], environment):
        wait_for_server(tracker, "gpu")
        measurer = measurer_for(get_backend("cuda -arch=sm_86"), f"{tracker}/gpu")
        assert isinstance(measurer, KernelMeasurer)
        assert measurer.machine.startswith("GPU Test GPU")
        template = gpu_templates.template()
        jobs = [measurer.job(template.name, {}, {"tile": tile}) for tile in ("small", "split")]
        assert measurer.build(jobs) == ["", ""]
        one, two = (outcome.value[0] for outcome in measurer.time([job["path"] for job in jobs]))
        assert two == pytest.approx(2 * one), "by the stand-in's clock a launch takes 10 us"
        with pytest.raises(TuningError, match=r"tuning for sm_90 needs such a GPU; GPU Test GPU.* is sm_86"):
            measurer_for(get_backend("cuda -arch=sm_90"), f"{tracker}/gpu")
        measurer.close()


def test_what_is_not_there_is_named(tracker: str, server: subprocess.Popen[bytes]) -> None:
    # Servers of other tests may be known still.
    with pytest.raises(TuningError, match=r"knows no server with key 'absent'; known keys: .*llvm"):
        RemotePlace("cuda", f"{tracker}/absent")
    with socket.socket() as taken:
        # Nobody else can have this port, and nobody listens there.
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(TuningError, match=f"127.0.0.1:{port}: no tracker there"):
            RemotePlace("cuda", f"127.0.0.1:{port}")
        result = CliRunner().invoke(app, ["rpc-server", "--tracker", f"127.0.0.1:{port}", "--key", "cuda"])
    assert result.exit_code == 2
    assert "no tracker there" in result.output
    with pytest.raises(TuningError, match="expected HOST:PORT, got 'nonsense'"):
        parse_address("nonsense")


def test_ports_in_use_are_passed_over() -> None:
    with listening_socket("127.0.0.1", FIRST_PORT) as first:
        # Past TVM's own end of 9199.
        port = first.getsockname()[1]
        with listening_socket("127.0.0.1", port) as second:
            assert second.getsockname()[1] > port
    with pytest.raises(TuningError, match=r"203\.0\.113\.1: port 21000 cannot be opened"):
        listening_socket("203.0.113.1", FIRST_PORT)


@pytest.mark.parametrize("command", ["rpc-tracker", "rpc-server"])
def test_the_help_says_who_may_reach_the_port(command: str) -> None:
    text = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
    assert "WHOEVER REACHES THE PORT CAN RUN CODE ON THIS MACHINE" in text
    assert "127.0.0.1" in text
