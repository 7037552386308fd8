"""Tiny models of further families in transformers' own layouts: a line of `NEWEST` for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import trl
from packaging.version import Version

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {"hidden_size": 32, "intermediate_size": 48}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN = {
    "pad_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "start_token": "<|im_start|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}


FIXTURES = Path(__file__).parents[1] / "fixtures" / "chat_templates"


@dataclass(frozen=True)
class Family:
    """How a family's tiny model is made.

    Attributes:
        tokens: the special tokens by their names in the tokenizer.
        template: returns the chat template.
        config: returns the config for a tokenizer.
        processor: returns the processor for a tokenizer; the second argument are its options.
        specials: special tokens without names.
        words: tokens that are no special ones.
        since: the release of transformers that has the family without faults of its own.
    """

    tokens: dict[str, str]
    template: Callable[[], str]
    config: Callable[[Any], Any]
    processor: Callable[[Any, dict[str, Any]], Any]
    specials: Sequence[str] = ()
    words: Sequence[str] = ()
    since: str = "5.17"


def available(families: dict[str, Family]) -> dict[str, Family]:
    """The families that the installed release of transformers has."""
    installed = Version(transformers.__version__)
    return {name: each for name, each in families.items() if installed >= Version(each.since)}


def shipped(name: str) -> str:
    """A chat template as TRL 1.16 holds it (Apache 2.0); one that TRL 1.11 lacks is a fixture."""
    fixture = FIXTURES / f"{name}.jinja"
    of_trl = Path(str(trl.__file__)).parent / "chat_templates" / f"{name}.jinja"
    return (fixture if fixture.exists() else of_trl).read_text()


def with_ids(tokenizer: Any, *names: str) -> dict[str, Any]:
    """The fields of a config that name tokens by their ids."""
    return {
        f"{name}_id": tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)) for name in names
    }


def text_config(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """The config of a decoder of two layers."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos")}
    return {**TEXT, "vocab_size": len(tokenizer), "num_hidden_layers": 2, **ids, **changes}


def qwen_images(side: int) -> Any:
    """The image processor of Qwen-VL for images of few tokens."""
    return transformers.Qwen2VLImageProcessor(
        size={"shortest_edge": 4 * side**2, "longest_edge": 48 * side**2}, patch_size=side
    )


def qwen3_videos(side: int) -> Any:
    """The video processor of Qwen3-VL for videos of few tokens, all frames together."""
    return transformers.Qwen3VLVideoProcessor(
        size={"shortest_edge": 16 * side**2, "longest_edge": 96 * side**2}, patch_size=side
    )


def qwen3_5_text(tokenizer: Any) -> dict[str, Any]:
    """A decoder with layers of linear attention."""
    return text_config(
        tokenizer,
        model_type="qwen3_5_text",
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        rope_parameters=ROPE
        | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    )


def qwen3_5_config(tokenizer: Any) -> Any:
    return transformers.Qwen3_5Config(
        text_config=qwen3_5_text(tokenizer),
        vision_config=VISION
        | {
            "depth": 2,
            "num_heads": 2,
            "patch_size": 16,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
        },
        **with_ids(
            tokenizer, "image_token", "video_token", "vision_start_token", "vision_end_token"
        ),
    )


def qwen3_5_processor(tokenizer: Any, options: dict[str, Any]) -> Any:
    video = qwen3_videos(16)
    return transformers.Qwen3VLProcessor(qwen_images(16), tokenizer, video, **options)


GEMMA = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def gemma4_config(tokenizer: Any) -> Any:
    layers = ["sliding_attention", "full_attention"]
    return transformers.Gemma4Config(
        text_config=text_config(
            tokenizer,
            bos_token_id=tokenizer.bos_token_id,
            num_hidden_layers=4,
            layer_types=layers * 2,
            num_kv_shared_layers=2,
            head_dim=8,
            global_head_dim=16,
            sliding_window=8,
            vocab_size_per_layer_input=len(tokenizer),
            hidden_size_per_layer_input=8,
            final_logit_softcapping=30.0,
            use_bidirectional_attention="vision",
        ),
        vision_config=VISION
        | {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "position_embedding_size": 128,
        },
        audio_config=None,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        **with_ids(tokenizer, "image_token", "boi_token", "eoi_token", "audio_token", "boa_token"),
    )


