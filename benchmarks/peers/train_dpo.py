"""TRL's DPOTrainer on the LLaVA-shaped model, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After
a line of standard input it takes a step, and prints {"seconds", "loss", "logps/chosen",
"logps/rejected"}.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset, Image, Sequence
from peft import LoraConfig
from probe import read_rows
from train_trl import TARGETS
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Turns(TrainerCallback):
    """Waits for a line before every step; its seconds include reading the step's rows.

    Prints each step's seconds and the logged figures of these `names`. With `cpu_time` seconds are
    the process's own, not the clock's.
    """

    def __init__(self, names: tuple[str, ...], *, cpu_time: bool) -> None:
        self.names = names
        self.now = time.process_time if cpu_time else time.perf_counter
        self.began = 0.0
        self.seconds = 0.0

    def on_train_begin(self, *unused: Any, **named: Any) -> None:
        """Waits for the first step."""
        self.wait()

    def on_step_end(self, *unused: Any, **named: Any) -> None:
        """Measures the step."""
        self.seconds = self.now() - self.began

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
        """Prints the step that ended, and waits for the next one."""
        if "loss" not in logs:  # the summary at the end
            return
        figures = {name: logs[name] for name in self.names}
        print(json.dumps({"seconds": self.seconds, **figures}), flush=True)
        self.wait()

    def wait(self) -> None:
        """Returns when a line comes, at which a step begins.

        After the last step too, since the memory of a process that has ended can't be read.
        """
        if not sys.stdin.readline():
            sys.exit()
        self.began = self.now()


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
    data = Dataset.from_list(read_rows(request)).cast_column("images", Sequence(Image()))
    with tempfile.TemporaryDirectory() as output:
        DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=output,
                max_steps=request["steps"],
                per_device_train_batch_size=request["batch"],
                bf16=request["precision"] == "bf16",
                gradient_checkpointing=False,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, 0.2],
                beta=0.1,
                learning_rate=request["learning_rate"],
                logging_steps=1,
                max_length=None,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=data,
            processing_class=AutoProcessor.from_pretrained(folder),
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS),
            callbacks=[
                Turns(("loss", "logps/chosen", "logps/rejected"), cpu_time=request["cpu_time"])
            ],
        ).train()


if __name__ == "__main__":
    main()
