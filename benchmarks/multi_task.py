"""Three tasks of easy-VQA trained alone, and together with adapters that they share or not.

Run: python -m benchmarks.multi_task [--align 7] [--epochs 1] [--limit N] [--folder FOLDER]

The stages `align` and `base` of recipes/easyvqa-tasks.yaml make a small model. Over it LoRA trains
each task alone, and all together with one adapter (hard), with an adapter each that is tied to
their mean (soft), and with one in the first layer and one each above (layered). All see each row
equally often. Prints the exact match of each task on the test part with its interval, and the
paired difference from the task alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.evaluation.answer_files import read_answers
from vlm_tune.evaluation.compare import compare
from vlm_tune.evaluation.metrics import Answer
from vlm_tune.resources import resource_folder

SHARING: dict[str, dict[str, Any]] = {
    "hard": {"sharing": "hard"},
    "soft": {"sharing": "soft", "tie": 0.01},
    "layered": {"sharing": "layered", "shared_layers": 1},
}
TASKS = ("color", "shape", "presence")


def base_recipe(options: argparse.Namespace, output: Path) -> Recipe:
    """The recipe's first two stages, which make the model that the others go on from."""
    changes: dict[str, Any] = {
        "output": str(output),
        "stages.0.train.epochs": options.align,
        "data.test": [],
    }
    recipe = load_recipe(resource_folder("recipes") / "easyvqa-tasks.yaml", changes)
    return recipe.model_copy(update={"stages": recipe.stages[:2]})


def task_recipe(
    options: argparse.Namespace, base: Path, output: Path, sharing: Mapping[str, Any], task: str
) -> Recipe:
    """LoRA over the base, for all tasks or (`task`) one; from the last stage of the recipe."""
    path = resource_folder("recipes") / "easyvqa-tasks.yaml"
    (_, written) = load_recipe(path).resolved_stages()[-1]
    shared = written.tune[2].model_dump(exclude_none=True)
    rule = {k: v for k, v in shared.items() if k not in ("sharing", "tie")} | dict(sharing)

    def chosen(part: str) -> list[dict[str, Any]]:
        sources = [each.model_dump(exclude_none=True) for each in getattr(written.data, part)]
        limit = {"limit": options.limit} if options.limit else {}
        return [
            {**source, **(limit if part == "train" else {})}
            for source in sources
            if source["task_name"] == task or not task
        ]

    changes = {
        "output": str(output),
        "stages": [],
        "model": {"pretrained": str(base)},
        "tune.2": rule,
        "train.epochs": options.epochs,
        "evaluate.baselines": [],
        **{f"data.{part}": chosen(part) for part in ("train", "validation", "test")},
    }
    return load_recipe(path, changes)


def lines(alone: Sequence[Answer], together: Mapping[str, Sequence[Answer]]) -> list[str]:
    """A line for each task and way to share: exact match in percent, beside the task alone."""
    shown = []
    for task in TASKS:
        first = [answer for answer in alone if answer.source == task]
        for name, answers in together.items():
            second = [answer for answer in answers if answer.source == task]
            entry = compare(first, second, names=("alone", name)).metrics["exact_match"]
            one, other = (
                "{value:6.2%} ({low:.2%} to {high:.2%})".format(**entry[side])
                for side in ("first", "second")
            )
            difference = "{difference:+.2%} ({difference_low:+.2%} to {difference_high:+.2%})"
            shown.append(
                f"{task:9} {name:8} {other}, alone {one}, difference {difference.format(**entry)}"
            )
    return shown


def main() -> None:
    """Trains the base, each task alone and all together, and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--align", type=float, default=7, help="epochs of the stage align")
    parser.add_argument("--epochs", type=float, default=1, help="epochs of each LoRA run")
    parser.add_argument("--limit", type=int, help="train each task on its first rows only")
    parser.add_argument("--folder", type=Path, help="where runs are written")
    options = parser.parse_args()
    from vlm_tune import sft

    folder = options.folder or Path(tempfile.mkdtemp(prefix="multi-task-"))
    base = sft(base_recipe(options, folder / "base")).folder / "model"
    alone: list[Answer] = []
    for task in TASKS:
        recipe = task_recipe(options, base, folder / task, SHARING["hard"], task)
        alone += read_answers(sft(recipe).folder)
    together = {
        name: read_answers(sft(task_recipe(options, base, folder / name, sharing, "")).folder)
        for name, sharing in SHARING.items()
    }
    print("\n".join(lines(alone, together)))


if __name__ == "__main__":
    main()
