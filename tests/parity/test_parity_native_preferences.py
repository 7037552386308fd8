"""Preferences and rewards of native models: losses and LoRA gradients are those of transformers.

Each answer is run by itself through transformers' own forward pass, with PEFT's LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.helpers.native_models import KINDS, save_native, with_native
from tests.helpers.policy_samples import completions_batch, drawn_ids, rewards_of
from tests.helpers.preference_samples import awake, objective_of, step
from tests.helpers.tiny_models import batch_of, parsed, rows_of, with_tune
from tests.helpers.tiny_recipes import tiny_text
from tests.helpers.transformers_parity import (
    Gradients,
    peft_over,
    same_gradients,
    their_step,
    write_rows,
)
from tests.parity.test_parity_native import our_name, their_inputs
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.packing import completed, with_mismatched
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Message
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.lora import adapters_off
from vlm_tune.train.preference_losses import orpo_losses, simpo_losses

BRANCHLESS = [kind for kind in ("lfm2_vl", "gemma4", "minicpmv4_6") if kind in KINDS]
"""Models that read one sample per row."""
TUNE = """
tune:
  - {match: "tower.*", how: lora, r: 4, lora_alpha: 8}
  - {match: "connector.*", how: frozen}
  - {match: "llm.*", how: lora, r: 4, lora_alpha: 8}
train:"""
REJECTED = ("a rather high image", "yes", "nothing of this kind", "no, not only")
BETA = 0.4
MEMBERS = 3
TEMPERATURE = 0.7
SPECIALS = 60
"""More than the special tokens of these models, whose ids come first."""


class Judged(NamedTuple):
    """A recipe's model with adapters, PEFT's over transformers' own model, and rows with pairs."""

    model: VisionLanguageModel
    theirs: Any
    rows: list[Conversation]
    folder: Path
    text: str

    def recipe(self, **objective: Any) -> Recipe:
        """The recipe with an objective."""
        return parsed(self.text, objective=objective)

    def example(self, row: Conversation, answer: Message) -> Example:
        """A row that ends in an answer, by itself."""
        (example,) = self.model.processor.examples(with_answer(row, answer))
        return example

    def logprob(self, row: Conversation, answer: Message) -> torch.Tensor:
        """The summed log-probability of an answer by transformers, after their processor's ids."""
        example = self.example(row, answer)
        given = their_inputs(self.folder, with_answer(row, answer))
        ids = example.input_ids.tolist()
        assert given["input_ids"][0, : len(ids)].tolist() == ids
        return self.of_ids(given, example, 1.0).sum()

    def of_ids(self, given: Any, example: Example, temperature: float) -> torch.Tensor:
        """The log-probabilities of an example's supervised tokens by transformers."""
        labels = torch.from_numpy(example.labels).long()
        places = (labels != IGNORE_INDEX).nonzero()[:, 0]
        logits = self.theirs(**given).logits[0, places].float() / temperature
        return logits.log_softmax(-1).gather(1, labels[places][:, None])[:, 0]

    def gradients(self, loss: torch.Tensor) -> Gradients:
        """The gradients of a loss of transformers' model, by our names."""
        return their_step(self.theirs, loss, our_name)


def with_answer(row: Conversation, answer: Message) -> Conversation:
    return replace(row, messages=(*row.messages[:-1], answer), rejected=None, desirable=None)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", *BRANCHLESS])
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    folder = tmp_path_factory.mktemp(request.param)
    write_rows(folder / "rows.jsonl")
    theirs = save_native(folder / "vlm", request.param)
    text = tiny_text("causal", folder / "rows.jsonl", folder / "run")
    text = text.replace("max_length: 128", "max_length: 512")
    text = with_tune(with_native(text, folder / "vlm"), TUNE)
    recipe = parsed(text)
    model = awake(recipe)
    rows = [
        replace(row, rejected=Message("assistant", (other,)))
        for row, other in zip(rows_of(recipe), REJECTED, strict=True)
    ]
    assert model.processor.spec.branches == (request.param not in BRANCHLESS)
    return Judged(model, peft_over(theirs, model, our_name), rows, folder / "vlm", text)


def sums_of(judged: Judged) -> torch.Tensor:
    """The log-probabilities [P, 2] of pairs by transformers, an answer at a time."""
    pairs = [(row, (row.messages[-1], row.rejected)) for row in judged.rows]
    return torch.stack(
        [
            torch.stack([judged.logprob(row, answer) for answer in answers if answer is not None])
            for row, answers in pairs
        ]
    )


