"""The recipes for a GPU and a hub, built at their real shapes on the meta device.

No weights, no downloads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.plan_time import (
    YI_34B,
    write_blip2_opt,
    write_granite_vision,
    write_instructblip,
    write_internvl,
    write_llava,
    write_llava_next,
    write_llava_onevision,
    write_ministral3,
    write_smolvlm,
)
from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.template import load_template
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.memory_plan.plan import plan
from vlm_tune.model.build import assemble, bare_model, bare_tower
from vlm_tune.model.optimizer_groups import Tuned
from vlm_tune.model.pretrained.tokenizer import train_tokenizer
from vlm_tune.model.pretrained.vlm_checkpoints import model_section
from vlm_tune.model.tuning import apply_rules
from vlm_tune.model.vlm import VisionLanguageConfig
from vlm_tune.model.weights import count_of
from vlm_tune.resources import resource_folder

RECIPES = Path(__file__).parent.parent.parent / "recipes"
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
"""Of a ViT-L/14."""


def meta_model(recipe: Recipe, language: Any) -> VisionLanguageModel:
    template = load_template(recipe.data.template)
    tokenizer = train_tokenizer([], 300, template)
    with torch.device("meta"):
        tower = bare_tower(model_section(recipe).tower)
        config = VisionLanguageConfig(
            model=model_section(recipe),
            tower_rebuild=tower.rebuild,
            template=template.model_dump(),
            system=recipe.data.system,
            max_length=recipe.data.max_length,
        )
        return assemble(config, tower, tokenizer, language, changed=set())


def tuned(model: VisionLanguageModel, recipe: Recipe) -> Tuned:
    return apply_rules(
        model, recipe.tune, learning_rate=recipe.train.learning_rate, precision=torch.bfloat16
    )


def trained(tuning: Tuned) -> dict[str, int]:
    return {row.match: row.trained for row in tuning.table}


def test_flan_t5_xl_with_clip_builds_and_tunes_at_its_real_shape() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    recipe = load_recipe(RECIPES / "flan-t5-clip-vqa.yaml")
    shape = {
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_heads": 32,
        "vocab_size": 32128,
    }
    with torch.device("meta"):
        language = T5ForConditionalGeneration(
            T5Config(**shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        )
    model = meta_model(recipe, language)
    assert model.processor.spec.tokens_per_image == 256  # ViT-L/14 at 224 px: 16 x 16 patches
    assert (
        len(model.tower.visual.transformer.resblocks) == 23
    )  # layer -2: the last of 24 blocks is never run
    counts = trained(tuned(model, recipe))
    assert counts["tower.*"] == 0
    assert counts["connector.*"] == (1024 + 1) * 2048 + (2048 + 1) * 2048
    # q and v of 24 encoder blocks, and of self- and cross-attention in 24 decoder blocks.
    assert counts["llm.*"] == 2 * (24 + 24 + 24) * 16 * (2048 + 2048)


def test_llava_7b_trains_in_full_at_its_real_shape(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    CLIPVisionConfig(
        **shape, image_size=336, patch_size=14, hidden_act="quick_gelu", projection_dim=768
    ).save_pretrained(tmp_path)
    recipe = load_recipe(RECIPES / "llava-7b-zero3.yaml", {"model.tower.name": str(tmp_path)})
    with torch.device("meta"):
        language = LlamaForCausalLM(LlamaConfig(vocab_size=32000))
    counts = trained(tuned(meta_model(recipe, language), recipe))
    assert counts["tower.*"] == 0
    assert counts["*"] == 6_738_415_616 + (1024 + 1) * 4096 + (4096 + 1) * 4096


def test_llava_style_7b_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

    tower = CLIPVisionConfig(**LARGE, image_size=336, hidden_act="quick_gelu", projection_dim=768)
    tower.save_pretrained(tmp_path)
    recipe = load_recipe(RECIPES / "llava-1.5-style.yaml", {"model.tower.name": str(tmp_path)})
    (_, align), (_, instruct) = recipe.resolved_stages()
    with torch.device("meta"):
        language = LlamaForCausalLM(LlamaConfig(vocab_size=32000))
    model = meta_model(align, language)
    assert model.processor.spec.tokens_per_image == 576
    projector = (1024 + 1) * 4096 + (4096 + 1) * 4096
    assert trained(tuned(model, align)) == {"connector.*": projector, "*": 0}
    counts = trained(tuned(model, instruct))
    layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert counts == {"tower.*": 0, "connector.*": projector, "llm.*": 32 * 128 * layer}
    assert model.llm.head.weight.shape == (32000, 4096)


def test_llava_1_5_7b_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    """From configs alone: the model that `plan` makes."""
    write_llava(tmp_path)
    recipe = load_recipe(RECIPES / "llava-1.5-7b-qlora.yaml", {"model.pretrained": str(tmp_path)})
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((576, 1024), 576)
    layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    projector = (1024 + 1) * 4096 + (4096 + 1) * 4096
    assert trained(tuned(model, recipe)) == {
        "tower.*": 0,
        "connector.*": projector,
        "llm.*": 32 * 64 * layer,
    }


def test_llava_1_6_mistral_7b_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    """CLIP ViT-L/14 at 336 pixels, Mistral-7B, and 4,096 numbers at the ends of rows."""
    write_llava_next(tmp_path)
    recipe = load_recipe(
        RECIPES / "llava-1.6-mistral-7b-qlora.yaml", {"model.pretrained": str(tmp_path)}
    )
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((576, 1024), 576)
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert trained(tuned(model, recipe)) == {
        "tower.*": 0,
        "connector.*": (1024 + 1) * 4096 + (4096 + 1) * 4096 + 4096,
        "llm.*": 32 * 16 * layer,
    }


def test_llava_1_6_34b_fits_on_two_gpus_of_24_gb_by_its_plan(tmp_path: Path) -> None:
    """Yi-34B in nf4: half of its weights, and two of its layers gathered."""
    write_llava_next(tmp_path, **YI_34B)
    recipe = load_recipe(
        RECIPES / "llava-1.6-34b-qlora-fsdp.yaml", {"model.pretrained": str(tmp_path)}
    )
    alone, halved = (
        plan(recipe, gpu_memory="24GB", processes=2, zero=zero, tokens=4096) for zero in (0, 3)
    )
    assert halved.fits
    (whole,), (half,) = alone.stages, halved.stages
    layer = 2 * (7168 + 7168) + 2 * (7168 + 1024) + 3 * (7168 + 20480)
    llm = whole.parts[-1]
    assert llm.adapters == 60 * 16 * layer
    packed = 60 * (2 * 7168 * 7168 + 2 * 7168 * 1024 + 3 * 7168 * 20480) * 9 // 16
    assert whole.memory.frozen > packed > 18e9
    assert half.memory.frozen == pytest.approx(whole.memory.frozen / 2, abs=1)


def test_llava_onevision_0_5b_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    """SigLIP So/14 at 384 pixels, 26 of its blocks, Qwen2-0.5B, 896 numbers at the ends of rows."""
    write_llava_onevision(tmp_path)
    recipe = load_recipe(
        RECIPES / "llava-onevision-0.5b-lora.yaml", {"model.pretrained": str(tmp_path)}
    )
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((729, 1152), 729)
    layer = 2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864)
    assert trained(tuned(model, recipe)) == {
        "tower.*": 0,
        "connector.*": (1152 + 1) * 896 + (896 + 1) * 896 + 896,
        "llm.*": 24 * 16 * layer,
    }


def test_granite_vision_2b_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    """SigLIP So/14 at 384 pixels, features of four layers, Granite 2B, and a row's end."""
    write_granite_vision(tmp_path)
    recipe = load_recipe(
        RECIPES / "granite-vision-2b-lora.yaml", {"model.pretrained": str(tmp_path)}
    )
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((729, 4 * 1152), 729)
    layer = 2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192)
    assert trained(tuned(model, recipe)) == {
        "tower.*": 0,
        "connector.*": (4 * 1152 + 1) * 2048 + (2048 + 1) * 2048 + 2048,
        "llm.*": 40 * 16 * layer,
    }


