"""Our decoder path against transformers' LLaVA, with the same tiny weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import (
    CLIP,
    LLAMA,
    batch_of,
    built,
    largest,
    parsed,
    rows_of,
    save_llm,
    with_llm,
    with_tower,
)
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.generation.answering import prompt_answers
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding


@pytest.fixture
def pair(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> tuple[VisionLanguageModel, Any, list[Any]]:
    """Ours and transformers' model with weights copied from ours, and examples."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = tiny_recipe("causal")
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(tmp_path / "clip")
    save_llm(tmp_path / "llama", "causal", rows_of(parsed(text)))
    text = with_llm(
        with_tower(text, f"{{kind: transformers, name: {tmp_path / 'clip'}, layer: -2}}"),
        tmp_path / "llama",
        "causal",
    )
    ours = built(parsed(text.replace("norm: true", "depth: 2")))
    tokenizer: Any = ours.processor.tokenizer
    # LLaVA finds its slots by an id, so it needs one that no text has; ours are marked by the mask.
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**{**LLAMA, "vocab_size": len(tokenizer)}),
        image_token_id=tokenizer.unk_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.model.vision_tower.load_state_dict(
        CLIPVisionModel.from_pretrained(tmp_path / "clip").state_dict()
    )
    theirs.model.language_model.load_state_dict(ours.llm.model.model.state_dict())
    theirs.lm_head.load_state_dict(ours.llm.model.lm_head.state_dict())
    names = {"layers.0": "linear_1", "layers.2": "linear_2"}
    connector = {
        f"{names[key[:8]]}{key[8:]}": value for key, value in ours.connector.state_dict().items()
    }
    theirs.model.multi_modal_projector.load_state_dict(connector)
    examples = [
        example for row in rows_of(parsed(text)) for example in ours.processor.examples(row)
    ]
    return ours.eval(), theirs, examples


def their_logits(
    theirs: Any, ours: VisionLanguageModel, examples: list[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """LLaVA's supervised logits and its mean loss for a batch of ours."""
    batch = batch_of(ours, examples)
    assert batch.pixels is not None
    pixels = batch.pixels.float() * ours.tower.scale - ours.tower.offset
    ids = batch.input_ids.masked_fill(batch.image_mask, theirs.config.image_token_id)
    logits = theirs(
        input_ids=ids,
        pixel_values=pixels[batch.media_index],
        attention_mask=batch.attention_mask.long(),
    ).logits.float()
    loss = theirs.loss_function(
        logits, None, theirs.config.text_config.vocab_size, shift_labels=batch.labels
    )
    return logits[batch.labels != IGNORE_INDEX], loss


@torch.no_grad()
def test_logits_equal_llava(pair: tuple[VisionLanguageModel, Any, list[Any]]) -> None:
    ours, theirs, examples = pair
    batch = batch_of(ours, examples)
    assert int(batch.image_mask.sum()) == 4 * len(examples)
    logits = ours.llm.supervised_logits(ours.embed(batch), batch)
    expected, loss = their_logits(theirs, ours, examples)
    assert logits.shape == expected.shape
    assert largest(logits, expected) <= 1e-5
    our_loss: Any = ours(batch)
    assert float(our_loss.sum) / our_loss.count == pytest.approx(float(loss), abs=1e-5)


@torch.no_grad()
def test_llava_weights_copied_into_ours(pair: tuple[VisionLanguageModel, Any, list[Any]]) -> None:
    ours, theirs, examples = pair
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    batch = batch_of(ours, examples)
    expected, _ = their_logits(theirs, ours, examples)
    before = ours.llm.supervised_logits(ours.embed(batch), batch)
    assert largest(before, expected) > 1e-2
    projector = theirs.model.multi_modal_projector.state_dict()
    names = {"linear_1": "layers.0", "linear_2": "layers.2"}
    ours.connector.load_state_dict(
        {f"{names[key[:8]]}{key[8:]}": value for key, value in projector.items()}
    )
    ours.llm.model.model.load_state_dict(theirs.model.language_model.state_dict())
    ours.llm.model.lm_head.load_state_dict(theirs.lm_head.state_dict())
    tower: Any = ours.tower
    known = tower.model.state_dict()
    tower.model.load_state_dict(
        {
            key: value
            for key, value in theirs.model.vision_tower.state_dict().items()
            if key in known
        }
    )
    after = ours.llm.supervised_logits(ours.embed(batch), batch)
    assert largest(after, expected) <= 1e-5


@torch.no_grad()
def test_greedy_text_equals_llava(pair: tuple[VisionLanguageModel, Any, list[Any]]) -> None:
    ours, theirs, examples = pair
    for parameter in theirs.model.language_model.parameters():
        parameter.mul_(
            3
        )  # sharper than at initialisation, so that greedy text depends on the image
    ours.llm.model.model.load_state_dict(theirs.model.language_model.state_dict())
    answers = set()
    for example in examples:
        batch = batch_of(ours, [example])
        assert batch.pixels is not None
        (answer,) = prompt_answers(ours, [example], Decoding(6), fetch=ours.processor.images)
        expected = theirs.generate(
            input_ids=batch.input_ids.masked_fill(batch.image_mask, theirs.config.image_token_id),
            pixel_values=batch.pixels.float() * ours.tower.scale - ours.tower.offset,
            attention_mask=batch.attention_mask.long(),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=ours.processor.stop_ids,
            pad_token_id=ours.processor.spec.pad_id,
        )[0, batch.input_ids.shape[1] :].tolist()
        end = next(
            (place for place, token in enumerate(expected) if token in ours.processor.stop_ids),
            len(expected),
        )
        assert list(answer.ids) == expected[:end]
        answers.add(answer.ids)
    assert len(answers) > 1