@pytest.mark.parametrize("kind", ["dpo", "simpo", "orpo"])
def test_losses_and_gradients_of_pairs_are_transformers(judged: Judged, kind: str) -> None:
    """Of one image, of several, and of words alone, in one batch."""
    model = judged.model
    objective: dict[str, Any] = {"kind": kind, "beta": BETA}
    if kind == "dpo":
        objective |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}
    examples = [example for row in judged.rows for example in model.processor.examples(row)]
    batch = batch_of(model, examples)
    assert len(batch.input_ids) == (4 if model.processor.spec.branches else 8)
    (loss,), gradients = step(model, judged.recipe(**objective), [batch])

    judged.theirs.zero_grad(set_to_none=True)
    policy = sums_of(judged)
    with torch.no_grad(), adapters_off(judged.theirs):
        before = sums_of(judged)
    assert batch.answer_lengths is not None
    lengths = batch.answer_lengths.view(-1, 3)[:, :2]
    if kind == "dpo":
        ratios = policy - before
        chosen = int(lengths[:, 0].sum())
        losses = -logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1]))
        expected = losses.sum() - 0.3 * len(examples) / chosen * policy[:, 0].sum()
        rewards = BETA * ratios.detach()
    else:
        rewards = BETA * (policy / lengths).detach()
        if kind == "simpo":
            losses = simpo_losses(policy, lengths, beta=BETA, gamma=0.5, smoothing=0.0)
            expected = losses.sum()
        else:
            losses = orpo_losses(policy, lengths, beta=BETA)
            chosen = int(lengths[:, 0].sum())
            expected = losses.sum() - len(examples) / chosen * policy[:, 0].sum()
    assert float(loss.sum.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for place, name in enumerate(("chosen", "rejected")):
        total, number = loss.metrics[f"rewards/{name}"]
        assert int(number) == 4
        mean = float(rewards[:, place].mean())
        assert float(total / number) == pytest.approx(mean, rel=1e-5, abs=1e-5)
    wanted = judged.gradients(expected / len(examples))
    assert any("lora_A" in name and value.abs().max() > 1e-4 for name, value in wanted.items())
    same_gradients(gradients, wanted)


def test_judged_answers_are_transformers(judged: Judged) -> None:
    """KTO, whose divergence is that of the mismatched answers, each after another row's prompt."""
    model = judged.model
    rows = [
        replace(row, rejected=None, desirable=number % 2 == 0)
        for number, row in enumerate(judged.rows)
    ]
    plain = [model.processor.examples(row)[0] for row in rows]
    examples = [
        with_mismatched([example], [plain[place - 1]], "causal")[0]
        for place, example in enumerate(plain)
    ]
    recipe = judged.recipe(kind="kto", beta=BETA)
    (loss,), gradients = step(model, recipe, [batch_of(model, examples)])

    judged.theirs.zero_grad(set_to_none=True)
    answers = [row.messages[-1] for row in rows]

    def sums(shift: int) -> torch.Tensor:
        return torch.stack(
            [judged.logprob(row, answers[place - shift]) for place, row in enumerate(rows)]
        )

    policy = sums(0)
    with torch.no_grad():
        mismatched = sums(1)
        with adapters_off(judged.theirs):
            before, other = sums(0), sums(1)
    divergence = (mismatched - other).mean().clamp(min=0)
    signs = torch.tensor([1.0 if row.desirable else -1.0 for row in rows])
    losses = 1 - torch.sigmoid(BETA * signs * (policy - before - divergence))
    assert float(loss.sum.detach()) == pytest.approx(float(losses.sum().detach()), rel=1e-5)
    total, number = loss.metrics["kl"]
    assert float(total / number) == pytest.approx(float(divergence), rel=1e-4, abs=1e-5)
    same_gradients(gradients, judged.gradients(losses.sum() / len(rows)))


def followed(given: Any, prompt: int, ids: Sequence[int]) -> dict[str, Any]:
    """Their inputs of a prompt of some tokens, with a completion behind it."""
    drawn = torch.tensor([list(ids)], dtype=torch.int64)
    inputs = dict(given)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            start = inputs[name][:, :prompt]
            rest = {"input_ids": drawn, "attention_mask": torch.ones_like(drawn)}
            inputs[name] = torch.cat([start, rest.get(name, torch.zeros_like(drawn))], 1)
    return inputs


def test_a_step_of_rewards_is_transformers(judged: Judged) -> None:
    """The clipped loss with a divergence from the model without adapters, one by one."""
    model = judged.model
    prompts = model.processor.prompts(judged.rows)
    # None of them is a special token.
    ids = [
        [[SPECIALS + token for token in each] for each in group]
        for group in drawn_ids(len(prompts), MEMBERS, 200)
    ]
    rewards = rewards_of(len(prompts), MEMBERS)
    recipe = judged.recipe(
        kind="grpo",
        loss_type="grpo",
        num_generations=MEMBERS,
        max_completion_length=6,
        temperature=TEMPERATURE,
        use_bias_correction_kl=False,
        beta=BETA,
    )
    objective = objective_of(model, recipe)
    batch = completions_batch(model, prompts, ids, rewards)
    assert len(batch.input_ids) == len(prompts) * (1 if model.processor.spec.branches else MEMBERS)
    counts = objective.counts(batch)
    model.zero_grad(set_to_none=True)
    objective.before(model, [batch], counts)
    loss = objective(model, batch, counts)
    (loss.sum / counts.items).backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }

    judged.theirs.zero_grad(set_to_none=True)
    groups = rewards.view(-1, MEMBERS)
    worth = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    losses = []
    for row, prompt, group, of_group in zip(judged.rows, prompts, ids, worth, strict=True):
        given = their_inputs(judged.folder, row, prompt=True)
        length = len(prompt.input_ids)
        assert given["input_ids"][0, :length].tolist() == prompt.input_ids.tolist()
        for each, advantage in zip(group, of_group, strict=True):
            example = completed(prompt, each, "causal")
            inputs = followed(given, length, each[:-1])
            now = judged.of_ids(inputs, example, TEMPERATURE)
            with torch.no_grad(), adapters_off(judged.theirs):
                before = judged.of_ids(inputs, example, TEMPERATURE)
            tokens = -advantage * (now - now.detach()).exp()
            divergence = (before - now).exp() - (before - now) - 1
            losses.append((tokens + BETA * divergence).mean())
    expected = torch.stack(losses).mean()
    mean = float(loss.sum.detach()) / counts.items
    assert mean == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    same_gradients(gradients, judged.gradients(expected))
