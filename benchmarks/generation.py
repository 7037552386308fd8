"""Evaluation by generation, ours against transformers' batched `generate`.

Run: python -m benchmarks.generation [--json FILE]

Both answer the same test questions of easy-VQA with the same merged weights, transformers with
those of the exported LLaVA folder. The runs are separate processes that alternate. The measured
time follows loading: decoding images, tower, prompts, generation, text. The tower's features are
recomputed in every run. In fp32 both must give the same texts. In bf16 another layout of rows
rounds differently, so the share of equal texts is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import material, ours
from benchmarks.peers import SCRIPTS
from benchmarks.runs import execute
from vlm_tune.resources import cache_folder


def trained(folder: Path, decoder: Path, steps: int, threads: int) -> Path:
    """Trains the comparison's LLaVA-shaped model, so that its answers have the data's form.

    The tower is a ViT-B/32 with random weights, the decoder SmolLM2. Returns the run's folder; a
    finished run is reused.
    """
    images = 256
    run = folder / f"generation-{steps}"
    if not (run / "result.json").is_file():
        data = folder / f"material-{images}-49"
        material.write_rows(data, images)
        material.write_models(data, decoder, 49)
        recipe = folder / f"generation-{steps}.yaml"
        recipe.write_text(ours.recipe("causal", data, decoder, run, batch=8, steps=steps))
        print(f"training a model for {steps} steps in {run}", flush=True)
        command = [sys.executable, "-m", "vlm_tune.cli", "sft", str(recipe), "--overwrite"]
        subprocess.run(
            command,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
        )
    return run


def written(run: Path, folder: Path) -> tuple[Path, Path]:
    """Writes the run's model merged in fp32, and exported as LLaVA.

    So both sides round the same weights.
    """
    from vlm_tune.api import export, merge

    merged = folder / "merged"
    llava = folder / "llava"
    merge(run, merged, dtype="fp32")
    export(merged, llava, dtype="fp32")
    return merged, llava


def write_chats(run: Path, merged: Path, folder: Path, images: int | None) -> int:
    """Writes the questions about the first test images for both sides; returns their number."""
    from vlm_tune.config.load import load_recipe
    from vlm_tune.data.prepare.run import read_part
    from vlm_tune.model.checkpoint import load_model

    material.write_rows(folder, images, "test")
    recipe = load_recipe(run / "recipe.yaml", overrides(folder))
    rows = read_part(recipe.data, "test", load_model(merged).processor, recipe.seed)
    chats = [
        [
            {
                "role": turn.role,
                "content": [
                    {"type": "text", "text": part}
                    if isinstance(part, str)
                    else {"type": "image", "path": str(part.source)}
                    for part in turn.parts
                ],
            }
            for turn in row.messages[:-1]
        ]
        for row in rows
    ]
    (folder / "chats.json").write_text(json.dumps(chats))
    return len(chats)


def overrides(folder: Path) -> dict[str, Any]:
    """Overrides of the run's recipe for the evaluation."""
    return {
        "data.test": [{"kind": "file", "path": str(folder / "single.jsonl")}],
        "data.validation": [],
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Evaluates with our model in this process."""
    import torch

    from vlm_tune.api import evaluate_model
    from vlm_tune.config.load import load_recipe
    from vlm_tune.model.checkpoint import load_model
    from vlm_tune.precision import DTYPES

    torch.set_num_threads(request["threads"])
    started = time.perf_counter()
    model = load_model(Path(request["folder"]), dtype=DTYPES[request["dtype"]])
    settings = {
        "evaluate.batch_size": request["batch"],
        "evaluate.max_new_tokens": request["max_new_tokens"],
        "evaluate.baselines": [],
    }
    recipe = load_recipe(request["recipe"], overrides(Path(request["rows"])) | settings)
    evaluate_model(model, recipe, limit=32)
    ready = time.perf_counter()
    evaluation = evaluate_model(model, recipe)
    seconds = time.perf_counter() - ready
    return {
        "seconds": seconds,
        "texts": [answer.generated.strip() for answer in evaluation.answers],
        "load_s": ready - started,
        "accuracy": evaluation.accuracy,
    }


class Answering:
    """Runs both sides on the same questions."""

    def __init__(self, options: argparse.Namespace, run: Path, folder: Path) -> None:
        self.options = options
        self.run = run
        self.folder = folder
        self.merged, self.llava = written(run, folder)
        self.counts = {
            images: write_chats(run, self.merged, self.rows(images), images)
            for images in {options.images, options.checked}
        }

    def rows(self, images: int | None) -> Path:
        """The folder of the questions about so many images."""
        return self.folder / f"test-{images}"

    def once(self, name: str, batch: int, dtype: str, images: int | None) -> dict[str, Any]:
        """The figures of one run: name, batch, dtype, questions_per_s, seconds, texts, ..."""
        request = {
            "batch": batch,
            "dtype": dtype,
            "max_new_tokens": self.options.max_new_tokens,
            "threads": self.options.threads,
        }
        if name == "ours":
            request |= {
                "folder": str(self.merged),
                "recipe": str(self.run / "recipe.yaml"),
                "rows": str(self.rows(images)),
            }
            command = [sys.executable, "-m", "benchmarks.generation", "--part", json.dumps(request)]
        else:
            request |= {"folder": str(self.llava), "rows": str(self.rows(images) / "chats.json")}
            command = [sys.executable, str(SCRIPTS / "generate_llava.py"), json.dumps(request)]
        with tempfile.TemporaryDirectory(
            dir=self.folder
        ) as cache:  # without features of an earlier run
            before = os.environ.get("VLM_TUNE_CACHE")
            os.environ["VLM_TUNE_CACHE"] = cache
            ended = execute(command, self.options.threads, self.options.timeout)
            os.environ.pop("VLM_TUNE_CACHE") if before is None else os.environ.update(
                VLM_TUNE_CACHE=before
            )
        if ended.code:
            raise SystemExit(f"{name}, batch {batch}, {dtype}: {ended.why}")
        figures = json.loads(ended.out.strip().splitlines()[-1])
        rate = len(figures["texts"]) / figures["seconds"]
        print(
            (
                f"{name:12} {dtype} batch {batch:4}: {rate:7.1f} answers/s, "
                f"{figures['seconds']:6.1f} s, loaded in {figures['load_s']:.1f} s"
            ),
            flush=True,
        )
        return {"name": name, "batch": batch, "dtype": dtype, "questions_per_s": rate, **figures}

    def best_batch(self, name: str) -> int:
        """The batch size with the most answers a second on the smaller part."""
        runs = [
            self.once(name, batch, self.options.dtype, self.options.checked)
            for batch in self.options.batches
        ]
        return max(runs, key=lambda run: run["questions_per_s"])["batch"]


def equal(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The share of equal texts."""
    pairs = list(zip(mine["texts"], theirs["texts"], strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def compare(bench: Answering) -> dict[str, Any]:
    """Checks the texts in fp32, finds the best batches, and measures in turns."""
    options = bench.options
    exact = [bench.once(name, 16, "fp32", options.checked) for name in ("ours", "transformers")]
    same = equal(*exact)
    print(f"fp32: {same:.2%} of {bench.counts[options.checked]} texts are equal")
    if same < 1:
        odd = next(
            pair
            for pair in zip(exact[0]["texts"], exact[1]["texts"], strict=True)
            if pair[0] != pair[1]
        )
        raise SystemExit(
            f"ours says {odd[0]!r} where transformers says {odd[1]!r}: nothing is compared"
        )
    batches = {name: bench.best_batch(name) for name in ("transformers", "ours")}
    runs = [
        bench.once(name, batches[name], options.dtype, options.images)
        for _ in range(options.rounds)
        for name in batches
    ]
    rates = {
        name: statistics.median(run["questions_per_s"] for run in runs if run["name"] == name)
        for name in batches
    }
    shares = [equal(mine, theirs) for theirs, mine in zip(runs[::2], runs[1::2], strict=True)]
    return {
        "ratio": rates["ours"] / rates["transformers"],
        "questions_per_s": rates,
        "batches": batches,
        "questions": bench.counts[options.images],
        "dtype": options.dtype,
        "equal_texts": statistics.median(shares),
        "equal_texts_fp32": same,
        "accuracy": runs[-1]["accuracy"],
        "runs": [{key: value for key, value in run.items() if key != "texts"} for run in runs],
    }


def main() -> None:
    """Prints the ratio; with --json also saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        help=(
            "a finished run that can be exported as LLaVA; without it one is trained for "
            "--train-steps"
        ),
    )
    add("--train-steps", type=int, default=60)
    add("--decoder", type=Path, default=Path("models/smollm2-135m-instruct"))
    add(
        "--images",
        type=int,
        default=100,
        help="test images whose questions are answered; 0 for all 1,000",
    )
    add(
        "--checked",
        type=int,
        default=30,
        help="test images of the check in fp32 and of the sweep over batches",
    )
    add(
        "--batches",
        type=lambda text: [int(one) for one in text.split(",")],
        default=[32, 64, 128, 192],
    )
    add("--dtype", choices=["bf16", "fp32"], default="bf16")
    add("--max-new-tokens", type=int, default=8)
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=os.cpu_count())
    add("--timeout", type=float, default=1800)
    add("--cache", type=Path, default=cache_folder("throughput"))
    add("--json", type=Path)
    add("--part", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(answer(options.part)))
        return
    options.images = options.images or None
    run = options.run or trained(
        options.cache.absolute(), options.decoder.absolute(), options.train_steps, options.threads
    )
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Answering(options, run.absolute(), Path(folder)))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
