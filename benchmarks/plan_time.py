"""Time of `vlm-tune plan` for models whose weights are not on the machine.

Run: python -m benchmarks.plan_time [--rounds 3] [--json FILE]

The recipes for LLaVA-1.5-7B (QLoRA) and InstructBLIP with Flan-T5-XL (LoRA) are planned by the
command line, each in its own process, from folders with nothing but the models' configs. The time
is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BAR = 10.0
"""Most seconds that a plan should take."""


def write_llava(folder: Path) -> None:
    """Writes the configs of LLaVA-1.5-7B."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig

    shape: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    vision = CLIPVisionConfig(
        **shape, patch_size=14, image_size=336, hidden_act="quick_gelu", projection_dim=768
    )
    LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064)).save_pretrained(
        folder
    )
    CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ).save_pretrained(folder)


YI_34B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "max_position_embeddings": 4096,
    "vocab_size": 64064,
}
"""What differs in the config of the language model of LLaVA-1.6-34B from Mistral-7B's."""


def write_llava_next(folder: Path, **changes: Any) -> None:
    """Writes the configs of LLaVA-1.6 over Mistral-7B, or over a language model with changes."""
    from transformers import LlavaNextConfig, LlavaNextImageProcessorPil

    text = {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "vocab_size": 32064,
    }
    config = LlavaNextConfig(text_config=text | changes, tie_word_embeddings=False)
    config.save_pretrained(folder)
    LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ).save_pretrained(folder)


def write_llava_onevision(folder: Path) -> None:
    """Writes the configs of LLaVA-OneVision over Qwen2-0.5B."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil

    text = {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "vocab_size": 152000,
    }
    LlavaOnevisionConfig(text_config=text, tie_word_embeddings=False).save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(
        size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def write_smolvlm(folder: Path) -> None:
    """Writes the configs of SmolVLM-256M."""
    from transformers import Idefics3Config, Idefics3ImageProcessorPil

    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49280,
        "max_position_embeddings": 8192,
        "pad_token_id": 2,
    }
    Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=4, image_token_id=49190
    ).save_pretrained(folder)
    Idefics3ImageProcessorPil(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    ).save_pretrained(folder)


def write_internvl(folder: Path) -> None:
    """Writes the configs of InternVL3.5-1B."""
    from transformers import GotOcr2ImageProcessorPil, InternVLConfig

    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "attention_bias": True,
        "image_size": 448,
        "patch_size": 14,
    }
    text = {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=151671, tie_word_embeddings=False
    ).save_pretrained(folder)
    GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}).save_pretrained(folder)


def write_ministral3(folder: Path) -> None:
    """Writes the configs of Ministral 3 3B."""
    from transformers import Mistral3Config, PixtralImageProcessorPil

    vision = {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 1540,
        "patch_size": 14,
        "hidden_act": "silu",
    }
    positions = {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "max_position_embeddings": 262144,
        "llama_4_scaling_beta": 0.1,
    }
    text = {
        "model_type": "ministral3",
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "rope_parameters": positions,
    }
    Mistral3Config(
        vision_config=vision, text_config=text, image_token_index=10, tie_word_embeddings=True
    ).save_pretrained(folder)
    PixtralImageProcessorPil(
        size={"longest_edge": 1540}, patch_size={"height": 14, "width": 14}
    ).save_pretrained(folder)


def write_instructblip(folder: Path) -> None:
    """Writes the configs of InstructBLIP with Flan-T5-XL."""
    from transformers import BlipImageProcessor, InstructBlipConfig, T5Config

    shape: dict[str, Any] = {
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_heads": 32,
        "vocab_size": 32128,
    }
    text = T5Config(
        **shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0
    )
    InstructBlipConfig(text_config=text, qformer_config={"vocab_size": 30523}).save_pretrained(
        folder
    )
    BlipImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)


def write_blip2_opt(folder: Path) -> None:
    """Writes the configs of BLIP-2 with OPT-2.7B."""
    from transformers import Blip2Config, BlipImageProcessor

    text = {
        "model_type": "opt",
        "hidden_size": 2560,
        "word_embed_proj_dim": 2560,
        "ffn_dim": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 50304,
    }
    Blip2Config(text_config=text).save_pretrained(folder)
    BlipImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)


def write_granite_vision(folder: Path) -> None:
    """Writes the configs of Granite Vision 3.3 2B, with fewer shapes of images."""
    from transformers import LlavaNextConfig, LlavaNextImageProcessorPil

    text = {
        "model_type": "granite",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 16384,
        "vocab_size": 49156,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_scaling": 8.0,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
    grids = [[384, 768], [768, 384], [768, 768], [384, 1152], [1152, 384]]
    LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        vision_feature_layer=[-24, -20, -12, -1],
        vision_feature_select_strategy="full",
        image_grid_pinpoints=grids,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    square = {"height": 384, "width": 384}
    LlavaNextImageProcessorPil(
        size=square,
        crop_size=square,
        image_grid_pinpoints=grids,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


RECIPES = {"llava-1.5-7b-qlora": write_llava, "instructblip-flan-t5-xl-lora": write_instructblip}


def planned(recipe: str, folder: Path) -> dict[str, Any]:
    """Seconds of one command, and the bytes it predicts. Raises `SystemExit` if it fails."""
    command = [
        sys.executable,
        "-m",
        "vlm_tune.cli",
        "plan",
        recipe,
        "--set",
        f"model.pretrained={folder}",
        "--gpu-memory",
        "24GB",
        "--json",
    ]
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if ended.returncode not in (0, 5):
        raise SystemExit(f"{recipe}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}")
    return {"seconds": seconds, "needed": json.loads(ended.stdout)["needed"]}


def main() -> None:
    """Prints the seconds; with --json also saves them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folders = {recipe: Path(root) / recipe for recipe in RECIPES}
        for recipe, write in RECIPES.items():
            write(folders[recipe])
        runs = [
            (recipe, planned(recipe, folders[recipe]))
            for _ in range(options.rounds)
            for recipe in RECIPES
        ]
    figures: dict[str, Any] = {}
    for recipe in RECIPES:
        recipe_runs = [run for name, run in runs if name == recipe]
        seconds = [run["seconds"] for run in recipe_runs]
        figures[recipe] = {
            "seconds": seconds,
            "median": statistics.median(seconds),
            "needed": recipe_runs[0]["needed"],
        }
        times = ", ".join(f"{each:.1f}" for each in seconds)
        print(
            f"{recipe:30} {figures[recipe]['median']:5.1f} s (bar {BAR:.0f}): {times}; needs "
            f"{recipe_runs[0]['needed'] / 1e9:.2f} GB"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
