"""MetaSchedule's XGBoost cost model over `Template.features`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from lpsn_tvm.errors import TuningError
from lpsn_tvm.schedules.template import Template
from lpsn_tvm.tuning.space import read_config
from lpsn_tvm.tuning.tasks import Task

WARMUP_TRIALS = 8
"""Until so many trials are known the model predicts at random: the first batch explores."""


def check_xgboost() -> None:
    """Refuse early where the cost model's library is missing.

    Raises
    ------
    TuningError
        Names the extra that brings it.
    """
    if importlib.util.find_spec("xgboost") is None:
        raise TuningError('needs xgboost: python -m pip install "lpsn-tvm[tune]"', where="tune")


def cost_model(tasks: Sequence[Task], seed: int) -> Any:
    """One model for all tasks.

    Templates of different names have different features: each name gets columns of its own, and a candidate has no
    value (which the trees understand) in the columns of others.
    """
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.meta_schedule.cost_model.xgb_model import XGBConfig

    return ms.cost_model.XGBModel(
        extractor=_extractor(tasks),
        config=XGBConfig(max_depth=6, seed=seed, nthread=1),
        num_warmup_samples=WARMUP_TRIALS,
        early_stopping_rounds=20,
        verbose_eval=0,
    )


def _extractor(tasks: Sequence[Task]) -> Any:
    import tvm
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms

    templates = {task.template.key: task.template for task in tasks}
    widths = {template.name: len(template.features(template.default)) for template in templates.values()}
    offsets = {name: sum(list(widths.values())[:i]) for i, name in enumerate(widths)}
    total = sum(widths.values()) or 1

    @derived_object
    class TemplateFeatures(ms.feature_extractor.PyFeatureExtractor):  # type: ignore[misc]
        """One row of features per candidate."""

        def extract_from(self, context: Any, candidates: Any) -> Any:
            """float64[1, all columns] of every candidate."""
            template = templates[str(context.task_name)]
            return [tvm.runtime.tensor(row(template, candidate.sch)) for candidate in candidates]

    def row(template: Template, sch: Any) -> Any:
        values = np.full((1, total), np.nan)
        features = template.features(read_config(sch, template.choices))
        values[0, offsets[template.name] : offsets[template.name] + widths[template.name]] = features
        return values

    return TemplateFeatures()
