"""Towers against the libraries they come from.

Layers, class token, other image sizes, and normalisation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.tiny_models import CLIP, assert_same_outputs, largest
from vlm_tune.config.towers import AnyTower, OpenClipTower, PairTower, TimmTower, TransformersTower
from vlm_tune.errors import ModelError
from vlm_tune.model.build import bare_tower
from vlm_tune.model.vision.base import IMAGENET_MEAN, resized
from vlm_tune.model.vision.registry import build_tower

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
FAMILIES = {
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", {"intermediate_size": 48}, 1),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {"intermediate_size": 48}, 0),
    "dinov2": ("Dinov2Config", "Dinov2Model", {"mlp_ratio": 2}, 1),
    "dinov2-registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        {"mlp_ratio": 2, "num_register_tokens": 4},
        5,
    ),
}


def noise(*shape: int) -> torch.Tensor:
    """Random uint8 pixels."""
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8))


def transformers_model(family: str, folder: Path) -> Any:
    """A tiny vision model with random weights, all of them, saved to a folder."""
    import transformers

    config, model, extra, _ = FAMILIES[family]
    torch.manual_seed(2)
    tower = getattr(transformers, model)(getattr(transformers, config)(**SHAPE, **extra)).eval()
    for parameter in tower.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tower.save_pretrained(folder)
    return tower


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("layer", "image_size"), [(-1, None), (-2, 32), (-2, 48), (-1, 24), (-4 + 1, 40)]
)
@torch.no_grad()
def test_transformers_tower_gives_the_hidden_state_of_its_layer(
    family: str, layer: int, image_size: int | None, tmp_path: Path
) -> None:
    """Sizes 48, 24 and 40 interpolate the positions as transformers does."""
    theirs = transformers_model(family, tmp_path)
    config = TransformersTower(
        kind="transformers", name=str(tmp_path), layer=layer, image_size=image_size
    )
    ours = build_tower(config).eval()
    size = image_size or 32
    pixels = noise(2, 3, size, size)
    options = {"interpolate_pos_encoding": True} if "dino" not in family and size != 32 else {}
    normalised = pixels.float() * ours.scale - ours.offset
    hidden = theirs(pixel_values=normalised, output_hidden_states=True, **options).hidden_states
    before = FAMILIES[family][3]
    assert ours.measure() == ((size // 8) ** 2, 32)
    assert largest(ours(pixels), hidden[layer][:, before:]) <= 1e-5
    assert largest(ours(pixels), hidden[0][:, before:]) > 1e-2
    if before:
        with_class = build_tower(config.model_copy(update={"class_token": True})).eval()
        assert largest(with_class(pixels)[:, :1], hidden[layer][:, :1]) <= 1e-5
        assert largest(with_class(pixels)[:, 1:], hidden[layer][:, before:]) <= 1e-5
        assert (
            bare_tower(config.model_copy(update={"class_token": True})).measure()
            == with_class.measure()
        )
        pooled = build_tower(config.model_copy(update={"class_token": True, "grid": 2})).eval()
        assert pooled(pixels).shape == (2, 5, 32)
        assert largest(pooled(pixels)[:, :1], hidden[layer][:, :1]) <= 1e-5


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2"])
@torch.no_grad()
def test_features_of_several_layers_are_joined_by_channel(family: str, tmp_path: Path) -> None:
    """In the order of the list, the class token's too; blocks after the last one are left out."""
    theirs = transformers_model(family, tmp_path)
    layers = [-2, -3, -2]
    config = TransformersTower(kind="transformers", name=str(tmp_path), layer=layers)
    before = FAMILIES[family][3]
    class_token = before > 0
    ours = build_tower(config.model_copy(update={"class_token": class_token})).eval()
    pixels = noise(2, 3, 32, 32)
    normalised = pixels.float() * ours.scale - ours.offset
    hidden = theirs(pixel_values=normalised, output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[layer] for layer in layers], dim=-1)
    assert ours.measure() == (16 + class_token, 3 * 32)
    patches = torch.cat(
        [expected[:, :1] if class_token else expected[:, :0], expected[:, before:]], 1
    )
    assert largest(ours(pixels), patches) <= 1e-5
    pooled = build_tower(config.model_copy(update={"grid": 2})).eval()
    assert pooled(pixels).shape == (2, 4, 3 * 32)
    with pytest.raises(ModelError, match=r"there is no layer -40"):
        build_tower(config.model_copy(update={"layer": [-1, -40]}))
    with pytest.raises(ModelError, match="final_norm is for one"):
        build_tower(config.model_copy(update={"final_norm": True}))


