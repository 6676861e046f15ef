"""Budgets from text."""

import pytest

from lpsn_tvm.budget import Budget
from lpsn_tvm.errors import RecipeError
from lpsn_tvm.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (200, Budget(trials=200)), ("200", Budget(trials=200)), ("90s", Budget(seconds=90)),
        ("10m", Budget(seconds=600)), ("1.5h", Budget(seconds=5400)), (" 2 m ", Budget(seconds=120)),
    ],
)  # fmt: skip
def test_budgets(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", [0, -5, "0s", "ten", "10d", "", "1.5", True, 2.5, None, "10 m s"])
def test_what_is_no_budget(text):
    with pytest.raises(RecipeError, match=r"tune: must be a number of trials, such as 200, or a time"):
        Budget.parse(text)


def test_a_recipe_checks_its_budget():
    assert Recipe.from_options(tune="10m").tune == "10m"
    with pytest.raises(RecipeError, match="tune"):
        Recipe.from_options(tune="soon")
    assert Recipe.from_json(Recipe.from_options(tune=50, tracker="host:9190/cuda").to_json()).tune == 50
