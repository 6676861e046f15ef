from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpsn_tvm.calibration import CalibrationSet
from lpsn_tvm.errors import CalibrationError
from lpsn_tvm.images import image_layout, load_image


def save(path: Path, height: int, width: int, mode: str = "RGB", value: tuple[int, ...] = (10, 20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), value if mode == "RGB" else value[0]).save(path)
    return path


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 8, 6), (3, 8, 6)), ((8, 6, 3), (8, 6, 3)), ((1, 8, 6), (1, 8, 6)), ((8, 6, 1), (8, 6, 1)), ((8, 6), (8, 6))],
    ids=["nchw", "nhwc", "grey nchw", "grey nhwc", "grey flat"],
)
def test_images_take_the_models_layout(shape: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path) -> None:
    image = load_image(save(tmp_path / "a.png", 50, 40), shape, "x")
    assert image.shape == expected and image.dtype == np.uint8
    colours = np.unique(image.reshape(3, -1) if shape[0] == 3 else image.reshape(-1, 3).T if shape[-1] == 3 else image)
    assert colours.tolist() == ([10, 20, 30] if 3 in shape else [18])


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (16, 24), (5, 300)], ids=str)
def test_short_side_fits_and_the_middle_is_cropped(size: tuple[int, int], tmp_path: Path) -> None:
    """A white cross through the middle stays in the middle, whatever the aspect ratio."""
    height, width = size
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 - max(1, width // 10) : width // 2 + max(1, width // 10)] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", (1, 32, 32), "x")[0].astype(float)
    columns = image.mean(axis=0)
    assert columns[15:17].min() > 100
    np.testing.assert_allclose(columns, columns[::-1], atol=90)


def test_folder_is_read_in_sorted_order_at_any_depth(tmp_path: Path) -> None:
    for index, name in enumerate(("b/2.png", "a/9.jpg", "c.bmp", "d.webp", "a/1.JPEG")):
        save(tmp_path / name, 9, 9, value=(index * 20,) * 3)
    (tmp_path / "notes.txt").write_text("not an image")
    data = CalibrationSet.from_any(tmp_path, {"x": (1, 3, 8, 8)})
    means = [round(float(x.mean()) * 255 / 20) for batch in data for x in batch["x"]]
    assert means == [4, 1, 0, 2, 3]
    assert "input_range" in data.notes[0]
    assert len(CalibrationSet.from_any(str(tmp_path), {"x": (1, 3, 8, 8)}, limit=2)) == 2


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16", "LA"])
def test_every_colour_mode_is_converted(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (9, 9)).save(path)
    assert load_image(path, (3, 8, 8), "x").shape == (3, 8, 8)


def test_bad_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(CalibrationError, match=r"broken\.png.*readable"):
        CalibrationSet.from_any(tmp_path, {"x": (1, 3, 8, 8)})
    whole = save(tmp_path / "half.png", 60, 60).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CalibrationError, match=r"half\.png"):
        load_image(tmp_path / "half.png", (3, 8, 8), "x")


def test_inputs_that_are_no_images_are_refused() -> None:
    with pytest.raises(CalibrationError, match="channels"):
        image_layout((7, 8, 9), "x")
    with pytest.raises(CalibrationError):
        image_layout((10,), "x")
