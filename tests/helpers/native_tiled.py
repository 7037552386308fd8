"""Tiny models of families that cut images into tiles, in transformers' own layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tests.helpers.native_families import (
    ROPE,
    TEXT,
    VISION,
    Family,
    available,
    text_config,
    with_ids,
)

CHAT = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|im_end|>"}
SIGLIP = VISION | {
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}


def chatml(image: str, start: str = "") -> Callable[[], str]:
    """A plain chat template in which an image is written as it is here."""
    return lambda: (
        f"{start}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n"
        "{% for part in m.content %}"
        f"{{{{ part.text if part.type == 'text' else '{image}' }}}}{{% endfor %}}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def llama4_config() -> Any:
    """The config of a Llama 4, which has no model without its head."""
    return transformers.Llama4Config(
        text_config=dict(
            TEXT,
            vocab_size=40,
            num_hidden_layers=2,
            intermediate_size_mlp=48,
            head_dim=8,
            num_local_experts=2,
            moe_layers=[1],
            no_rope_layers=[1, 0],
            attention_chunk_size=16,
            rope_parameters=ROPE,
        ),
        vision_config=VISION
        | {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        image_token_index=3,
    )


def ovis2_config(tokenizer: Any) -> Any:
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    return transformers.Ovis2Config(
        text_config=text_config(tokenizer, model_type="qwen2", rope_parameters=ROPE),
        vision_config=VISION
        | {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "hidden_stride": 2,
            "vocab_size": 40,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(marks),
        vocab_size=len(tokenizer),
        hidden_size=32,
    )


def ovis2_processor(tokenizer: Any, options: dict[str, Any]) -> Any:
    images = transformers.Ovis2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4
    )
    return transformers.Ovis2Processor(images, tokenizer, image_seq_length=4, **options)


def cohere_text(tokenizer: Any) -> dict[str, Any]:
    """A decoder of Cohere with a window in its first layer."""
    return text_config(
        tokenizer,
        model_type="cohere2",
        bos_token_id=tokenizer.bos_token_id,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        head_dim=8,
        rope_parameters=ROPE,
    )


def aya_config(tokenizer: Any) -> Any:
    return transformers.AyaVisionConfig(
        text_config=cohere_text(tokenizer),
        vision_config=SIGLIP,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )


def aya_processor(tokenizer: Any, options: dict[str, Any]) -> Any:
    images = transformers.GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4
    )
    return transformers.AyaVisionProcessor(images, tokenizer, patch_size=16, img_size=32, **options)


def cohere_config(tokenizer: Any) -> Any:
    return transformers.Cohere2VisionConfig(
        text_config=cohere_text(tokenizer),
        vision_config=SIGLIP,
        alignment_intermediate_size=48,
        **with_ids(tokenizer, "image_token"),
    )


def cohere_processor(tokenizer: Any, options: dict[str, Any]) -> Any:
    images = transformers.Cohere2VisionImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4, patch_size=2
    )
    return transformers.Cohere2VisionProcessor(images, tokenizer, **options)


PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def granite_config(tokenizer: Any) -> Any:
    return transformers.Granite4VisionConfig(
        text_config=text_config(tokenizer, num_hidden_layers=3, rope_parameters=ROPE),
        vision_config=SIGLIP | {"hidden_size": 64, "num_hidden_layers": 3},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=4,
        downsample_rate="1/2",
        deepstack_layer_map=[[0, 0], [1, 1]],
        spatial_target_layers=[0, 1, 2, 2],
        projector_dropout=0.0,
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    )


def granite_processor(tokenizer: Any, options: dict[str, Any]) -> Any:
    side = {"height": 32, "width": 32}
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=PINPOINTS
    )
    return transformers.Granite4VisionProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        **options,
    )


def mistral3_config(tokenizer: Any) -> Any:
    return transformers.Mistral3Config(
        text_config=text_config(
            tokenizer, model_type="mistral", head_dim=8, sliding_window=16, rope_parameters=ROPE
        ),
        vision_config=VISION
        | {
            "model_type": "pixtral",
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 2,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )


def mistral3_processor(tokenizer: Any, options: dict[str, Any]) -> Any:
    images = transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=2)
    return transformers.PixtralProcessor(
        images, tokenizer, patch_size=2, spatial_merge_size=2, **options
    )


MOLMO = (
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<frame_start>",
    "<im_end>",
    "<frame_end>",
    "<im_low>",
)


def molmo2_config(tokenizer: Any) -> Any:
    ids = tokenizer.convert_tokens_to_ids
    return transformers.Molmo2Config(
        text_config=text_config(
            tokenizer,
            vocab_size=len(tokenizer) - 8,
            additional_vocab_size=8,
            head_dim=8,
            rope_parameters=ROPE,
        ),
        vision_config=VISION
        | {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "image_size": [32, 32],
            "patch_size": 8,
        },
        adapter_config=VISION
        | {
            "vision_feature_layer": [1, 0],
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "text_hidden_size": 32,
        },
        image_patch_id=ids("<im_patch>"),
        image_start_token_id=ids("<im_start>"),
        low_res_image_start_token_id=ids("<low_res_im_start>"),
        image_end_token_id=ids("<im_end>"),
        frame_start_token_id=ids("<frame_start>"),
        frame_end_token_id=ids("<frame_end>"),
    )


def molmo2_processor(tokenizer: Any, options: dict[str, Any]) -> Any:
    images = transformers.Molmo2ImageProcessor(
        size={"height": 32, "width": 32}, max_crops=4, overlap_margins=[1, 1], patch_size=8
    )
    video = transformers.Molmo2VideoProcessor()
    return transformers.Molmo2Processor(images, video, tokenizer, **options)


TILED = available(
    {
        "ovis2": Family(
            CHAT,
            chatml("<image>"),
            ovis2_config,
            ovis2_processor,
            (
                "<|im_start|>",
                "<image>",
                "<IMG_ATOM>",
                "<IMG_START>",
                "<IMG_GRID>",
                "<IMG_COL>",
                "<IMG_ROW>",
                "<IMG_END>",
            ),
        ),
        "aya_vision": Family(
            CHAT,
            chatml("<image>", "<s>"),
            aya_config,
            aya_processor,
            (
                "<|im_start|>",
                "<image>",
                "<|START_OF_IMG|>",
                "<|END_OF_IMG|>",
                "<|IMG_PATCH|>",
                "TILE",
                "TILE_GLOBAL",
            ),
        ),
        "cohere2_vision": Family(
            CHAT
            | {
                "image_token": "<|IMG_PATCH|>",
                "boi_token": "<|START_OF_IMG|>",
                "eoi_token": "<|END_OF_IMG|>",
                "img_line_break_token": "<|IMG_LINE_BREAK|>",
            },
            chatml("<|IMG_PATCH|>", "<s>"),
            cohere_config,
            cohere_processor,
            ("<|im_start|>",),
        ),
        "granite4_vision": Family(
            CHAT,
            chatml("<image>"),
            granite_config,
            granite_processor,
            ("<|im_start|>", "<image>"),
            since="5.24",
        ),
        "mistral3": Family(
            CHAT,
            chatml("[IMG]", "<s>"),
            mistral3_config,
            mistral3_processor,
            ("<|im_start|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        ),
        "molmo2": Family(
            CHAT | {"bos_token": "<|endoftext|>"},
            chatml("<|image|>"),
            molmo2_config,
            molmo2_processor,
            ("<|im_start|>", "<|image|>", "<|video|>", *MOLMO),
            since="5.24",
        ),
    }
)
