"""DPO, GRPO and further instruction tuning from one base, compared on easy-VQA's test part.

Run: python -m benchmarks.preference_gains [--seeds 0 1 2] [--steps 60] [--only sft dpo]

The first two stages of recipes/easyvqa-grpo.yaml make a base for each seed: a small T5 after 45
steps of instruction tuning. From there each way trains the same weights on the same questions, with
as many to a step, for `--steps` steps (`grpo` for those of its recipe):

    sft      the right answers
    wrong    answers of which a share is wrong (`--wrong`), as those of hasty annotators
    dpo      the right answer rather than another of its kind
    grpo     sampled answers, rewarded where they are right

Of `sft`, `wrong` and `dpo` the learning rate is the best of three on the validation part, chosen
with the first seed. Prints the paired differences of exact match on the test part, with 95%
intervals by image. A run that has ended in `--folder` is taken as it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.finished import finished_run
from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.draws import draw
from vlm_tune.data.sources.easy_vqa import KINDS, answer_type, part_folder, questions
from vlm_tune.evaluation.answer_files import read_answers
from vlm_tune.evaluation.compare import compare
from vlm_tune.resources import resource_folder

WAYS = ("sft", "wrong", "dpo", "grpo")
RATES = (5e-4, 1e-3, 2e-3)
"""Learning rates that each way but `grpo` is tried with."""
VALIDATION_IMAGES = 200
DPO = {
    "kind": "dpo",
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.2],
    "beta": 0.1,
    "reference": "copy",
}


def base_recipe(seed: int, output: Path) -> Recipe:
    """The GRPO recipe's first two stages."""
    shipped = load_recipe(resource_folder("recipes") / "easyvqa-grpo.yaml")
    stages = [stage.model_dump(exclude_unset=True) for stage in shipped.stages[:2]]
    changes = {"output": str(output), "seed": seed, "stages": stages}
    return load_recipe(resource_folder("recipes") / "easyvqa-grpo.yaml", changes)


def way_recipe(way: str, base: Recipe, rate: float, output: Path, steps: int) -> Recipe:
    """Further training of a base's model in one way; `wrong.jsonl` lies beside the base."""
    path = resource_folder("recipes") / "easyvqa-grpo.yaml"
    changes: dict[str, Any] = {
        "output": str(output),
        "seed": base.seed,
        "model": {"pretrained": str(Path(base.output) / "model")},
        "evaluate.samples": 0,
    }
    if way == "grpo":
        reward = load_recipe(path).stages[2].model_dump(exclude_unset=True)
        return load_recipe(path, changes | {"stages": [reward]})
    changes |= {
        "stages": [],
        "train.steps": steps,
        "train.learning_rate": rate,
        "train.schedule": {"kind": "cosine", "warmup": 0.05},
    }
    if way == "wrong":
        rows = Path(base.output).parent / "wrong.jsonl"
        images = str(part_folder("train") / "images")
        changes["data.train"] = [{"kind": "file", "path": str(rows), "image_root": images}]
    if way == "dpo":
        preference = {"kind": "easy_vqa", "task": "preference"}
        changes["data.train"] = [preference | {"split": "train"}]
        changes["data.validation"] = [preference | {"split": "validation"}]
        changes["objective"] = DPO
    return load_recipe(path, changes)


def hasty_rows(wrong: float, seed: int = 0) -> Iterator[dict[str, str]]:
    """easy-VQA's training rows, of which the answers of a share are others of their kind."""
    for row, question, answer, image in questions("train", VALIDATION_IMAGES):
        written = answer
        if draw(seed, f"hasty {row}") < wrong * 2**64:
            others = [other for other in KINDS[answer_type(answer)] if other != answer]
            written = others[draw(seed, f"written {row}") % len(others)]
        yield {"image": f"{image}.png", "question": question, "answer": written}


def best_rate(way: str, base: Recipe, folder: Path, steps: int) -> float:
    """The learning rate after which most validation questions are answered right."""
    from vlm_tune import evaluate

    scores = {}
    for rate in RATES:
        output = folder / run_name(way, base, rate, steps)
        run = finished_run(way_recipe(way, base, rate, output, steps), command(way))
        scores[rate] = evaluate(run, base, split="validation").accuracy
        print(f"{way} at {rate:g}: validation {scores[rate]:.2%}", flush=True)
    return max(scores, key=scores.__getitem__)


def run_name(way: str, base: Recipe, rate: float, steps: int) -> str:
    """The folder's name of a run."""
    return f"{way}-{base.seed}" if way == "grpo" else f"{way}-{base.seed}-{steps}-{rate:g}"


def command(way: str) -> str:
    """The command that trains a way."""
    return "sft" if way == "wrong" else way


def line(name: str, first: Path, second: Path) -> str:
    """The paired comparison of two runs as a row of the table."""
    names = (first.name, second.name)
    pair = compare(read_answers(first), read_answers(second), names=names, metrics=["exact_match"])
    entry = pair.metrics["exact_match"]
    return (
        f"| {name} | {entry['first']['value']:.2%} | {entry['second']['value']:.2%} | "
        "{difference:+.2%} ({difference_low:+.2%} to {difference_high:+.2%}) | {p:.4f} |".format(
            **entry
        )
    )


def table(seed: int, base: Path, runs: dict[str, Path]) -> list[str]:
    """A seed's rows: each way beside the base, and each other one beside instruction tuning."""
    lines = [line(f"{seed}: the base, {way}", base, run) for way, run in runs.items()]
    for tuned in ("sft", "wrong"):
        lines += [
            line(f"{seed}: {tuned}, {way}", runs[tuned], run)
            for way, run in runs.items()
            if tuned in runs and way in ("dpo", "grpo")
        ]
    return lines


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="of all ways but grpo (default: 60)")
    parser.add_argument("--wrong", type=float, default=0.4, help="share of wrong answers")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where runs are written")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="preference-gains-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps(row) + "\n" for row in hasty_rows(options.wrong))
    (folder / "wrong.jsonl").write_text(rows)
    bases = [base_recipe(seed, folder / f"base-{seed}") for seed in options.seeds]
    lines = compared(bases, folder, options.only, options.steps)
    print("| seed: first, second | first | second | difference | p |\n|---|---|---|---|---|")
    print("\n".join(lines))


def compared(bases: Sequence[Recipe], folder: Path, ways: Sequence[str], steps: int) -> list[str]:
    """Trains every way from every base; returns the rows of the table."""
    lines = []
    rates: dict[str, float] = {}
    for base in bases:
        runs = {}
        base_run = finished_run(base)
        for way in ways:
            if way not in rates and way != "grpo":
                rates[way] = best_rate(way, base, folder, steps)
            rate = rates.get(way, 0.0)
            output = folder / run_name(way, base, rate, steps)
            runs[way] = finished_run(way_recipe(way, base, rate, output, steps), command(way))
        lines += table(base.seed, base_run, runs)
        print("\n".join(table(base.seed, base_run, runs)), flush=True)
    return lines


if __name__ == "__main__":
    main()
