"""Inputs of several images are joined as a processor joins them, which is told by one trial."""

from __future__ import annotations

import torch

from vlm_tune.data.images.native import joined_inputs
from vlm_tune.data.types import Join, NativeInputs
from vlm_tune.model.pretrained.image_joins import image_joins


def of_image(crops: int, patches: int, width: int) -> NativeInputs:
    """Inputs of an image: crops, places of patches in them, a row of patches, padded pixels."""
    return {
        "crops": torch.rand(crops, 4, 2),
        "places": torch.tensor([[0, 1], [-1, 4 * crops - 1]]),
        "patches": torch.rand(1, 3, patches),
        "pixels": torch.rand(1, 3, 5, width),
    }


def test_joins_are_those_of_a_trial() -> None:
    first, second = of_image(2, 6, 4), of_image(3, 5, 7)
    padded = torch.zeros(2, 3, 5, 7)
    padded[0, :, :, :4] = first["pixels"]
    padded[1] = second["pixels"]
    together = {
        "crops": torch.cat([first["crops"], second["crops"]]),
        "places": torch.tensor([[0, 1], [-1, 7], [8, 9], [-1, 19]]),
        "patches": torch.cat([first["patches"], second["patches"]], 2),
        "pixels": padded,
    }
    joins = image_joins([first, second], together)
    assert joins == (Join("places", 0, "crops", 2), Join("patches", 2))
    joined = joined_inputs([first, second], joins)
    assert joined.keys() == together.keys()
    assert all(torch.equal(joined[name], together[name]) for name in together)
    three = joined_inputs([second, first, second], joins)["places"]
    assert three.tolist() == [[0, 1], [-1, 11], [12, 13], [-1, 19], [20, 21], [-1, 31]]


def test_inputs_put_one_behind_the_other_need_no_rule() -> None:
    first, second = ({"sizes": torch.tensor([[3, size]])} for size in (4, 5))
    together = {"sizes": torch.tensor([[3, 4], [3, 5]])}
    assert image_joins([first, second], together) == ()
    assert torch.equal(joined_inputs([first, second])["sizes"], together["sizes"])
