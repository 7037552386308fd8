"""Tiny models in transformers' own layouts with their processors, and recipes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.helpers.chat_samples import TEXTS
from tests.helpers.native_families import (
    NEWEST,
    QWEN,
    ROPE,
    TEXT,
    VISION,
    qwen3_videos,
    qwen_images,
    shipped,
)
from tests.helpers.native_tiled import TILED
from tests.helpers.tiny_recipes import tiny_text
from tests.helpers.vlm_samples import stir

FAMILIES = NEWEST | TILED
Kind = str
KINDS: list[Kind] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "lfm2_vl", *FAMILIES]
JOINED: list[Kind] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
"""Models whose samples can be joined in a row."""
TEMPLATES = {
    "qwen2_vl": "qwen2_5_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "lfm2_vl": "lfm2_2_5_vl",
}
"""The chat templates of the models, as TRL 1.16 holds them (Apache 2.0)."""
LFM = {
    "pad_token": "<|pad|>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|im_end|>",
    "start_token": "<|im_start|>",
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail": "<|img_thumbnail|>",
}
SIZES = {"wide": (120, 60), "high": (50, 110), "small": (9, 9)}
QUESTIONS = (
    (["wide"], "<image>What is it?", "a wide image"),
    (["wide"], "<image>What color is there, and where?", "many of them"),
    (["wide"], "<image>Hot?", "no"),
    (["high", "small"], "<image> and <image>: same?", "no, one is high"),
    (["high", "small"], "<image> and <image>: same sizes?", "no"),
    (["small"], "<image>What is it?", "a small image"),
    ([], "Only words here?", "yes"),
)


def chat_template(kind: Kind) -> str:
    """A model's chat template."""
    return FAMILIES[kind].template() if kind in FAMILIES else shipped(TEMPLATES[kind])


@cache
def native_tokenizer(kind: Kind) -> Any:
    """A tokenizer with a model's special tokens."""
    family = FAMILIES.get(kind)
    names = family.tokens if family else LFM if kind == "lfm2_vl" else QWEN
    specials = [*dict.fromkeys(names.values()), *(family.specials if family else ())]
    if kind == "lfm2_vl":
        specials += [f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5)]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[assignment]
        add_prefix_space=False
    )
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    ends = {key: name for key, name in names.items() if key in ("pad_token", "eos_token")}
    if "bos_token" in names:
        ends["bos_token"] = names["bos_token"]
    others = {key: name for key, name in names.items() if key not in ends and key != "start_token"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        extra_special_tokens=others,
        clean_up_tokenization_spaces=False,
        **ends,
    )
    words = family.words if family else ()
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    return tokenizer


def native_processor(kind: Kind) -> Any:
    """A model's own processor, for images of few tokens."""
    tokenizer = native_tokenizer(kind)
    options = {"chat_template": chat_template(kind)}
    if kind in FAMILIES:
        return FAMILIES[kind].processor(tokenizer, options)
    if kind == "lfm2_vl":
        sizes: dict[str, Any] = {"tile_size": 64, "max_tiles": 4}
        sizes |= {"min_image_tokens": 2, "max_image_tokens": 4, "max_num_patches": 16}
        images = transformers.Lfm2VlImageProcessor(**sizes)
        return transformers.Lfm2VlProcessor(images, tokenizer, **options)
    side = 16 if kind == "qwen3_vl" else 14
    images = qwen_images(side)
    if kind == "qwen3_vl":
        video = qwen3_videos(side)
        return transformers.Qwen3VLProcessor(images, tokenizer, video, **options)
    video = transformers.Qwen2VLVideoProcessor(
        size={"shortest_edge": 4 * side**2, "longest_edge": 24 * side**2}, patch_size=side
    )
    whole = (
        transformers.Qwen2VLProcessor if kind == "qwen2_vl" else transformers.Qwen2_5_VLProcessor
    )
    return whole(images, tokenizer, video, **options)


def native_model(kind: Kind, *, tied: bool = False) -> Any:
    """A model with random weights, norms and biases moved too."""
    tokenizer = native_tokenizer(kind)
    if kind in FAMILIES:
        return _stirred(FAMILIES[kind].config(tokenizer))
    text = TEXT | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    common: dict[str, Any] = {
        "image_token_id": tokenizer.image_token_id,
        "tie_word_embeddings": tied,
    }
    if kind == "lfm2_vl":
        layers = ["conv", "full_attention", "conv"]
        config: Any = transformers.Lfm2VlConfig(
            text_config=text
            | {"model_type": "lfm2", "layer_types": layers, "num_hidden_layers": len(layers)},
            vision_config=VISION
            | {
                "model_type": "siglip2_vision_model",
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_patches": 16,
            },
            projector_hidden_size=32,
            **common,
        )
        return _stirred(config)
    common |= {
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.vision_start_token_id,
        "vision_end_token_id": tokenizer.vision_end_token_id,
    }
    vision = VISION | {"num_heads": 2, "out_hidden_size": 32}
    if kind == "qwen2_vl":
        config = transformers.Qwen2VLConfig(
            text_config=text
            | {"num_hidden_layers": 2, "rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
            | {"mlp_ratio": 2, "patch_size": 14},
            **common,
        )
    elif kind == "qwen2_5_vl":
        config = transformers.Qwen2_5_VLConfig(
            text_config=text
            | {"num_hidden_layers": 2, "rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
            vision_config=vision
            | {"depth": 2, "fullatt_block_indexes": [1], "window_size": 56, "patch_size": 14},
            **common,
        )
    else:
        config = transformers.Qwen3VLConfig(
            text_config=text
            | {
                "num_hidden_layers": 3,
                "head_dim": 8,
                "rope_parameters": ROPE | {"mrope_section": [2, 1, 1]},
            },
            vision_config=vision
            | {
                "depth": 3,
                "patch_size": 16,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            **common,
        )
    return _stirred(config)


def _stirred(config: Any) -> Any:
    config._attn_implementation = "eager"
    return stir(transformers.AutoModelForImageTextToText.from_config(config))


def save_native(folder: Path, kind: Kind, *, tied: bool = False) -> Any:
    """Writes a tiny model with its processor, and returns it."""
    model = native_model(kind, tied=tied)
    model.save_pretrained(folder)
    native_processor(kind).save_pretrained(folder)
    return model


def with_native(recipe: str, name: Path | str, extra: str = "", template: str = "own") -> str:
    """A tiny recipe's text that starts from a native model."""
    head, _, rest = recipe.partition("\nmodel:")
    rest = rest[rest.index("\ndata:") :]
    for original in ("flan", "chatml"):
        rest = rest.replace(f"template: {original}\n", f"template: {template}\n")
    return f"{head}\nmodel: {{kind: native, pretrained: {name}{extra}}}{rest}"


def native_recipe(folder: Path, kind: Kind) -> Callable[..., str]:
    """Writes `write_questions` and a tiny model, and returns what makes texts of recipes of it."""
    write_questions(folder / "messages.jsonl")
    save_native(folder / "vlm", kind)

    def make(_: str = "causal", output: str = "run") -> str:
        text = tiny_text("causal", folder / "messages.jsonl", folder / output)
        return with_native(text.replace("max_length: 128", "max_length: 512"), folder / "vlm")

    return make


def write_questions(path: Path) -> None:
    """Rows about images of several rows and columns of tokens."""
    for seed, (name, size) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path.parent / f"{name}.png")
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "images": [f"{name}.png" for name in names],
        }
        for names, question, answer in QUESTIONS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
