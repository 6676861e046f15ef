"""The llvm backend: this machine's CPU or a named one, its instruction set, and the CPU features that a compiled
library will need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lpsn_tvm import runtime
from lpsn_tvm.compat import check_versions
from lpsn_tvm.errors import TargetError
from lpsn_tvm.quant import QuantScheme
from lpsn_tvm.schedules.llvm.isa import isa_of
from lpsn_tvm.targets.backend import Backend

CHANNEL_TILE = 16

# LLVM's feature name -> Linux's, for the features that change which instructions LLVM emits.
LINUX_NAMES = {
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "ssse3": "ssse3",
    "popcnt": "popcnt",
    "movbe": "movbe",
    "lzcnt": "abm",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "gfni": "gfni",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "sha": "sha_ni",
    "avx512f": "avx512f",
    "avx512cd": "avx512cd",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avxvnni": "avx_vnni",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
    "adx": "adx",
    "rdseed": "rdseed",
    "avxifma": "avx_ifma",
    "avxneconvert": "avx_ne_convert",
    "avxvnniint8": "avx_vnni_int8",
}


def llvm_backend(config: Mapping[str, Any]) -> Backend:
    """The backend of an LLVM target; without `mcpu`, of this machine's CPU.

    Raises
    ------
    TargetError
        LLVM does not know the CPU.
    """
    from tvm.target import codegen

    from lpsn_tvm.targets.compile import compile_llvm
    from lpsn_tvm.targets.llvm_artifact import make_artifact, measure
    from lpsn_tvm.targets.llvm_lowering import lower
    from lpsn_tvm.targets.llvm_rules import RULES

    check_versions()
    # A Target that is turned into a dictionary brings these along; TVM derives them itself.
    options = {name: value for name, value in config.items() if name not in ("keys", "tag")}
    if any(name.startswith("fast-math") for name in options):
        raise TargetError(
            "fast-math changes how results are rounded, so they would differ from the reference; leave it out",
            where="llvm",
        )
    host = "mcpu" not in options and "mtriple" not in options
    if host:
        options["mcpu"] = str(codegen.llvm_get_system_cpu())
    target = _target(options)
    absent = _absent_here(target) if host else []
    if absent:
        options["mattr"] = [*options.get("mattr", []), *(f"-{name}" for name in absent)]
        target = _target(options)
    if "mcpu" in options and not codegen.llvm_is_valid_cpu(
        options["mcpu"], options.get("mtriple", codegen.llvm_get_system_triple())
    ):
        raise TargetError(
            "LLVM does not know this CPU; see `llc -mcpu=help`, for example cascadelake, haswell, znver4",
            where=f"mcpu={options['mcpu']}",
        )
    return Backend(
        name="llvm",
        tvm_target=json.dumps(options, sort_keys=True),
        scheme=QuantScheme(),
        channel_tile=CHANNEL_TILE,
        rules=RULES,
        geometry=isa_of(target),
        lowering=lower,
        compiler=compile_llvm,
        maker=make_artifact,
        measurer=measure,
        namer=device_name,
    )


def device_name(backend: Backend) -> str:
    """CPU and features, as in "llvm sapphirerapids -amx-bf16"; the rest of the target does not change times."""
    options = json.loads(backend.tvm_target)
    triple = [options["mtriple"]] if "mtriple" in options else []
    return " ".join(["llvm", options.get("mcpu", "generic"), *triple, *sorted(options.get("mattr", []))])


def _target(options: Mapping[str, Any]) -> Any:
    import tvm

    try:
        return tvm.target.Target(dict(options))
    except (ValueError, TypeError, RuntimeError) as error:
        raise TargetError(
            f"TVM does not accept it: {str(error).splitlines()[-1]}", where=json.dumps(options)
        ) from error


def _features(target: Any) -> set[str]:
    from tvm.target import codegen

    return {name for name in LINUX_NAMES if codegen.llvm_cpu_has_features(name, target)}


def _absent_here(target: Any) -> list[str]:
    """Features that LLVM infers from the CPU's name but that this machine (a virtual one, say) does not offer."""
    present = runtime.cpu_features()
    if present is None:
        return []
    return sorted(name for name in _features(target) if LINUX_NAMES[name] not in present)


def required_features(target: Any) -> tuple[str, ...]:
    """Linux names of the CPU features that code for `target` may use."""
    if str(target.attrs.get("mtriple", "x86_64")).split("-")[0] not in ("x86_64", "i686", "i386"):
        return ()
    return tuple(sorted(LINUX_NAMES[name] for name in _features(target)))
