"""Chooses what a recipe says about data, training and evaluation, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vlm_tune.config.objectives import LEAST_IMAGES
from vlm_tune.recipe_writer.draft import Draft
from vlm_tune.recipe_writer.find_data import PARTS, Sources
from vlm_tune.recipe_writer.look import ROWS, Answers, Facts
from vlm_tune.recipe_writer.machine import Machine
from vlm_tune.recipe_writer.models import ModelChoice, Size
from vlm_tune.recipe_writer.small_data import unlearnable

MANY_IMAGES = 4
"""Images of a row from which on each is pooled to fewer tokens."""
POOLED = 6
"""Side of the grid of tokens to which they are pooled."""
FEW_IMAGES = 10
"""Images under which none is held out: a score on one or two would say nothing."""
SMALL_SET = 40
"""Images under which larger shares are held out."""
QUESTIONS = 1.5
"""Questions an image from which on a decoder reads an image's rows together."""
LONGEST = 2048
"""Tokens of the longest row."""
MARGIN = 1.25
"""Share by which a row that was not read may be longer than those that were."""
TEMPLATE_TOKENS = 64
"""Tokens of a chat format around a row's text."""
ROW_LENGTH = 1024
"""Tokens of a row of joined questions, as `data.row_length` has it by default."""
LEAST_STEPS = 8
"""Optimizer steps that an epoch has at least; fewer rows get smaller batches."""


@dataclass(frozen=True)
class Effort:
    """How much a size of model trains: questions in all, at most so many epochs, batches."""

    questions: int
    epochs: int
    batch: int
    largest: int


EFFORTS: dict[Size, Effort] = {
    "scratch": Effort(questions=60_000, epochs=60, batch=32, largest=32),
    "small": Effort(questions=20_000, epochs=30, batch=8, largest=8),
    "aligned": Effort(questions=8_000, epochs=40, batch=20, largest=20),
    "large": Effort(questions=5_000, epochs=5, batch=32, largest=16),
}
"""By size of the model; `batch` is the units of an optimizer step, `largest` those read at once.

780 questions about icons needed 24 epochs of a small LLM: 9 were too few.
"""

EVALUATIONS = 12
"""Evaluations of a run of many short epochs."""

STRATIFIED = ", and every class has its share"
"""End of the reason for a split by category."""

SCORES: dict[Answers, str] = {
    "repeated": "the score is the share of answers that equal the expected ones (exact match): "
    "few different answers come again and again, so it fits; it is also given by category",
    "short": "the score is the share of answers that equal the expected ones (exact match); they "
    "are short, so it fits, but a synonym counts as wrong",
    "long": "the score, exact match, says little about answers as long as these: look at the "
    "validation loss and at the answers in the report",
}


def shape_tower(draft: Draft, facts: Facts, size: Size) -> None:
    """Sets how the tower sees the images: their edges, and the tokens each takes."""
    whole = "model.pretrained" in draft.values
    tower = dict(draft.values.get("model.tower", {}))
    reasons = []
    if facts.elongated > 0.1:
        tower["resize"] = "pad"
        reasons.append(
            f"{facts.elongated:.0%} of the images are not square: padding shows their edges too"
        )
    if facts.most_images >= MANY_IMAGES and size != "scratch":
        tower["grid"] = POOLED
        reasons.append(
            f"rows have up to {facts.most_images} images, so each is pooled to {POOLED} x {POOLED} "
            "tokens"
        )
    if reasons:
        before = [] if whole else [draft.reasons["model.tower"]]
        draft.set("model.tower", tower, "\n".join([*before, *reasons]))


