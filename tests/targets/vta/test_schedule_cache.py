"""The schedule cache: atomic, indifferent to damage, shared by processes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lpsn_tvm.targets.vta.schedule_cache import ScheduleCache, default_directory, open_cache

KEY = {"op": [1, 2, (3, 4)], "model": "pynq"}
VALUE = {"schedule": {"tile_h": 4}, "cycles": 10}


def test_an_entry_comes_back(tmp_path: Path) -> None:
    cache = ScheduleCache(tmp_path / "deep" / "down")
    assert cache.read(KEY) is None
    assert cache.write(KEY, VALUE)
    assert cache.read(KEY) == VALUE
    assert cache.read(KEY | {"model": "rtl"}) is None
    assert [path.suffix for path in cache.directory.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff\xfe" + text,
        lambda text: b"[]",
        lambda text: text.replace(b'"cycles": 10', b'"cycles": 11'),
        lambda text: text.replace(b'"pynq"', b'"rtl"'),
        lambda text: text.replace(b'"format": 1', b'"format": 2'),
        lambda text: b"[" * 100_000,
    ],
    ids=["empty", "truncated", "not utf-8", "not an object", "another value", "another key", "another format", "deep"],
)
def test_a_damaged_entry_counts_as_absent_and_is_rewritten(tmp_path: Path, damage: object) -> None:
    cache = ScheduleCache(tmp_path)
    cache.write(KEY, VALUE)
    path = cache.path(KEY)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert cache.read(KEY) is None
    assert cache.write(KEY, VALUE)
    assert cache.read(KEY) == VALUE


def test_a_directory_that_cannot_be_used_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ScheduleCache(tmp_path / "file" / "cache")
    assert not cache.write(KEY, VALUE)
    assert cache.read(KEY) is None
    blocked = ScheduleCache(tmp_path)
    blocked.path(KEY).mkdir()
    assert not blocked.write(KEY, VALUE)
    assert blocked.read(KEY) is None
    assert not list(tmp_path.glob(".*.tmp"))


def test_concurrent_writers_leave_a_whole_entry(tmp_path: Path) -> None:
    values = [{"schedule": {"tile_h": n}, "cycles": n, "filler": "x" * 10_000 * n} for n in range(1, 9)]

    def work(value: dict[str, object]) -> bool:
        cache = ScheduleCache(tmp_path)
        cache.write(KEY, value)
        return cache.read(KEY) in values

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, values * 4))
    assert len(list(tmp_path.iterdir())) == 1


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "lpsn_tvm" / "vta"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".cache" / "lpsn_tvm" / "vta"
    assert open_cache(False) is None
    assert open_cache(None) == open_cache(True) == ScheduleCache(default_directory())
    assert open_cache(tmp_path) == open_cache(os.fspath(tmp_path)) == ScheduleCache(tmp_path)
