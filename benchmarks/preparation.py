"""Cost of preparing data: `python -m benchmarks.preparation [--rows N] [--stream-rows N] [--json]`.

1. 100,000 question-answer rows about the 5,000 images of easy-VQA: rows per second cold, seconds
   of a warm start.
2. 10 million such rows streamed: rows per second, and the process's peak memory.
3. Tokens per question of easy-VQA with 49 image tokens, with padding: one row per question, and one
   row per image with branches.

Each part runs in its own process. Needs `make models` for the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

TOKENIZER = Path("models/smollm2-135m-instruct")
WORDS = (
    *("the", "small", "red", "circle", "stands", "left", "of", "a", "blue", "square", "under"),
    *("two", "green", "triangles", "on", "grey", "ground", "near", "an", "old", "wall"),
)


def images() -> list[Path]:
    """easy-VQA's 5,000 images."""
    import easy_vqa

    folder = Path(easy_vqa.__file__).parent / "data"
    return sorted((folder / "train" / "images").glob("*.png")) + sorted(
        (folder / "test" / "images").glob("*.png")
    )


def write_rows(path: Path, rows: int) -> None:
    """Writes rows of {image, question, answer}, with distinct questions of 8 to 19 words."""
    names = [str(image) for image in images()]
    with path.open("w") as file:
        for number in range(rows):
            words = [
                WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(8 + number % 12)
            ]
            question = f"In picture {number}, is {' '.join(words)}?"
            file.write(
                json.dumps(
                    {
                        "image": names[number % len(names)],
                        "question": question,
                        "answer": "yes" if number % 3 else "no",
                    }
                )
                + "\n"
            )


def data_section(path: Path, **options: Any) -> Any:
    from vlm_tune.config.data import DataSection, FileSource

    source = FileSource(kind="file", path=str(path), image_root=str(images()[0].parents[2]))
    return DataSection(train=[source], template="smollm2", **options)


