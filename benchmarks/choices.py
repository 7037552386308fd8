"""Choosing between 20 answers, against scoring each of them by itself.

Run: python -m benchmarks.choices [--questions 1000] [--json FILE]

The model has the comparison's shape (a ViT-B/32 tower, 49 tokens an image) and random weights in
the connector, the questions are easy-VQA's. Both sides get the tower's features, so that only the
LLM's work is compared. Alone, each choice is the answer in a row of its own, first one row a pass,
then in batches of rows of like length; as that takes long, it is measured on the first `--alone`
questions. The probabilities of both sides must be the same to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import material, ours
from vlm_tune.resources import cache_folder

ANSWERS = ("yes", "no", "circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
OTHERS = ("purple", "pink", "white", "oval", "star", "hexagon", "none")
CHOICES = (*ANSWERS, *COLORS, *OTHERS)
"""Those of the data, and others up to 20."""

BATCH = 64
"""Rows of a batch of the batched side."""


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` returns, and its seconds."""
    started = time.perf_counter()
    outcome = work()
    return outcome, time.perf_counter() - started


class Choosing:
    """The model and the questions of both sides."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from vlm_tune.config.load import parse_recipe
        from vlm_tune.data.prepare.run import read_part
        from vlm_tune.data.types import distinct_media
        from vlm_tune.model.build import build
        from vlm_tune.model.feature_cache import tower_features

        data = folder / "choices-material"
        # An image has about five questions.
        material.write_rows(data, options.questions // 4 + 8)
        material.write_models(data, options.decoder, 49)
        text = ours.recipe(
            "causal", data, options.decoder, folder / "choices", batch=8, steps=1, precision="fp32"
        )
        recipe = parse_recipe(text)
        self.model = build(recipe, []).eval()
        rows = read_part(recipe.data, "train", self.model.processor, recipe.seed)
        rows = [row for row in rows if row.media][: options.questions]
        if len(rows) < options.questions:
            raise SystemExit(f"there are {len(rows)} questions")
        self.questions = [replace(row, messages=row.messages[:-1]) for row in rows]
        self.images = len(distinct_media(rows))
        self.features = tower_features(self.model, distinct_media(rows))

    def together(self, count: int) -> list[list[float]]:
        """Probabilities of the choices of the first questions, by `choose`."""
        from vlm_tune.generation.choices import choose

        answers = choose(
            self.model,
            self.questions[:count],
            [CHOICES] * count,
            fetch=self.features,
            cached=True,
        )
        return [list((answer.probabilities or {}).values()) for answer in answers]

    @torch.inference_mode()
    def alone(self, count: int, size: int) -> list[list[float]]:
        """The same by `size` rows a pass, each with one question and one choice."""
        from vlm_tune.data.batching.collate import collate
        from vlm_tune.generation.choices import answered, token_logprobs

        model = self.model
        examples = [
            example
            for question in self.questions[:count]
            for example in answered(model, question, CHOICES)
        ]
        order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
        scores = [0.0] * len(examples)
        for start in range(0, len(order), size):
            places = order[start : start + size]
            chosen = [examples[place] for place in places]
            batch = collate(chosen, model.processor.spec, fetch=self.features, cached=True)
            hidden, targets = model.llm.supervised(model.embed(batch), batch)
            parts = token_logprobs(model.llm, hidden, targets).split(
                [example.supervised for example in chosen]
            )
            for place, part in zip(places, parts, strict=True):
                scores[place] = float(part.sum())
        table = torch.tensor(scores, dtype=torch.float64).view(count, len(CHOICES))
        return table.softmax(1).tolist()


def difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """The largest difference between two tables of probabilities."""
    return float((torch.tensor(one) - torch.tensor(other)).abs().max())


def compare(bench: Choosing, options: argparse.Namespace) -> dict[str, Any]:
    """Times all sides and checks that they agree."""
    bench.together(8)
    bench.alone(1, 1)
    probabilities, seconds = timed(lambda: bench.together(options.questions))
    rates = {"together": options.questions / seconds}
    differences = {}
    for name, size in (("one row a pass", 1), (f"{BATCH} rows a pass", BATCH)):
        alone, seconds = timed(lambda size=size: bench.alone(options.alone, size))
        rates[name] = options.alone / seconds
        differences[name] = difference(alone, probabilities[: options.alone])
        print(f"{name}: {rates[name]:.2f} questions/s, {differences[name]:.1e} apart", flush=True)
        if differences[name] > 1e-5:
            raise SystemExit("the probabilities differ: nothing is compared")
    return {
        "questions": options.questions,
        "images": bench.images,
        "choices": len(CHOICES),
        "questions_per_s": rates,
        "largest_difference": max(differences.values()),
        "ratio": rates["together"] / rates["one row a pass"],
        "ratio_to_batched_rows": rates["together"] / rates[f"{BATCH} rows a pass"],
    }


def main() -> None:
    """Prints the ratios; with --json also saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--questions", type=int, default=1000)
    add("--alone", type=int, default=40, help="questions whose choices are scored by themselves")
    add("--decoder", type=Path, default=Path("models/smollm2-135m-instruct"))
    add("--threads", type=int, default=os.cpu_count())
    add("--cache", type=Path, default=cache_folder("throughput"))
    add("--json", type=Path)
    options = parser.parse_args()
    options.alone = min(options.alone, options.questions)
    options.decoder = options.decoder.absolute()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as features:
        os.environ["VLM_TUNE_CACHE"] = features
        figures = compare(Choosing(options, options.cache.absolute()), options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
