"""Questions about a model that need no build: how much channel rankings depend on what was pruned before."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lpsn_tvm.progress import ProgressCallback, progress_bar
from lpsn_tvm.recipe import DEFAULT_SAMPLES, Recipe

if TYPE_CHECKING:
    import onnx

    from lpsn_tvm.passes.ranking import RankingChange


def compare_rankings(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto,
    *,
    calibration: Any,
    sparsities: Sequence[float] = (0.25, 0.5, 0.75),
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    input_range: tuple[float, float] | None = None,
    preprocessing: Any = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    progress: bool | ProgressCallback | None = None,
) -> list[RankingChange]:
    """Rank every layer's channels on the dense network and on the already pruned prefix, by the paper's importance.

    Parameters
    ----------
    model, calibration, input_shapes, input_range, preprocessing, samples, seed, progress
        As for `build`.
    sparsities : sequence of float
        Fractions of channels to compare at.

    Returns
    -------
    list of RankingChange
        Kendall's tau and Levenshtein distance of the two rankings for each group and sparsity: a tau well below 1 says
        that one-shot estimates rank this layer wrongly.

    Source: Zhang, Colbert, Das (2022), comparison of rankings at sparsities 0.25, 0.5 and 0.75.
    """
    recipe = Recipe.from_options(
        input_shapes=dict(input_shapes or {}), samples=samples, seed=seed, sparsity=max(sparsities)
    )

    from lpsn_tvm.calibration import CalibrationSet
    from lpsn_tvm.frontend import import_model, load_model
    from lpsn_tvm.passes.canonicalize import canonicalize
    from lpsn_tvm.passes.ranking import compare_rankings as compare

    imported = import_model(load_model(model, input_shapes=dict(recipe.input_shapes)))
    data = CalibrationSet.from_any(
        calibration, imported.signature, input_range=input_range, preprocessing=preprocessing, limit=recipe.samples
    )
    with progress_bar(progress) as show:
        return compare(canonicalize(imported.mod), data, sparsities=sparsities, seed=recipe.seed, progress=show)