def set_data(draft: Draft, facts: Facts, sources: Sources, choice: ModelChoice) -> None:
    """Sets sources, held-out parts, lengths and grouping."""
    for part in PARTS:
        if sources[part]:
            draft.set(f"data.{part}", sources[part], _about(part, facts))
    split, reason = held_out(facts, sources)
    if split:
        draft.set("data.split", split, reason)
    elif reason:
        draft.reasons["data.train"] += f"\n{reason}"
    longest = _longest_row(facts, choice)
    media = choice.tokens_of(facts.most_images)
    draft.set(
        "data.max_length",
        longest,
        f"the longest row has {facts.longest_row:,} bytes of text (a token has one or more), and "
        f"its {facts.medium}s take up to {media:,} tokens",
    )
    draft.set("data.overlong", "drop", "longer rows are left out and counted")
    if facts.bad:
        draft.set(
            "data.on_bad_row",
            "quarantine",
            f"{facts.bad:,} of the first {facts.read + facts.bad:,} rows can't be used; they are "
            "left out and written to quarantine.jsonl (see `vlm-tune check`)",
        )
        draft.set("data.max_bad_rows", max(100, 2 * facts.bad))
    if _groups_images(facts, choice):
        draft.set(
            "data.group",
            "image",
            f"{facts.questions_per_image:.1f} questions about each {facts.medium}, which is read "
            "once for all of them",
        )
        if longest > ROW_LENGTH:
            draft.set("data.row_length", longest, "room for images and questions in one row")


def _about(part: str, facts: Facts) -> str:
    if part != "train":
        return f"a file of its own: it is the {part} part"
    language = f", language {facts.language}" if facts.language else ""
    return (
        f"{facts.rows:,} rows of the form {' and '.join(facts.forms)}, about "
        f"{facts.media_text}{'' if facts.seconds else ' (median)'}, "
        f"{facts.questions_per_image:.1f} questions about each{language}"
    )


def held_out(facts: Facts, sources: Sources) -> tuple[dict[str, Any] | None, str]:
    """The shares to hold out for parts without a source, and the reason."""
    missing = [part for part in ("validation", "test") if not sources[part]]
    if facts.all_images >= FEW_IMAGES and unlearnable(facts) and "validation" in missing:
        missing.remove("validation")
        open_answers = (
            f"no validation part is held out: {facts.unrepeated:.0%} of the questions have an "
            f"answer that belongs to one {facts.medium}, which could not be learned from the others"
        )
        split, reason = _shares(facts, missing)
        return split, f"{open_answers}\n{reason}".strip()
    return _shares(facts, missing)


def _shares(facts: Facts, missing: list[str]) -> tuple[dict[str, Any] | None, str]:
    """The shares to hold out for these parts, and the reason."""
    if not missing:
        return None, ""
    if facts.all_images < FEW_IMAGES:
        return None, (
            f"nothing is held out: {facts.all_images} {facts.medium}s are too few; add rows about "
            "others as data.validation and data.test"
        )
    share = 0.2 if facts.all_images < SMALL_SET else 0.1 if facts.all_images < 10_000 else 0.02
    split: dict[str, Any] = dict.fromkeys(missing, share)
    reason = (
        f"there is no file for {' and '.join(missing)}, so rows are held out; those that share "
        f"{'a clip' if facts.seconds else 'an image'} stay together"
    )
    if facts.smallest_class * share >= 1:
        split["stratify"] = True
        reason += STRATIFIED
    return split, reason


def hold_out_less(draft: Draft) -> bool:
    """Changes a split that does not fit the data; returns False where none is left to change."""
    split = draft.values.pop("data.split", None)
    if split is None:
        return False
    reason = draft.reasons.pop("data.split")
    if split.pop("stratify", False):
        draft.set("data.split", split, reason.removesuffix(STRATIFIED))
        return True
    draft.reasons["data.train"] += (
        "\nnothing is held out: too many rows share their images; add a file of rows about other "
        "images as data.validation and data.test"
    )
    return True


