"""A trainer of TRL on the LLaVA-shaped model, one step at a time."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, Image, Sequence
from peft import LoraConfig
from train_trl import TARGETS
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

Request = dict[str, Any]


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


def take_steps(
    trainer: Callable[..., Any],
    config: Callable[..., Any],
    rows: Callable[[Request], list[dict[str, Any]]],
    options: Callable[[Request], dict[str, Any]],
    names: tuple[str, ...],
    **named: Any,
) -> None:
    """Trains for the steps of the request on the command line, one for each line that is read.

    Args:
        trainer: TRL's trainer.
        config: The class of its arguments.
        rows: The rows of a request.
        options: The trainer's own arguments for a request, beside those that all share.
        names: The figures to print of each step.
        **named: Further arguments of the trainer.
    """
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    half = request["precision"] == "bf16_weights"
    model = AutoModelForImageTextToText.from_pretrained(
        request["model"],
        dtype=torch.bfloat16 if half else torch.float32,
        attn_implementation=request["attention"],
    )
    with tempfile.TemporaryDirectory() as output:
        trainer(
            model=model,
            args=config(
                output_dir=output,
                max_steps=request["steps"],
                bf16=request["precision"] == "bf16",
                gradient_checkpointing=False,
                learning_rate=request["learning_rate"],
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **options(request),
            ),
            train_dataset=Dataset.from_list(rows(request)).cast_column("images", Sequence(Image())),
            processing_class=AutoProcessor.from_pretrained(request["model"]),
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS),
            callbacks=[Turns(names, cpu_time=request["cpu_time"])],
            **named,
        ).train()
