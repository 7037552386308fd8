"""Images of jobs: their pixels, and the tower's features of those that came lately.

Shapes: N patches, D width of the tower.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch

from vlm_tune.data.images.patches import patch_places, stacked
from vlm_tune.data.types import Media, NativeInputs
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.prefixes import Remembered, image_digest

Features = Remembered[bytes, torch.Tensor]
"""The tower's features [N, D] by the digest of their image."""


class JobImages:
    """The images of a job, decoded in the thread that submits it.

    Attributes:
        digests: The digests of the images.
    """

    def __init__(
        self, media: Iterable[Media], model: VisionLanguageModel, computed: Container[bytes]
    ) -> None:
        """Decodes images.

        Args:
            media: The images.
            model: The model that reads them.
            computed: The digests of images whose features are there: they are not decoded.

        Raises:
            DataError: An image can't be decoded.
        """
        # It remembers the last image for its tiles: each job has its own.
        self._processor = model.processor.images.fresh()
        self.digests = {each: image_digest(each) for each in dict.fromkeys(media)}
        self._pixels = {
            each: self._processor.inputs(each)
            for each, digest in self.digests.items()
            if digest not in computed
        }

    def pixels(self, media: Media) -> torch.Tensor | NativeInputs:
        """Pixels uint8[3, H, W] of one of the images, or a native model's inputs."""
        pixels = self._pixels.get(media)
        return self._processor.inputs(media) if pixels is None else pixels


@torch.inference_mode()
def features_of(
    model: VisionLanguageModel, remembered: Features, wanted: Iterable[tuple[JobImages, Media]]
) -> dict[Media, torch.Tensor]:
    """The tower's features [N, D] of images of jobs, in one pass for those not remembered.

    Args:
        model: The model, in eval mode; no native one.
        remembered: Features that came lately; those that are computed join them.
        wanted: Each image with the images of its job.
    """
    features: dict[Media, torch.Tensor] = {}
    missing: dict[bytes, list[Media]] = {}
    pixels: list[torch.Tensor] = []
    shown: list[Media] = []
    for images, media in wanted:
        digest = images.digests[media]
        known = remembered.get(digest)
        if known is not None:
            features[media] = known
            continue
        if digest not in missing:
            each = images.pixels(media)
            assert not isinstance(each, dict)  # a native model has no features apart
            pixels.append(each)
            shown.append(media)
        missing.setdefault(digest, []).append(media)
    if missing:
        places = patch_places(shown)
        shapes = () if places is None else (places.to(model.device),)
        computed = model.tower(stacked(pixels, shown).to(model.device), *shapes)
        for (digest, same), padded in zip(missing.items(), computed.unbind(), strict=True):
            each = padded[: same[0].grid.patches] if same[0].grid else padded
            remembered.put(digest, each.clone())
            for media in same:
                features[media] = each
    return features
