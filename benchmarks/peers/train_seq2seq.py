"""transformers' Seq2SeqTrainer on a T5 that reads a CLIP tower's features before the question, LoRA on every linear."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from probe import LORA, Counted, Times, arguments, clock, read_rows, report
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
)

TARGETS = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]


class Reader(nn.Module):
    """Frozen tower, trained projector, T5 with LoRA."""

    def __init__(self, tower: Any, language: Any) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.language = language
        width = tower.config.hidden_size
        inner = language.config.d_model
        self.projector = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner))

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> Any:
        """The language model's output; attention_mask covers the image's slots, which come first."""
        with torch.no_grad():
            features = self.tower(pixel_values.to(self.tower.dtype)).last_hidden_state[:, 1:]
        words = self.language.get_input_embeddings()(input_ids)
        embeds = torch.cat(
            [self.projector(features.to(self.projector[0].weight.dtype)).to(words.dtype), words], 1
        )
        return self.language(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Asked by the trainer."""
        self.language.enable_input_require_grads()
        self.language.gradient_checkpointing_enable(**options)


def collator(tokenizer: Any, images: Any, slots: int) -> Any:
    """Rows of one question to padded tensors."""

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        text = tokenizer(
            [row["messages"][0]["content"] for row in rows], padding=True, return_tensors="pt"
        )
        labels = tokenizer(
            [row["messages"][1]["content"] + tokenizer.eos_token for row in rows],
            padding=True,
            return_tensors="pt",
        )
        pixels = images(
            [Image.open(row["images"][0]).convert("RGB") for row in rows], return_tensors="pt"
        )["pixel_values"]
        return {
            "pixel_values": pixels,
            "input_ids": text["input_ids"],
            "attention_mask": torch.cat(
                [torch.ones(len(rows), slots, dtype=torch.long), text["attention_mask"]], 1
            ),
            "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100),
        }

    return collate


def main() -> None:
    """Trains some steps and prints what they took."""
    asked = arguments()
    torch.set_num_threads(asked["threads"])
    folder = asked["material"]
    half = asked["precision"] in ("bf16_weights", "bf16_both")
    dtype = torch.bfloat16 if half else torch.float32
    tower = CLIPVisionModel.from_pretrained(f"{folder}/tower", dtype=dtype)
    language: Any = T5ForConditionalGeneration.from_pretrained(f"{folder}/t5", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/t5")
    language = get_peft_model(
        language, LoraConfig(**LORA, target_modules=TARGETS, task_type="SEQ_2_SEQ_LM")
    )
    slots = (tower.config.image_size // tower.config.patch_size) ** 2
    given: dict[str, Any] = {
        "bf16": asked["precision"] in ("bf16", "bf16_both"),
        "gradient_checkpointing": bool(asked["checkpointing"]),
    }
    if asked["batch"] is not None:
        given["per_device_train_batch_size"] = asked["batch"]
    rows = read_rows(asked)
    times = Times()
    counted = Counted(
        collator(tokenizer, CLIPImageProcessor.from_pretrained(f"{folder}/llava"), slots),
        seq2seq=True,
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = Seq2SeqTrainer(
            model=Reader(tower, language),
            args=Seq2SeqTrainingArguments(
                output_dir=output,
                max_steps=asked["steps"],
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                use_cpu=not torch.cuda.is_available(),
                **given,
            ),
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=counted,
            callbacks=[clock(asked, times)],
        )
        answers = counted.answers(asked, rows, tokenizer)
        trainer.train()
    report(times, counted, answers)


if __name__ == "__main__":
    main()
