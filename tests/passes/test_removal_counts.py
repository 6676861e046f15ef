import numpy as np
import pytest

from lpsn_tvm.errors import RecipeError
from lpsn_tvm.passes.channel_groups import ChannelGroup, Slot
from lpsn_tvm.passes.removal_counts import check_names, fraction_of, kept_rounded_up, kept_units


def group(size, width=1, names=("a",)):
    index = np.arange(size * width).reshape(size, width)
    return ChannelGroup(names[0], size, tuple(Slot(name, index) for name in names), (), (), (), ())


@pytest.mark.parametrize(
    "size, width, fraction, align, kept",
    [
        (10, 1, 0.35, 1, 7),  # int(3.5) go, as in the paper
        (64, 1, 0.5, 16, 32),
        (64, 1, 0.3, 16, 48),  # 45 -> 48
        (64, 1, 0.6, 16, 32),  # 26 -> 32
        (64, 1, 0.99, 16, 16),  # at least one tile
        (24, 1, 0.5, 16, 12),  # narrower than two tiles: exact
        (16, 4, 0.5, 16, 8),  # units of 4 channels: tiles of 4 units
        (64, 1, 0.0, 16, 64),
        (2, 1, 0.99, 1, 1),  # one unit always stays
    ],
)
def test_kept_units(size, width, fraction, align, kept):
    assert kept_units(group(size, width), fraction, align) == kept


def test_auto_rounds_up():
    assert kept_rounded_up(group(64), 33, 16) == 48
    assert kept_rounded_up(group(24), 13, 16) == 13


def test_names_win_over_patterns_and_must_agree():
    pair = group(8, names=("block.a", "block.b"))
    assert fraction_of(pair, {"block.*": 0.5, "block.b": 0.25}) == 0.25
    assert fraction_of(pair, {"other": 0.5}) == 0.0
    with pytest.raises(RecipeError, match="share their channels"):
        fraction_of(pair, {"block.a": 0.5, "block.b": 0.25})


def test_unknown_names_list_close_matches():
    with pytest.raises(RecipeError, match=r"ignore.*close matches: layer1\.conv1"):
        check_names(["layer1.conv11"], ["layer1.conv1", "fc"], "ignore")
    check_names(["layer1.*", "fc"], ["layer1.conv1", "fc"], "ignore")
