"""Safe decoding and preprocessing: encoded bytes become uint8 pixels [3, H, W] of the tower's size."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlm_tune.config import Augment
from vlm_tune.data.types import Media
from vlm_tune.errors import DataError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 100_000_000
MAX_ASPECT = 200


def decode_image(data: bytes, name: str = "<bytes>") -> Image:
    """An RGB image: first frame, EXIF rotation applied, transparency on white, 16 bit scaled to 8.

    Raises `DataError` for other formats than PNG, JPEG, WebP, BMP, GIF and TIFF, for files that are cut or empty, and
    from the header alone for more than 100 megapixels or sides of over 200 to 1.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{name}: {width}x{height} is more than {MAX_PIXELS:,} pixels")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise DataError(f"{name}: {width}x{height}, sides of over {MAX_ASPECT} to 1")
            image.load()
        image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image of {', '.join(FORMATS)} ({len(data)} bytes)") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: can't be decoded: {error}") from None
    if image.mode.startswith("I;16") or image.mode == "I":
        array = np.asarray(image, dtype=np.uint32)
        return Image.fromarray((array >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageProcessor:
    """An image as the tower takes it: uint8[3, size, size], made square by `resize`; the tower normalises."""

    size: int
    resize: Literal["squash", "crop", "pad"] = "crop"
    mean: Sequence[float] = (0.5, 0.5, 0.5)

    def __call__(self, media: Media) -> torch.Tensor:
        """uint8[3, size, size]. Raises `DataError` for what can't be decoded."""
        return self.pixels(decode_image(media.read(), media.name))

    def pixels(self, image: Image) -> torch.Tensor:
        """As above, for a decoded image."""
        import torch
        from PIL import Image as Pil

        width, height = image.size
        if self.resize == "pad" and width != height:
            side = max(width, height)
            fill = tuple(round(255 * value) for value in self.mean)
            square = Pil.new("RGB", (side, side), fill)  # type: ignore[arg-type]
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            image = square
        elif self.resize == "crop" and width != height:
            scale = self.size / min(width, height)
            width, height = max(round(width * scale), self.size), max(round(height * scale), self.size)
            image = image.resize((width, height), Pil.Resampling.BICUBIC)
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Pil.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def augment_pixels(pixels: torch.Tensor, augment: Augment, key: tuple[int, ...]) -> torch.Tensor:
    """Randomly changed uint8[3, H, W]; the same `key` (seed, epoch, sample) gives the same change."""
    from torchvision.transforms.v2 import functional

    random = np.random.default_rng(key)
    flip, transpose = random.random(2)
    if flip < augment.flip:
        pixels = functional.horizontal_flip(pixels)
    if transpose < augment.transpose and pixels.shape[-1] == pixels.shape[-2]:
        pixels = pixels.transpose(-1, -2)
    if augment.shift:
        height, width = pixels.shape[-2:]
        most = round(augment.shift * min(height, width))
        down, right = (int(value) for value in random.integers(-most, most + 1, 2))
        padded = functional.pad(pixels, [most, most, most, most], padding_mode="edge")
        pixels = padded[:, most - down : most - down + height, most - right : most - right + width]
    return pixels


class PixelCache:
    """Decoded pixels of images met before, up to a number of bytes; images past that are decoded each time."""

    def __init__(self, processor: ImageProcessor, max_bytes: int = 1 << 28) -> None:
        self.processor, self._left = processor, max_bytes
        self._kept: dict[Media, torch.Tensor] = {}

    def __call__(self, media: Media) -> torch.Tensor:
        """uint8[3, size, size]."""
        found = self._kept.get(media)
        if found is None:
            found = self.processor(media)
            if self._left >= found.nbytes:
                self._left -= found.nbytes
                self._kept[media] = found
        return found
