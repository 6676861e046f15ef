"""A small module for GPUs, and tensors that claim to lie on one: the stand-in for the driver knows their memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fake_driver import FakeDriver
from integer_network import Builder, residual_network

from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.recipe import Recipe
from lpsn_tvm.reference import run_reference
from lpsn_tvm.report import Report
from lpsn_tvm.targets.cuda import cuda_backend
from lpsn_tvm.targets.cuda_artifact import CudaArtifact
from lpsn_tvm.targets.cuda_build import generate
from lpsn_tvm.targets.cuda_program import CudaProgram

SHAPE = (2, 3, 10, 12)


@dataclass(frozen=True)
class SmallNetwork:
    """Integer module, CUDA source, and a program for sm_86 whose machine code is never looked at."""

    mod: Any
    source: str
    program: CudaProgram

    def module(self, *programs: CudaProgram) -> CudaArtifact:
        (output,) = self.program.outputs
        return CudaArtifact(
            inputs=[TensorInfo("x", SHAPE)],
            outputs=[TensorInfo("y", output.shape)],
            recipe=Recipe(target="cuda"),
            report=Report(),
            target="cuda -arch=sm_86",
            programs=programs or (self.program,),
        )

    def reference(self, x: np.ndarray) -> np.ndarray:
        """The exact result, for any number of samples."""
        pieces = []
        for start in range(0, len(x), SHAPE[0]):
            piece = x[start : start + SHAPE[0]]
            filled = np.concatenate([piece, piece[-1:]])[: SHAPE[0]]
            (result,) = run_reference(self.mod, {"x": filled}).values()
            pieces.append(result[: len(piece)])
        return np.concatenate(pieces)


@functools.cache
def small_network() -> SmallNetwork:
    mod = Builder(SHAPE).build(residual_network)
    source, plan = generate(cuda_backend({"kind": "cuda", "arch": "sm_86"}), mod)
    code = source.source.encode()
    program = CudaProgram("sm_86", plan.launches, plan.inputs, plan.outputs, plan.arena_bytes, plan.constants, code)
    return SmallNetwork(mod, source.source, program)


def feed(seed: int = 1, batch: int = SHAPE[0]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, *SHAPE[1:])).astype(np.float32)


class Caller:
    """A program that uses a module on the GPU: it has streams, and work that is still to be done on them."""

    def __init__(self, module: CudaArtifact, fake: FakeDriver, device: int = 0) -> None:
        self.runner, self.fake = module.runner(device), fake

    def stream(self) -> int:
        with self.runner.driver.using(self.runner.context):
            stream = self.runner.driver.stream()
        self.runner.taken.append(("cuStreamDestroy_v2", stream))
        return stream

    def write_later(self, array: np.ndarray, values: np.ndarray, stream: int) -> None:
        """Fill device memory when the stream comes to it."""
        with self.runner.driver.using(self.runner.context):
            self.runner.driver.to_device(array.ctypes.data, values.ctypes.data, values.nbytes, stream)

    def finish(self, stream: int) -> None:
        with self.runner.driver.using(self.runner.context):
            self.runner.driver.synchronize(stream)


class CudaTensor(torch.Tensor):
    """A torch tensor that says it is on a GPU."""

    fake: Any = None
    number = 0
    recorded: Any = None

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def get_device(self) -> int:
        return self.number

    def to(self, *args: Any, **kwargs: Any) -> Any:
        made = torch.Tensor.to(self, *args, **kwargs)
        return self if made is self else on_gpu(self.fake, made, self.number)

    def contiguous(self) -> Any:  # type: ignore[override]
        made = torch.Tensor.contiguous(self)
        return self if made is self else on_gpu(self.fake, made, self.number)

    def record_stream(self, stream: Any) -> None:
        self.recorded.append(stream)


def on_gpu(fake: FakeDriver, tensor: torch.Tensor, device: int = 0) -> CudaTensor:
    made = tensor.as_subclass(CudaTensor)
    made.fake, made.number = fake, device
    made.recorded = getattr(tensor, "recorded", None) or []
    fake.register(plain(made))
    return made


def plain(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor."""
    return torch.Tensor.as_subclass(tensor, torch.Tensor).detach().numpy()


@contextmanager
def torch_with_gpu(monkeypatch: Any, fake: FakeDriver) -> Iterator[SimpleNamespace]:
    """Torch's answers about streams, and `torch.empty` in device memory; `.stream` is the current one."""
    state = SimpleNamespace(stream=0, entered=[])
    make: Callable[..., torch.Tensor] = torch.empty

    def empty(shape: Any, *, dtype: Any, device: Any = None) -> torch.Tensor:
        return on_gpu(fake, make(shape, dtype=dtype))

    def enter(stream: Any) -> Any:
        state.entered.append(stream)
        return nullcontext()

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: state.stream, raising=False)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda number, device: ("external", number))
    yield state
