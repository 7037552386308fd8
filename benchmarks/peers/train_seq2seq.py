"""transformers' Seq2SeqTrainer on a T5 with a CLIP tower.

The tower's features come before the question's tokens; LoRA is on every linear layer of T5.
"""

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
    """A frozen CLIP tower, a trained projector and a T5 with LoRA."""

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
        """The language model's output.

        Args:
            pixel_values: [rows, 3, height, width].
            input_ids: [rows, text length].
            attention_mask: [rows, image slots + text length]; the image's slots come first.
            labels: [rows, label length], -100 at padding.
        """
        with torch.no_grad():
            features = self.tower(pixel_values.to(self.tower.dtype)).last_hidden_state[:, 1:]
        words = self.language.get_input_embeddings()(input_ids)
        embeds = torch.cat(
            [self.projector(features.to(self.projector[0].weight.dtype)).to(words.dtype), words], 1
        )
        return self.language(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Turns checkpointing on in the language model; the trainer calls this."""
        self.language.enable_input_require_grads()
        self.language.gradient_checkpointing_enable(**options)


def collator(tokenizer: Any, images: Any, slots: int) -> Any:
    """A collator that turns rows of one question into padded tensors."""

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
    """Trains for some steps and prints their times."""
    request = arguments()
    torch.set_num_threads(request["threads"])
    folder = request["material"]
    half = request["precision"] in ("bf16_weights", "bf16_both")
    dtype = torch.bfloat16 if half else torch.float32
    tower = CLIPVisionModel.from_pretrained(f"{folder}/tower", dtype=dtype)
    language: Any = T5ForConditionalGeneration.from_pretrained(f"{folder}/t5", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/t5")
    language = get_peft_model(
        language, LoraConfig(**LORA, target_modules=TARGETS, task_type="SEQ_2_SEQ_LM")
    )
    slots = (tower.config.image_size // tower.config.patch_size) ** 2
    overrides: dict[str, Any] = {
        "bf16": request["precision"] in ("bf16", "bf16_both"),
        "gradient_checkpointing": bool(request["checkpointing"]),
    }
    if request["batch"] is not None:
        overrides["per_device_train_batch_size"] = request["batch"]
    rows = read_rows(request)
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
                max_steps=request["steps"],
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                use_cpu=not torch.cuda.is_available(),
                **overrides,
            ),
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=counted,
            callbacks=[clock(request, times)],
        )
        answers = counted.answers(request, rows, tokenizer)
        trainer.train()
    report(times, counted, answers)


if __name__ == "__main__":
    main()
