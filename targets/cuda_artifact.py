"""The module of a GPU: programs for one or several architectures. Built, saved, loaded and inspected anywhere; run
where a driver and a GPU are.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lpsn_tvm.artifact import Artifact, shared_fields
from lpsn_tvm.errors import LpsnError
from lpsn_tvm.progress import ProgressCallback
from lpsn_tvm.targets.cuda_program import CudaProgram, programs_from_files, programs_to_files
from lpsn_tvm.targets.cuda_tensors import DeviceInput, device_input, empty_like

if TYPE_CHECKING:
    from lpsn_tvm.targets.backend import Backend, Parts
    from lpsn_tvm.targets.cuda_runner import Runner


@dataclass(kw_only=True)
class CudaArtifact(Artifact):
    """A compiled network for GPUs; see `Artifact`.

    Calls with numpy arrays copy to the device and back. Calls with tensors that lie on the device (torch, cupy, or
    anything with `__cuda_array_interface__`) are read in place, return tensors of the same kind on the device, and do
    not wait: they are in order with the caller's stream.

    Parameters
    ----------
    programs : sequence of CudaProgram
        One per architecture.
    """

    kind = "cuda"
    timing = "measured on this machine's GPU, copies from and to the host left out"

    programs: Sequence[CudaProgram] = field(repr=False)
    _runners: dict[int, Runner] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def runner(self, device: int = 0) -> Runner:
        """The network on a GPU, loaded on first use.

        Raises
        ------
        ArtifactError
            No driver, no such GPU, or none of the programs runs on it.
        """
        from lpsn_tvm.targets.cuda_runner import Runner

        with self._lock:
            if device not in self._runners:
                self._runners[device] = Runner(self.programs, device)
            return self._runners[device]

    def prepare(self, num_threads: int | None = None) -> None:
        """Load the network on the first GPU and record its launches."""
        self.runner().prepare()

    def execute(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """One batch on the first GPU."""
        return self.runner()(arrays)

    def benchmark(self, *, repeats: int = 30, warmup: int = 5) -> float:
        """Median milliseconds of one run of the compiled batch size on the first GPU, from CUDA events."""
        return statistics.median(self.runner().milliseconds(repeats, warmup))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; see `Artifact.__call__`. Tensors on a GPU must have the compiled batch size."""
        names = [info.name for info in self.inputs]
        by_name = args[0] if len(args) == 1 and isinstance(args[0], Mapping) else dict(zip(names, args, strict=False))
        given = {**by_name, **kwargs}
        found = [device_input(value) for value in given.values()]
        if not any(found):
            return super().__call__(*args, **kwargs)
        if not all(found):
            raise LpsnError("either all inputs are on the GPU or none", where="module call")
        names = [info.name for info in self.inputs]
        given = (
            dict(args[0]) if len(args) == 1 and isinstance(args[0], Mapping) else dict(zip(names, args, strict=False))
        )
        given |= kwargs
        if len(args) > len(names) or set(given) != set(names):
            raise LpsnError(f"expected inputs {names}, got {len(args)} and {sorted(kwargs)}", where="module call")
        return self._on_device([given[name] for name in names])

    def _on_device(self, tensors: list[Any]) -> Any:
        inputs = [self._checked(i, device_input(tensor)) for i, tensor in enumerate(tensors)]
        runner = self.runner(inputs[0].device)
        outputs = [empty_like(tensors[0], port.shape, port.dtype) for port in runner.program.outputs]
        addresses = [made.address for made in map(device_input, outputs) if made is not None]
        runner.run_on_device([tensor.address for tensor in inputs], addresses, inputs[0].stream)
        if len(outputs) == 1:
            return outputs[0]
        return {info.name: output for info, output in zip(self.outputs, outputs, strict=True)}

    def _checked(self, index: int, tensor: DeviceInput | None) -> DeviceInput:
        info = self.inputs[index]
        where = f"input {info.name!r}"
        if tensor is None:
            raise LpsnError("is not on a GPU", where=where)
        if tensor.shape != tuple(info.shape) or tensor.dtype != info.dtype:
            raise LpsnError(
                f"is {tensor.dtype}{list(tensor.shape)}; on the GPU exactly {info.dtype}{list(info.shape)} is taken",
                where=where,
            )
        if not tensor.is_contiguous:
            raise LpsnError("is not contiguous; call .contiguous()", where=where)
        return tensor

    def details(self) -> dict[str, Any]:
        """What `lpsn-tvm inspect` shows beside the report."""
        programs = [
            {
                "arch": program.arch,
                "has_ptx": program.has_ptx,
                "launches": len(program.launches),
                "kernels": len({launch.kernel for launch in program.launches}),
                "arena_bytes": program.arena_bytes,
                "constant_bytes": len(program.constants),
                "binary_bytes": len(program.binary),
            }
            for program in self.programs
        ]
        return super().details() | {"programs": programs}

    def pack(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Launches as JSON; machine code and constants as members."""
        records, members = programs_to_files(self.programs)
        return {"programs": records}, members

    @classmethod
    def unpack(cls, manifest: Mapping[str, Any], members: Mapping[str, bytes], where: str) -> CudaArtifact:
        """Inverse of `pack`; needs no driver."""
        return cls(**shared_fields(manifest), programs=programs_from_files(manifest["programs"], members))


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
    """Nothing: a build for GPUs may happen anywhere, and the float network has no kernels here to compare with;
    `benchmark` measures.
    """