def test_blip2_opt_2_7b_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    """EVA-CLIP's ViT-g/14 at 224 pixels, 32 queries, OPT-2.7B."""
    write_blip2_opt(tmp_path)
    recipe = load_recipe(RECIPES / "blip2-opt-2.7b-lora.yaml", {"model.pretrained": str(tmp_path)})
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((257, 1408), 32)
    counts = trained(tuned(model, recipe))
    assert counts["llm.*"] == 32 * 16 * (4 * (2560 + 2560) + 2 * (2560 + 10240))
    assert counts["tower.*"] == 0 and counts["connector.*"] > 100_000_000


def test_instructblip_flan_t5_xl_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    write_instructblip(tmp_path)
    recipe = load_recipe(
        RECIPES / "instructblip-flan-t5-xl-lora.yaml", {"model.pretrained": str(tmp_path)}
    )
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((257, 1408), 32)
    counts = trained(tuned(model, recipe))
    assert counts["llm.*"] == 2 * (24 + 24 + 24) * 16 * (2048 + 2048)
    attention = lambda context: (  # noqa: E731
        2 * (768 + 1) * 768 + 2 * (context + 1) * 768 + 2 * 768
    )
    feed = (768 + 1) * 3072 + (3072 + 1) * 768 + 2 * 768
    words = 32 * 768 + 2 * 768 + (30523 + 512) * 768 + (768 + 1) * 2048
    assert (
        counts["connector.*"]
        == words + 12 * (attention(768) + feed) + 6 * attention(1408) + 11 * feed
    )


