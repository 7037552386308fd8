"""Our side of a comparison: recipes, logs of `vlm-tune sft`, and the useful work of a question."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


def recipe(
    kind: str,
    material: Path,
    decoder: Path,
    output: Path,
    *,
    batch: int,
    steps: int | None,
    precision: str = "bf16",
    quantize: str | None = None,
    row_length: int | None = None,
) -> str:
    """A recipe that trains the same as the peers.

    It has LoRA on every linear layer, a trained connector and a frozen tower. Without `steps` it
    trains one epoch.
    """
    duration = "epochs: 1" if steps is None else f"steps: {steps}"
    name, template = (decoder, "chatml") if kind == "causal" else (material / "t5", "flan")
    return f"""
name: bench
output: {output}
seed: 0
model:
  tower: {{kind: transformers, name: {material / "tower"}}}
  connector: {{kind: mlp, depth: 2}}
  llm: {{kind: {kind}, name: {name}, quantize: {quantize or "null"}}}
data:
  template: {template}
  group: image
  packing: {"true" if row_length else "false"}
  row_length: {row_length or 1024}
  max_length: 2048
  train: [{{kind: file, path: {material / "single.jsonl"}}}]
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: full, learning_rate: 1.0e-3}}
  - {{match: "llm.*", how: lora, r: 16, lora_alpha: 32, target_modules: all-linear, \
learning_rate: 2.0e-4}}
train: {{{duration}, batch_size: {batch}, precision: {precision}, compile: true, log_every: 1, \
checkpoints: {{every: 1000000}}}}
evaluate: {{samples: 0}}
"""


def recipe_from(
    file: Path,
    material: Path,
    decoder: Path,
    output: Path,
    *,
    batch: int,
    steps: int | None,
    precision: str | None = None,
    quantize: str | None = None,
    row_length: int | None = None,
) -> str:
    """A decoder recipe of the user's with the comparison's tower, data and length.

    Without `steps` it trains one epoch.
    """
    from vlm_tune.config.load import dump_recipe, load_recipe

    changes: dict[str, Any] = {
        "output": str(output),
        "model.tower": {"kind": "transformers", "name": str(material / "tower")},
        "model.llm.name": str(decoder),
        "data.train": [{"kind": "file", "path": str(material / "single.jsonl")}],
        "data.validation": [],
        "data.test": [],
        "data.max_length": 2048,
        "train.epochs": 1 if steps is None else None,
        "train.steps": steps,
        "train.batch_size": batch,
        "train.log_every": 1,
        "train.checkpoints": {"every": 1000000},
        "evaluate.samples": 0,
    }
    if precision:
        changes["train.precision"] = precision
    if quantize:
        changes["model.llm.quantize"] = quantize
    if row_length:
        changes |= {"data.packing": True, "data.row_length": row_length}
    return dump_recipe(load_recipe(file, changes))


def logged(run: Path) -> list[dict[str, float]]:
    """The training steps of a run's log: rates per second, and the share of padding."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "train"]


def preparing(run: Path) -> float:
    """Seconds between the first stage's tuning table and its first step.

    In them the batches are planned, and the tower's features computed if they are not cached.
    """
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = {
        event["event"]: event["time"]
        for event in reversed(events)
        if event["event"] in ("tuning", "stage")
    }
    return times["stage"] - times["tuning"]


@dataclass(frozen=True)
class Amount:
    """Sizes of rows: input tokens, label tokens of an encoder-decoder, pairs and supervised tokens.

    `read_pairs` are the attended pairs of the input, `written_pairs` those of an encoder-decoder's
    labels.
    """

    tokens: float = 0.0
    labels: float = 0.0
    read_pairs: float = 0.0
    written_pairs: float = 0.0
    supervised: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )

    def over(self, count: float) -> Amount:
        """The amount divided by `count`."""
        return Amount(*(getattr(self, name) / count for name in self.__dataclass_fields__))


class Formula:
    """Operations of a LoRA step.

    They are 4·N per token for N frozen linear weights, 6·N for adapters, 12·h·d_h per attended pair
    and layer, and 4·d·V per supervised row for the head. Recomputation, padding, and what is below
    the language model (tower, connector) do not count.
    """

    def __init__(self, config: Any, rank: int, *, seq2seq: bool) -> None:
        self.each = _seq2seq(config, rank) if seq2seq else _causal(config, rank)

    def operations(self, amount: Amount) -> float:
        """Operations of an amount, forward and backward."""
        return sum(
            getattr(self.each, name) * getattr(amount, name) for name in amount.__dataclass_fields__
        )


