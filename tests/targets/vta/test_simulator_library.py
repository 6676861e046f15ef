"""The compiled core: found beside the package, else built once into the user's cache, else a message."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from vta_programs import Hand, final_nop, matmul

from lpsn_tvm.errors import TargetError
from lpsn_tvm.targets.vta import simulator, simulator_library
from lpsn_tvm.targets.vta.isa import Finish, Gemm, Load, Store
from lpsn_tvm.targets.vta.simulator import simulate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


ROOT = Path(__file__).resolve().parents[3]


def test_the_wheel_builds_every_source() -> None:
    """A file that pyproject does not list would be missing from the extension, not from a build in the cache."""
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    (module,) = [entry for entry in modules if entry["name"] == "lpsn_tvm.targets.vta._simulator"]
    folder = ROOT / "targets" / "vta" / "simulator_src"
    assert {*module["sources"], *module["depends"]} == {
        str(path.relative_to(ROOT)) for path in folder.iterdir() if path.suffix in {".cpp", ".hpp"}
    }
    assert module["optional"] is True


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No extension, an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(simulator_library, "_extension", lambda: None)
    simulator_library.library.cache_clear()
    yield tmp_path / "lpsn_tvm" / "vta"
    simulator_library.library.cache_clear()


def test_without_a_compiler_the_error_says_what_to_install(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(TargetError, match=r"no C\+\+ compiler .*install the binary wheel .*apt install g\+\+"):
        simulate(matmul().linked)


def test_a_failing_compiler_is_quoted_and_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(TargetError, match=r"false cannot build its core"):
        simulate(matmul().linked)
    assert list(fresh.iterdir()) == []


def test_a_broken_core_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh.parent / "broken.so"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(simulator_library, "_extension", lambda: broken)
    with pytest.raises(TargetError, match=r"cannot load .*broken.so.*delete it"):
        simulate(matmul().linked)


@pytest.mark.slow
def test_built_once_into_the_cache(fresh: Path) -> None:
    assert simulate(matmul().linked).memory["y"] == matmul().expected
    (built,) = fresh.iterdir()
    before = built.stat().st_mtime_ns
    simulator_library.library.cache_clear()
    simulate(matmul().linked)
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [before]


def test_portable_kernel_equals_the_vector_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    case = matmul(tiles=16, fan_in=8, seed=3)
    fast = simulate(case.linked).memory["y"]
    monkeypatch.setenv("LPSN_TVM_SIMULATOR_PORTABLE", "1")
    assert simulate(case.linked).memory["y"] == fast == case.expected


def test_other_threads_run_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter lock is free while the core runs. A busy machine may not give another thread its turn in time:
    once is enough, and were the lock held it would never happen.
    """
    spans: list[tuple[float, float]] = []

    def timed(request: object) -> int:
        begin = time.perf_counter()
        status = core.vta_simulate(request)
        spans.append((begin, time.perf_counter()))
        return int(status)

    core = simulator_library.library()
    monkeypatch.setattr(simulator, "library", lambda: SimpleNamespace(vta_simulate=timed))
    hand = Hand().uops([(t, t) for t in range(8)]).add(Load(memory="uop", y_size=1, x_size=8, x_stride=8), "uop")
    for _ in range(200):
        hand.add(Gemm(reset=True, uop_end=8, iter_out=2000, iter_in=1))
    hand.add(Load(memory="uop", push_next=True, x_size=0)).add(Store(pop_prev=True, push_prev=True)).add(
        final_nop()
    ).add(Finish())
    linked = hand.link()
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    counts: list[int] = []
    try:
        while len(counts) < 50 and max(counts, default=0) < 3:
            simulate(linked)
            begin, end = spans[-1]
            counts.append(sum(begin < tick < end for tick in ticks))
    finally:
        stop.set()
        thread.join()
    assert max(counts) >= 3, (counts, spans)