def test_smolvlm_256m_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    """SigLIP B/16 at 512 pixels and SmolLM2-135M, in each layer 16 rows of LoRA on 7 matrices."""
    write_smolvlm(tmp_path)
    recipe = load_recipe(RECIPES / "smolvlm-256m-lora.yaml", {"model.pretrained": str(tmp_path)})
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((1024, 768), 64)
    layer = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    assert trained(tuned(model, recipe)) == {
        "tower.*": 0,
        "connector.*": 16 * 768 * 576,
        "llm.*": 30 * 16 * layer,
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 255e6 < total - 30 * 16 * layer < 260e6


def test_internvl_3_5_1b_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    """InternViT-300M at 448 pixels and Qwen3-0.6B with a head of its own."""
    write_internvl(tmp_path)
    recipe = load_recipe(RECIPES / "internvl3.5-1b-lora.yaml", {"model.pretrained": str(tmp_path)})
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((1024, 1024), 256)
    layer = 2 * (1024 + 2048) + 2 * (1024 + 1024) + 3 * (1024 + 3072)
    assert trained(tuned(model, recipe)) == {
        "tower.*": 0,
        "connector.*": 2 * 4096 + (4096 + 1) * 1024 + (1024 + 1) * 1024,
        "llm.*": 28 * 16 * layer,
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 1.0e9 < total - 28 * 16 * layer < 1.1e9


def test_ministral_3_3b_builds_and_tunes_at_its_real_shape(tmp_path: Path) -> None:
    """Pixtral's tower at 616 pixels, squares of 2 x 2 patches, and 26 layers with a tied head."""
    write_ministral3(tmp_path)
    recipe = load_recipe(RECIPES / "ministral-3-3b-qlora.yaml", {"model.pretrained": str(tmp_path)})
    model, measured = bare_model(recipe)
    assert (measured, model.processor.spec.tokens_per_image) == ((44**2, 1024), 22**2)
    layer = 2 * (3072 + 4096) + 2 * (3072 + 1024) + 3 * (3072 + 9216)
    assert trained(tuned(model, recipe)) == {
        "tower.*": 0,
        "connector.*": 1024 + 4 * 1024 * 1024 + 1024 * 3072 + 3072 * 3072,
        "llm.*": 26 * 16 * layer,
    }
    weights = sum(count_of(parameter) for parameter in model.parameters())
    assert 3.8e9 < weights - 26 * 16 * layer < 3.9e9


@pytest.mark.parametrize("recipe_name", ["qlora", "dpo", "grpo"])
def test_qwen3_vl_4b_builds_and_tunes_at_its_real_shape(recipe_name: str) -> None:
    """From the config that is shipped: in each layer 16 rows of LoRA on 7 packed matrices."""
    name = resource_folder("data_templates") / "models" / "Qwen" / "Qwen3-VL-4B-Instruct"
    path = RECIPES / f"qwen3-vl-4b-{recipe_name}.yaml"
    recipe = load_recipe(path, {"model.pretrained": str(name)})
    model, _ = bare_model(recipe)
    layer = (2560 + 4096) + 2 * (2560 + 1024) + (4096 + 2560) + 3 * (2560 + 9728)
    assert trained(tuned(model, recipe)) == {
        "tower.*": 0,
        "connector.*": 0,
        "llm.*": 36 * 16 * layer,
    }
    weights = sum(count_of(parameter) for parameter in model.parameters())
    assert 4.4e9 < weights - 36 * 16 * layer < 4.5e9


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_header_says_what_the_recipe_is_for_and_what_was_measured(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header and path.read_text().startswith("# ")
    text = " ".join(header)
    assert "Not run on a GPU" in text or "Measured on two CPU cores" in text
