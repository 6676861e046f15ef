"""Templates: validity, keys, and dataclasses back from JSON."""

import json
from dataclasses import asdict, dataclass

import pytest

from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.schedules.template import REMAKERS, Template, canonical, decode, remake, template_key


def template(**changes):
    values = {
        "name": "t",
        "workload": {"shape": (1, 2), "isa": {"b": 1, "a": None}},
        "choices": {"tile": (1, 2, 4), "order": ("rows", "columns")},
        "default": {"tile": 2, "order": "rows"},
        "maker": lambda config: Kernel(lambda: None, (), TensorSpec((1,), "int8"), ("t", canonical(config))),
        "validator": lambda config: config["tile"] != 4 or config["order"] == "rows",
    }
    return Template(**{**values, **changes})


def test_configurations_in_order():
    assert [canonical(config) for config in template().configs()] == [
        canonical({"tile": tile, "order": order})
        for tile, order in ((1, "rows"), (1, "columns"), (2, "rows"), (2, "columns"), (4, "rows"))
    ]


@pytest.mark.parametrize(
    "config", [{}, {"tile": 2}, {"tile": 3, "order": "rows"}, {"tile": 4, "order": "columns"},
               {"tile": 2, "order": "rows", "more": 1}],
)  # fmt: skip
def test_invalid_configurations(config):
    assert not template().is_valid(config)
    assert template().is_valid(template().default)


def test_kernels_know_their_template():
    t = template()
    assert t.kernel().template is t and t.kernel().key == t.make(t.default).key
    assert t.make({"tile": 1, "order": "rows"}).template is t


def test_the_key_is_name_and_workload():
    t = template()
    assert t.key == template_key("t", {"isa": {"a": None, "b": 1}, "shape": [1, 2]})
    assert t.key == template(choices={"tile": (2,), "order": ("rows",)}).key
    assert t.key not in (template(name="u").key, template(workload={"shape": (1, 3)}).key)


def test_unknown_names_cannot_be_made_again():
    with pytest.raises(KeyError):
        remake("no such template", {})
    assert all(path.count(":") == 1 for path in REMAKERS.values())


@dataclass(frozen=True)
class Inner:
    pair: tuple[int, str]
    limit: float


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    maybe: Inner | None
    many: tuple[Inner, ...]
    sizes: tuple[int, ...] | None = None


@pytest.mark.parametrize("maybe", [None, Inner((3, "c"), float("inf"))], ids=["none", "some"])
def test_dataclasses_come_back_from_json(maybe):
    value = Outer("x", Inner((1, "a"), 0.5), maybe, (Inner((2, "b"), 1.0),) * 2, None if maybe else (1, 2))
    assert decode(Outer, json.loads(canonical(asdict(value)))) == value
