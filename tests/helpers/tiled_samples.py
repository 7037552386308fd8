"""Tiny whole models that see images as tiles, as transformers writes them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from tests.helpers.chat_samples import TEXTS, turns
from tests.helpers.tiny_models import CLIP, LLAMA
from tests.helpers.vlm_samples import VISION, stir, text_tokenizer
from vlm_tune.data.chat.template import load_template
from vlm_tune.data.types import Conversation
from vlm_tune.model.pretrained.tokenizer import SPECIALS, train_tokenizer

INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of InternVL, as transformers' conversion script writes it (Apache 2.0)."""
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SIDE = 32
"""Pixels of a frame's side."""
MOST_TILES = 4


@cache
def internvl_tokenizer() -> Any:
    """A tokenizer with InternVL's special tokens and their names."""
    rows = [Conversation("", turns(text, text)) for text in TEXTS]
    tokenizer = train_tokenizer(rows, 420, load_template("internvl"))
    tokenizer.add_tokens(list(INTERNVL_TOKENS.values()), special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=INTERNVL_TOKENS,
        **SPECIALS,
    )


LLAVA_NEXT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
"""The chat template of llava-hf/llava-v1.6-mistral-7b-hf, but for images where they stand.

That one writes a turn's images first. It has no system turns here.
"""
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]


LLAVA_ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of llava-hf/llava-onevision-qwen2-0.5b-ov-hf, as transformers tests it.

In `tests/models/llava_onevision/test_processing_llava_onevision.py` (Apache 2.0). It puts a space
behind the role of an answer that is there, and none behind that of one that is to be written.
"""
LLAVA_ONEVISION_ROWS = LLAVA_ONEVISION_TEMPLATE.replace(
    "message['role'] + ' '}}",
    "message['role']}}{% if message['role'] != 'assistant' %}{{ ' ' }}{% endif %}",
)
"""The same with every answer as the template opens one: so it is trained."""
ONEVISION_PINPOINTS = [[SIDE, SIDE], [2 * SIDE, 3 * SIDE], [3 * SIDE, 2 * SIDE]]


@cache
def llava_onevision_tokenizer() -> Any:
    """A tokenizer with ChatML's tokens, and those of images and videos."""
    rows = [Conversation("", turns(text, text)) for text in TEXTS]
    tokenizer = train_tokenizer(rows, 420, load_template("llava_onevision"))
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    return tokenizer


