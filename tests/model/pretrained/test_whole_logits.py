"""Settings of an LLM that scale or cap, off neutral, inside a vision-language model taken over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import LLAMA, built, largest, parsed, rows_of
from tests.helpers.vlm_samples import one_batch, our_pixels, save_llava, with_pretrained
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.errors import ModelError
from vlm_tune.model.build import bare_model

Taken = tuple[Recipe, Any]


@pytest.fixture
def llava_over(tiny_recipe: Callable[..., str], tmp_path: Path) -> Callable[..., Taken]:
    """A recipe of a tiny LLaVA over an LLM of a type with these settings, and transformers' own."""

    def over(language: str, **settings: Any) -> Taken:
        from transformers import AutoConfig

        text = tiny_recipe("causal")
        rows = rows_of(parsed(text))
        plain = save_llava(tmp_path / "plain", rows).config.text_config
        names = ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")
        ids = {name: getattr(plain, name) for name in names}
        config = AutoConfig.for_model(language, **LLAMA | ids | settings)
        theirs = save_llava(tmp_path / "llava", rows, text_config=config)
        return parsed(with_pretrained(text, tmp_path / "llava", "vicuna")), theirs

    return over


@pytest.mark.parametrize(
    ("language", "settings"),
    [
        (
            "granite",
            {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2},
        ),
        (
            "gemma2",
            {
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": None,
                "query_pre_attn_scalar": 9,
                "head_dim": 16,
            },
        ),
    ],
)
def test_what_an_llm_scales_in_its_layers_it_scales_inside_the_whole(
    language: str, settings: dict[str, Any], llava_over: Callable[..., Taken]
) -> None:
    """Embeddings too, of words and of images, as transformers' whole model has them."""
    recipe, theirs = llava_over(language, **settings)
    theirs.set_attn_implementation("eager")  # sdpa leaves out the cap of scores
    model = built(recipe).eval()
    example, batch = one_batch(model, rows_of(recipe)[0])
    ids = batch.input_ids.masked_fill(batch.image_mask, theirs.config.image_token_id)
    with torch.no_grad():
        ours = model.llm.supervised_logits(model.embed(batch), batch)
        logits = theirs(input_ids=ids, pixel_values=our_pixels(model, batch)).logits[0]
        blind = theirs(input_ids=ids, pixel_values=-our_pixels(model, batch)).logits[0]
    places = torch.from_numpy(example.labels != IGNORE_INDEX)
    assert largest(ours, logits[places]) <= 1e-5 * max(1.0, float(logits.abs().max()))
    assert largest(ours, blind[places]) > 1e-4


@pytest.mark.parametrize(
    ("language", "settings"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_an_llm_that_scales_or_caps_its_logits_by_itself_alone_is_refused(
    language: str, settings: dict[str, Any], llava_over: Callable[..., Taken]
) -> None:
    """Inside a LLaVA transformers leaves the scale out; ours would train with it."""
    recipe, _ = llava_over(language, **settings)
    with pytest.raises(ModelError, match=r"(?s)ForCausalLM inside, which scales.*kind: native"):
        bare_model(recipe)
