"""Random instructions of every kind, for tests of encoding and assembly."""

from __future__ import annotations

from hypothesis import strategies as st

from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.isa import Alu, Finish, Gemm, Instruction, Load, Store


def _counts(config: VtaConfig) -> dict[str, st.SearchStrategy[int]]:
    """Fields of the loops, from the widths in the bit tables and not from the encoder's own."""
    uop = config.log_uop_buff_size - 2
    return {
        "uop_begin": st.integers(0, 2**uop - 1),
        "uop_end": st.integers(0, 2 ** (uop + 1) - 1),
        "iter_out": st.integers(0, 2**14 - 1),
        "iter_in": st.integers(0, 2**14 - 1),
        "dst_out": st.integers(0, config.acc_depth - 1),
        "dst_in": st.integers(0, config.acc_depth - 1),
    }


def instructions(config: VtaConfig) -> st.SearchStrategy[Instruction]:
    """Any instruction that a configuration can encode."""
    flags = {name: st.booleans() for name in ("pop_prev", "pop_next", "push_prev", "push_next")}
    u4, u16, u32 = st.integers(0, 15), st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
    rows = {"sram": u16, "dram": u32, "y_size": u16, "x_size": u16, "x_stride": u16}
    pads = {"y_pad_0": u4, "y_pad_1": u4, "x_pad_0": u4, "x_pad_1": u4}
    inp, wgt = st.integers(0, config.inp_depth - 1), st.integers(0, config.wgt_depth - 1)
    acc = st.integers(0, config.acc_depth - 1)
    return st.one_of(
        st.builds(Load, memory=st.sampled_from(["uop", "wgt", "inp", "acc"]), **flags, **rows, **pads),  # type: ignore[arg-type]
        st.builds(Store, **flags, **rows),
        st.builds(
            Gemm, reset=st.booleans(), **flags, **_counts(config), src_out=inp, src_in=inp, wgt_out=wgt, wgt_in=wgt
        ),  # type: ignore[arg-type]
        st.builds(
            Alu,
            op=st.sampled_from(["min", "max", "add", "shr"]),
            use_imm=st.booleans(),
            imm=st.integers(-(2**15), 2**15 - 1),
            src_out=acc,
            src_in=acc,
            **flags,
            **_counts(config),
        ),  # type: ignore[arg-type]
        st.just(Finish()),
    )