def processor(template: str = "smollm2", tokens: int = 49) -> Any:
    from transformers import AutoTokenizer

    from vlm_tune.data.chat.processor import Processor
    from vlm_tune.data.chat.template import load_template
    from vlm_tune.data.images.decode import ImageProcessor
    from vlm_tune.data.types import InputSpec

    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    spec = InputSpec(tokens, "causal", 2048, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return Processor(tokenizer, load_template(template), spec, ImageProcessor(112))


def measure_prepare(folder: Path, rows: int) -> dict[str, float]:
    """Measures cold and warm preparation of `rows` rows."""
    from vlm_tune.data.prepare.run import prepare

    write_rows(folder / "rows.jsonl", rows)
    data = data_section(folder / "rows.jsonl")
    text_processor = processor()
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        prepared = prepare(data, data.train, text_processor, seed=0)
        assert prepared.questions == rows and len(prepared.media) == len(images())
        seconds.append(time.perf_counter() - started)
    return {
        "rows": rows,
        "cold_seconds": seconds[0],
        "cold_rows_per_s": rows / seconds[0],
        "warm_seconds": seconds[1],
    }


def measure_stream(folder: Path, rows: int) -> dict[str, float]:
    """Reads all rows, shuffled in a buffer of 10,000; then builds the first 2,000 batches of 16."""
    from vlm_tune.data.batching.loader import Position
    from vlm_tune.data.batching.streaming import StreamFeed, mixed, shuffled
    from vlm_tune.data.sources.registry import open_source

    write_rows(folder / "rows.jsonl", rows)
    data = data_section(folder / "rows.jsonl", streaming=True)
    reader = open_source(data.train[0], seed=0, streaming=True)
    started = time.perf_counter()
    read = sum(
        1
        for _ in islice(
            shuffled(mixed([reader], data.train, 0), data.shuffle_buffer, 0),
            rows - data.shuffle_buffer,
        )
    )
    reading = time.perf_counter() - started
    text_processor = processor()
    feed = StreamFeed(data, data.train, text_processor, text_processor.images, 16, seed=0)
    started = time.perf_counter()
    batches = min(2000, rows // 16)
    questions = sum(
        batch.questions for window in islice(feed.windows(Position()), batches) for batch in window
    )
    batching = time.perf_counter() - started
    return {
        "rows": rows,
        "read": read,
        "read_rows_per_s": read / reading,
        "batch_rows_per_s": questions / batching,
    }


def measure_tokens(folder: Path, rows: int) -> dict[str, Any]:
    """Counts tokens per question on easy-VQA's train part, in padded batches of 8.

    Batches are drawn at random, and built by the plan.
    """
    import numpy as np

    from vlm_tune.config.data import DataSection, EasyVqaSource
    from vlm_tune.data.batching.sampler import Plan, Sizes
    from vlm_tune.data.prepare.run import prepare

    figures: dict[str, Any] = {}
    source = EasyVqaSource(kind="easy_vqa", split="train")
    for template in ("smollm2", "chatml", "vicuna", "llama3"):
        lengths: dict[str, Any] = {}
        try:
            text_processor = processor(template)
        except Exception as error:
            figures[template] = str(error)
            continue
        for group in ("none", "image"):
            data = DataSection(
                train=[source],
                template=template,
                group=group,  # type: ignore[arg-type]
            )
            prepared = prepare(data, data.train, text_processor, seed=0)
            plan = Plan(prepared, data, Sizes(8), 0)
            epoch = plan.epoch(0)
            widest = [
                [int(plan.lengths[row[0], 0]) for row in epoch.rows(*place, 0, 1)]
                for place in epoch.places(1)
            ]
            lengths[group] = (
                prepared.unit_lengths[:, 1],
                sum(max(batch) * len(batch) for batch in widest),
                prepared.questions,
            )
        plain = lengths["none"]
        joined = lengths["image"]
        drawn = np.random.default_rng(0).permutation(plain[0])
        drawn = drawn[: len(drawn) // 8 * 8].reshape(-1, 8)
        questions = plain[2]
        figures[template] = {
            "row_a_question": float(plain[0].sum() / questions),
            "row_a_question_padded": float(drawn.max(1).sum() * 8 / drawn.size),
            "branches": float(joined[0].sum() / questions),
            "branches_padded": float(joined[1] / questions),
            "padding": float(1 - joined[0].sum() / joined[1]),
            "ratio": float(plain[0].sum() / joined[0].sum()),
            "ratio_padded": float(drawn.max(1).sum() * 8 / drawn.size * questions / joined[1]),
        }
    return figures


PARTS = {"prepare": measure_prepare, "stream": measure_stream, "tokens": measure_tokens}


def main() -> None:
    """Runs the parts and prints their figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--stream-rows", type=int, default=10_000_000)
    parser.add_argument("--parts", default="prepare,stream,tokens")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["VLM_TUNE_CACHE"] = f"{folder}/cache"
            rows = arguments.stream_rows if arguments.one == "stream" else arguments.rows
            figures = PARTS[arguments.one](Path(folder), rows)
            # The larger of this process's peak and that of its largest child process.
            peak = max(
                resource.getrusage(who).ru_maxrss
                for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            )
            print(json.dumps({**figures, "peak_memory_mb": peak * 1024 // 1_000_000}))
        return
    result = {}
    for part in arguments.parts.split(","):
        command = [
            sys.executable,
            "-m",
            "benchmarks.preparation",
            "--one",
            part,
            "--rows",
            str(arguments.rows),
        ]
        done = subprocess.run(
            [*command, "--stream-rows", str(arguments.stream_rows)],
            check=True,
            capture_output=True,
            text=True,
        )
        result[part] = json.loads(done.stdout.splitlines()[-1])
    if arguments.json:
        print(json.dumps(result))
        return
    for part, figures in result.items():
        print(part)
        for name, value in figures.items():
            print(
                f"  {name}: {json.dumps(value)}"
                if isinstance(value, dict)
                else f"  {name}: {value:,.4g}"
                if isinstance(value, float)
                else f"  {name}: {value}"
            )


if __name__ == "__main__":
    main()
