"""Our side of a comparison: the recipe, a run of `vlm-tune sft`, and the useful work of a question."""

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
    """A recipe that trains what the peers train: LoRA on every linear layer and the connector, the tower frozen.

    Without `steps` it trains one epoch.
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
  - {{match: "llm.*", how: lora, r: 16, lora_alpha: 32, target_modules: all-linear, learning_rate: 2.0e-4}}
train: {{{duration}, batch_size: {batch}, precision: {precision}, compile: true, log_every: 1, checkpoints: {{every: 1000000}}}}
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
    """A decoder recipe of the user's, its tower, data and length replaced by those of the comparison; without `steps` one epoch."""
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
    """The training steps of a run's log: rates a second, and the share of padding."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "train"]


def preparing(run: Path) -> float:
    """Seconds between the first stage's tuning table and its first step: features of the tower where not cached, batches planned."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = {
        event["event"]: event["time"]
        for event in reversed(events)
        if event["event"] in ("tuning", "stage")
    }
    return times["stage"] - times["tuning"]


@dataclass(frozen=True)
class Amount:
    """What rows hold: tokens read and (by an encoder-decoder) written, attended pairs of each, supervised tokens."""

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
        """A `count`-th of it."""
        return Amount(*(getattr(self, name) / count for name in self.__dataclass_fields__))


class Formula:
    """Operations of a LoRA step: 4·N a token for frozen linear weights N, 6·N for adapters, 12·h·d_h an attended pair and
    layer, 4·d·V a supervised row for the head.

    What is recomputed, padded, or below the language model (tower, connector) does not count.
    """

    def __init__(self, config: Any, rank: int, *, seq2seq: bool) -> None:
        self.each = _seq2seq(config, rank) if seq2seq else _causal(config, rank)

    def operations(self, amount: Amount) -> float:
        """Operations of that amount, forward and backward."""
        return sum(
            getattr(self.each, name) * getattr(amount, name) for name in amount.__dataclass_fields__
        )


def _linear(rank: int, *shapes: tuple[int, int]) -> float:
    """Operations a token of LoRA layers of these shapes, forward and backward."""
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
    # The decoder looks at what was read through keys and values of its own.
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
    """What a prepared row holds."""
    read = len(example.input_ids)
    said = len(example.labels)
    if seq2seq:
        return Amount(
            read, said, float(read) ** 2, said * (said + 1) / 2 + said * read, example.supervised
        )
    # A token is seen by itself and those after it, as far as its branch goes.
    pairs = float(((read if example.ends is None else example.ends) - np.arange(read)).sum())
    return Amount(tokens=read, read_pairs=pairs, supervised=example.supervised)


@dataclass(frozen=True)
class Work:
    """Useful work of a mean question of a recipe's data, the formula it follows, and what answers it is trained on."""

    mean: Amount
    formula: Formula
    answers: list[str]

    @property
    def operations(self) -> float:
        """Of a mean question."""
        return self.formula.operations(self.mean)


def work(text: str) -> Work:
    """The mean over the training data of a recipe with LoRA on its language model."""
    from transformers import AutoConfig

    from vlm_tune.config.load import parse_recipe
    from vlm_tune.data.prepare.run import prepare, scratch_texts
    from vlm_tune.data.types import IGNORE_INDEX
    from vlm_tune.model.build import build_processor

    asked = parse_recipe(text)
    llm = asked.model.llm
    seq2seq = asked.model.llm.kind == "seq2seq"
    processor = build_processor(asked, scratch_texts(asked))
    prepared = prepare(asked.data, asked.data.train, processor, seed=asked.seed)
    config: Any = (
        AutoConfig.for_model(llm.scratch.model_type, **llm.scratch.config)
        if llm.scratch
        else AutoConfig.from_pretrained(str(llm.name))
    )
    rank = next(rule.r or 16 for rule in asked.tune if rule.how == "lora")
    total = Amount()
    answers = []
    for example in map(prepared.store.__getitem__, range(len(prepared.store))):
        total += amount(example, seq2seq=seq2seq)
        said: list[int] = []
        for label in example.labels[example.labels != IGNORE_INDEX].tolist():
            if label not in processor.stop_ids:
                said.append(label)
            elif said:
                answers.append(processor.decode(said).strip())
                said = []
    return Work(
        total.over(prepared.questions), Formula(config, rank, seq2seq=seq2seq), sorted(answers)
    )