def save_llava_onevision(
    folder: Path, *, tied: bool = False, template: str = LLAVA_ONEVISION_ROWS, **changes: Any
) -> Any:
    """A tiny LLaVA-OneVision with its processor; a frame has 4 x 4 tokens.

    A picture of joined tiles is shrunk to about the tokens of one.
    """
    import transformers

    tokenizer = llava_onevision_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(3)
    vision = {"model_type": "siglip_vision_model", **CLIP, "patch_size": 8}
    language = {"model_type": "qwen2", **LLAMA, **ids, "vocab_size": len(tokenizer) + 3}
    settings: dict[str, Any] = {
        "vision_config": vision | {"vision_use_head": False},
        "text_config": language | {"max_position_embeddings": 512},
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "video_token_index": tokenizer.convert_tokens_to_ids("<video>"),
        "image_grid_pinpoints": ONEVISION_PINPOINTS,
        "vision_aspect_ratio": "anyres_max_1",
        "tie_word_embeddings": tied,
    }
    config = transformers.LlavaOnevisionConfig(**(settings | changes))
    theirs = stir(transformers.LlavaOnevisionForConditionalGeneration(config))
    theirs.save_pretrained(folder)
    # SigLIP's levels, which published checkpoints have.
    images: dict[str, Any] = {
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(
            image_grid_pinpoints=ONEVISION_PINPOINTS, **images
        ),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(**images),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return theirs


@cache
def llava_next_tokenizer() -> Any:
    """A tokenizer with a start token before a text, as Mistral's, and the image's token."""
    rows = [Conversation("", turns(text, text)) for text in TEXTS]
    tokenizer = text_tokenizer(rows, "llava_mistral", "<s> $A")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


GRANITE_TEMPLATE = (
    "{{ '<|system|>\\nA chat between a curious user and an artificial intelligence assistant. The"
    " assistant gives helpful, detailed, and polite answers to the user\\'s questions.\\n' }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""A chat template of the format that transformers' page on Granite Vision shows, with llama.cpp's
system text."""


@cache
def granite_tokenizer() -> Any:
    """A tokenizer that adds no special token, with the image's."""
    rows = [Conversation("", turns(text, text)) for text in TEXTS]
    tokenizer = train_tokenizer(rows, 420, load_template("granite_vision"))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def save_granite_vision(folder: Path, *, tied: bool = True) -> Any:
    """A tiny Granite Vision 3: a LLaVA-NeXT with a SigLIP, features of three layers, and a Granite.

    The projector has no biases; Granite's multipliers are far from neutral.
    """
    language = {
        "model_type": "granite",
        **LLAMA,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    }
    return save_llava_next(
        folder,
        granite=True,
        tied=tied,
        vision_config={"model_type": "siglip_vision_model", **CLIP, "patch_size": 8}
        | {"vision_use_head": False},
        text_config=language,
        vision_feature_layer=[-3, 1, -1],
        vision_feature_select_strategy="full",
        multimodal_projector_bias=False,
    )


def save_llava_next(
    folder: Path, *, tied: bool = False, granite: bool = False, **changes: Any
) -> Any:
    """A tiny LLaVA-NeXT with its processor; a frame has 4 x 4 tokens.

    With `granite` its tokenizer and chat template are Granite Vision's.
    """
    import transformers

    tokenizer = granite_tokenizer() if granite else llava_next_tokenizer()
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    torch.manual_seed(3)
    mistral = {"model_type": "mistral", **LLAMA, "sliding_window": None}
    language = changes.pop("text_config", mistral)
    sizes = {"vocab_size": len(tokenizer) + 3, "max_position_embeddings": 512}
    settings: dict[str, Any] = {
        "vision_config": {"model_type": "clip_vision_model", **CLIP, "patch_size": 8},
        "text_config": language | ids | sizes,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_grid_pinpoints": PINPOINTS,
        "tie_word_embeddings": tied,
    }
    config = transformers.LlavaNextConfig(**(settings | changes))
    theirs = stir(transformers.LlavaNextForConditionalGeneration(config))
    theirs.save_pretrained(folder)
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = transformers.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=0 if granite else 1,
        chat_template=GRANITE_TEMPLATE if granite else LLAVA_NEXT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return theirs


def save_internvl(
    folder: Path,
    text: Literal["qwen2", "qwen3"] = "qwen3",
    *,
    tied: bool = False,
    max_tiles: int = MOST_TILES,
    **vision: Any,
) -> Any:
    """A tiny InternVL with its processor; a frame has 4 x 4 patches and takes 4 slots."""
    import transformers

    tokenizer = internvl_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(3)
    language = {"model_type": text, **LLAMA, **ids, "vocab_size": len(tokenizer) + 3}
    config = transformers.InternVLConfig(
        vision_config={**VISION, "image_size": SIDE, "patch_size": 8, "attention_bias": True}
        | vision,
        text_config=language | ({"head_dim": 16} if text == "qwen3" else {}),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    theirs = stir(transformers.InternVLForConditionalGeneration(config))
    theirs.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    images = transformers.GotOcr2ImageProcessor(size=square, max_patches=max_tiles)
    processor = transformers.InternVLProcessor(
        images,
        tokenizer,
        transformers.InternVLVideoProcessor(size=square),
        image_seq_length=4,
        chat_template=INTERNVL_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return theirs
