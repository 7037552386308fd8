"""TRL's GRPOTrainer on the LLaVA-shaped model, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After a line
of standard input it takes a step, and prints {"seconds", "loss", "reward",
"completions/mean_length"}.
"""

from __future__ import annotations

import json
import sys
import tempfile

import torch
from datasets import Dataset, Image, Sequence
from peft import LoraConfig
from probe import read_rows
from rewards import vowels
from train_dpo import Turns
from train_trl import TARGETS
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

GROUP = 8
"""Completions of a prompt."""


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
    rows = [{"prompt": row["messages"][:1], "images": row["images"]} for row in read_rows(request)]
    data = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    with tempfile.TemporaryDirectory() as output:
        GRPOTrainer(
            model=model,
            reward_funcs=vowels,
            args=GRPOConfig(
                output_dir=output,
                max_steps=request["steps"],
                num_generations=GROUP,
                max_completion_length=request["length"],
                per_device_train_batch_size=request["micro_batch"],
                # All completions of a step are sampled at once, and trained in micro-batches.
                gradient_accumulation_steps=request["batch"] * GROUP // request["micro_batch"],
                bf16=request["precision"] == "bf16",
                gradient_checkpointing=False,
                learning_rate=request["learning_rate"],
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=data,
            processing_class=AutoProcessor.from_pretrained(folder),
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS),
            callbacks=[
                Turns(("loss", "reward", "completions/mean_length"), cpu_time=request["cpu_time"])
            ],
        ).train()


if __name__ == "__main__":
    main()
