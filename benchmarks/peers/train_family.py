"""TRL's SFTTrainer on a published family's model, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After a line
of standard input it takes a step, and prints {"seconds", "loss"}.
"""

from __future__ import annotations

import json
import sys
import tempfile

import torch
from peft import LoraConfig
from train_dpo import Turns
from train_trl import TARGETS, rows_of
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Trains for the requested steps."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    folder = request["model"]
    half = request["precision"] == "bf16_weights"
    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=torch.bfloat16 if half else torch.float32,
        attn_implementation=request["attention"],
    )
    with tempfile.TemporaryDirectory() as output:
        SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=output,
                max_steps=request["steps"],
                per_device_train_batch_size=request["batch"] // request["accumulated"],
                gradient_accumulation_steps=request["accumulated"],
                bf16=request["precision"] == "bf16",
                gradient_checkpointing=False,
                assistant_only_loss=request["rows"] == "multi",
                learning_rate=request["learning_rate"],
                logging_steps=1,
                max_length=None,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=rows_of(request),
            processing_class=AutoProcessor.from_pretrained(folder),
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS),
            callbacks=[Turns(("loss",), cpu_time=request["cpu_time"])],
        ).train()


if __name__ == "__main__":
    main()
