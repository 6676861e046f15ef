"""`Backend`: what a target is, as data; and `get_backend`, which finds one by name or target string."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.artifact import Artifact, Sources, TensorInfo
from lpsn_tvm.errors import CompileError, TargetError
from lpsn_tvm.progress import ProgressCallback, silent
from lpsn_tvm.quant import QuantScheme
from lpsn_tvm.recipe import Recipe
from lpsn_tvm.records import Records, shipped
from lpsn_tvm.report import Report
from lpsn_tvm.schedules.kernel import Builder
from lpsn_tvm.targets.choices import Choice, Choices, nobody

Bits = tuple[int, int] | None
KINDS = {
    "llvm": ("lpsn_tvm.targets.llvm", "llvm_backend"),
    "cuda": ("lpsn_tvm.targets.cuda", "cuda_backend"),
    "vta": ("lpsn_tvm.targets.vta.backend", "vta_backend"),
}
"""Target kind -> module and function that makes the backend from the parsed target."""


@dataclass(frozen=True)
class Compiled:
    """A compiled module: shared library, the constants that `main` takes as its last argument (a tuple), and the CPU
    features it needs.
    """

    library: bytes
    params: tuple[npt.NDArray[Any], ...]
    cpu_features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """What an artifact of any kind consists of beside the compiled network."""

    inputs: Sequence[TensorInfo]
    outputs: Sequence[TensorInfo]
    recipe: Recipe
    report: Report
    sources: Sources | None = None


def _same_for_all_bits(backend: Backend, bits: Bits) -> Backend:
    return backend


def _target_as_device(backend: Backend) -> str:
    return backend.tvm_target


@dataclass(frozen=True)
class Backend:
    """A target.

    Parameters
    ----------
    name : str
        "llvm", "vta", ...
    tvm_target : str
        Target as text: JSON of the TVM target (llvm), or a target string that `get_backend` reads.
    scheme : QuantScheme
        The integer arithmetic that the hardware wants.
    channel_tile : int
        Kept channel counts should be multiples of this.
    rules : mapping of str to tuple of builders
        Operator ("lpsn.conv2d") -> kernel builders, asked in order; one that returns None passes.
    geometry : object
        What schedules need to know about the hardware (llvm: `Isa`, cuda: `CudaIsa`, vta: `VtaGeometry`).
    lowering : (backend, module) -> lowered network
    compiler : (backend, lowered network) -> compiled network
    maker : (backend, module, parts, progress) -> Artifact
        Lowers and compiles, and wraps the result.
    measurer : (backend, artifact, dense float module) -> None
        Fills what the report says about speed.
    specializer : (backend, bits) -> Backend
        The backend for a bit width, where geometry or scheme depend on it.
    namer : (backend) -> str
        What `device` is.
    fuses_epilogues : bool
        Whether layers end in tables and pixel shuffles (`passes/fuse_tables.py`, `passes/fuse_pixel_shuffle.py`):
        memory counts more than what those cost. Other backends refuse such layers.
    records : Records
        Measured configurations of kernels that offer a choice; by default what the package ships.
    on_choice : (Choice) -> None
        Told of every such kernel while a network is lowered.
    """

    name: str
    tvm_target: str
    scheme: QuantScheme
    channel_tile: int
    rules: Mapping[str, tuple[Builder, ...]] = field(repr=False)
    geometry: Any
    lowering: Callable[[Backend, Any], Any] = field(repr=False)
    compiler: Callable[[Backend, Any], Any] = field(repr=False)
    maker: Callable[[Backend, Any, Parts, ProgressCallback], Artifact] = field(repr=False)
    measurer: Callable[[Backend, Any, Any], None] = field(repr=False)
    specializer: Callable[[Backend, Bits], Backend] = field(default=_same_for_all_bits, repr=False)
    namer: Callable[[Backend], str] = field(default=_target_as_device, repr=False)
    fuses_epilogues: bool = False
    records: Records = field(default_factory=shipped, repr=False)
    on_choice: Callable[[Choice], None] = field(default=nobody, repr=False)

    @property
    def target(self) -> Any:
        """The `tvm.target.Target` (of backends that compile with TVM)."""
        import tvm

        return tvm.target.Target(json.loads(self.tvm_target))

    @property
    def device(self) -> str:
        """What times measured for this backend are good for: "sm_90", or the llvm CPU and its features."""
        return self.namer(self)

    def for_bits(self, bits: Bits) -> Backend:
        """The backend for (weight bits, activation bits), or None for float.

        Raises
        ------
        TargetError
            The hardware has no geometry for them; says what is allowed.
        """
        return self.specializer(self, bits)

    def with_records(self, records: Records | str | os.PathLike[str] | None) -> Backend:
        """The backend with these records, or those of this file, beside its own.

        Raises
        ------
        TuningError
            The file cannot be read.
        """
        return self if records is None else replace(self, records=self.records.merge(Records.from_any(records)))

    def lower(self, mod: Any) -> Any:
        """Every lpsn operator becomes what the backend schedules; inputs and outputs stay as they are.

        Raises
        ------
        CompileError
            An operator has no kernel on this backend; names the operator and the variable.
        """
        return self.lowering(self, self.fuse(mod))

    def fuse(self, mod: Any) -> Any:
        """The first step of `lower`: operators that this backend's layers do at their end become part of them.

        Raises
        ------
        CompileError
            A layer does what this backend's do not.
        """
        if not self.fuses_epilogues:
            _refuse_epilogues(self.name, mod)
            return mod
        from lpsn_tvm.passes.fuse_pixel_shuffle import fuse_pixel_shuffle
        from lpsn_tvm.passes.fuse_tables import fuse_tables

        return fuse_pixel_shuffle(fuse_tables(mod))

    def compile(self, mod: Any) -> Any:
        """Compile a lowered module (a module with lpsn operators is lowered first); how many threads run it is the
        runtime's business.
        """
        return self.compiler(self, mod)

    def build(self, mod: Any, parts: Parts, progress: ProgressCallback = silent) -> Artifact:
        """Lower and compile a quantized (or, where the backend can, float) network.

        Raises
        ------
        CompileError
            Names the operator that cannot be compiled.
        """
        choices = Choices()
        artifact = self.maker(replace(self, on_choice=choices), mod, parts, progress)
        artifact.report.tuning = choices.summary(self.records)
        return artifact

    def measure(self, artifact: Any, dense: Any) -> None:
        """Fill in how fast the artifact is, compared with the dense float network where the backend can run that."""
        self.measurer(self, artifact, dense)


def _refuse_epilogues(backend: str, mod: Any) -> None:
    from lpsn_tvm import graph

    for var, value in graph.bindings(mod):
        if not graph.op_name(value).startswith("lpsn."):
            continue
        attrs = graph.call_attrs(value)
        if "table" in attrs:
            raise CompileError(f"layers of backend {backend} have no tables; let `lpsn.lookup` follow", where=var.name)
        if graph.op_name(value) == "lpsn.conv2d" and attrs["block_size"] > 1:
            raise CompileError(
                f"layers of backend {backend} do not rearrange pixels; let `lpsn.depth_to_space` follow", where=var.name
            )


def get_backend(target: Any) -> Backend:
    """The backend of a name, a target string, a dictionary or a `tvm.target.Target`; a `Backend` is returned as it is.

    "llvm" means this machine's CPU; "llvm -mcpu=cascadelake -mattr=-avx512vbmi" another one. "vta" is the accelerator
    whose geometry follows the bits; "vta -preset=pynq-0.0.2", "vta -config=vta_config.json", "vta -model=rtl".
    "cuda" is this machine's first GPU, "cuda -arch=sm_86" or "cuda -arch=sm_80,sm_90" are GPUs that need not be here.

    Raises
    ------
    TargetError
        Unknown kind or CPU; lists what is known.
    """
    if isinstance(target, Backend):
        return target
    config = parse_target(target)
    kind = str(config.get("kind", ""))
    if kind not in KINDS:
        raise TargetError(f"unknown target kind {kind!r}; known: {', '.join(KINDS)}", where=str(target))
    module, function = KINDS[kind]
    backend: Backend = getattr(importlib.import_module(module), function)(config)
    return backend


def parse_target(target: Any) -> dict[str, Any]:
    """Target string (`llvm -mcpu=x`, or JSON), dictionary or `tvm.target.Target` -> dictionary for `tvm.target.Target`.

    Raises
    ------
    TargetError
        If it cannot be read.
    """
    if isinstance(target, Mapping):
        return dict(target)
    if not isinstance(target, str):
        if not hasattr(target, "kind") or not hasattr(target, "attrs"):
            raise TargetError(f"a target is a string, a dictionary or a Backend, not {type(target).__name__}")
        return dict(json.loads(str(target)))
    text = target.strip()
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise TargetError(f"is not valid JSON: {error}", where=text) from error
    kind, *options = text.split()[:1] + text.split()[1:] if text else [""]
    config: dict[str, Any] = {"kind": kind}
    for option in options:
        name, separator, value = option.lstrip("-").partition("=")
        if not option.startswith("-") or not separator:
            raise TargetError(f"{option!r} is not of the form -name=value", where=text)
        config[name] = (
            value.split(",")
            if name == "mattr"
            else int(value)
            if name == "num-cores" and np.char.isdigit(value)
            else value
        )
    return config
