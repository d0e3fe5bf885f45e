"""Reading an image as a person sees it, the same in every process: upright, on white, in eight bits, whole or not at all."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

MAX_PIXELS = 178_956_970  # where Pillow itself takes an image for a decompression bomb; other libraries lift its limit
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")


def read_image(source: "Path | bytes | Image.Image") -> Image.Image:
    """The image in RGB, from a file, the bytes of one, or an image that was opened elsewhere.

    Its EXIF rotation is applied, transparent parts are laid on white, 16-bit grey is scaled to 8 bits; of several frames the
    first is taken. Raises whatever Pillow raises, and ValueError for more than `MAX_PIXELS` pixels or values of unknown range.
    """
    with whole_images_only():
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return _upright_rgb(opened)


@contextmanager
def whole_images_only() -> Iterator[None]:
    """Inside, Pillow refuses files that are cut off, whatever another library has told it, and does not warn of large ones."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _upright_rgb(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, and more than {MAX_PIXELS:,} are not read")
    image = ImageOps.exif_transpose(image)
    if image.mode in _GREY_16 or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its values are of mode {image.mode}, whose range is not known: store it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)  # 0 .. 65535 = 257 x 255
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
