"""TRL's trainers on an exported tiny model, with the weights and adapters of one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers.export_samples import opened
from tests.helpers.preference_samples import preference_text
from tests.helpers.tiny_models import batch_of, built, parsed
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.types import IGNORE_INDEX, Example
from vlm_tune.exporting import export
from vlm_tune.generation.chat import VisionLanguageModel

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def exported_llava(folder: Path) -> Path:
    """A tiny model of ours as transformers' LLaVA: `hf` in the folder, beside `model`."""
    text = tiny_text("causal", write_color_rows(folder), folder / "run")
    model = built(parsed(text.replace("norm: true", "depth: 2")))
    with torch.no_grad():
        for parameter in (*model.llm.parameters(), *model.connector.parameters()):
            parameter.mul_(2.0)
    model.changed |= {"llm", "tower"}
    model.save_pretrained(folder / "model")
    export(folder / "model", folder / "hf", verify=False)
    return folder


def lora_recipe(folder: Path, objective: str, *, judged: bool = False) -> Recipe:
    """A recipe that trains LoRA on the exported model's own weights, on preferences."""

    def make(kind: str) -> str:
        text = tiny_text(kind, folder / "messages.jsonl", folder / "run")
        head, _, rest = text.partition("\nmodel:")
        return (
            f"{head}\nmodel: {{pretrained: {folder / 'model'}}}\ndata:{rest.partition('data:')[2]}"
        )

    return parsed(preference_text(make, "causal", objective, judged=judged))


def their_name(name: str) -> str:
    """TRL's name of one of our LoRA parameters."""
    return f"base_model.model.model.language_model{name.removeprefix('llm.model.model')}"


def their_inputs(model: VisionLanguageModel, rows: list[Example], image: int) -> dict[str, Any]:
    """Separate rows of ours as TRL's trainers take them from their collators."""
    whole = [
        # Ours end before the last label, theirs with it.
        [*row.input_ids.tolist(), int(row.labels[-1])]
        for row in rows
    ]
    length = max(map(len, whole))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    attended = torch.zeros_like(ids)
    answered = torch.zeros_like(ids)
    for place, (row, tokens) in enumerate(zip(rows, whole, strict=True)):
        ids[place, : len(tokens)] = torch.tensor(tokens)
        ids[place, : len(row.image_mask)][torch.tensor(row.image_mask)] = image
        attended[place, : len(tokens)] = 1
        labelled = torch.tensor(row.labels != IGNORE_INDEX)
        answered[place, 1 : len(tokens)] = labelled.long()
    batch = batch_of(model, rows)
    assert batch.pixels is not None
    tower: Any = model.tower
    pixels = (batch.pixels.float() * tower.scale - tower.offset)[batch.media_index]
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "completion_mask": answered,
        "pixel_values": pixels,
    }


def trainer_of(
    folder: Path,
    model: VisionLanguageModel,
    trainer: Any,
    config: Any,
    row: dict[str, Any],
    **options: Any,
) -> Any:
    """One of TRL's trainers with the model's base weights and adapters, on a row with an image."""
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image

    theirs, processor = opened(folder / "hf")
    # The export's token of images would be one more in the denominator of all probabilities.
    theirs.resize_token_embeddings(model.llm.vocabulary)
    theirs.config.image_token_id = processor.tokenizer.unk_token_id
    image = Image.new("RGB", (32, 32))
    trainer_with_lora = trainer(
        model=theirs,
        args=config,
        train_dataset=Dataset.from_list([{**row, "images": [image]}] * 2),
        processing_class=processor,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
        **options,
    )
    parameters = dict(trainer_with_lora.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameters[their_name(name)].copy_(parameter)
    return trainer_with_lora


def trl_settings(config: Any, folder: Path, **changes: Any) -> Any:
    """A config of TRL's for a processor."""
    return config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        **changes,
    )


def their_gradients(trainer_with_lora: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a loss of a trainer's model, by TRL's names."""
    trainer_with_lora.model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in trainer_with_lora.model.named_parameters()
        if parameter.grad is not None
    }
