"""Images from a folder, fitted to a model's input: decoded, resized, cropped, grey or RGB, NCHW or NHWC, uint8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lpsn_tvm.errors import CalibrationError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
CHANNELS = (1, 3, 4)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def find_images(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted by path, so that the order does not depend on the file system.

    Raises
    ------
    CalibrationError
        There is none.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise CalibrationError(f"no images found; looked for {', '.join(SUFFIXES)}", where=str(folder))
    return paths


def image_layout(shape: tuple[int, ...], where: str) -> tuple[bool, int, int, int]:
    """How a model reads images.

    Parameters
    ----------
    shape : tuple of int
        One sample, without the batch axis: (C, H, W), (H, W, C) or (H, W).
    where : str
        The input's name, for the error.

    Returns
    -------
    (is_nhwc, channels, height, width)

    Raises
    ------
    CalibrationError
        No axis looks like channels.
    """
    if len(shape) == 2:
        return False, 1, shape[0], shape[1]
    if len(shape) == 3 and shape[0] in CHANNELS:
        return False, shape[0], shape[1], shape[2]
    if len(shape) == 3 and shape[2] in CHANNELS:
        return True, shape[2], shape[0], shape[1]
    raise CalibrationError(
        f"a folder of images cannot feed an input of shape {shape}: "
        f"channels must be {' or '.join(map(str, CHANNELS))}, first (NCHW) or last (NHWC)",
        where=where,
    )


def load_image(path: Path, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Decodes one image for a model input.

    The image is turned as its EXIF says, converted to the model's channels, resized (bilinear, antialiased) until it
    just covers the model's height and width with its aspect ratio kept, and cropped in the middle.

    Parameters
    ----------
    path : Path
        Any format that Pillow reads.
    shape : tuple of int
        One sample's shape, without the batch axis.
    where : str
        The input's name, for errors.

    Returns
    -------
    uint8[shape]

    Raises
    ------
    CalibrationError
        The file is no readable image, or `shape` is not that of an image.
    """
    from PIL import Image, ImageOps

    is_nhwc, channels, height, width = image_layout(shape, where)
    try:
        with Image.open(path) as opened:
            image: Any = ImageOps.exif_transpose(opened).convert(_MODES[channels])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"not a readable image: {error}", where=str(path)) from error
    image = ImageOps.fit(image, (width, height), method=Image.Resampling.BILINEAR, centering=(0.5, 0.5))
    pixels = np.asarray(image, np.uint8).reshape(height, width, channels)
    if len(shape) == 2:
        return pixels[:, :, 0]
    return pixels if is_nhwc else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def load_images(folder: Path, shape: tuple[int, ...], where: str, limit: int | None) -> Any:
    """Yields the images of a folder one by one as uint8[shape], at most `limit`."""
    for path in find_images(folder)[:limit]:
        yield load_image(path, shape, where)
