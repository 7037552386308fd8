"""DPO, GRPO and further instruction tuning from one base, compared on easy-VQA's test part.

Run: python -m benchmarks.preference_gains [--seeds 0 1 2] [--steps 60 240] [--only sft dpo]

The first two stages of recipes/easyvqa-grpo.yaml make a base for each seed: a small T5 after 45
steps of instruction tuning. From there each way trains the same weights on the same questions, with
as many to a step, for each of `--steps` (`grpo` for those of its recipe):

    sft      the right answers
    wrong    answers of which a share is wrong (`--wrong`), as those of hasty annotators
    dpo      the right answer rather than another of its kind
    grpo     sampled answers, rewarded where they are right

Of `sft`, `wrong` and `dpo` the learning rate is the best of three on the validation part, chosen
for each seed and number of steps; only that run answers the test part. Prints the paired
differences of exact match on the test part, with 95% intervals by image, of each seed and over all
of them; a run is named by its way, seed, steps and rate. A run that has ended in `--folder` is
taken as it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.finished import finished_run
from vlm_tune import evaluate
from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.draws import draw
from vlm_tune.data.sources.easy_vqa import KINDS, answer_type, part_folder, questions
from vlm_tune.evaluation.answer_files import ANSWERS_FILE, read_answers, save_answers
from vlm_tune.evaluation.compare import compare
from vlm_tune.evaluation.metrics import Answer
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
        "data.test": [],
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


def best_run(way: str, base: Recipe, folder: Path, steps: int) -> Path:
    """A way's run from a base, at the rate after which it answers most validation questions.

    The test part is answered by that run alone.
    """
    if way == "grpo":
        run = finished_run(way_recipe(way, base, 0.0, folder / f"grpo-{base.seed}", steps), way)
    else:
        scores = {}
        for rate in RATES:
            output = folder / f"{way}-{base.seed}-{steps}-{rate:g}"
            tried = finished_run(way_recipe(way, base, rate, output, steps), command(way))
            scores[tried] = evaluate(tried, base, split="validation").accuracy
            print(f"{tried.name}: validation {scores[tried]:.2%}", flush=True)
        run = max(scores, key=scores.__getitem__)
    if not (run / ANSWERS_FILE).is_file():
        save_answers(run / ANSWERS_FILE, evaluate(run, base).answers)
    return run


def command(way: str) -> str:
    """The command that trains a way."""
    return "sft" if way == "wrong" else way


def line(first: Sequence[Path], second: Sequence[Path]) -> str:
    """The paired comparison of two ways' runs, one a seed, as a row of the table."""
    names = (_name(first), _name(second))
    pair = compare(_answers(first), _answers(second), names=names, metrics=["exact_match"])
    entry = pair.metrics["exact_match"]
    difference = "{difference:+.2%} ({difference_low:+.2%} to {difference_high:+.2%})".format(
        **entry
    )
    scores = f"{entry['first']['value']:.2%} | {entry['second']['value']:.2%}"
    return f"| {names[0]} | {names[1]} | {scores} | {difference} | {entry['p']:.4f} |"


def _name(runs: Sequence[Path]) -> str:
    return ", ".join(run.name for run in runs)


def _answers(runs: Sequence[Path]) -> list[Answer]:
    """The test answers of all runs; those about one image stay together, whichever run's."""
    return [
        replace(answer, id=f"{number}/{answer.id}")
        for number, run in enumerate(runs)
        for answer in read_answers(run)
    ]


def table(bases: Sequence[Path], runs: dict[str, list[Path]]) -> list[str]:
    """Each way beside the bases, and each other one beside instruction tuning; a run a base."""
    lines = [line(bases, each) for each in runs.values()]
    for tuned in ("sft", "wrong"):
        lines += [
            line(runs[tuned], each)
            for way, each in runs.items()
            if tuned in runs and way in ("dpo", "grpo")
        ]
    return lines


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[60, 240], help="of all ways but grpo"
    )
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
    print("| first | second | exact match | of the second | difference | p |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


def compared(
    bases: Sequence[Recipe], folder: Path, ways: Sequence[str], numbers: Sequence[int]
) -> list[str]:
    """Trains every way from every base for each number of steps; returns the rows of the table.

    With several bases the last rows of each number of steps are over all of them.
    """
    lines: list[str] = []
    for steps in numbers:
        base_runs: list[Path] = []
        runs: dict[str, list[Path]] = {way: [] for way in ways}
        for base in bases:
            base_runs.append(finished_run(base))
            for way in ways:
                runs[way].append(best_run(way, base, folder, steps))
            lines += _new(lines, table(base_runs[-1:], {way: runs[way][-1:] for way in ways}))
        if len(bases) > 1:
            lines += _new(lines, table(base_runs, runs))
    return lines


def _new(lines: Sequence[str], rows: Sequence[str]) -> list[str]:
    """Prints and returns the rows that are not among the lines: GRPO's do not change with steps."""
    new = [row for row in rows if row not in lines]
    print("\n".join(new), flush=True)
    return new


if __name__ == "__main__":
    main()
