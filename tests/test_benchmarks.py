"""The GPU benchmark without a GPU: the torch network is the ONNX network, the kit holds what it says, and the measuring
part runs through on a stand-in for `torch.cuda` that is the CPU.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import cuda_kit, models
from benchmarks.cuda_kit import VARIANTS, Case
from lpsn_tvm.targets.cuda_profile import KernelTime

CASES = (Case("lenet5", VARIANTS[0], 2), Case("lenet5", VARIANTS[4], 2))
CALL_MS = {"W8A8": 2.0, "W8A8, 50 % removed": 1.0, "torch eager fp16": 8.0, "torch.compile fp16": 5.0}
"""What a call takes by the stand-in's clock."""


@pytest.mark.parametrize("name", ["resnet20", "lenet5", "espcn"])
def test_torch_network_is_the_onnx_network(name: str) -> None:
    import onnxruntime
    import torch

    from benchmarks.torch_network import TorchNetwork

    model = {"resnet20": models.resnet20, "lenet5": models.lenet5, "espcn": lambda: models.espcn(height=24, width=32)}[
        name
    ]()
    x = models.smooth_noise(cuda_kit.input_shape(model, 1), 3)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": x})[0]
    with torch.no_grad():
        got = TorchNetwork(model).eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_torch_network_names_what_it_does_not_know() -> None:
    from benchmarks.torch_network import TorchNetwork

    with pytest.raises(ValueError, match=r"InstanceNormalization|Pad"):
        TorchNetwork(models.cyclegan_generator(size=32, blocks=1, base=8))


def test_peers_are_compiled_for_the_batch_that_is_timed() -> None:
    import torch

    from benchmarks.cuda import compiled
    from benchmarks.torch_network import TorchNetwork

    seen: list[Any] = []

    def backend(module: Any, examples: Any, **_: Any) -> Any:
        seen.append([type(example) for example in examples if not isinstance(example, torch.Tensor)])
        seen[-1] += [int for example in examples if any(not isinstance(n, int) for n in getattr(example, "shape", ()))]
        return module.forward

    # More than torch compiles of one function, and with a pooling layer of other numbers each time.
    for batch in range(1, 11):
        module = TorchNetwork(models.lenet5()).eval()
        with torch.inference_mode():
            assert compiled(module, backend)(torch.zeros(batch, 1, 28, 28)).shape[0] == batch
    assert len(seen) == 10
    assert not any(seen), "a batch size is a symbol"


def test_a_recorded_call_runs_before_and_keeps_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.cuda import recorded

    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def inside(name: str) -> Iterator[None]:
        log.append(name)
        yield
        log.append("end")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: inside("side"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: inside("graph"))
    buffers = Graph()
    lives = weakref.ref(buffers)
    replay = recorded(lambda: log.append("run"), buffers)
    del buffers
    replay()
    assert log == ["side", "run", "run", "run", "end", "graph", "run", "end", "replay"]
    assert lives() is not None
    del replay
    gc.collect()
    assert lives() is None


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of modules for this machine's CPU, which the stand-in can run."""
    folder = tmp_path_factory.mktemp("kit")
    cuda_kit.prepare(folder, CASES[:1], "llvm")
    cuda_kit.prepare(folder, CASES, "llvm")
    return folder


