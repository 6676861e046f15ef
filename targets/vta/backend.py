"""The accelerator as a backend: target strings, geometry by bits, and the path from an integer graph to an artifact."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lpsn_tvm.errors import CompileError, RecipeError, TargetError
from lpsn_tvm.progress import ProgressCallback, silent
from lpsn_tvm.recipe import Recipe
from lpsn_tvm.schedules.vta.emit import default_schedule, emit
from lpsn_tvm.schedules.vta.nest import SEQUENCE_LIMIT
from lpsn_tvm.schedules.vta.ops import TileOp
from lpsn_tvm.schedules.vta.schedule import Schedule
from lpsn_tvm.targets.backend import Backend, Bits, Parts
from lpsn_tvm.targets.vta.artifact import VtaArtifact
from lpsn_tvm.targets.vta.assemble_network import assemble
from lpsn_tvm.targets.vta.config import PREBUILT, PRESETS, VtaConfig, default_config, preset
from lpsn_tvm.targets.vta.lowering import lower
from lpsn_tvm.targets.vta.network import LoweredNetwork, VtaNetwork
from lpsn_tvm.targets.vta.profile import MODELS
from lpsn_tvm.targets.vta.scheme import vta_scheme
from lpsn_tvm.targets.vta.search import BUDGET_SECONDS
from lpsn_tvm.targets.vta.search_workers import find_schedules

OPTIONS = ("preset", "config", "model")
DEFAULT_MODEL = "pynq"


@dataclass(frozen=True)
class VtaGeometry:
    """What the backend knows about the accelerator.

    Parameters
    ----------
    config : VtaConfig
    model : str
        Cycle model that schedules are searched for: "pynq" or "rtl".
    is_chosen : bool
        Whether the user named the configuration; otherwise it follows the bits.
    """

    config: VtaConfig
    model: str = DEFAULT_MODEL
    is_chosen: bool = False


def vta_backend(options: Mapping[str, Any]) -> Backend:
    """The backend of a parsed target: `vta`, `vta -preset=pynq-0.0.2`, `vta -config=vta_config.json`, `vta -model=rtl`.

    Raises
    ------
    TargetError
        Unknown option, preset or model; a configuration that breaks a rule of the hardware.
    """
    given = {name: value for name, value in options.items() if name not in ("kind", "keys", "tag")}
    unknown = sorted(set(given) - set(OPTIONS))
    if unknown:
        allowed = ", ".join(f"-{name}" for name in OPTIONS)
        raise TargetError(f"unknown option {unknown[0]!r}; allowed: {allowed}", where="vta")
    if "preset" in given and "config" in given:
        raise TargetError("give -preset or -config, not both", where="vta")
    model = str(given.get("model", DEFAULT_MODEL))
    if model not in MODELS:
        raise TargetError(f"unknown cycle model {model!r}; known: {', '.join(MODELS)}", where="vta -model")
    if "config" in given:
        config = VtaConfig.read(str(given["config"]))
        if config.uop_depth < SEQUENCE_LIMIT:
            raise TargetError(
                f"its micro-op buffer holds {config.uop_depth}; schedules need {SEQUENCE_LIMIT} (LOG_UOP_BUFF_SIZE "
                f"{(SEQUENCE_LIMIT * config.uop_tile_bytes - 1).bit_length()} or more)",
                where=str(given["config"]),
            )
        return _backend(VtaGeometry(config, model, True), None)
    if "preset" in given:
        return _backend(VtaGeometry(preset(str(given["preset"])), model, True), None)
    return _backend(VtaGeometry(PRESETS["pynq"], model), None)


def _backend(geometry: VtaGeometry, bits: tuple[int, int] | None) -> Backend:
    config = geometry.config
    name = next((key for key, value in PRESETS.items() if value == config), None)
    where = f"-preset={name}" if name else f"-config={config.name}"
    return Backend(
        name="vta",
        tvm_target=f"vta {where} -model={geometry.model}",
        scheme=_scheme(config, bits),
        channel_tile=config.block_out,
        rules={},
        geometry=geometry,
        lowering=_lower,
        compiler=_compile,
        maker=make_artifact,
        measurer=_measure,
        specializer=_for_bits,
    )


def _scheme(config: VtaConfig, bits: tuple[int, int] | None) -> Any:
    try:
        return vta_scheme(config, bits)
    except RecipeError as error:
        raise TargetError(str(error), where="vta") from error


def _for_bits(backend: Backend, bits: Bits) -> Backend:
    """The geometry that the bits ask for, unless one was named; then they must fit it."""
    if bits is None:
        raise TargetError(
            "the accelerator has integer arithmetic only; bits=None (float) needs target='llvm'", where="vta"
        )
    geometry: VtaGeometry = backend.geometry
    if not geometry.is_chosen:
        try:
            geometry = replace(geometry, config=default_config(bits))
        except TargetError as error:
            raise TargetError(
                f"{error}; a named one takes fewer bits than it holds, too: target='vta -preset=pynq'", where="vta"
            ) from error
    return _backend(geometry, bits)


def _lower(backend: Backend, mod: Any) -> LoweredNetwork:
    lowered: LoweredNetwork = lower(mod, backend.geometry.config)
    return lowered


def _compile(backend: Backend, mod: Any) -> VtaNetwork:
    """Programs with default schedules."""
    lowered = mod if isinstance(mod, LoweredNetwork) else backend.lower(mod)
    return compile_network(lowered, Recipe(search=False), DEFAULT_MODEL)


def compile_network(
    lowered: LoweredNetwork, recipe: Recipe, model: str, progress: ProgressCallback = silent
) -> VtaNetwork:
    """Schedules and programs of a lowered network.

    Raises
    ------
    CompileError
        An operator fits the buffers under no schedule; names it.
    """
    found = _searched(lowered, recipe, model, progress) if recipe.search else {}

    def choose(op: TileOp, config: VtaConfig) -> Schedule:
        try:
            return found[op] if found else default_schedule(op, config)
        except CompileError as error:
            raise _unschedulable(error, config) from error

    return assemble(lowered, emit=emit, choose=choose, progress=progress)


def _searched(
    lowered: LoweredNetwork, recipe: Recipe, model: str, progress: ProgressCallback
) -> dict[TileOp, Schedule]:
    """The best schedule of every operator; those that cost the same are searched once."""
    seconds = BUDGET_SECONDS if isinstance(recipe.search, bool) else float(recipe.search)
    ops = [step for step in lowered.steps if isinstance(step, TileOp)]
    try:
        results = find_schedules(
            ops,
            lowered.config,
            model=model,
            cache=recipe.cache,
            budget_seconds=seconds,
            finished=lambda done, total: progress("schedule", done, total),
        )
    except CompileError as error:
        raise _unschedulable(error, lowered.config) from error
    return {op: result.schedule for op, result in zip(ops, results, strict=True)}


def _unschedulable(error: CompileError, config: VtaConfig) -> CompileError:
    reason = str(error).removeprefix(f"{error.where}: ")
    return CompileError(
        f"fits {config.name} under no schedule: {reason}; ignore=[layer] leaves a layer in float on the host",
        where=error.where,
    )


def make_artifact(backend: Backend, mod: Any, parts: Parts, progress: ProgressCallback) -> VtaArtifact:
    """Lower, schedule and assemble an integer graph."""
    geometry: VtaGeometry = backend.geometry
    start = time.perf_counter()
    lowered = backend.lower(mod)
    middle = time.perf_counter()
    network = compile_network(lowered, parts.recipe, geometry.model, progress)
    seconds = {"vta lowering": middle - start, "vta schedules and programs": time.perf_counter() - middle}
    parts.report.seconds.update({name: round(value, 3) for name, value in seconds.items()})
    parts.report.notes.extend((*network.notes, *_notes(geometry.config)))
    return VtaArtifact(
        inputs=parts.inputs,
        outputs=parts.outputs,
        recipe=parts.recipe,
        report=parts.report,
        target=backend.tvm_target,
        sources=parts.sources,
        network=network,
        model=geometry.model,
    )


def _notes(config: VtaConfig) -> list[str]:
    if any(PRESETS[name] == config for name in PREBUILT):
        return []
    return [
        f"there is no published bitstream for {config.name}: build it from the public hardware sources with the "
        "vta_config.json that export_vta and export_pynq write"
    ]


def _measure(backend: Backend, artifact: VtaArtifact, dense: Any) -> None:
    """Cycles of every step; the float network does not run here."""
    artifact.report.accelerator = artifact.profile()
