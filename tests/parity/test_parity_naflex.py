"""SigLIP 2's NaFlex tower: features as transformers', and a recipe that trains with it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.transformers_parity import write_rows
from tests.helpers.vlm_samples import stir
from vlm_tune.config.towers import TransformersTower
from vlm_tune.data.images.patches import patch_places, stacked
from vlm_tune.data.images.shaped import ShapedImages
from vlm_tune.data.types import Media
from vlm_tune.errors import ModelError
from vlm_tune.memory_plan.plan import plan
from vlm_tune.model.vision.registry import build_tower
from vlm_tune.model.vision.shaped_tower import NaFlexVision

Tiny = Callable[..., str]
PATCH = 4
MOST = 24


def save_naflex(folder: Path) -> Any:
    """A tiny NaFlex tower whose table of positions is 4 x 4, with its image processor."""
    from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(6)
    config = Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=PATCH,
        num_patches=16,
    )
    theirs = stir(Siglip2VisionModel(config))
    theirs.save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=MOST).save_pretrained(folder)
    return theirs


def noise(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(width)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator)
    return Image.fromarray(pixels.byte().numpy())


def media_of(image: Image.Image) -> Media:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return Media(stream.getvalue())


def test_features_of_several_shapes_are_transformers(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    theirs = save_naflex(tmp_path)
    section = TransformersTower(
        kind="transformers", name=str(tmp_path), layer=-1, final_norm=True, max_num_patches=MOST
    )
    tower = build_tower(section).eval()
    assert isinstance(tower, NaFlexVision)
    assert tower.measure() == (MOST, 32)
    pictures = [noise(60, 21), noise(9, 50), noise(7, 7)]
    images = ShapedImages(tower.image_size, sizing=tower.sizing(1), patch=tower.patch)
    media = [images.whole(media_of(picture)) for picture in pictures]
    processor: Any = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    inputs = processor(images=pictures, return_tensors="pt")
    grids = [(one.grid.rows, one.grid.columns) for one in media if one.grid]
    assert inputs["spatial_shapes"].tolist() == [list(grid) for grid in grids]
    assert len(set(grids)) == 3
    with torch.no_grad():
        ours = tower(stacked([images(one) for one in media], media), patch_places(media))
        expected = theirs(**inputs).last_hidden_state
    for (rows, columns), features, states in zip(grids, ours, expected, strict=True):
        count = rows * columns
        assert largest(features[:count], states[:count]) <= 1e-5 * max(
            1.0, float(states.abs().max())
        )
    assert largest(ours[0, 0], ours[1, 0]) > 1e-3


@pytest.fixture
def recipe_text(tiny_recipe: Tiny, color_rows: Path, tmp_path: Path) -> str:
    """A tiny recipe over images of several shapes, whose tower is trained."""
    write_rows(color_rows)
    save_naflex(tmp_path / "tower")
    tower = f"{{kind: transformers, name: {tmp_path / 'tower'}, layer: -1, max_num_patches: 20}}"
    text = tiny_recipe("causal").replace('  - {match: "tower.*", how: frozen}\n', "")
    return "\n".join(
        f"  tower: {tower}" if line.startswith("  tower:") else line for line in text.splitlines()
    )


def test_a_recipe_trains_any_llm_with_images_of_any_shape(recipe_text: str) -> None:
    recipe = parsed(recipe_text)
    model = built(recipe)
    examples = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    slots = [int(example.image_mask.sum()) for example in examples]
    assert max(slots) <= 2 * 20
    assert len(set(slots)) == 4
    batch = batch_of(model, examples)
    model.requires_grad_(True)
    loss: Any = model.train()(batch)
    loss.sum.backward()
    assert [name for name, p in model.tower.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        model.eval()
        alone = [float(model(batch_of(model, [example])).sum) for example in examples]
    assert float(loss.sum.detach()) == pytest.approx(sum(alone), rel=1e-5)
    (stage,) = plan(recipe).stages
    assert stage.parts[0].total == sum(p.numel() for p in model.tower.parameters())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "max_num_patches: 20",
            "image_size: 32",
            "tower.image_size: a NaFlex tower has none",
        ),
        ("{kind: mlp, norm: true}", "{kind: pixel_shuffle}", "kind pixel_shuffle needs images of"),
        ("max_num_patches: 20", "grid: 2", "model.tower.grid: the tower takes images of any shape"),
    ],
)
def test_what_does_not_fit_is_refused(recipe_text: str, old: str, new: str, message: str) -> None:
    assert old in recipe_text
    with pytest.raises(ModelError, match=message):
        built(parsed(recipe_text.replace(old, new)))
