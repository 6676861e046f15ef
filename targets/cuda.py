"""The cuda backend: NVIDIA GPUs by architecture, "cuda -arch=sm_86" or several, "cuda -arch=sm_80,sm_90"."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from lpsn_tvm.compat import check_versions
from lpsn_tvm.errors import TargetError
from lpsn_tvm.quant import QuantScheme
from lpsn_tvm.schedules.cuda.isa import ARCHITECTURES, BLOCK, CudaIsa
from lpsn_tvm.targets.backend import Backend, Bits
from lpsn_tvm.targets.cuda_nvcc import known_architectures, refusal

KNOWN_BY_TVM = ("keys", "tag", "host", "libs", "max_num_threads", "max_threads_per_block", "thread_warp_size",
                "max_shared_memory_per_block", "registers_per_block", "l2_cache_size_bytes")  # fmt: skip
"""What a `tvm.target.Target` that is turned into a dictionary brings along."""


def cuda_backend(config: Mapping[str, Any]) -> Backend:
    """The backend of one architecture or several; without `arch`, of this machine's first GPU.

    Raises
    ------
    TargetError
        Unknown option or architecture, or none named where no GPU is.
    """
    from lpsn_tvm.targets.cuda_artifact import make_artifact, measure
    from lpsn_tvm.targets.cuda_build import compile_cuda
    from lpsn_tvm.targets.cuda_lowering import lower
    from lpsn_tvm.targets.cuda_rules import RULES

    check_versions()
    unknown = sorted(set(config) - {"kind", "arch"} - set(KNOWN_BY_TVM))
    if unknown:
        raise TargetError(f"unknown option {', '.join(unknown)}; known: arch, as in -arch=sm_86", where="cuda")
    text = f"cuda -arch={config['arch'] if 'arch' in config else _arch_of_this_machine()}"
    isas = isas_of(text)
    return Backend(
        name="cuda",
        tvm_target=text,
        scheme=QuantScheme(),
        channel_tile=BLOCK,
        rules=RULES,
        geometry=isas[0],
        lowering=lower,
        compiler=compile_cuda,
        maker=make_artifact,
        measurer=measure,
        specializer=_specialized,
        fuses_epilogues=True,
        namer=lambda backend: str(backend.geometry.arch),
    )


def isas_of(target: str) -> tuple[CudaIsa, ...]:
    """What the architectures of "cuda -arch=sm_80,sm_90" offer, oldest first.

    Raises
    ------
    TargetError
        An architecture is not known.
    """
    names = target.partition("-arch=")[2].split(",")
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        raise TargetError(
            f"unknown architecture {', '.join(map(repr, unknown))}; known: {', '.join(ARCHITECTURES)}", where=target
        )
    return tuple(sorted((ARCHITECTURES[name] for name in dict.fromkeys(names)), key=lambda isa: isa.number))


def _arch_of_this_machine() -> str:
    """The newest known architecture that this machine's first GPU runs."""
    from lpsn_tvm.errors import ArtifactError
    from lpsn_tvm.targets.cuda_driver import Driver

    try:
        number = Driver.open().device(0).number
    except ArtifactError as error:
        # It says itself that it is about cuda.
        raise TargetError(f"{error}; name the GPU to compile for, as in cuda -arch=sm_86") from error
    fitting = [isa for isa in ARCHITECTURES.values() if isa.number <= number]
    if not fitting:
        raise TargetError(f"this GPU is sm_{number}; sm_61 and later are supported", where="cuda")
    return max(fitting, key=lambda isa: isa.number).arch


def _specialized(backend: Backend, bits: Bits) -> Backend:
    """The same backend; refused early is what could only fail after the work is done."""
    if bits is None:
        raise TargetError("GPUs run quantized networks only: choose bits, 8, 4 or (4, 8)", where="cuda")
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise TargetError(
            "building for GPUs needs nvcc, which is not installed: install the CUDA toolkit 12 or later "
            "(a GPU or a driver is not needed) and put its bin folder on PATH",
            where="cuda",
        )
    known = known_architectures(compiler)
    for isa in isas_of(backend.tvm_target):
        if known and isa.arch not in known:
            raise TargetError(refusal(compiler, isa.arch), where=backend.tvm_target)
    return backend
