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


def options(asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments of a run; what is None stays LLaMA-Factory's default."""
    given: dict[str, Any] = {
        "model_name_or_path": f"{asked['material']}/llava",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": LORA["r"],
        "lora_alpha": LORA["lora_alpha"],
        "lora_target": "all",
        "freeze_multi_modal_projector": False,
        "additional_target": "multi_modal_projector",
        "template": "llava",
        "default_system": "",  # as long a prompt as the others have
        "dataset": "questions",
        "dataset_dir": str(folder),
        "output_dir": str(folder / "run"),
        "overwrite_cache": True,
        "max_steps": asked["steps"],
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": not torch.cuda.is_available(),
        "cutoff_len": 4096,
    }
    if asked["batch"] is not None:
        given["per_device_train_batch_size"] = asked["batch"]
    if asked["precision"] is not None:
        given["bf16"] = asked["precision"] == "bf16"
    if asked["checkpointing"] is not None:
        given["disable_gradient_checkpointing"] = not asked["checkpointing"]
    return given


def main() -> None:
    """Trains some steps and prints what they took."""
    asked = arguments()
    torch.set_num_threads(asked["threads"])
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    rows = read_rows(asked)
    for row in rows:
        row["messages"][0]["content"] = "<image>" + row["messages"][0]["content"]
    times = Times()
    kept: dict[str, Any] = {}
    inner = workflow.CustomSeq2SeqTrainer

    class Trainer(inner):
        """Theirs, whose collator and data are looked at."""

        def __init__(self, **named: Any) -> None:
            named["data_collator"] = kept["counted"] = Counted(named["data_collator"])
            super().__init__(**named)
            kept["rows"] = self.train_dataset
            kept["tokenizer"] = named["tokenizer"]

    workflow.CustomSeq2SeqTrainer = Trainer
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "dataset_info.json").write_text(
            json.dumps({"questions": {"file_name": "rows.json", **DATASET}})
        )
        run_exp(options(asked, folder), callbacks=[clock(asked, times)])
    counted = kept["counted"]
    answers = counted.answers(asked, kept["rows"], kept["tokenizer"])
    report(times, counted, answers)


if __name__ == "__main__":
    main()