def _linear(rank: int, *shapes: tuple[int, int]) -> float:
    """Operations per token of LoRA layers of these shapes, forward and backward."""
    return sum(4.0 * read * written + 6.0 * rank * (read + written) for read, written in shapes)


def _causal(config: Any, rank: int) -> Amount:
    width = config.hidden_size
    inner = config.intermediate_size
    layers = config.num_hidden_layers
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    query = config.num_attention_heads * head
    keys = config.num_key_value_heads * head
    block = _linear(
        rank,
        (width, query),
        (width, keys),
        (width, keys),
        (query, width),
        (width, inner),
        (width, inner),
        (inner, width),
    )
    return Amount(
        tokens=layers * block,
        read_pairs=12.0 * layers * query,
        supervised=4.0 * width * config.vocab_size,
    )


def _seq2seq(config: Any, rank: int) -> Amount:
    width = config.d_model
    inner = config.d_ff
    heads = config.num_heads * config.d_kv
    attention = [(width, heads)] * 3 + [(heads, width)]
    feed = [(width, inner)] * 2 + [(inner, width)]
    encoder = _linear(rank, *attention, *feed)
    # The decoder attends to the encoder's output through its own key and value projections.
    looked = _linear(rank, (width, heads), (width, heads))
    return Amount(
        tokens=config.num_layers * encoder + config.num_decoder_layers * looked,
        labels=config.num_decoder_layers
        * _linear(rank, *attention, *feed, (width, heads), (heads, width)),
        read_pairs=12.0 * config.num_layers * heads,
        written_pairs=12.0 * config.num_decoder_layers * heads,
        supervised=4.0 * width * config.vocab_size,
    )


def amount(example: Any, *, seq2seq: bool) -> Amount:
    """The sizes of a prepared row."""
    read = len(example.input_ids)
    written = len(example.labels)
    if seq2seq:
        return Amount(
            read,
            written,
            float(read) ** 2,
            written * (written + 1) / 2 + written * read,
            example.supervised,
        )
    # A token is visible to itself and to later tokens, as far as its branch goes.
    pairs = float(
        ((read if example.visible_until is None else example.visible_until) - np.arange(read)).sum()
    )
    return Amount(tokens=read, read_pairs=pairs, supervised=example.supervised)


@dataclass(frozen=True)
class Work:
    """Useful work of a mean question of a recipe's data, its formula, and the trained answers."""

    mean: Amount
    formula: Formula
    answers: list[str]

    @property
    def operations(self) -> float:
        """Operations of a mean question."""
        return self.formula.operations(self.mean)


def work(text: str) -> Work:
    """The mean over the training data of a recipe with LoRA on its language model."""
    from transformers import AutoConfig

    from vlm_tune.config.load import parse_recipe
    from vlm_tune.data.prepare.run import prepare, scratch_texts
    from vlm_tune.data.types import IGNORE_INDEX
    from vlm_tune.model.build import build_processor

    parsed = parse_recipe(text)
    llm = parsed.model.llm
    seq2seq = parsed.model.llm.kind == "seq2seq"
    processor = build_processor(parsed, scratch_texts(parsed))
    prepared = prepare(parsed.data, parsed.data.train, processor, seed=parsed.seed)
    config: Any = (
        AutoConfig.for_model(llm.scratch.model_type, **llm.scratch.config)
        if llm.scratch
        else AutoConfig.from_pretrained(str(llm.name))
    )
    rank = next(rule.r or 16 for rule in parsed.tune if rule.how == "lora")
    total = Amount()
    answers = []
    for example in map(prepared.store.__getitem__, range(len(prepared.store))):
        total += amount(example, seq2seq=seq2seq)
        answer_ids: list[int] = []
        for label in example.labels[example.labels != IGNORE_INDEX].tolist():
            if label not in processor.stop_ids:
                answer_ids.append(label)
            elif answer_ids:
                answers.append(processor.decode(answer_ids).strip())
                answer_ids = []
    return Work(
        total.over(prepared.questions), Formula(config, rank, seq2seq=seq2seq), sorted(answers)
    )
