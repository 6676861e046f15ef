"""Records of measured configurations: files, merging, digests, and when one is not used."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lpsn_tvm.errors import ArtifactError, TuningError
from lpsn_tvm.records import FORMAT, SHIPPED, Record, Records, shipped
from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.schedules.template import Template, canonical

TEMPLATE = Template(
    "t", {"shape": (1, 2)}, {"a": (1, 2, 4), "b": ("x", "y")}, {"a": 1, "b": "x"},
    lambda config: Kernel(lambda: None, (), TensorSpec((1,), "int8"), ("t", canonical(config))),
    lambda config: config["a"] != 4 or config["b"] == "x",
)  # fmt: skip
RECORD = Record("sm_90", "t", {"shape": [1, 2]}, {"a": 2, "b": "y"}, 1e-3, 2e-3, "GPU", "2026-01-01T00:00:00+00:00")

RECORD_JSON = json.loads(canonical(asdict(RECORD)))


def test_a_record_is_found_by_device_and_template():
    records = Records([RECORD])
    assert records.find("sm_90", TEMPLATE) is RECORD
    assert records.find("sm_80", TEMPLATE) is None
    assert records.find("sm_90", replace(TEMPLATE, workload={"shape": (1, 3)})) is None
    assert records.find("sm_90", replace(TEMPLATE, name="u")) is None
    assert records.misfit("sm_90", TEMPLATE) == ""


@pytest.mark.parametrize("config", [{"a": 3, "b": "x"}, {"a": 4, "b": "y"}, {"a": 2}, {"a": 2, "b": "x", "c": 1}])
def test_a_configuration_that_the_template_no_longer_offers_is_ignored_with_a_note(config):
    records = Records([replace(RECORD, config=config)])
    assert records.find("sm_90", TEMPLATE) is None
    assert (
        records.misfit("sm_90", TEMPLATE)
        == f"a record of t is ignored: this release does not offer {canonical(config)}"
    )
    assert records.misfit("sm_80", TEMPLATE) == ""


def test_files(tmp_path):
    path = Records([RECORD, replace(RECORD, device="sm_80")]).save(tmp_path / "records.json")
    loaded = Records.load(path)
    assert loaded == Records([replace(RECORD, device="sm_80"), RECORD])
    assert [record.config for record in loaded] == [{"a": 2, "b": "y"}] * 2
    assert loaded.digest == Records([RECORD, replace(RECORD, device="sm_80")]).digest != Records([RECORD]).digest
    assert Records.from_any(str(path)) == Records.from_any(loaded) == loaded
    assert len(Records.from_any(None)) == 0 and Records.from_any(None).digest == ""
    assert [p.name for p in tmp_path.iterdir()] == ["records.json"]


def test_the_later_record_counts():
    better = replace(RECORD, config={"a": 1, "b": "y"}, seconds=5e-4)
    merged = Records([RECORD]).merge(Records([better]))
    assert len(merged) == 1 and merged.find("sm_90", TEMPLATE) is better
    assert len(merged.merge(Records([replace(RECORD, device="sm_80")])).for_device("sm_80")) == 1


def _content(**changes):
    return {"package": "lpsn_tvm", "format": FORMAT, "records": [], **changes}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "is not a file of tuning records"),
        (json.dumps({"records": []}), "is not a file of tuning records"),
        (json.dumps([1]), "is not a file of tuning records"),
        (json.dumps(_content(records=[{"device": "x"}])), "is not a file of tuning records"),
        (json.dumps(_content(records=[{**RECORD_JSON, "seconds": -1}])), "times must be positive"),
        (json.dumps(_content(format=FORMAT + 1)), f"is of format {FORMAT + 1}, this release reads up to {FORMAT}"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "records.json"
    path.write_text(text)
    with pytest.raises(TuningError, match=message) as caught:
        Records.load(path)
    assert str(path) in str(caught.value)


def test_absent_files_and_other_things_are_refused(tmp_path):
    with pytest.raises(TuningError, match="cannot be read: No such file"):
        Records.load(tmp_path / "absent.json")
    with pytest.raises(TuningError, match="must be a file of records or Records, got int"):
        Records.from_any(3)
    with pytest.raises(ArtifactError, match="cannot be written"):
        Records([RECORD]).save(tmp_path / "absent" / "records.json")


def test_what_the_package_ships_can_be_read():
    assert (SHIPPED / "README.md").is_file()
    for path in SHIPPED.glob("*.json"):
        for record in Records.load(path):
            assert record.machine and record.date and record.seconds < record.default_seconds
    assert isinstance(shipped(), Records)


def test_shipped_files_are_in_the_wheel():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"lpsn_tvm.tuning" = ["shipped/README.md", "shipped/*.json"]' in text
