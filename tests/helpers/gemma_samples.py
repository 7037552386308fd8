"""Tiny Gemma 3 and PaliGemma models as transformers writes them, with their processors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken

from tests.helpers.chat_samples import TEXTS, turns
from tests.helpers.vlm_samples import VISION, stir
from vlm_tune.compat import cap_logits
from vlm_tune.data.chat.template import load_template
from vlm_tune.data.types import Conversation, Media, Message
from vlm_tune.exporting.gemma3_layout import TOKENS
from vlm_tune.model.pretrained.tokenizer import train_tokenizer

GEMMA3_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
"""The chat template of google/gemma-3-4b-it, as TRL 1.16 holds it (`trl/chat_templates`)."""

SIDE = 32
"""Pixels of an image's side, of 4 x 4 patches; an image takes 4 tokens."""

WINDOW = 3
"""Tokens that a layer with a window sees: fewer than an image has."""


@cache
def gemma3_tokenizer() -> Any:
    """A tokenizer with Gemma 3's special tokens and names of them; lines' ends are joined."""
    rows = [Conversation("", turns(text, text)) for text in TEXTS]
    for word in ("What", "Is", "Look", "are"):
        # The text before the image ends with three line ends.
        messages = (Message("system", (f"{word}\n",)), Message("user", (Media(b""),)))
        rows.append(Conversation("", messages))
    tokenizer = train_tokenizer(rows, 420, load_template("gemma3"))
    tokens = [AddedToken(token, special=True, normalized=False) for token in TOKENS.values()]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.init_kwargs |= TOKENS
    return tokenizer


LLAMA_CPP: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "sliding_window": 8,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
"""A text model with what llama.cpp expects of every Gemma 3, scaled as those with images are."""


def save_gemma3(
    folder: Path, *, tied: bool = True, text: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """A tiny `Gemma3ForConditionalGeneration` with its processor."""
    import transformers

    gemma3_tokenizer().save_pretrained(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids
    torch.manual_seed(6)
    config = transformers.Gemma3Config(
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": SIDE,
            "patch_size": 8,
            "vision_use_head": False,
        },
        text_config={
            "vocab_size": len(tokenizer) + 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "max_position_embeddings": 256,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            # The whole model's config says whether the head is the embedding.
            "tie_word_embeddings": True,
            **(text or {}),
        },
        mm_tokens_per_image=4,
        boi_token_index=ids(TOKENS["boi_token"]),
        eoi_token_index=ids(TOKENS["eoi_token"]),
        image_token_index=ids(TOKENS["image_token"]),
        tie_word_embeddings=tied,
        **changes,
    )
    theirs = stir(transformers.Gemma3ForConditionalGeneration(config))
    theirs.save_pretrained(folder)
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(
            size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer,
        chat_template=GEMMA3_TEMPLATE,
        image_seq_length=4,
    )
    processor.save_pretrained(folder)
    return theirs


@cache
def paligemma_tokenizer() -> Any:
    """A tokenizer of the format's texts; the processor adds its tokens of places and images."""
    rows = [Conversation("", turns(text, text)) for text in TEXTS]
    return train_tokenizer(rows, 420, load_template("paligemma"))


def save_paligemma(folder: Path, language: Literal["gemma", "gemma2"], *, tied: bool = True) -> Any:
    """A tiny PaliGemma with its processor; over a Gemma 2 it is a PaliGemma 2."""
    import transformers

    images: Any = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = 16
    paligemma_tokenizer().save_pretrained(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    processor.save_pretrained(folder)
    torch.manual_seed(7)
    windows = {
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    }
    config = transformers.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": SIDE,
            "patch_size": 8,
            "projection_dim": 32,
            "vision_use_head": False,
        },
        text_config={
            "model_type": language,
            "vocab_size": len(tokenizer) + 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            **(windows if language == "gemma2" else {}),
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=tied,
    )
    theirs = stir(transformers.PaliGemmaForConditionalGeneration(config))
    theirs.save_pretrained(folder)
    # sdpa, its default, leaves out the cap of scores.
    theirs.set_attn_implementation("eager")
    cap_logits(theirs)
    return theirs


SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
"""The shape of SigLIP So400m/14."""


def write_gemma3_4b(folder: Path) -> None:
    """Writes the configs of Gemma 3 4B."""
    import transformers

    vision = {**SO400M, "image_size": 896}
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    transformers.Gemma3Config(vision_config=vision, text_config=text).save_pretrained(folder)
    transformers.Gemma3ImageProcessorPil(
        size={"height": 896, "width": 896}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def write_paligemma2_3b(folder: Path) -> None:
    """Writes the configs of PaliGemma 2 3B at 224 pixels."""
    import transformers

    text = {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 257216,
    }
    transformers.PaliGemmaConfig(
        vision_config={**SO400M, "image_size": 224, "projection_dim": 2304},
        text_config=text,
        image_token_index=257152,
        projection_dim=2304,
        hidden_size=2304,
    ).save_pretrained(folder)
    transformers.SiglipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)