def test_pixels_are_normalised_as_the_checkpoint_says(tmp_path: Path) -> None:
    for family, mean in (("clip", 0.48145466), ("siglip", 0.5), ("dinov2", 0.485)):
        transformers_model(family, tmp_path / family)
        config = TransformersTower(kind="transformers", name=str(tmp_path / family))
        assert build_tower(config).mean[0] == pytest.approx(mean)
        processor_config = {
            "image_processor_type": "CLIPImageProcessor",
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
        }
        (tmp_path / family / "preprocessor_config.json").write_text(json.dumps(processor_config))
        tower = build_tower(config)
        assert tower.mean == (0.1, 0.2, 0.3)
        assert tower.std == (0.4, 0.5, 0.6)
        assert build_tower(config, json.loads(json.dumps(tower.rebuild))).mean == (0.1, 0.2, 0.3)


def test_a_model_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            vocab_size=9,
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"is of type bert; known are clip_vision_model, siglip_vision_model"
    ):
        build_tower(TransformersTower(kind="transformers", name=str(tmp_path)))


@torch.no_grad()
def test_a_tower_may_leave_out_the_last_pixels_of_its_images(tmp_path: Path) -> None:
    """As SigLIP SO400M does, with patches of 14 pixels in images of 384."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(2)
    shape = SHAPE | {"image_size": 36, "intermediate_size": 48}
    theirs = SiglipVisionModel(SiglipVisionConfig(**shape)).eval()
    theirs.save_pretrained(tmp_path)
    config = TransformersTower(kind="transformers", name=str(tmp_path), layer=-2)
    ours = build_tower(config).eval()
    pixels = noise(2, 3, 36, 36)
    normalised = pixels.float() * ours.scale - ours.offset
    hidden = theirs(pixel_values=normalised, output_hidden_states=True).hidden_states[-2]
    assert hidden.shape[1] == 16
    assert_same_outputs(ours(pixels), hidden)
    with pytest.raises(ModelError, match="42 is no multiple of the tower's patches of 8 pixels"):
        build_tower(config.model_copy(update={"image_size": 42}))


def test_the_vision_part_of_a_whole_clip_and_siglip_model_is_taken(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    for kind, config in ((CLIPModel, CLIPConfig), (SiglipModel, SiglipConfig)):
        whole = kind(config(vision_config=CLIP, text_config=text)).eval()
        whole.save_pretrained(tmp_path / kind.__name__)
        ours = build_tower(
            TransformersTower(kind="transformers", name=str(tmp_path / kind.__name__), layer=-1)
        )
        pixels = noise(1, 3, 32, 32)
        hidden = whole.vision_model(
            pixel_values=pixels.float() * ours.scale - ours.offset, output_hidden_states=True
        ).hidden_states[-1]
        assert largest(ours.eval()(pixels), hidden[:, -4:]) <= 1e-5


# --- timm --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", 224),
        ("vit_tiny_patch16_224", 64),
        ("convnext_atto", 64),
        ("resnet10t", 64),
        ("efficientnet_lite0", 64),
    ],
)
@torch.no_grad()
def test_timm_tower_loads_a_timm_file_and_gives_its_features(
    name: str, size: int, tmp_path: Path
) -> None:
    import timm

    torch.manual_seed(0)
    whole: Any = timm.create_model(name).eval()
    for module in whole.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(std=0.1)
    state = whole.state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    config = TimmTower(
        kind="timm",
        name=name,
        pretrained=str(tmp_path / "timm.safetensors"),
        image_size=size,
        grid=None,
    )
    ours = build_tower(config).eval()
    if hasattr(whole, "set_input_size"):
        whole.set_input_size(img_size=size)
    pixels = noise(2, 3, size, size)
    normalised = pixels.float() * ours.scale - ours.offset
    expected = whole.forward_intermediates(normalised, indices=1, intermediates_only=True)[-1]
    assert_same_outputs(ours(pixels), expected.flatten(2).transpose(1, 2))
    bare = build_tower(config, ours.rebuild)
    bare.load_state_dict(ours.state_dict())
    assert_same_outputs(bare.eval()(pixels), ours(pixels))
    del state[next(key for key in state if key.endswith("weight") and "head" not in key)]
    save_file(state, tmp_path / "timm.safetensors")
    with pytest.raises(ModelError, match="does not fit the model; missing: "):
        build_tower(config)


@torch.no_grad()
def test_timm_class_token_and_channels_last_maps() -> None:
    torch.manual_seed(1)
    config = TimmTower(
        kind="timm",
        name="vit_tiny_patch16_224",
        image_size=32,
        grid=None,
        stages=[-2, -1],
        class_token=True,
    )
    ours: Any = build_tower(config).eval()
    pixels = noise(1, 3, 32, 32)
    normalised = pixels.float() * ours.scale - ours.offset
    intermediates = ours.trunk.model.forward_intermediates(
        normalised,
        indices=[10, 11],
        intermediates_only=True,
        output_fmt="NLC",
        return_prefix_tokens=True,
    )
    expected = torch.cat([torch.cat([prefix, patches], 1) for patches, prefix in intermediates], 2)
    assert largest(ours(pixels), expected) <= 1e-5
    swin = build_tower(TimmTower(kind="timm", name="swin_tiny_patch4_window7_224", grid=None))
    assert swin.measure() == (49, 768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "swin_tiny_patch4_window7_224", "image_size": 64},
            "takes images of 224 pixels only",
        ),
        ({"name": "resnet10t", "class_token": True}, "resnet10t has none"),
        ({"name": "no_such_model"}, "no_such_model"),
        ({"name": "vit_tiny_patch16_224", "stages": [40]}, r"model\.tower\.name"),
    ],
)
def test_timm_towers_that_can_not_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_tower(TimmTower(kind="timm", **changes))


# --- open_clip ---------------------------------------------------------------------------------

TIMM_VIT = {
    "timm_model_name": "vit_tiny_patch16_224",
    "timm_pool": "token",
    "timm_proj": "linear",
    "image_size": 224,
}
TIMM_CONVNEXT = {
    "timm_model_name": "convnext_atto",
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": 64,
}


@pytest.mark.parametrize(
    ("vision", "size", "layer"),
    [(TIMM_VIT, 64, -1), (TIMM_VIT, 64, -3), (TIMM_CONVNEXT, None, -1), (TIMM_CONVNEXT, None, -2)],
)
@torch.no_grad()
def test_open_clip_timm_tower_gives_the_intermediate_of_its_layer(
    vision: dict[str, Any], size: int | None, layer: int
) -> None:
    from vlm_tune.model.vision.open_clip_tower import _bare_open_clip

    torch.manual_seed(4)
    config = OpenClipTower(kind="open_clip", config=vision, layer=layer, image_size=size)
    ours: Any = build_tower(config).eval()
    theirs = _bare_open_clip({"vision_cfg": vision, "quick_gelu": False}, size).eval()
    weights = {name.removeprefix("visual."): value for name, value in ours.state_dict().items()}
    assert weights.keys() <= theirs.state_dict().keys()
    theirs.load_state_dict(theirs.state_dict() | weights)
    pixels = noise(1, 3, 64, 64)
    normalised = pixels.float() * ours.scale - ours.offset
    expected = theirs.forward_intermediates(normalised, intermediates_only=True)[
        "image_intermediates"
    ][layer]
    assert largest(ours(pixels), expected.flatten(2).transpose(1, 2)) <= 1e-5
    if vision is TIMM_VIT:
        with_class: Any = build_tower(
            config.model_copy(update={"class_token": True}), ours.rebuild
        ).eval()
        with_class.load_state_dict(ours.state_dict())
        assert largest(with_class(pixels)[:, 1:], ours(pixels)) <= 1e-6
        prefix = theirs.forward_intermediates(
            normalised, intermediates_only=True, output_extra_tokens=True
        )["image_intermediates_prefix"]
        assert largest(with_class(pixels)[:, :1], prefix[layer]) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_open_clip_tower_of_another_size_has_interpolated_positions(tmp_path: Path) -> None:
    """open_clip interpolates with a smoothing bicubic filter.

    What transformers' sharper one gives is near it.
    """
    import open_clip
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    torch.manual_seed(6)
    whole: Any = open_clip.create_model("ViT-S-32-alt")
    smooth = torch.linspace(-1, 1, 7)
    grid = (smooth[:, None] * smooth).flatten()[:, None] * torch.randn(
        whole.visual.positional_embedding.shape[1]
    )
    whole.visual.positional_embedding.data[1:] = grid
    file = tmp_path / "clip.safetensors"
    save_file(whole.state_dict(), file)
    ours: Any = build_tower(
        OpenClipTower(kind="open_clip", name="ViT-S-32-alt", pretrained=str(file), image_size=96)
    )
    assert ours.image_size == 96
    assert ours.measure()[0] == 9
    state = {"visual.positional_embedding": whole.visual.positional_embedding.data.clone()}
    open_clip.model.resize_pos_embed(state, ours)  # reads ours.visual.grid_size
    assert largest(ours.visual.positional_embedding, state["visual.positional_embedding"]) <= 1e-6
    width = ours.measure()[1]
    embeddings = CLIPVisionEmbeddings(
        CLIPVisionConfig(hidden_size=width, image_size=224, patch_size=32)
    )
    embeddings.position_embedding.weight.data = whole.visual.positional_embedding.data
    theirs = embeddings.interpolate_pos_encoding(torch.zeros(1, 10, width), 96, 96)[0]
    assert largest(ours.visual.positional_embedding, theirs) <= 0.15 * float(theirs.abs().max())


@torch.no_grad()
def test_open_clip_folder_is_loaded_and_pickles_in_it_are_not(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(8)
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    text = {"vocab_size": 8, "context_length": 4, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    theirs: Any = open_clip.CLIP(**config).eval()  # type: ignore[arg-type]
    described = {
        "model_cfg": config,
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    tower = OpenClipTower(kind="open_clip", name=f"local-dir:{tmp_path}", layer=-2)
    ours: Any = build_tower(tower).eval()
    pixels = noise(1, 3, 32, 32)
    assert ours.mean == (0.1, 0.2, 0.3)
    normalised = pixels.float() * ours.scale - ours.offset
    expected = theirs.visual.forward_intermediates(normalised, intermediates_only=True)[
        "image_intermediates"
    ][0]
    assert largest(ours(pixels), expected.flatten(2).transpose(1, 2)) <= 1e-5
    again = build_tower(tower, json.loads(json.dumps(ours.rebuild))).eval()
    again.load_state_dict(ours.state_dict())
    assert_same_outputs(again(pixels), ours(pixels))
    assert bare_tower(tower).measure() == ours.measure()
    (tmp_path / "open_clip_model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not loaded"):
        build_tower(tower)


def test_open_clip_class_token_comes_first() -> None:
    torch.manual_seed(3)
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    one: Any = build_tower(OpenClipTower(kind="open_clip", config=vision, class_token=True)).eval()
    pixels = noise(2, 3, 32, 32)
    with torch.no_grad():
        intermediates = one.visual.forward_intermediates(
            pixels.float() * one.scale - one.offset,
            intermediates_only=True,
            output_extra_tokens=True,
        )
        expected = torch.cat(
            [
                intermediates["image_intermediates_prefix"][-1],
                intermediates["image_intermediates"][-1].flatten(2).transpose(1, 2),
            ],
            1,
        )
        assert largest(one(pixels), expected) <= 1e-6
    resnet = {
        "layers": [1, 1, 1, 1],
        "width": 32,
        "head_width": 32,
        "patch_size": None,
        "image_size": 64,
    }
    with pytest.raises(ModelError, match="class_token: this tower has none"):
        build_tower(OpenClipTower(kind="open_clip", config=resnet, class_token=True))


# --- two side by side --------------------------------------------------------------------------


@torch.no_grad()
def test_a_pair_joins_the_features_of_both_by_channel(tmp_path: Path) -> None:
    """Each sees the image in its own size, and normalised its own way."""
    transformers_model("dinov2", tmp_path)
    first = TransformersTower(kind="transformers", name=str(tmp_path), layer=-1, image_size=48)
    second = OpenClipTower(
        kind="open_clip",
        config={"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
    )
    pair: Any = build_tower(PairTower(kind="pair", towers=[first, second])).eval()
    pixels = noise(2, 3, 48, 48)
    one, other = pair.towers
    assert (one.mean[0], other.mean[0]) == (IMAGENET_MEAN[0], pytest.approx(0.4814, abs=1e-3))
    assert pair.image_size == 48
    assert (
        pair.measure()
        == bare_tower(PairTower(kind="pair", towers=[first, second])).measure()
        == (4, 96)
    )
    fine = one(pixels).transpose(1, 2).unflatten(2, (6, 6))
    expected = torch.nn.functional.adaptive_avg_pool2d(fine, 2).flatten(2).transpose(1, 2)
    assert largest(pair(pixels)[..., :32], expected) <= 1e-6
    assert largest(pair(pixels)[..., 32:], other(resized(pixels, 32))) <= 1e-6
    again = build_tower(
        PairTower(kind="pair", towers=[first, second]), json.loads(json.dumps(pair.rebuild))
    )
    again.load_state_dict(pair.state_dict())
    assert_same_outputs(again.eval()(pixels), pair(pixels))


def test_a_smaller_copy_of_an_image_is_near_the_one_pillow_makes() -> None:
    from PIL import Image

    from vlm_tune.data.images.decode import ImageProcessor

    pixels = (
        torch.nn.functional.interpolate(noise(1, 3, 6, 6).float(), (64, 64), mode="bilinear")
        .round()
        .to(torch.uint8)
    )
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    assert largest(resized(pixels, 40)[0], ImageProcessor(40).pixels(image)) <= 2


def test_pairs_that_can_not_be(tmp_path: Path) -> None:
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    one = OpenClipTower(kind="open_clip", config=vision)
    with pytest.raises(ModelError, match="class_token in both or in none"):
        build_tower(
            PairTower(kind="pair", towers=[one, one.model_copy(update={"class_token": True})])
        )
    with pytest.raises(ModelError, match=r"set model\.tower\.resize: pad for the pair"):
        build_tower(PairTower(kind="pair", towers=[one, one.model_copy(update={"resize": "pad"})]))


# --- training ----------------------------------------------------------------------------------


def towers_to_train(folder: Path) -> list[AnyTower]:
    towers: list[AnyTower] = [
        OpenClipTower(kind="open_clip", config=TIMM_VIT, image_size=32, layer=-2)
    ]
    for family in FAMILIES:
        transformers_model(family, folder / family)
        towers.append(TransformersTower(kind="transformers", name=str(folder / family)))
    towers.append(TimmTower(kind="timm", name="vit_tiny_patch16_224", image_size=32))
    return [
        *towers,
        PairTower(kind="pair", towers=[towers[1], towers[3]]),  # type: ignore[list-item]
    ]


def test_every_parameter_of_a_trained_tower_has_a_gradient(tmp_path: Path) -> None:
    """Else the processes of a distributed run would wait for those that have none."""
    for config in towers_to_train(tmp_path):
        tower = build_tower(config).train()
        tower(noise(2, 3, tower.image_size, tower.image_size)).square().sum().backward()
        assert [
            name for name, parameter in tower.named_parameters() if parameter.grad is None
        ] == [], config
