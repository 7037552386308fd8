"""The server answers rows as the export does in plain transformers, which has no code of ours."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from tests.helpers.export_samples import llava_text, opened, saved_model
from tests.helpers.served import image_part, listening, served
from vlm_tune import VisionLanguageModel, export
from vlm_tune.serving.engine import BatchingEngine

TOKENS = 12
WORDS = [
    "what",
    "color",
    "shape",
    "is",
    "the",
    "big",
    "red",
    "blue",
    "circle",
    "square",
    "left",
    "of",
]


def rows(count: int) -> list[tuple[bytes, str]]:
    """Images of all sizes, a few questions to each, and questions of several lengths."""
    random = np.random.default_rng(3)
    questions: list[tuple[bytes, str]] = []
    while len(questions) < count:
        width, height = random.integers(20, 90, 2)
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(buffer, "PNG")
        for length in random.integers(1, 12, 4):
            questions.append((buffer.getvalue(), " ".join(random.choice(WORDS, length))))
    return questions[:count]


def by_transformers(folder: Path, questions: list[tuple[bytes, str]]) -> list[str]:
    """The answers of the export, one by one."""
    model, processor = opened(folder)
    answers = []
    for image, text in questions:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(
            text=prompt,
            images=Image.open(io.BytesIO(image)),
            return_tensors="pt",
            add_special_tokens=False,
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


async def by_server(url: str, questions: list[tuple[bytes, str]]) -> list[str]:
    """The server's answers, all asked for at once."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def ask(image: bytes, text: str) -> str:
            content: Any = [image_part(image), {"type": "text", "text": text}]
            reply = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], max_tokens=TOKENS
            )
            return reply.choices[0].message.content or ""

        return await asyncio.gather(*(ask(*each) for each in questions))


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_the_server_answers_as_the_export(
    count: int, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    run, _ = saved_model(llava_text(tiny_recipe), tmp_path / "saved")
    export(run, tmp_path / "llava", dtype="fp32")
    model = VisionLanguageModel.from_pretrained(run)
    questions = rows(count)
    engine = BatchingEngine({"tiny": model}, queue=count, batch=16)
    with listening(served(model, engine, queue=count), engine) as url:
        answers = asyncio.run(by_server(url, questions))
    assert answers == by_transformers(tmp_path / "llava", questions)
    assert len(set(answers)) > count // 4
