"""Our side of a comparison: the recipe, a run of `vlm-tune sft`, and the useful work of a question."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


def recipe(kind: str, material: Path, decoder: Path, output: Path, *, batch: int, steps: int) -> str:
    """A recipe that trains what the peers train: LoRA on every linear layer and the connector, the tower frozen."""
    name, template = (decoder, "chatml") if kind == "causal" else (material / "t5", "flan")
    return f"""
name: bench
output: {output}
seed: 0
model:
  tower: {{kind: transformers, name: {material / "tower"}}}
  connector: {{kind: mlp, depth: 2}}
  llm: {{kind: {kind}, name: {name}}}
data:
  template: {template}
  group: image
  max_length: 2048
  train: [{{kind: file, path: {material / "single.jsonl"}}}]
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: full, learning_rate: 1.0e-3}}
  - {{match: "llm.*", how: lora, r: 16, lora_alpha: 32, target_modules: all-linear, learning_rate: 2.0e-4}}
train: {{steps: {steps}, batch_size: {batch}, precision: bf16, log_every: 1, checkpoints: {{every: 1000000}}}}
evaluate: {{samples: 0}}
"""


def recipe_from(file: Path, material: Path, decoder: Path, output: Path, *, batch: int, steps: int) -> str:
    """A decoder recipe of the user's, its tower, data and length replaced by those of the comparison."""
    from vlm_tune.recipe import dump_recipe, load_recipe

    changes: dict[str, Any] = {
        "output": str(output),
        "model.tower": {"kind": "transformers", "name": str(material / "tower")},
        "model.llm.name": str(decoder),
        "data.train": [{"kind": "messages", "path": str(material / "single.jsonl")}],
        "data.validation": [],
        "data.test": [],
        "data.max_length": 2048,
        "train.epochs": None,
        "train.steps": steps,
        "train.batch_size": batch,
        "train.log_every": 1,
        "train.checkpoints": {"every": 1000000},
        "evaluate.samples": 0,
    }
    return dump_recipe(load_recipe(file, changes))


def logged(run: Path) -> list[dict[str, float]]:
    """The training steps of a run's log: rates a second, and the share of padding."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "train"]


@dataclass(frozen=True)
class Work:
    """Useful work of a mean question: unpadded and supervised tokens, and operations; and what answers it is trained on."""

    tokens: float
    supervised: float
    operations: float
    answers: list[str]


def work(text: str) -> Work:
    """The mean over the recipe's training data.

    Operations: 4·N a token for frozen linear weights N, 6·N for adapters, 12·L·h·d_h an attended pair, 4·d·V a
    supervised row for the head; what is recomputed, padded or frozen below the language model does not count.
    """
    from transformers import AutoConfig

    from vlm_tune.data.prepare import prepare
    from vlm_tune.data.types import IGNORE_INDEX
    from vlm_tune.model.build import build_processor
    from vlm_tune.recipe import parse_recipe

    asked = parse_recipe(text)
    processor = build_processor(asked, [])
    prepared = prepare(asked.data, asked.data.train, processor, seed=asked.seed)
    config: Any = AutoConfig.from_pretrained(asked.model.llm.name)
    rank = next(rule.r or 16 for rule in asked.tune if rule.how == "lora")
    operations = tokens = supervised = 0.0
    answers = []
    for example in map(prepared.store.__getitem__, range(len(prepared.store))):
        tokens += len(example.input_ids)
        supervised += example.supervised
        operations += _seq2seq(config, example, rank) if asked.model.llm.kind == "seq2seq" else _causal(config, example, rank)
        said: list[int] = []
        for label in example.labels[example.labels != IGNORE_INDEX].tolist():
            if label not in processor.stop_ids:
                said.append(label)
            elif said:
                answers.append(processor.decode(said).strip())
                said = []
    count = prepared.questions
    return Work(tokens / count, supervised / count, operations / count, sorted(answers))


def _linear(rank: int, *shapes: tuple[int, int]) -> float:
    """Operations a token of LoRA layers of these shapes, forward and backward."""
    return sum(4.0 * read * written + 6.0 * rank * (read + written) for read, written in shapes)


def _causal(config: Any, example: Any, rank: int) -> float:
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    query, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    block = _linear(rank, (width, query), (width, keys), (width, keys), (query, width), (width, inner), (width, inner), (inner, width))
    length = len(example.input_ids)
    # A token is seen by itself and those after it, as far as its branch goes.
    pairs = float(((length if example.ends is None else example.ends) - np.arange(length)).sum())
    return length * layers * block + 12.0 * layers * query * pairs + 4.0 * example.supervised * width * config.vocab_size


def _seq2seq(config: Any, example: Any, rank: int) -> float:
    width, inner, heads = config.d_model, config.d_ff, config.num_heads * config.d_kv
    read, said = len(example.input_ids), len(example.labels)
    attention, feed = [(width, heads)] * 3 + [(heads, width)], [(width, inner)] * 2 + [(inner, width)]
    encoder = read * _linear(rank, *attention, *feed) + 12.0 * heads * read * read
    decoder = said * _linear(rank, *attention, *feed, (width, heads), (heads, width)) + read * _linear(rank, (width, heads), (width, heads))
    decoder += 12.0 * heads * (said * (said + 1) / 2 + said * read)
    return config.num_layers * encoder + config.num_decoder_layers * decoder + 4.0 * example.supervised * width * config.vocab_size
