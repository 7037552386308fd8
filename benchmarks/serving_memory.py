"""The memory of a server's engine after many questions: it must not grow with their number.

Run: python -m benchmarks.serving_memory [--requests 20000] [--json FILE]

A tiny model with random weights answers questions of 1 to 60 words about 32 images, a quarter of
them with drawn tokens, a tenth of them broken off. The resident memory at the end is compared with
that after a tenth of the questions.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import material
from benchmarks.memory_plan import resident
from benchmarks.serving import WORDS
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.resources import cache_folder
from vlm_tune.serving.engine import BatchingEngine
from vlm_tune.serving.jobs import Failed, Job, JobEvent, Piece

RECIPE = """
name: bench
output: {folder}/run
model:
  tower: {{kind: open_clip, config: {{layers: 2, width: 64, head_width: 32, patch_size: 16, \
image_size: 32}}}}
  connector: {{kind: mlp, norm: true}}
  llm: {{kind: causal, scratch: {{model_type: llama, config: {{hidden_size: 32, \
intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1}}}}}}
data:
  train: [{{kind: file, path: {folder}/single.jsonl}}]
  template: chatml
  max_length: 512
tune: [{{match: "*", how: full}}]
train: {{steps: 1, precision: fp32}}
"""


def tiny_model(folder: Path) -> VisionLanguageModel:
    """A model of random weights with a tokenizer of the questions."""
    from vlm_tune.config.load import parse_recipe
    from vlm_tune.data.prepare.run import conversations
    from vlm_tune.model.build import build

    recipe = parse_recipe(RECIPE.format(folder=folder))
    rows = conversations(recipe.data, recipe.data.train, recipe.seed)
    torch.manual_seed(0)
    return build(recipe, rows, model_class=VisionLanguageModel).eval()


def random_job(rng: random.Random, images: list[Path]) -> Job:
    """A job with words and settings by chance."""
    from vlm_tune.generation.requests import request_conversation
    from vlm_tune.model.language.decoding import Decoding

    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
    request = {"prompt": words, "images": [rng.choice(images)]}
    drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9} if rng.random() < 0.25 else {}
    decoding = Decoding(max_new_tokens=rng.randint(1, 24), **drawn)
    return Job(request_conversation(1, request), decoding, "model")


class Asked:
    """A question that takes one of the clients' places until it ends or is broken off."""

    def __init__(self, places: threading.Semaphore, errors: list[Exception]) -> None:
        self._places = places
        self._errors = errors
        self._lock = threading.Lock()
        self._ended = False

    def __call__(self, event: JobEvent) -> None:
        """Takes an event of the engine."""
        if isinstance(event, Failed):
            self._errors.append(event.error)
        if not isinstance(event, Piece):
            self.end()

    def end(self) -> None:
        """Gives the place back, once."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._places.release()


def answer_all(
    engine: BatchingEngine, images: list[Path], options: argparse.Namespace
) -> dict[str, Any]:
    """Asks all questions, so many at once, and notes the memory at ten points."""
    rng = random.Random(0)
    places = threading.Semaphore(options.clients)
    errors: list[Exception] = []
    memory: list[int] = []
    for number in range(1, options.requests + 1):
        places.acquire()
        place = Asked(places, errors)
        ticket = engine.submit(random_job(rng, images), place)
        if number % 10 == 0:
            ticket.cancel()
            place.end()
        if number % (options.requests // 10) == 0:
            memory.append(resident("VmRSS"))
            print(f"{number} questions: {memory[-1] / 2**20:.0f} MiB", flush=True)
    return {"memory": memory, "ratio": memory[-1] / memory[0], "errors": len(errors)}


def main() -> None:
    """Prints the figures; with --json also saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--requests", type=int, default=20_000)
    add("--clients", type=int, default=64)
    add("--threads", type=int, default=1)
    add("--cache", type=Path, default=cache_folder("throughput"))
    add("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.cache.absolute() / "serving-material"
    material.write_rows(folder, 32)
    images = sorted((folder / "images").iterdir())[:32]
    engine = BatchingEngine({"model": tiny_model(folder)}, queue=4096, batch=options.clients)
    started = time.perf_counter()
    figures = answer_all(engine, images, options)
    engine.close(60)
    figures |= {"requests": options.requests, "seconds": time.perf_counter() - started}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