def set_training(
    draft: Draft, facts: Facts, machine: Machine, choice: ModelChoice, batch: int
) -> None:
    """Sets epochs, batches, precision, schedule and memory options for a batch of `batch` units."""
    effort = EFFORTS[choice.size]
    epochs = min(max(round(effort.questions / facts.all_questions), 1), effort.epochs)
    draft.set(
        "train.epochs",
        epochs,
        f"about {epochs * facts.all_questions:,} questions in all: small sets need several passes",
    )
    draft.set("train.batch_size", batch)
    accumulation = max(step_units(facts, choice) // batch, 1)
    if accumulation > 1:
        draft.set(
            "train.gradient_accumulation",
            accumulation,
            f"{batch * accumulation} a step, in parts that fit into memory",
        )
    if choice.size == "scratch":
        draft.set("train.learning_rate", 1.0e-3, "usual for a small model from random weights")
        draft.set("train.precision", "fp32", "a model this small gains nothing from 16 bits")
    else:
        precision, reason = machine.precision
        if precision == "fp16" and not choice.causal:
            precision, reason = "fp32", f"T5 overflows in fp16, and {reason}"
        draft.set("train.precision", precision, reason)
    draft.set("train.schedule", {"kind": "cosine", "warmup": 0.05})
    if choice.size == "large":
        draft.set("train.gradient_checkpointing", True, "a third more work for much less memory")


def units(facts: Facts, choice: ModelChoice) -> int:
    """The units of an epoch: images where their rows are grouped, else rows."""
    return facts.all_images if _groups_images(facts, choice) else facts.rows


def planned_tokens(facts: Facts, choice: ModelChoice) -> int | None:
    """The tokens of a row to plan with, where the data has too many rows to be prepared before.

    None leaves that to the plan, which knows prepared data or takes the longest row.
    """
    if facts.rows <= ROWS or not _groups_images(facts, choice):
        return None
    return max(ROW_LENGTH, _longest_row(facts, choice))


def _longest_row(facts: Facts, choice: ModelChoice) -> int:
    """The tokens of the longest row that is trained on."""
    tokens = MARGIN * facts.longest_row + choice.tokens_of(facts.most_images)
    return min(64 * math.ceil((tokens + TEMPLATE_TOKENS) / 64), LONGEST)


def _groups_images(facts: Facts, choice: ModelChoice) -> bool:
    """Whether the rows of an image are one unit; a decoder gains most from that."""
    return choice.causal and choice.shares and facts.questions_per_image >= QUESTIONS


def step_units(facts: Facts, choice: ModelChoice) -> int:
    """The units of an optimizer step."""
    return max(min(EFFORTS[choice.size].batch, units(facts, choice) // LEAST_STEPS), 1)


def batches(facts: Facts, choice: ModelChoice) -> list[int]:
    """The batches to try, the largest first: halves of the first."""
    batch = min(step_units(facts, choice), EFFORTS[choice.size].largest)
    least = LEAST_IMAGES if choice.size == "aligned" else 1
    sizes = [batch]
    while sizes[-1] >= 2 * least:
        sizes.append(sizes[-1] // 2)
    return sizes


def set_evaluation(draft: Draft, facts: Facts, choice: ModelChoice) -> None:
    """Sets how often and how answers are generated and scored; after `set_training`."""
    # The most that any tokenizer here makes of a text: a token for two bytes of Latin text, and
    # two for each other character.
    tokens = facts.longest_answer if facts.latin > 0.9 else 2 * facts.longest_answer
    longest = min(max(tokens // 2 if choice.size != "scratch" else tokens, 4) + 4, 512)
    draft.set(
        "evaluate.max_new_tokens",
        longest,
        f"{SCORES[facts.answers]}\nthe longest answer has {facts.longest_answer:,} characters",
    )
    epochs = draft.values["train.epochs"]
    if epochs > EVALUATIONS:
        steps = epochs * math.ceil(units(facts, choice) / step_units(facts, choice))
        draft.set(
            "evaluate.every",
            max(steps // EVALUATIONS, 1),
            f"steps: about {EVALUATIONS} times a run; after each of {epochs} short epochs would "
            "take longer than training",
        )
    draft.set("evaluate.batch_size", 16 if choice.size == "large" else 64)
    draft.set("evaluate.limit", 500, "validation rows that are scored while training")
