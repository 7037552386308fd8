"""Predicted against measured memory: `python -m benchmarks.memory_plan [--json]`.

Six models of different shape are planned, and trained for an epoch by `sft`, each in its own
process. The measured figure is the largest resident set up to the last step (VmHWM, so weights
being created count), less that of the process after a run of a tiny model. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BAR = 0.15
LORA = [
    {"match": "tower.*", "how": "frozen"},
    {"match": "connector.*", "how": "full"},
    {"match": "llm.*", "how": "lora", "r": 16, "target_modules": "all-linear"},
]
FULL = [{"match": "tower.*", "how": "frozen"}, {"match": "*", "how": "full"}]


def llama(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    shape = {
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }
    return {
        "model_type": "llama",
        "config": {**shape, "vocab_size": vocabulary, "num_key_value_heads": width // 128},
    }


def t5(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    shape = {
        "d_model": width,
        "d_ff": 5 * width // 2,
        "num_layers": layers,
        "num_heads": width // 64,
        "feed_forward_proj": "gated-gelu",
    }
    return {"model_type": "t5", "config": {**shape, "vocab_size": vocabulary}}


RUNS: dict[str, dict[str, Any]] = {
    "llama, LoRA, bf16": {
        "scratch": llama(768, 12, 32000),
        "tune": LORA,
        "batch_size": 8,
        "words": 120,
        "precision": "bf16",
    },
    "llama, LoRA, bf16, checkpointing, accumulation": {
        "scratch": llama(768, 12, 32000),
        "tune": LORA,
        "batch_size": 8,
        "words": 120,
        "precision": "bf16",
        "gradient_checkpointing": True,
        "gradient_accumulation": 2,
    },
    "llama, full, fp32": {
        "scratch": llama(512, 8, 16000),
        "tune": FULL,
        "batch_size": 4,
        "words": 120,
        "precision": "fp32",
    },
    "t5, LoRA, fp32": {
        "scratch": t5(512, 8, 16000),
        "tune": LORA,
        "batch_size": 4,
        "words": 130,
        "precision": "fp32",
    },
    "t5, full, bf16, checkpointing": {
        "scratch": t5(640, 8, 32000),
        "tune": FULL,
        "batch_size": 8,
        "words": 130,
        "precision": "bf16",
        "gradient_checkpointing": True,
    },
    "llama, LoRA, nf4": {
        "folder": llama(1024, 12, 32000),
        "tune": LORA,
        "batch_size": 6,
        "words": 110,
        "precision": "bf16",
    },
}


def write_rows(folder: Path, words: int) -> Path:
    """Writes 32 questions of about `words` words, each with an image."""
    from PIL import Image

    chosen = random.Random(0)
    known = [
        f"{first}{second}"
        for first in "bdfgklmnprst"
        for second in ("a", "e", "i", "o", "u", "ar", "en", "il")
    ]
    path = folder / "rows.jsonl"
    rows = []
    for number in range(32):
        name = f"{number}.png"
        Image.new("RGB", (64, 64), (8 * number, 100, 200)).save(folder / name)
        question = " ".join(chosen.choice(known) for _ in range(words + number % 8))
        rows.append(
            {
                "image": name,
                "question": question,
                "answer": " ".join(chosen.choice(known) for _ in range(12)),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(run: dict[str, Any], folder: Path) -> Path:
    """Writes a run's recipe, its rows, and its language model if that is quantised."""
    kind = "seq2seq" if run.get("scratch", {}).get("model_type") == "t5" else "causal"
    settings = ("batch_size", "precision", "gradient_checkpointing", "gradient_accumulation")
    recipe = {
        "name": "memory",
        "output": str(folder / "run"),
        "model": {
            "tower": {
                "kind": "open_clip",
                "config": {
                    "layers": 2,
                    "width": 128,
                    "head_width": 64,
                    "patch_size": 16,
                    "image_size": 64,
                },
            },
            "llm": {"kind": kind}
            | ({"scratch": {"vocab_size": 400, **run["scratch"]}} if "scratch" in run else {}),
        },
        "data": {
            "train": [{"kind": "file", "path": str(write_rows(folder, run["words"]))}],
            "template": "flan" if kind == "seq2seq" else "chatml",
            "max_length": 4096,
        },
        "tune": run["tune"],
        "train": {"epochs": 1, "log_every": 1, **{key: run[key] for key in settings if key in run}},
        "evaluate": {"samples": 0},
    }
    if "folder" in run:
        recipe["model"]["llm"] |= {
            "name": str(save_llm(folder / "llm", run["folder"], recipe)),
            "quantize": "nf4",
        }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def save_llm(folder: Path, scratch: dict[str, Any], recipe: dict[str, Any]) -> Path:
    """Saves a random decoder in bf16 with a tokenizer of the rows' words, as a hub stores it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from vlm_tune.config.data import DataSection
    from vlm_tune.data.chat.template import load_template
    from vlm_tune.data.prepare.run import conversations
    from vlm_tune.model.pretrained.tokenizer import train_tokenizer

    data = DataSection.model_validate(recipe["data"])
    tokenizer = train_tokenizer(
        conversations(data, data.train, 0), 400, load_template(data.template)
    )
    config = AutoConfig.for_model(scratch["model_type"], **scratch["config"])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def resident(name: str) -> int:
    """Bytes of VmRSS, or of VmHWM, its peak."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def predict(path: Path) -> dict[str, Any]:
    """The figures of `plan` for a recipe, without the process's base."""
    from vlm_tune.memory_plan.plan import plan

    planned = plan(path)
    stage = planned.stages[0]
    return {
        "predicted": planned.needed - stage.memory.base,
        "memory": vars(stage.memory),
        "loading": stage.loading - stage.memory.base,
    }


