"""Shows samples by token: trained tokens, the prompt, and image slots."""

from __future__ import annotations

from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.truncation import fit
from vlm_tune.data.packing import branch_layout
from vlm_tune.data.prepare.run import conversations, scratch_texts
from vlm_tune.data.types import ANSWER_KINDS, IGNORE_INDEX, Example
from vlm_tune.model.build import build_processor
from vlm_tune.quoting import escaped

ROWS = 200
"""Rows read for each unit that is shown: the rows of one image need not be adjacent."""

STYLES = {
    "trained": "black on green",
    "prompt": "",
    "image": "white on blue",
    "target": "black on green",
}


def sample_tokens(recipe: Recipe, n: int) -> list[dict[str, Any]]:
    """The tokens of the first `n` units of every stage, without loading weights.

    Returns [{stage, id, tokens: [{id, text, kind, branch}]}], where `kind` is prompt, trained
    (decoders), image, or target (the labels of an encoder-decoder). The answers' tokens of a
    preference stage also have `answer`, which is chosen or rejected, and `prompt`, the number of
    the prompt that the answer belongs to.
    """
    stages = recipe.resolved_stages()
    processor = build_processor(recipe, scratch_texts(recipe))
    samples = []
    for name, stage in stages:
        data = stage.data
        rows = list(islice(conversations(data, data.train, stage.seed), ROWS * n))
        units: dict[Any, list[Example]] = {}
        for row in rows:
            for example in fit(row, processor, data.overlong).examples:
                units.setdefault(
                    example.media if data.group == "image" and example.media else example.id, []
                ).append(example)
        for unit in list(units.values())[:n]:
            joined = (
                branch_layout(unit, data.row_length) if processor.spec.layout == "causal" else unit
            )
            samples += [
                {"stage": name, "id": example.id, "tokens": _tokens(example, processor)}
                for example in joined[:n]
            ]
    return samples


def _tokens(example: Example, processor: Processor) -> list[dict[str, Any]]:
    def text(token: int) -> str:
        return str(processor.tokenizer.decode([token]))

    causal = processor.spec.layout == "causal"
    out: list[dict[str, Any]] = []
    answers: list[int | None] = []
    branch = 0
    trained = False
    for place, token in enumerate(example.input_ids.tolist()):
        # A branch begins where positions are not consecutive.
        if (
            place
            and example.positions is not None
            and example.positions[place] != example.positions[place - 1] + 1
        ):
            branch += 1
        kind = "image" if example.image_mask[place] else "trained" if trained else "prompt"
        out.append(
            {
                "id": token,
                "text": "" if kind == "image" else text(token),
                "kind": kind,
                "branch": branch,
            }
        )
        label = int(example.labels[place]) if causal else IGNORE_INDEX
        following = place + 1 < len(example.input_ids) and (
            example.visible_until is None or place + 1 < example.visible_until[place]
        )
        trained = following and label != IGNORE_INDEX
        if label != IGNORE_INDEX:
            # The label's token is the next one shown, or stands here alone.
            answers.append(None if example.answers is None else int(example.answers[place]))
            if not following:
                out.append({"id": label, "text": text(label), "kind": "trained", "branch": branch})
    if not causal:
        numbers = example.label_samples
        out += [
            {
                "id": token,
                "text": text(token),
                "kind": "target",
                "branch": 0 if numbers is None else int(numbers[place]),
            }
            for place, token in enumerate(example.labels.tolist())
        ]
        answers = [] if example.answers is None else example.answers.tolist()
    labelled = [token for token in out if token["kind"] in ("trained", "target")]
    for token, answer in zip(labelled, answers, strict=False):
        if answer is not None:
            token["prompt"], kind = divmod(answer, ANSWER_KINDS)
            token["answer"] = ("chosen", "rejected")[kind]
    return out


def show_samples(console: Console, samples: list[dict[str, Any]], *, ids: bool) -> None:
    """Prints samples in color: trained tokens on green, image slots on blue."""
    console.print(
        Text.assemble(
            ("trained", STYLES["trained"]), " ", ("image slots", STYLES["image"]), " prompt"
        )
    )
    for sample in samples:
        tokens = sample["tokens"]
        trained = sum(token["kind"] in ("trained", "target") for token in tokens)
        images = sum(token["kind"] == "image" for token in tokens)
        title = (
            f"\n{sample['stage']}  {escaped(sample['id'])}: {len(tokens)} tokens, "
            f"{trained} trained, {images} image slots"
        )
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(_line(tokens, ids=ids), soft_wrap=True)


def _judgement(token: dict[str, Any]) -> str:
    """The text before a preference answer, from one of its tokens; empty for another token."""
    return f"{token['answer']}: " if "answer" in token else ""


def _line(tokens: list[dict[str, Any]], *, ids: bool) -> Text:
    line = Text()
    slots = 0
    previous = tokens[0]
    for token in [*tokens, {"kind": "end", "branch": -1}]:
        if token["kind"] == "image":
            slots += 1
            continue
        if slots:
            line.append(f"[image x{slots}]", style=STYLES["image"])
            slots = 0
        if token["kind"] == "end":
            break
        begins = token["branch"] != previous["branch"]
        if token["kind"] == "target" and (begins or previous["kind"] != "target"):
            line.append(f"\n=> {_judgement(token)}", style="dim")
        elif begins:
            line.append(f"\n  branch {token['branch']}: ", style="dim")
        elif token.get("answer") != previous.get("answer") and "answer" in token:
            line.append(f" {_judgement(token)}", style="dim")
        # A row's text may hold control sequences.
        shown = escaped(token["text"]) + (f"⟨{token['id']}⟩" if ids else "")
        line.append(shown, style=STYLES[token["kind"]])
        previous = token
    return line