def test_kit_goes_on_where_it_stopped(kit: Path) -> None:
    assert set(cuda_kit.load(kit)) == set(CASES)
    before = {path: path.stat().st_mtime_ns for path in kit.glob("*.lpsn")}
    cuda_kit.prepare(kit, CASES, "llvm")
    assert before == {path: path.stat().st_mtime_ns for path in kit.glob("*.lpsn")}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`torch.cuda` on the CPU: tensors stay where they are, and only calls take time."""
    import torch

    clock = [1.0]

    def spend(name: str) -> None:
        clock[0] += CALL_MS[name]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = clock[0]

        def synchronize(self) -> None:
            assert self.time

        def elapsed_time(self, other: Event) -> float:
            return other.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "stand-in")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path)
    script = pytest.importorskip("benchmarks.cuda")
    peers = {name: lambda name=name: spend(name) for name in ("torch eager fp16", "torch.compile fp16")}
    monkeypatch.setattr(script, "torch_peers", lambda network, batch: peers)
    monkeypatch.setattr(script, "limits", lambda: {"bytes_per_second": 1e10, "operations_per_second": 1e11})
    names = {f"{case.stem}.lpsn": case.variant.name for case in CASES}
    monkeypatch.setattr("lpsn_tvm.load", lambda path: _load(path, lambda: spend(names[path.name])))
    return script


def _load(path: Path, on_call: Callable[[], None]) -> Any:
    """A module that gives tensors for tensors."""
    import torch

    from lpsn_tvm.loading import load

    module = load(path)

    def call(x: Any) -> Any:
        on_call()
        return torch.from_numpy(module(x.numpy())) if isinstance(x, torch.Tensor) else module(x)

    class Module:
        __call__ = staticmethod(call)
        details = staticmethod(lambda: {"programs": [{"constant_bytes": 1_250_000}]})
        profile = staticmethod(lambda: [KernelTime("conv1", "conv2d_mma", 2.0, 10**7, 10**8)])

    return Module()


def options(**changed: Any) -> Any:
    return SimpleNamespace(check=False, no_peers=False, seconds=0.01, keep="cuda", **changed)


def test_measuring_keeps_medians_and_ratios(
    kit: Path, stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.run(kit, cuda_kit.load(kit), options())
    kept = json.loads((tmp_path / "cuda.json").read_text())["results"]
    rows = kept["lenet5, batch 2"]
    assert {name: row["median_ms"] for name, row in rows.items()} == pytest.approx(CALL_MS)
    for name in ("W8A8", "W8A8, 50 % removed"):
        # 10 MB at 10 GB/s and 0.1 GOP at 100 GOP/s: one millisecond, of two.
        assert rows[name]["kernels"][0]["roofline_share"] == pytest.approx(0.5)
        ratio = CALL_MS["torch.compile fp16"] / CALL_MS[name]
        assert rows[name]["times_faster_than torch.compile fp16"] == pytest.approx(ratio)
    printed = capsys.readouterr().out
    assert "exact" in printed
    assert printed.count("1.25 MB of weights") == len(CASES)


def test_rounding_is_allowed_where_floats_are_computed(
    kit: Path, stand_in: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A difference below the tolerance is an error of integer networks only, a larger one of any."""
    case, entry = CASES[0], cuda_kit.load(kit)[CASES[0]]
    assert entry["is_inexact"] is False
    arrays = dict(np.load(kit / f"{case.stem}.npz", allow_pickle=False))
    try:
        for share, kind, verdict in ((1e-6, True, "close"), (1e-6, False, "WRONG"), (1e-3, True, "WRONG")):
            wrong = arrays["y"].copy()
            wrong.flat[3] += share * np.ptp(wrong)
            np.savez(kit / f"{case.stem}.npz", x=arrays["x"], y=wrong)
            assert bool(stand_in.check(kit, {case: entry | {"is_inexact": kind}})) == (verdict == "WRONG")
            assert verdict in capsys.readouterr().out
    finally:
        np.savez(kit / f"{case.stem}.npz", **arrays)


def test_a_kit_is_for_one_target(kit: Path) -> None:
    with pytest.raises(SystemExit, match=r"is for 'llvm', not for 'cuda -arch=sm_90'"):
        cuda_kit.prepare(kit, CASES, "cuda -arch=sm_90")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is no kit .*kit.json.*--prepare"), ("{", "is no kit"), ('{"archs": []}', "another script.*no 'cases'")],
)
def test_what_is_no_kit_is_told(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "kit.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        cuda_kit.load(tmp_path)


def test_a_torch_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.cuda import need_torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match="built without CUDA, cannot use a GPU"):
        need_torch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    need_torch()


def test_wrong_output_is_found_and_nothing_is_timed(kit: Path, stand_in: Any, tmp_path: Path) -> None:
    case = CASES[0]
    arrays = dict(np.load(kit / f"{case.stem}.npz", allow_pickle=False))
    wrong = arrays["y"].copy()
    wrong.flat[3] += 1.0
    np.savez(kit / f"{case.stem}.npz", x=arrays["x"], y=wrong)
    try:
        with pytest.raises(SystemExit, match="1"):
            stand_in.run(kit, cuda_kit.load(kit), options())
        assert not (tmp_path / "cuda.json").exists()
    finally:
        np.savez(kit / f"{case.stem}.npz", **arrays)
