"""Shows samples by token: trained tokens, the prompt, and image slots."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from vlm_tune.config.grpo import Grpo
from vlm_tune.config.objectives import Contrastive, Matching
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batching.corruption import corruption_of
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.truncation import fit
from vlm_tune.data.packing import Tree, branch_layout, trees
from vlm_tune.data.prepare.job import plan_job
from vlm_tune.data.prepare.run import conversations, scratch_texts
from vlm_tune.data.types import ANSWER_KINDS, IGNORE_INDEX, Conversation, Example
from vlm_tune.model.build import build_processor
from vlm_tune.quoting import escaped, name_list

ROWS = 200
"""Rows read for each unit that is shown: the rows of one image need not be adjacent."""

SLOTS = {"image": "image", "frame": "video frame", "audio": "audio"}
"""Kinds of slots of media, as they are shown."""
MATCHING = {"chosen": "match", "rejected": "mismatch"}
"""The two answers of a matching stage: to a caption with its image, and with another one."""
COMPARES = {
    "image_text": "image and caption are compared",
    "image_image": "two augmentations of the image are compared",
    "both": "two augmentations of the image are compared, and image and caption",
}
"""What a contrastive stage does with a sample, by its views."""
STYLES = {
    "trained": "black on green",
    "prompt": "",
    "target": "black on green",
    "caption": "black on cyan",
    **dict.fromkeys(SLOTS, "white on blue"),
}


def sample_tokens(recipe: Recipe, n: int) -> list[dict[str, Any]]:
    """The tokens of the first `n` units of every stage, without loading weights.

    Returns [{stage, id, tokens: [{id, text, kind, branch}]}], where `kind` is prompt, trained
    (decoders), target (the labels of an encoder-decoder), or a slot of a medium: image, frame (of
    a video) or audio. The answers' tokens of a preference stage also have `answer`, which is chosen
    or rejected, and `prompt`, the number of the prompt that the answer belongs to. Those of a
    matching stage are match, the answer where the image is the caption's, and mismatch.

    Samples of a contrastive stage have the slots and words whose vectors are compared, and
    `compares`: its `views`. The words, of kind caption, are read and not answered, and nothing else
    of the row is.

    Samples of a stage that samples its completions have prompts alone, and `completions`: their
    `number` after each prompt, their `most_tokens`, what they are `rewarded_by`, and the prompts'
    `references` and last tokens (`after`), in the same order.

    Several answers or completions have `separate`, where each is trained in a row of its own.
    """
    processor = build_processor(recipe, scratch_texts(recipe))
    samples = []
    for name, stage in recipe.resolved_stages():
        data = stage.data
        of_stage = processor.variant(data.template, data.system, data.enable_thinking)
        for unit in list(_units(stage, of_stage, n).values())[:n]:
            if isinstance(stage.objective, Grpo):
                shown = _groups(unit, stage.objective, of_stage, stage.data.row_length)
            else:
                shown = _joined(unit, stage, of_stage)
            samples += [{"stage": name, **sample} for sample in shown[:n]]
    return samples


Shown = tuple[Conversation, Example]
"""An example and the row that it is made of."""


def _units(stage: Recipe, processor: Processor, n: int) -> dict[Any, list[Shown]]:
    """The examples of a stage's first rows by unit: a row, or an image with all rows about it.

    An example of a stage that samples is the prompt of its row.
    """
    data = stage.data
    job = plan_job(data, data.train, processor, seed=stage.seed, part="train")
    units: dict[Any, list[Shown]] = {}
    rows = (
        (row, of_source)
        for source, of_source in zip(job.sources, job.processors, strict=True)
        for row in conversations(data, [source], stage.seed)
    )
    for row, of_source in islice(rows, ROWS * n):
        examples = fit(row, of_source, data.overlong).examples
        if isinstance(stage.objective, Grpo):
            examples = [of_source.prompt(row)] * len(examples)
        for example in examples:
            unit = example.media if data.group == "image" and example.media else example.id
            units.setdefault(unit, []).append((row, example))
    return units


def _joined(unit: list[Shown], stage: Recipe, processor: Processor) -> list[dict[str, Any]]:
    """The samples of a unit, whose rows a decoder reads as branches of one."""
    examples = [example for _, example in unit]
    corruption = corruption_of(stage.objective, processor, stage.seed)
    if corruption is not None:
        examples = corruption.of_unit(examples, 0)
    if processor.spec.layout == "causal":
        examples = branch_layout(examples, stage.data.row_length)
    samples: list[dict[str, Any]] = [
        {"id": example.id, "tokens": _tokens(example, processor)}
        | _separate(processor, several=example.visible_until is not None)
        for example in examples
    ]
    if isinstance(stage.objective, Contrastive):
        return [_compared(sample, stage.objective, processor) for sample in samples]
    if isinstance(stage.objective, Matching):
        for token in (token for sample in samples for token in sample["tokens"]):
            if "answer" in token:
                token["answer"] = MATCHING[token["answer"]]
    return samples


def _compared(
    sample: dict[str, Any], objective: Contrastive, processor: Processor
) -> dict[str, Any]:
    """A sample of what a contrastive stage reads: slots, and the words of captions."""
    words = objective.views != "image_image"
    tokens = []
    for token in sample["tokens"]:
        of_answer = token["kind"] in ("trained", "target")
        if of_answer and words and token["id"] not in processor.stop_ids:
            tokens.append(token | {"kind": "caption"})
        elif token["kind"] in SLOTS:
            tokens.append(token)
    return {"id": sample["id"], "tokens": tokens, "compares": objective.views}


def _groups(
    unit: list[Shown], objective: Grpo, processor: Processor, row_length: int
) -> list[dict[str, Any]]:
    """The samples of a unit of prompts whose completions are sampled."""
    prompts = [example for _, example in unit]
    if processor.spec.layout == "causal":
        joined = trees(prompts, row_length)
    else:
        joined = [
            Tree(prompt, (place,), (len(prompt.input_ids) - 1,))
            for place, prompt in enumerate(prompts)
        ]
    return [
        {
            "id": tree.row.id,
            "tokens": _tokens(tree.row, processor),
            "completions": {
                "number": objective.num_generations,
                "most_tokens": objective.max_completion_length,
                "rewarded_by": objective.names,
                "references": [
                    processor.template.parted(unit[place][0]).messages[-1].text
                    for place in tree.members
                ],
                "after": list(tree.leaves),
            },
        }
        | _separate(processor, several=True)
        for tree in joined
    ]


def _separate(processor: Processor, *, several: bool) -> dict[str, Any]:
    """The mark of a sample with `several` answers that a model trains in rows of their own."""
    return {"separate": True} if several and not processor.spec.branches else {}


def _slot_kind(example: Example) -> str:
    """The kind of an example's slots: those of images, of a video's frames, or of audio."""
    if example.media and all(media.of_video for media in example.media):
        return "frame"
    return example.media[0].modality if example.media else "image"


def _tokens(example: Example, processor: Processor) -> list[dict[str, Any]]:
    def text(token: int) -> str:
        return str(processor.tokenizer.decode([token]))

    causal = processor.spec.layout == "causal"
    slots = _slot_kind(example)
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
        kind = slots if example.image_mask[place] else "trained" if trained else "prompt"
        out.append(
            {
                "id": token,
                "text": "" if kind in SLOTS else text(token),
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
    kinds = Counter(token["kind"] for sample in samples for token in sample["tokens"])
    legend = [(f"{SLOTS[kind]} slots", STYLES[kind]) for kind in SLOTS if kinds[kind]]
    captions = [("caption", STYLES["caption"])] if kinds["caption"] else []
    parts = [("trained", STYLES["trained"]), *captions, *legend, ("prompt", STYLES["prompt"])]
    console.print(Text(" ").join(Text(*part) for part in parts))
    for sample in samples:
        completions = sample.get("completions")
        title = f"\n{sample['stage']}  {escaped(sample['id'])}: {_counts(sample['tokens'])}"
        if completions:
            title += f"; {completions['number']} completions of each prompt train"
        if sample.get("separate"):
            title += f"; each {'completion' if completions else 'answer'} is a row of its own"
        if "compares" in sample:
            title += f"; {COMPARES[sample['compares']]}"
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(_line(sample["tokens"], completions, ids=ids), soft_wrap=True)


def _counts(tokens: list[dict[str, Any]]) -> str:
    """The numbers of a sample's tokens, trained tokens and slots."""
    kinds = Counter(token["kind"] for token in tokens)
    slots = [f"{kinds[kind]} {SLOTS[kind]} slots" for kind in SLOTS if kinds[kind]]
    trained = f"{kinds['trained'] + kinds['target']} trained"
    words = f"{kinds['caption']} of captions" if kinds["caption"] else trained
    return ", ".join([f"{len(tokens)} tokens", words, *(slots or ["no media"])])


