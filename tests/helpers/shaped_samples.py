"""Tiny whole models whose tower keeps an image's shape, as transformers writes them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from tests.helpers.chat_samples import TEXTS, turns
from tests.helpers.tiny_models import LLAMA
from tests.helpers.vlm_samples import stir
from vlm_tune.data.chat.template import load_template
from vlm_tune.data.types import Conversation
from vlm_tune.model.pretrained.tokenizer import train_tokenizer

LONGEST = 48
"""Pixels to which an image's longest edge is shrunk."""
SLOT = 4
"""Pixels of the side of what takes a slot: Pixtral's patches, and Mistral 3's squares of 2 x 2."""
VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": LONGEST,
    "patch_size": SLOT,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Ministral 3's positions: queries grow behind the first 32."""

_USER = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for block in message['content'] %}{% if block['type'] == 'text' %}{{ block['text'] }}"
    "{% elif block['type'] == 'image' %}{{ '[IMG]' }}{% endif %}{% endfor %}{% endif %}"
)
_ANSWER = (
    "{% if message['content'] is string %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}"
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    + _USER
    + "{{ '[/INST]' }}{% else %}"
    + _ANSWER
    + "{% endif %}{% endfor %}"
)
"""The turns of users and assistants in the chat templates of Mistral Small 3.1 and Pixtral-12B."""


@cache
def mistral_tokenizer(template: str) -> Any:
    """A tokenizer with the control tokens of a chat format and those of images."""
    rows = [Conversation("", turns(text, text)) for text in TEXTS]
    tokenizer = train_tokenizer(rows, 420, load_template(template))
    tokenizer.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], special_tokens=True)
    return tokenizer


def _language(tokenizer: Any, text: Literal["mistral", "ministral3"]) -> dict[str, Any]:
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    sizes = {**LLAMA, **ids, "vocab_size": len(tokenizer) + 3, "max_position_embeddings": 512}
    sizes["rms_norm_eps"] = 1e-5  # as in all of Mistral's
    positions = {"rope_parameters": YARN} if text == "ministral3" else {"sliding_window": None}
    return {"model_type": text, **sizes, "head_dim": 16, **positions}


def _save(folder: Path, theirs: Any, tokenizer: Any, merge: int) -> Any:
    """Writes the model with its processor."""
    import transformers

    stir(theirs).save_pretrained(folder)
    patch = SLOT // merge
    images = transformers.PixtralImageProcessor(
        size={"longest_edge": LONGEST}, patch_size={"height": patch, "width": patch}
    )
    transformers.PixtralProcessor(
        images,
        tokenizer,
        patch_size=patch,
        spatial_merge_size=merge,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return theirs


def save_mistral3(
    folder: Path,
    text: Literal["mistral", "ministral3"] = "mistral",
    *,
    tied: bool = False,
    **changes: Any,
) -> Any:
    """A tiny Mistral 3 with its processor; squares of 2 x 2 patches take a slot."""
    import transformers

    tokenizer = mistral_tokenizer("mistral3")
    torch.manual_seed(3)
    settings = {
        "vision_config": {**VISION, "patch_size": SLOT // 2},
        "text_config": _language(tokenizer, text),
        "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
        "tie_word_embeddings": tied,
    }
    config = transformers.Mistral3Config(**(settings | changes))
    theirs = transformers.Mistral3ForConditionalGeneration(config)
    return _save(folder, theirs, tokenizer, config.spatial_merge_size)


def save_pixtral(folder: Path, *, tied: bool = False, **changes: Any) -> Any:
    """A tiny LLaVA with Pixtral's tower and processor; each patch takes a slot."""
    import transformers

    tokenizer = mistral_tokenizer("pixtral")
    torch.manual_seed(3)
    settings = {
        "vision_config": VISION,
        "text_config": _language(tokenizer, "mistral"),
        "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": tied,
    }
    config = transformers.LlavaConfig(**(settings | changes))
    return _save(folder, transformers.LlavaForConditionalGeneration(config), tokenizer, 1)
