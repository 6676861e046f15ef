"""The module of a GPU: programs for one or several architectures. Built, saved, loaded and inspected anywhere; run
where a driver and a GPU are.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lpsn_tvm.artifact import Artifact, shared_fields
from lpsn_tvm.errors import ArtifactError, LpsnError
from lpsn_tvm.progress import ProgressCallback
from lpsn_tvm.targets.cuda_call import call_on_device
from lpsn_tvm.targets.cuda_dlpack import is_on_gpu
from lpsn_tvm.targets.cuda_program import (
    CudaProgram,
    best_program,
    choose_program,
    programs_from_files,
    programs_to_files,
)
from lpsn_tvm.targets.cuda_tensors import is_torch, stream_number

if TYPE_CHECKING:
    from lpsn_tvm.targets.backend import Backend, Parts
    from lpsn_tvm.targets.cuda_profile import KernelTime, Timing
    from lpsn_tvm.targets.cuda_runner import Runner


@dataclass(kw_only=True)
class CudaArtifact(Artifact):
    """A compiled network for GPUs; see `Artifact`.

    Calls with numpy arrays (or anything that numpy reads, torch tensors on the CPU too) copy to the device and back.
    Calls with tensors that lie on the device (torch, or anything with `__cuda_array_interface__` or DLPack) are read in
    place, return tensors of the same library on the device, and do not wait: they run on the caller's stream. Recorded
    into the caller's own graph (`torch.cuda.graph`) they become part of it; such a graph must not be replayed beside
    other calls of the module, whose working memory it uses, nor after the module is gone, whose kernels it launches.

    Parameters
    ----------
    programs : sequence of CudaProgram
        One per architecture.
    device : int
        The GPU for numpy arrays and for `benchmark`; other tensors say themselves where they are.
    """

    kind = "cuda"
    timing = "measured on this machine's GPU, copies from and to the host left out"

    programs: Sequence[CudaProgram] = field(repr=False)
    device: int = 0
    _runners: dict[int, Runner] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def runner(self, device: int | None = None) -> Runner:
        """The network on a GPU, loaded on first use.

        Raises
        ------
        ArtifactError
            No driver, no such GPU, or none of the programs runs on it.
        """
        device = self.device if device is None else device
        found = self._runners.get(device)
        if found is not None:
            return found
        from lpsn_tvm.targets.cuda_runner import Runner

        with self._lock:
            if device not in self._runners:
                self._runners[device] = Runner(self.programs, device)
            return self._runners[device]

    @property
    def stream(self) -> int:
        """The driver's handle of the stream that calls with numpy arrays run on; does not wait for the default one."""
        return self.runner().stream

    def prepare(self, num_threads: int | None = None) -> None:
        """Load the network on the GPU, ready for the first call."""
        self.runner().prepare()

    def execute(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """One batch."""
        return self.runner()(arrays)

    def benchmark(
        self, *, repeats: int = 30, warmup: int = 5, is_cold: bool = False, with_copies: bool = False
    ) -> float:
        """Median milliseconds of one run of the compiled batch size; see `measure`."""
        return self.measure(repeats=repeats, warmup=warmup, is_cold=is_cold, with_copies=with_copies).median

    def measure(
        self, *, repeats: int = 30, warmup: int = 5, is_cold: bool = False, with_copies: bool = False
    ) -> Timing:
        """Time runs of the compiled batch size.

        Parameters
        ----------
        repeats : int
            Runs that count.
        warmup : int
            Runs per round before them; rounds go on until they are steady.
        is_cold : bool
            Sweep the GPU's second-level cache before each run.
        with_copies : bool
            Wall-clock time of whole calls with numpy arrays, instead of the time on the device.
        """
        from lpsn_tvm.targets.cuda_profile import time_calls, time_network

        if with_copies:
            return time_calls(self.runner(), repeats, warmup)
        return time_network(self.runner(), repeats, warmup, is_cold=is_cold)

    def profile(self, *, launches: int = 20, repeats: int = 5) -> list[KernelTime]:
        """Time every kernel by itself, in the order of the network; `KernelTime.roofline_share` compares it with the
        machine's measured rates.
        """
        from lpsn_tvm.targets.cuda_profile import profile

        return profile(self.runner(), launches, repeats)

    def __call__(self, *args: Any, stream: Any = None, **kwargs: Any) -> Any:
        """Run the network; see `Artifact.__call__`.

        Parameters
        ----------
        *args, **kwargs : tensors
            All on one GPU, or all on the host. Those of torch may be of any layout and real type; others on the GPU
            are taken as the network wants them: contiguous, of its type.
        stream : int or a library's stream, optional
            Where to run, for tensors on the GPU. Torch's current stream by default, or the one that the tensor's
            interface names, or the default stream.
        """
        if (
            len(args) == 1 == len(self.inputs)
            and not kwargs
            and stream is None
            and is_torch(args[0])
            and args[0].is_cuda
        ):
            return call_on_device(self, [args[0]], None)
        names = [info.name for info in self.inputs]
        if stream is not None and "stream" in names:
            kwargs, stream = {**kwargs, "stream": stream}, None
        given = _by_name(names, args, kwargs)
        found = [_is_on_gpu(value) for value in given.values()]
        if not any(found):
            if stream is not None:
                raise LpsnError("is for tensors on the GPU only; calls with numpy arrays wait anyway", where="stream")
            return super().__call__(*args, **kwargs)
        if not all(found):
            raise LpsnError("either all inputs are on the GPU or none", where="module call")
        if len(args) > len(names) or set(given) != set(names):
            raise LpsnError(
                f"expected inputs {names}, got {len(args)} positional and {sorted(kwargs)}", where="module call"
            )
        return call_on_device(self, [given[name] for name in names], None if stream is None else stream_number(stream))

    def details(self) -> dict[str, Any]:
        """What `lpsn-tvm inspect` shows beside the report."""
        programs = [
            {
                "arch": program.arch,
                "has_ptx": program.has_ptx,
                "toolkit": program.toolkit,
                "launches": len(program.launches),
                "kernels": len({launch.kernel for launch in program.launches}),
                "arena_bytes": program.arena_bytes,
                "constant_bytes": len(program.constants),
                "binary_bytes": len(program.binary),
            }
            for program in self.programs
        ]
        return super().details() | {"programs": programs, "this_machine": self._runs_here()}

    def _runs_here(self) -> str:
        """What this machine's GPU would run, or why it cannot."""
        from lpsn_tvm.targets.cuda_driver import Driver

        try:
            driver = Driver.open()
            device = driver.device(self.device)
            program = choose_program(self.programs, device.number, device.name)
            reason = program.misses(driver.version())
        except ArtifactError as error:
            return str(error)
        fitting = f"the program for {program.arch}" + (f", but it was {reason}" if reason else "")
        return f"{device.name} (sm_{device.number}) runs {fitting}"

    def pack(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Launches as JSON; machine code and constants as members."""
        records, members = programs_to_files(self.programs)
        return {"programs": records}, members

    @classmethod
    def unpack(cls, manifest: Mapping[str, Any], members: Mapping[str, bytes], where: str) -> CudaArtifact:
        """Inverse of `pack`; needs no driver."""
        return cls(**shared_fields(manifest), programs=programs_from_files(manifest["programs"], members))


def _by_name(names: list[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if len(args) == 1 and isinstance(args[0], Mapping):
        return {**args[0], **kwargs}
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _is_on_gpu(value: Any) -> bool:
    if is_torch(value):
        return bool(value.is_cuda)
    return hasattr(value, "__cuda_array_interface__") or is_on_gpu(value)


def make_artifact(backend: Backend, mod: Any, parts: Parts, progress: ProgressCallback) -> CudaArtifact:
    """The module of a network, for every architecture that the backend names."""
    return CudaArtifact(
        inputs=parts.inputs,
        outputs=parts.outputs,
        recipe=parts.recipe,
        report=parts.report,
        target=backend.tvm_target,
        sources=parts.sources,
        programs=backend.compile(mod),
    )


def measure(backend: Backend, artifact: CudaArtifact, dense: Any) -> None:
    """Time the module on this machine's GPU where there is one that runs it, else say so in the report; the float
    network has no kernels here to compare with.
    """
    from lpsn_tvm.targets.cuda_driver import Driver

    notes = artifact.report.notes
    try:
        device = Driver.open().device(artifact.device)
    except ArtifactError:
        notes.append("latency not measured: no GPU on this machine")
        return
    if best_program(artifact.programs, device.number) is None:
        notes.append(f"latency not measured: {device.name} (sm_{device.number}) is not what the module is for")
        return
    try:
        timing = artifact.measure()
    except ArtifactError as error:
        notes.append(f"latency not measured: {error}")
        return
    artifact.report.milliseconds = {"module": timing.median}
    notes.append(f"latency measured on {timing.device}, copies from and to the host left out")
