"""`build`: the straight path from an ONNX model to a compiled low-precision subnetwork, on one screen."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from lpsn_tvm.artifact import Artifact, Sources
from lpsn_tvm.progress import ProgressCallback, Stopwatch, progress_bar
from lpsn_tvm.recipe import Recipe

if TYPE_CHECKING:
    import onnx

    from lpsn_tvm.records import Records
    from lpsn_tvm.targets.backend import Backend

SYNTHETIC_SAMPLES = 32
NO_CALIBRATION = (
    "no calibration data: ranges come from synthetic inputs and only dead channels are removed; expect less accuracy"
)


def build(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto,
    *,
    target: str | Backend = "llvm",
    bits: int | tuple[int, int] | None = 8,
    calibration: Any = None,
    input_range: tuple[float, float] | None = None,
    preprocessing: Any = None,
    records: str | os.PathLike[str] | Records | None = None,
    progress: bool | ProgressCallback | None = None,
    **options: Any,
) -> Artifact:
    """Prune, quantize and compile a trained network.

    Parameters
    ----------
    model : path, bytes or onnx.ModelProto
        External data is read from beside the file.
    target : str or Backend
        "llvm" (this machine's CPU), a TVM target string such as "llvm -mcpu=cascadelake", "cuda" (this machine's GPU),
        "cuda -arch=sm_86" (any other; several with commas), "vta" (the accelerator, run through its simulator),
        "vta -preset=pynq-0.0.2", "vta -config=vta_config.json", or a Backend.
    bits : int, (weight bits, activation bits) or None
        2..8; None compiles the (pruned) network in float (llvm only). vta: 8, 4 or (4, 8) choose the geometry.
    calibration : optional
        Unlabelled samples: ndarray, dict of arrays, list, iterator, generator function, torch DataLoader, .npy / .npz
        file, or a folder of images. Without it only provably dead channels are removed and ranges come from seeded
        synthetic inputs; a warning and the report say so.
    input_range, preprocessing : optional
        How images become inputs: the interval that 0..255 is mapped to, and {"mean": ..., "std": ...} or a function
        of an array.
    records : path or Records, optional
        What `tune` found on the target's device, beside what the package ships. Changes speed, never results.
    progress : bool, callable (stage, done, total) or None
        None shows bars when standard error is a terminal.
    **options
        The other fields of `Recipe`: sparsity, align, score, order, observer, ignore, batch, input_shapes, samples,
        seed, num_threads, tune, ...
        `sparsity` is "auto" by default when there is calibration data.

    Returns
    -------
    Artifact

    Raises
    ------
    LpsnError
        A subclass per stage: RecipeError, ModelError, UnsupportedOpError, CalibrationError, PruneError,
        QuantizeError, TargetError, TuningError, CompileError.
    """
    recipe = Recipe.from_options(
        bits=bits, **{"target": str(getattr(target, "name", target)), "sparsity": "auto", **options}
    )

    from lpsn_tvm.calibration import CalibrationSet
    from lpsn_tvm.export import to_onnx
    from lpsn_tvm.frontend import import_model, load_model
    from lpsn_tvm.passes.pipeline import Network, stages
    from lpsn_tvm.reporting import input_infos, make_report, model_name, output_infos
    from lpsn_tvm.targets import Parts, get_backend
    from lpsn_tvm.tuning.network import check_tunable, tune_network

    with progress_bar(progress) as show:
        watch = Stopwatch(show)
        with watch.stage("import"):
            backend = get_backend(target).for_bits(recipe.bits).with_records(records)
            if recipe.tune is not None:
                check_tunable(backend, recipe.tracker)
            imported = import_model(load_model(model, batch=recipe.batch, input_shapes=dict(recipe.input_shapes)))
        with watch.stage("read calibration data"):
            if calibration is None:
                data = CalibrationSet.synthetic(
                    imported.signature, SYNTHETIC_SAMPLES, recipe.seed, ranges=imported.input_ranges
                )
                warnings.warn(NO_CALIBRATION, stacklevel=2)
            else:
                data = CalibrationSet.from_any(
                    calibration,
                    imported.signature,
                    input_range=input_range,
                    preprocessing=preprocessing,
                    limit=recipe.samples,
                )
        net = Network(imported, recipe, backend.scheme, recipe.align or backend.channel_tile, data, progress=show)
        for stage in stages(recipe, is_synthetic=data.synthetic):
            with watch.stage(stage.name):
                stage.run(net)
        parts = Parts(
            inputs=input_infos(imported),
            outputs=output_infos(imported),
            recipe=recipe,
            report=make_report(model_name(model), backend, net, watch.seconds),
            sources=Sources(net.pruned, net.plan, to_onnx),
        )
        with watch.stage("compile"):
            artifact = backend.build(net.mod, parts, show)
        if recipe.tune is not None:
            with watch.stage("tune"):
                artifact = tune_network(backend, net.mod, parts, artifact, show)
        if recipe.measure:
            with watch.stage("measure"):
                backend.measure(artifact, net.dense)
    return artifact
