"""What a CPU offers to the schedules: vector width, registers and an integer dot product; found from an LLVM target's
features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Dot = Literal["vnni512", "vnni256", "pmaddwd512", "pmaddwd256", "none"]


@dataclass(frozen=True)
class Isa:
    """Instruction set, as far as schedules care.

    Parameters
    ----------
    name : str
        For reports: "avx512-vnni", "avx-vnni", "avx512", "avx2", "generic".
    vector_bytes : int
        Width of a vector register.
    registers : int
        Vector registers.
    dot : str
        Integer dot product: "vnni512" / "vnni256" (uint8 x int8, four products per lane), "pmaddwd512" / "pmaddwd256"
        (int16 pairs), "none".
    has_vbmi : bool
        Byte permutation across a 64-byte register (vpermb).
    """

    name: str
    vector_bytes: int
    registers: int
    dot: Dot
    has_vbmi: bool = False

    @property
    def float_lanes(self) -> int:
        """float32 values in a vector register."""
        return self.vector_bytes // 4


AVX512_VNNI = Isa("avx512-vnni", 64, 32, "vnni512")
AVX512 = Isa("avx512", 64, 32, "pmaddwd512")
AVX_VNNI = Isa("avx-vnni", 32, 16, "vnni256")
AVX2 = Isa("avx2", 32, 16, "pmaddwd256")
GENERIC = Isa("generic", 16, 16, "none")


def isa_of(target: Any) -> Isa:
    """The `Isa` of a TVM target of kind llvm, by what its `mcpu` and `mattr` mean to LLVM.

    Parameters
    ----------
    target : tvm.target.Target
        Of kind llvm.
    """
    from tvm.target import codegen

    def has(*features: str) -> bool:
        return all(bool(codegen.llvm_cpu_has_features(feature, target)) for feature in features)

    triple = str(target.attrs.get("mtriple", "") or codegen.llvm_get_system_triple())
    if not triple.startswith(("x86_64", "i686", "i386")):
        return GENERIC
    if has("avx512f", "avx512bw", "avx512vl", "avx512dq"):
        if not has("avx512vnni"):
            return AVX512
        return Isa("avx512-vnni", 64, 32, "vnni512", has("avx512vbmi"))
    if has("avx2"):
        return AVX_VNNI if has("avxvnni") else AVX2
    return GENERIC
