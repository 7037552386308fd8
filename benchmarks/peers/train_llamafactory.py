"""LLaMA-Factory on the LLaVA-shaped model, through the Python entry that its command line uses."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from probe import LORA, Counted, Times, arguments, clock, read_rows, report

DATASET = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    },
}


def options(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of a LLaMA-Factory run; settings that are None keep its defaults."""
    overrides: dict[str, Any] = {
        "model_name_or_path": f"{request['material']}/llava",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": LORA["r"],
        "lora_alpha": LORA["lora_alpha"],
        "lora_target": "all",
        "freeze_multi_modal_projector": False,
        "additional_target": "multi_modal_projector",
        "template": "llava",
        "default_system": "",  # so that prompts are as long as the other peers'
        "dataset": "questions",
        "dataset_dir": str(folder),
        "output_dir": str(folder / "run"),
        "overwrite_cache": True,
        "max_steps": request["steps"],
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": not torch.cuda.is_available(),
        "cutoff_len": 4096,
    }
    if request["batch"] is not None:
        overrides["per_device_train_batch_size"] = request["batch"]
    if request["precision"] is not None:
        overrides["bf16"] = request["precision"] == "bf16"
    if request["checkpointing"] is not None:
        overrides["disable_gradient_checkpointing"] = not request["checkpointing"]
    return overrides


def main() -> None:
    """Trains for some steps and prints their times."""
    request = arguments()
    torch.set_num_threads(request["threads"])
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    rows = read_rows(request)
    for row in rows:
        row["messages"][0]["content"] = "<image>" + row["messages"][0]["content"]
    times = Times()
    captured: dict[str, Any] = {}
    inner = workflow.CustomSeq2SeqTrainer

    class Trainer(inner):
        """LLaMA-Factory's trainer, with its collator wrapped and its data captured."""

        def __init__(self, **named: Any) -> None:
            named["data_collator"] = captured["counted"] = Counted(named["data_collator"])
            super().__init__(**named)
            captured["rows"] = self.train_dataset
            captured["tokenizer"] = named["tokenizer"]

    workflow.CustomSeq2SeqTrainer = Trainer
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "dataset_info.json").write_text(
            json.dumps({"questions": {"file_name": "rows.json", **DATASET}})
        )
        run_exp(options(request, folder), callbacks=[clock(request, times)])
    counted = captured["counted"]
    answers = counted.answers(request, captured["rows"], captured["tokenizer"])
    report(times, counted, answers)


if __name__ == "__main__":
    main()