def measure(path: Path) -> dict[str, Any]:
    """Peaks of a real run without the process's base.

    One is up to the last step, the other of the whole run with its checkpoint and saved model.
    """
    from vlm_tune.api import sft
    from vlm_tune.events import Event, TrainSteps

    # A run of a tiny model first: imports and what is set up on first use belong to the base.
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    tiny = json.loads(path.read_text()) | {"output": str(path.parent / "tiny"), "tune": LORA}
    tiny["model"] = tiny["model"] | {
        "llm": {
            "kind": "causal",
            "scratch": {"model_type": "llama", "vocab_size": 400, "config": shape},
        }
    }
    tiny["data"] = tiny["data"] | {"template": "chatml"}
    (path.parent / "tiny.yaml").write_text(json.dumps(tiny))
    sft(path.parent / "tiny.yaml")
    base = resident("VmRSS")
    steps = []
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def show(event: Event) -> None:
        if isinstance(event, TrainSteps):
            steps.append(resident("VmHWM"))

    sft(path, show=show)
    return {"measured": steps[-1] - base, "whole_run": resident("VmHWM") - base, "base": base}


def child(part: str, path: Path, cache: Path) -> dict[str, Any]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLM_TUNE_CACHE": str(cache),
    }
    command = [sys.executable, "-m", "benchmarks.memory_plan", "--part", part, str(path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr[-3000:])
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Prints predicted and measured peaks; exits with 1 if one is off by more than `BAR`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help="runs whose name holds this")
    parser.add_argument("--part", nargs=2, metavar=("PART", "RECIPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part, path = arguments.part
        print(json.dumps({"predict": predict, "measure": measure}[part](Path(path))))
        return
    rows = []
    for name, run in RUNS.items():
        if arguments.only and arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            path = recipe_of(run, folder)
            # The run comes first: it prepares the rows, so that the plan knows their lengths even
            # on a slow machine.
            measured = child("measure", path, folder / "cache")
            row = {"run": name} | child("predict", path, folder / "cache") | measured
        row["ratio"] = row["predicted"] / row["measured"]
        rows.append(row)
        if not arguments.json:
            figures = "  ".join(
                f"{key} {row[key] / 1e6:7,.0f} MB" for key in ("predicted", "measured", "whole_run")
            )
            print(f"{name:48} {figures}  ratio {row['ratio']:.3f}", flush=True)
    if arguments.json:
        print(json.dumps({"bar": BAR, "runs": rows}))
    if any(abs(row["ratio"] - 1) > BAR for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
