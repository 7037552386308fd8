"""Images and audio of requests: from data URLs; images also from allowed hosts and a folder.

Nothing is decoded here but headers, which say what a file is and how many pixels it would have.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import replace

from vlm_tune.data.audio.decode import FORMATS, is_audio
from vlm_tune.data.images.decode import image_size
from vlm_tune.data.sources.media import ImageFolder, data_url
from vlm_tune.data.types import Media, Modality
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted
from vlm_tune.serving.api_errors import ApiError, bad_media
from vlm_tune.serving.guard import Footprint
from vlm_tune.serving.limits import Limits
from vlm_tune.serving.remote import RemoteImages

ReadMedia = Callable[[str, Modality], Awaitable[Media]]
"""Returns the image or audio clip at a URL."""
LABEL = "it"
"""What a medium is called until it has the label of its place in the request."""
BASE64_SHARE = 4 / 3
"""Characters of base64 for each byte."""


async def labelled_media(
    read: ReadMedia, url: str, modality: Modality, label: str, param: str
) -> Media:
    """The image or clip at a URL, with a label by which errors name it.

    `param` is the name of its field. Raises `ApiError`, as `read` does.
    """
    try:
        media = await read(url, modality)
    except ApiError as error:
        if error.status_code != 400:
            raise
        message = f"{label}: {error.message}"
        raise ApiError(error.status_code, message, param=param, code=error.code) from None
    return replace(media, label=label)


class MediaReader:
    """Reads the images and audio clips of requests.

    Args:
        limits: What the server accepts.
        pool: Where they are read, apart from the event loop.
        remote: Fetches images from other hosts.
        observe: Called with the seconds that each took.
    """

    def __init__(
        self,
        limits: Limits,
        pool: Executor,
        remote: RemoteImages,
        observe: Callable[[float], None],
    ) -> None:
        self._limits = limits
        self._pool = pool
        self._remote = remote
        self._observe = observe
        self._folder = None if limits.image_root is None else ImageFolder(limits.image_root)

    async def __call__(self, url: str, modality: Modality, footprint: Footprint) -> Media:
        """Returns the image or audio clip at a URL, with its bytes. Audio is in data URLs alone.

        Bytes that the request does not bring are counted in `footprint`: a small one may name large
        images.

        Raises:
            ApiError: The place is refused, what is there is of another kind or too large, or there
                is no room for it.
        """
        begun = time.perf_counter()
        loop = asyncio.get_running_loop()
        scheme = url[:8].lower()
        try:
            if scheme.startswith("data:"):
                return await loop.run_in_executor(self._pool, self._from_data, url, modality)
            if scheme.startswith(("http://", "https://")):
                encoded = await self._remote.fetch(url)
                footprint.add(len(encoded))
                return await loop.run_in_executor(self._pool, self._checked, encoded)
            image = await loop.run_in_executor(self._pool, self._from_folder, url)
            footprint.add(len(image.read()))
            return image
        except DataError as error:
            raise bad_media(error.message.removeprefix(f"{LABEL}: "), modality) from None
        finally:
            self._observe(time.perf_counter() - begun)

    def _from_data(self, url: str, modality: Modality) -> Media:
        # Before it is decoded: a text that is too long stands for too many bytes.
        if len(url) > self._limits.image_bytes * BASE64_SHARE + 1000:
            raise self._too_large(modality)
        encoded = data_url(url, modality)
        if modality == "image":
            return self._checked(encoded)
        if len(encoded) > self._limits.image_bytes:
            raise self._too_large(modality)
        if not is_audio(encoded):
            raise bad_media(f"it is not audio of {FORMATS} ({len(encoded):,} bytes)", modality)
        return Media(encoded, modality, label=LABEL)

    def _from_folder(self, name: str) -> Media:
        """The image of a path in the folder; any other path gets one answer, whatever is there."""
        refused = bad_media(
            "an image is a data URL (data:image/png;base64,...)"
            if self._folder is None
            else f"there is no image {quoted(name)} in the server's image folder",
        )
        if self._folder is None or ":" in name.split("/")[0]:
            raise refused
        try:
            path = self._folder.path(name, "image")
            with path.open("rb") as file:
                encoded = file.read(self._limits.image_bytes + 1)
        except (DataError, OSError):
            raise refused from None
        return self._checked(encoded)

    def _checked(self, encoded: bytes) -> Media:
        """The image of encoded bytes whose size is within the limits."""
        if len(encoded) > self._limits.image_bytes:
            raise self._too_large("image")
        media = Media(encoded, label=LABEL)
        width, height = image_size(media)
        if width * height > self._limits.image_pixels:
            raise bad_media(
                f"{width}x{height} is more than {self._limits.image_pixels:,} pixels, the most "
                f"that this server reads",
            )
        return media

    def _too_large(self, modality: Modality) -> ApiError:
        return bad_media(f"it has more than {self._limits.image_bytes:,} bytes", modality)