def gemma4_processor(tokenizer: Any, options: dict[str, Any]) -> Any:
    return transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70),
        tokenizer,
        transformers.Gemma4VideoProcessor(patch_size=4),
        **options,
    )


GLM = {
    "pad_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
GLM_TURNS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


def glm_template() -> str:
    """The chat template of GLM-4.5, in which an image is written as GLM-4.6V writes it."""
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    text = "{{- item.text }}\n"
    return shipped("glm4moe").replace(
        text, f"{text}{{%- elif item is mapping and item.type == 'image' -%}}{image}\n", 1
    )


def glm46v_config(tokenizer: Any) -> Any:
    stops = ["<|endoftext|>", "<|user|>", "<|observation|>"]
    return transformers.Glm46VConfig(
        text_config=text_config(
            tokenizer,
            model_type="glm4v_text",
            hidden_size=64,
            eos_token_id=tokenizer.convert_tokens_to_ids(stops),
            rope_parameters=ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        ),
        vision_config=VISION
        | {
            "model_type": "glm4v_vision",
            "depth": 2,
            "num_heads": 2,
            "image_size": 56,
            "out_hidden_size": 64,
        },
        **with_ids(
            tokenizer,
            "image_token",
            "video_token",
            "image_start_token",
            "image_end_token",
            "video_start_token",
            "video_end_token",
        ),
    )


def glm46v_processor(tokenizer: Any, options: dict[str, Any]) -> Any:
    images = transformers.Glm46VImageProcessor(
        size={"shortest_edge": 8 * 14**2, "longest_edge": 96 * 14**2}
    )
    video = transformers.Glm46VVideoProcessor()
    return transformers.Glm46VProcessor(images, tokenizer, video, **options)


MINICPM = {
    "pad_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "start_token": "<|im_start|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def minicpm_template() -> str:
    """The chat template of Qwen3.5, in which an image is one token."""
    written = "<|vision_start|><|image_pad|><|vision_end|>"
    return shipped("qwen3_5_nothink").replace(written, "<|image_pad|>")


def minicpm_config(tokenizer: Any) -> Any:
    return transformers.MiniCPMV4_6Config(
        text_config=qwen3_5_text(tokenizer),
        vision_config=VISION
        | {
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
        },
        insert_layer_id=1,
        **with_ids(tokenizer, "image_token", "video_token"),
    )


def minicpm_processor(tokenizer: Any, options: dict[str, Any]) -> Any:
    images = transformers.MiniCPMV4_6ImageProcessor(scale_resolution=56, max_slice_nums=4)
    video = transformers.MiniCPMV4_6VideoProcessor()
    return transformers.MiniCPMV4_6Processor(images, video, tokenizer, **options)


THINK = ("<think>", "</think>")
NEWEST = available(
    {
        "qwen3_5": Family(
            QWEN, lambda: shipped("qwen3_5_think"), qwen3_5_config, qwen3_5_processor, words=THINK
        ),
        "gemma4": Family(
            GEMMA,
            lambda: shipped("gemma4_v5"),
            gemma4_config,
            gemma4_processor,
            ("<|video|>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
        ),
        "glm46v": Family(
            GLM,
            glm_template,
            glm46v_config,
            glm46v_processor,
            GLM_TURNS,
            words=(*THINK, "/nothink"),
        ),
        "minicpmv4_6": Family(
            MINICPM, minicpm_template, minicpm_config, minicpm_processor, words=THINK, since="5.24"
        ),
    }
)
