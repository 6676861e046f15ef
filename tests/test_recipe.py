"""Options are validated once, with errors that name the option."""

from __future__ import annotations

import numpy as np
import pytest

from lpsn_tvm.errors import RecipeError
from lpsn_tvm.recipe import Recipe


@pytest.mark.parametrize(
    ("options", "field", "expected"),
    [
        ({"bits": 4}, "bits", (4, 4)),
        ({"bits": (4, 8)}, "bits", (4, 8)),
        ({"bits": [np.int64(2), 8]}, "bits", (2, 8)),
        ({"bits": None}, "bits", None),
        ({"sparsity": 0.5}, "sparsity", 0.5),
        ({"sparsity": "auto"}, "sparsity", "auto"),
        ({"sparsity": {"conv1": 0.25}}, "sparsity", {"conv1": 0.25}),
        ({"ignore": "conv1"}, "ignore", ("conv1",)),
        ({"input_shapes": {"x": [1, 3, 8, 8]}}, "input_shapes", {"x": (1, 3, 8, 8)}),
    ],
    ids=str,
)
def test_accepts(options: dict, field: str, expected: object) -> None:
    assert getattr(Recipe.from_options(**options), field) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 4.5},
        {"bits": True},
        {"bits": (4, 8, 8)},
        {"bits": "8"},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"sparsity": float("nan")},
        {"sparsity": "half"},
        {"sparsity": {"conv1": 1.0}},
        {"align": 0},
        {"batch": 0},
        {"samples": 0},
        {"seed": -1},
        {"seed": 0.5},
        {"num_threads": 0},
        {"score": "l2"},
        {"observer": "max"},
        {"ignore": 3},
        {"input_shapes": {"x": [0, 3]}},
        {"input_shapes": [1, 3]},
        {"memory_budget": 10},
    ],
    ids=str,
)
def test_refuses_and_names_the_option(options: dict) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_options(**options)
    assert next(iter(options)) in str(error.value)


def test_an_unknown_option_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="sparsity"):
        Recipe.from_options(sparsty=0.5)


def test_json_round_trip() -> None:
    recipe = Recipe.from_options(
        bits=(4, 8), sparsity={"a": 0.5}, ignore=["b*"], input_shapes={"x": (1, 3, 8, 8)}, align=1, seed=3
    )
    assert Recipe.from_json(recipe.to_json()) == recipe
