"""Shows samples token by token: what is trained, what is prompt, where the image goes."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from vlm_tune.config import Recipe
from vlm_tune.data.prepare import prepare, read_conversations
from vlm_tune.data.processor import Processor
from vlm_tune.data.types import IGNORE_INDEX, Example
from vlm_tune.model.build import build_processor

STYLES = {"trained": "black on green", "prompt": "", "image": "white on blue", "target": "black on green"}


def sample_tokens(recipe: Recipe, n: int) -> list[dict[str, Any]]:
    """The first `n` units of every stage as tokens: [{stage, id, tokens: [{id, text, kind, branch}]}], no weights loaded.

    `kind` is prompt, trained (decoders), image, or target (what an encoder-decoder's decoder learns).
    """
    stages = recipe.resolved_stages()
    read = [(name, stage, read_conversations(stage.data, stage.data.train, stage.seed)[0]) for name, stage in stages]
    processor = build_processor(recipe, [row for _, _, rows in read for row in rows])
    found = []
    for name, stage, rows in read:
        data = stage.data
        groups = prepare(rows[: 200 * n], data, processor).groups[:n]
        found += [{"stage": name, "id": example.id, "tokens": _tokens(example, processor)} for group in groups for example in group[:n]]
    return found


def _tokens(example: Example, processor: Processor) -> list[dict[str, Any]]:
    def text(token: int) -> str:
        return str(processor.tokenizer.decode([token]))

    causal = processor.spec.layout == "causal"
    out: list[dict[str, Any]] = []
    for place, token in enumerate(example.input_ids.tolist()):
        branch = 0 if example.branches is None else int(example.branches[place])
        if example.image_mask[place]:
            out.append({"id": token, "text": "", "kind": "image", "branch": branch})
        else:
            trained = causal and example.labels[place] != IGNORE_INDEX
            out.append({"id": token, "text": text(token), "kind": "trained" if trained else "prompt", "branch": branch})
    if not causal:
        out += [{"id": token, "text": text(token), "kind": "target", "branch": 0} for token in example.labels.tolist()]
    return out


def show_samples(console: Console, samples: list[dict[str, Any]], *, ids: bool) -> None:
    """Prints samples in color: trained tokens on green, image slots on blue."""
    console.print(Text.assemble(("trained", STYLES["trained"]), " ", ("image slots", STYLES["image"]), " prompt"))
    for sample in samples:
        tokens = sample["tokens"]
        trained = sum(token["kind"] in ("trained", "target") for token in tokens)
        images = sum(token["kind"] == "image" for token in tokens)
        console.print(
            Text(f"\n{sample['stage']}  {sample['id']}: {len(tokens)} tokens, {trained} trained, {images} image slots", style="bold")
        )
        console.print(_line(tokens, ids=ids), soft_wrap=True)


def _line(tokens: list[dict[str, Any]], *, ids: bool) -> Text:
    line, slots, previous = Text(), 0, tokens[0]
    for token in [*tokens, {"kind": "end", "branch": -1}]:
        if token["kind"] == "image":
            slots += 1
            continue
        if slots:
            line.append(f"[image x{slots}]", style=STYLES["image"])
            slots = 0
        if token["kind"] == "end":
            break
        if token["kind"] == "target" and previous["kind"] != "target":
            line.append("\n=> ", style="dim")
        elif token["branch"] != previous["branch"]:
            line.append(f"\n  branch {token['branch']}: ", style="dim")
        shown = token["text"].replace("\n", "\\n") + (f"⟨{token['id']}⟩" if ids else "")
        line.append(shown, style=STYLES[token["kind"]])
        previous = token
    return line
