"""TRL's SFTTrainer on the LLaVA-shaped model, LoRA on every linear layer of its language model."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset, Image, Sequence
from peft import LoraConfig
from probe import LORA, Counted, Times, arguments, clock, read_rows, report
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

TARGETS = r".*(language|text)_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def options(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SFTConfig; settings that are None keep TRL's defaults."""
    overrides: dict[str, Any] = {}
    if request["batch"] is not None:
        overrides["per_device_train_batch_size"] = request["batch"]
    if request["precision"] is not None:
        overrides["bf16"] = request["precision"] in ("bf16", "bf16_both")
    if request["checkpointing"] is not None:
        overrides["gradient_checkpointing"] = request["checkpointing"]
    return overrides


def rows_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The requested rows in TRL's form: a prompt and its completion, or an image's turns."""
    rows = read_rows(request)
    if request["rows"] == "single":
        rows = [
            {
                "prompt": row["messages"][:-1],
                "completion": row["messages"][-1:],
                "images": row["images"],
            }
            for row in rows
        ]
    return rows


def main() -> None:
    """Trains for some steps and prints their times."""
    request = arguments()
    torch.set_num_threads(request["threads"])
    folder = f"{request['material']}/llava"
    half = request["precision"] in ("bf16_weights", "bf16_both")
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16 if half else torch.float32
    )
    processor = AutoProcessor.from_pretrained(folder)
    data = Dataset.from_list(rows_of(request)).cast_column("images", Sequence(Image()))
    with tempfile.TemporaryDirectory() as output:
        times = Times()
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=output,
                max_steps=request["steps"],
                save_strategy="no",
                report_to="none",
                assistant_only_loss=request["rows"] == "multi",
                max_length=None,
                use_cpu=not torch.cuda.is_available(),
                **options(request),
            ),
            train_dataset=data,
            processing_class=processor,
            peft_config=LoraConfig(
                **LORA, target_modules=TARGETS, modules_to_save=["multi_modal_projector"]
            ),
            callbacks=[clock(request, times)],
        )
        counted = trainer.data_collator = Counted(trainer.data_collator)
        answers = counted.answers(request, data, processor.tokenizer)
        trainer.train()
    report(times, counted, answers)


if __name__ == "__main__":
    main()
