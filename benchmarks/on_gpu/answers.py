"""Answers to 500 questions about 50 images: ours against transformers' static-cache `generate`.

Random weights end no answer, so both write all of the new tokens. That both write the same ones is
a check of `checks`, in fp32.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.on_gpu.material import material, shape
from benchmarks.on_gpu.measuring import device_type, memory_gb
from benchmarks.on_gpu.report import Report
from benchmarks.on_gpu.training import recipe_text

NEW_TOKENS = 8
BATCHES = (250, 125, 50)
"""Of transformers, the largest that fits; each divides 500, so that no shape is compiled twice."""


def _now() -> float:
    if device_type() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _figures(questions: int, seconds: float, warm: float, batch: int) -> dict[str, Any]:
    peak = torch.cuda.max_memory_allocated() / 1e9 if device_type() == "cuda" else 0.0
    return {
        "batch": batch,
        "questions_per_s": questions / seconds,
        "tokens_per_s": questions * NEW_TOKENS / seconds,
        "ms": 1000 * seconds,
        "first_step_s": warm,
        "peak_gb": peak,
    }


def ours(report: Report) -> None:
    """`evaluate_model`: decoding, tower, prefill, answers, scores; after loading and a warm-up."""
    from vlm_tune.api import evaluate_model
    from vlm_tune.config.load import parse_recipe
    from vlm_tune.generation.chat import VisionLanguageModel
    from vlm_tune.model.build import build

    name = report.options["shape"]
    kind = shape(name, tiny=report.tiny)
    home = material(report.folder, name, tiny=report.tiny)
    text = recipe_text(kind, home, report.folder / "answers", "rows", 1, compiles=not report.tiny)
    recipe = parse_recipe(text)
    device = torch.device(device_type())
    model = build(recipe, [], device=device, model_class=VisionLanguageModel)
    # Other images, so that no feature of the measured ones is cached.
    other = text.replace(str(home / "test" / "single.jsonl"), str(home / "single.jsonl"))
    began = _now()
    evaluate_model(model, parse_recipe(other), limit=20 if report.tiny else 250)
    started = _now()
    scores = evaluate_model(model, recipe)
    seconds = _now() - started
    batch = recipe.evaluate.batch_size
    report.row("answers", **_figures(len(scores.answers), seconds, started - began, batch))


def transformers(report: Report) -> None:
    """LlavaForConditionalGeneration.generate with a static cache, prompts sorted by length."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    name = report.options["shape"]
    home = material(report.folder, name, tiny=report.tiny)
    processor: Any = AutoProcessor.from_pretrained(home / "llava")
    processor.tokenizer.padding_side = "left"
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        home / "llava", dtype=torch.bfloat16
    ).to(device_type())
    model.eval()
    prompts = sorted(_prompts(home / "test", processor), key=lambda prompt: len(prompt[0]))
    longest = (
        max(len(processor.tokenizer(text)["input_ids"]) for text, _ in prompts)
        + shape(name, tiny=report.tiny).image_tokens
    )
    for batch in BATCHES:
        if report.tiny:
            batch = len(prompts) // 2
        try:
            began = _now()
            _generate(model, processor, prompts[:batch], batch, longest)
            started = _now()
            _generate(model, processor, prompts, batch, longest)
            seconds = _now() - started
        except torch.OutOfMemoryError:
            report.note(f"out of memory with a batch of {batch} in {memory_gb():.0f} GB")
            torch.cuda.empty_cache()
            continue
        figures = _figures(len(prompts), seconds, started - began, batch)
        report.row("answers transformers", **figures)
        return
    raise RuntimeError("out of memory with every batch")


def _prompts(folder: Path, processor: Any) -> list[tuple[str, str]]:
    """The text and the image's path of each question."""
    rows = [json.loads(line) for line in (folder / "single.jsonl").read_text().splitlines()]
    return [
        (
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image"},
                            {"type": "text", "text": row["messages"][0]["content"]},
                        ],
                    }
                ],
                add_generation_prompt=True,
            ),
            str(folder / row["images"][0]),
        )
        for row in rows
    ]


@torch.inference_mode()
def _generate(
    model: Any, processor: Any, prompts: list[tuple[str, str]], batch: int, longest: int
) -> None:
    """Answers prompts, in batches of one shape."""
    from PIL import Image

    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        inputs = processor(
            images=[Image.open(path).convert("RGB") for _, path in chosen],
            text=[text for text, _ in chosen],
            padding="max_length",
            max_length=longest,
            return_tensors="pt",
        ).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        ids = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            cache_implementation="static",
        )
        processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
