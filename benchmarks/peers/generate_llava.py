"""transformers' own batched `generate` on an exported LLaVA folder; imports nothing of vlm_tune.

Takes one JSON argument: folder, rows (a JSON file of chats, images as paths), batch, dtype,
max_new_tokens, threads. Prints one line: {"seconds", "texts", "load_s"}. Prompts of similar length
are batched together.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@torch.inference_mode()
def answer(model: Any, processor: Any, chats: list[Any], request: dict[str, Any]) -> list[str]:
    """Greedy answers to the chats, in the order of the chats."""
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    paths = [
        [part["path"] for turn in chat for part in turn["content"] if part["type"] == "image"]
        for chat in chats
    ]
    order = sorted(range(len(chats)), key=lambda place: len(prompts[place]))
    answers = [""] * len(chats)
    for start in range(0, len(order), request["batch"]):
        chosen = order[start : start + request["batch"]]
        images = [[Image.open(path).convert("RGB") for path in paths[place]] for place in chosen]
        inputs = processor(
            images=images,
            text=[prompts[place] for place in chosen],
            padding=True,
            return_tensors="pt",
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        ids = model.generate(**inputs, max_new_tokens=request["max_new_tokens"], do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
        for place, text in zip(
            chosen, processor.batch_decode(ids, skip_special_tokens=True), strict=True
        ):
            answers[place] = text.strip()
    return answers


def main() -> None:
    """Answers all chats; the first batch is run once before, as a warm-up."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    started = time.perf_counter()
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        request["folder"], dtype=DTYPES[request["dtype"]]
    ).eval()
    processor: Any = AutoProcessor.from_pretrained(request["folder"])
    # Pillow resizes as the model was trained with; torchvision's pixels are off by a level or two.
    processor.image_processor = AutoImageProcessor.from_pretrained(request["folder"], backend="pil")
    chats = json.loads(Path(request["rows"]).read_text())
    answer(model, processor, chats[: min(request["batch"], 32)], request)
    ready = time.perf_counter()
    texts = answer(model, processor, chats, request)
    print(
        json.dumps(
            {"seconds": time.perf_counter() - ready, "texts": texts, "load_s": ready - started}
        )
    )


if __name__ == "__main__":
    main()
