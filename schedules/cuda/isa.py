"""What an NVIDIA GPU offers to the schedules, by its architecture."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 32
"""Channels per block of the device layout (`TensorSpec.block`): one k-step of the 8-bit tensor-core instruction."""
WARP = 32


@dataclass(frozen=True)
class CudaIsa:
    """Instruction set and size of one architecture.

    Parameters
    ----------
    arch : str
        "sm_80".
    multiprocessors : int
        Of the usual part; only the choice of tiles depends on it.
    shared_bytes : int
        Shared memory that one block may ask for.
    shared_bytes_total : int
        Shared memory of a multiprocessor.
    has_mma_s8_k32 : bool
        Where `has_mma_s8`: mma.m16n8k32 for 8-bit integers (sm_80 and later); otherwise mma.m8n8k16 (sm_75).
    has_mma_s4 : bool
        4-bit tensor-core instructions that the hardware runs natively (sm_75 to sm_89).
    has_cp_async : bool
        Copies from global to shared memory that bypass registers (sm_80 and later).
    max_threads : int
        Most threads of a block.
    max_registers : int
        32-bit registers of a multiprocessor.
    has_mma_s8 : bool
        8-bit matrix instructions (`mma.sync`, sm_75 and later); otherwise dot products of four bytes (dp4a).
    """

    arch: str
    multiprocessors: int
    shared_bytes: int
    shared_bytes_total: int
    has_mma_s8_k32: bool
    has_mma_s4: bool
    has_cp_async: bool
    max_threads: int = 1024
    max_registers: int = 65536
    has_mma_s8: bool = True

    @property
    def number(self) -> int:
        """80 for sm_80."""
        return int(self.arch.removeprefix("sm_").rstrip("af"))


_KIB = 1024
ARCHITECTURES = {
    isa.arch: isa
    for isa in (
        CudaIsa("sm_61", 20, 48 * _KIB, 96 * _KIB, False, False, False, has_mma_s8=False),
        CudaIsa("sm_70", 80, 96 * _KIB, 96 * _KIB, False, False, False, has_mma_s8=False),
        CudaIsa("sm_72", 8, 96 * _KIB, 96 * _KIB, False, False, False, has_mma_s8=False),
        CudaIsa("sm_75", 40, 64 * _KIB, 64 * _KIB, False, True, False),
        CudaIsa("sm_80", 108, 163 * _KIB, 164 * _KIB, True, True, True),
        CudaIsa("sm_86", 84, 99 * _KIB, 100 * _KIB, True, True, True),
        CudaIsa("sm_87", 16, 163 * _KIB, 164 * _KIB, True, True, True),
        CudaIsa("sm_89", 128, 99 * _KIB, 100 * _KIB, True, True, True),
        CudaIsa("sm_90", 132, 227 * _KIB, 228 * _KIB, True, False, True),
        CudaIsa("sm_100", 148, 227 * _KIB, 228 * _KIB, True, False, True),
        CudaIsa("sm_120", 170, 99 * _KIB, 100 * _KIB, True, False, True),
    )
}
"""Architectures that kernels are made for, by name, oldest first. The compiler of CUDA 13 begins at sm_75: older ones
need CUDA 12. sm_72 has matrix instructions, but none that `mma.sync` reaches.
"""