def _completions(completions: dict[str, Any], place: int) -> Text:
    """The line of the completions after a prompt, which a run samples."""
    number = completions["number"]
    rewards = name_list(completions["rewarded_by"])
    reference = completions["references"][place]
    line = Text(f"\n  completions 1 to {number}: ", style="dim")
    line.append("sampled", style=STYLES["trained"])
    line.append(
        f" in training, up to {completions['most_tokens']:,} tokens each, rewarded by "
        f"{escaped(rewards)}; reference: {escaped(reference)}"
    )
    return line


def _judgement(token: dict[str, Any]) -> str:
    """The text before a preference answer, from one of its tokens; empty for another token."""
    return f"{token['answer']}: " if "answer" in token else ""


def _line(tokens: list[dict[str, Any]], completions: dict[str, Any] | None, *, ids: bool) -> Text:
    """A sample's text; runs of slots are shown by their number."""
    line = Text()
    after = {} if completions is None else {end: k for k, end in enumerate(completions["after"])}
    previous = tokens[0]
    slots = 0
    for place, token in enumerate(tokens):
        begins = token["branch"] != previous["branch"]
        if token["kind"] == "caption" and (begins or previous["kind"] != "caption"):
            line.append("\n  caption: ", style="dim")
        elif token["kind"] == "target" and (begins or previous["kind"] != "target"):
            line.append(f"\n=> {_judgement(token)}", style="dim")
        elif begins:
            line.append(f"\n  branch {token['branch']}: ", style="dim")
        elif token.get("answer") != previous.get("answer") and "answer" in token:
            line.append(f" {_judgement(token)}", style="dim")
        if token["kind"] in SLOTS:
            slots += 1
            if place + 1 == len(tokens) or tokens[place + 1]["kind"] not in SLOTS:
                line.append(f"[{SLOTS[token['kind']]} x{slots}]", style=STYLES[token["kind"]])
                slots = 0
        else:
            # A row's text may hold control sequences.
            shown = escaped(token["text"]) + (f"⟨{token['id']}⟩" if ids else "")
            line.append(shown, style=STYLES[token["kind"]])
        if completions is not None and place in after:
            line.append_text(_completions(completions, after[place]))
        previous = token
    return line
