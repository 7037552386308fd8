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

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def options(asked: dict[str, Any]) -> dict[str, Any]:
    """SFTConfig's arguments; what is None stays TRL's default."""
    given: dict[str, Any] = {}
    if asked["batch"] is not None:
        given["per_device_train_batch_size"] = asked["batch"]
    if asked["precision"] is not None:
        given["bf16"] = asked["precision"] in ("bf16", "bf16_both")
    if asked["checkpointing"] is not None:
        given["gradient_checkpointing"] = asked["checkpointing"]
    return given


def main() -> None:
    """Trains some steps and prints what they took."""
    asked = arguments()
    torch.set_num_threads(asked["threads"])
    folder = f"{asked['material']}/llava"
    half = asked["precision"] in ("bf16_weights", "bf16_both")
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16 if half else torch.float32
    )
    processor = AutoProcessor.from_pretrained(folder)
    rows: Any = read_rows(asked)
    if asked["rows"] == "single":
        rows = [
            {
                "prompt": row["messages"][:-1],
                "completion": row["messages"][-1:],
                "images": row["images"],
            }
            for row in rows
        ]
    data = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    with tempfile.TemporaryDirectory() as output:
        times = Times()
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=output,
                max_steps=asked["steps"],
                save_strategy="no",
                report_to="none",
                assistant_only_loss=asked["rows"] == "multi",
                max_length=None,
                use_cpu=not torch.cuda.is_available(),
                **options(asked),
            ),
            train_dataset=data,
            processing_class=processor,
            peft_config=LoraConfig(
                **LORA, target_modules=TARGETS, modules_to_save=["multi_modal_projector"]
            ),
            callbacks=[clock(asked, times)],
        )
        counted = trainer.data_collator = Counted(trainer.data_collator)
        answers = counted.answers(asked, data, processor.tokenizer)
        trainer.train()
    report(times, counted, answers)


if __name__ == "__main__":
    main()
