"""Our loss of sampled completions against TRL's GRPOTrainer, on the same completions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.policy_samples import (
    completions_batch,
    drawn_ids,
    prompts_of,
    rewards_of,
)
from tests.helpers.preference_samples import awake, objective_of
from tests.helpers.tiny_models import assert_close, batch_of
from tests.helpers.trl_trainers import (
    exported_llava,
    lora_recipe,
    their_gradients,
    their_name,
    trainer_of,
    trl_settings,
)
from vlm_tune.data.types import Example
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.train.policy_losses import advantages_of, deviation, summed_rewards

PROMPTS = 3
MEMBERS = 4
LONGEST = 6
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def ours(llava: Path) -> VisionLanguageModel:
    return awake(lora_recipe(llava, "{kind: grpo}"))


@pytest.fixture(scope="module")
def trainer(llava: Path, ours: VisionLanguageModel, tmp_path_factory: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    config = trl_settings(
        GRPOConfig,
        tmp_path_factory.mktemp("trl"),
        per_device_train_batch_size=PROMPTS * MEMBERS,
        num_generations=MEMBERS,
        max_completion_length=LONGEST,
        beta=0.2,
        temperature=TEMPERATURE,
    )
    row = {"prompt": [{"role": "user", "content": "a"}]}
    return trainer_of(
        llava, ours, GRPOTrainer, config, row, reward_funcs=lambda completions, **_: [0.0]
    )


def their_inputs(
    model: VisionLanguageModel, prompts: list[Example], ids: list[list[Any]], image: int
) -> dict[str, Any]:
    """Prompts padded on the left and completions on the right, as TRL's trainer has them."""
    repeated = [prompt for prompt in prompts for _ in range(MEMBERS)]
    completions = [each for group in ids for each in group]
    longest = max(len(prompt.input_ids) for prompt in prompts)
    inputs = {
        name: torch.zeros(len(repeated), length, dtype=torch.int64)
        for name, length in (
            ("prompt_ids", longest),
            ("prompt_mask", longest),
            ("completion_ids", LONGEST),
            ("completion_mask", LONGEST),
        )
    }
    for place, (prompt, completion) in enumerate(zip(repeated, completions, strict=True)):
        tokens = torch.tensor(prompt.input_ids).long()
        tokens[torch.tensor(prompt.image_mask)] = image
        inputs["prompt_ids"][place, -len(tokens) :] = tokens
        inputs["prompt_mask"][place, -len(tokens) :] = 1
        inputs["completion_ids"][place, : len(completion)] = torch.tensor(completion)
        inputs["completion_mask"][place, : len(completion)] = 1
    batch = batch_of(model, prompts)
    assert batch.pixels is not None
    tower: Any = model.tower
    pixels = (batch.pixels.float() * tower.scale - tower.offset)[batch.media_index]
    inputs["pixel_values"] = pixels.repeat_interleave(MEMBERS, 0)
    inputs["num_images"] = [1] * len(repeated)  # type: ignore[assignment]
    return inputs


def their_logprobs(trainer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """TRL's log-probabilities [N, T] of the completions."""
    logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        LONGEST,
        pixel_values=inputs["pixel_values"],
        num_images=inputs["num_images"],
    )
    return logprobs.detach()


def prepared(trainer: Any, inputs: dict[str, Any], advantages: torch.Tensor) -> torch.Tensor:
    """Gives TRL's inputs what its `_generate_and_score_completions` adds; returns the earlier
    log-probabilities of both sides' tokens.
    """
    generator = torch.Generator().manual_seed(5)
    mask = inputs["completion_mask"]
    now = their_logprobs(trainer, inputs)
    with trainer.model.disable_adapter():
        inputs["ref_per_token_logps"] = their_logprobs(trainer, inputs)
    # As after an update: some ratios are outside of the bounds.
    inputs["old_per_token_logps"] = now + 0.3 * torch.randn(now.shape, generator=generator)
    inputs["advantages"] = advantages
    inputs["num_items_in_batch"] = mask.sum()
    return inputs["old_per_token_logps"][mask.bool()]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_loss_and_gradients_equal_trl(
    llava: Path, ours: VisionLanguageModel, trainer: Any, loss_type: str, level: str
) -> None:
    corrects = loss_type in ("bnpo", "dapo")
    recipe = lora_recipe(
        llava,
        f"{{kind: grpo, loss_type: {loss_type}, importance_sampling_level: {level}, beta: 0.2, "
        f"epsilon: 0.1, epsilon_high: 0.15, num_generations: {MEMBERS}, "
        f"max_completion_length: {LONGEST}, temperature: {TEMPERATURE}, "
        f"use_bias_correction_kl: {str(corrects).lower()}}}",
    )
    prompts = prompts_of(ours, recipe, PROMPTS)
    ids = drawn_ids(PROMPTS, MEMBERS, ours.llm.vocabulary, LONGEST)
    batch = completions_batch(ours, prompts, ids, rewards_of(PROMPTS, MEMBERS))
    objective = objective_of(ours, recipe)
    counts = objective.counts(batch)
    objective.before(ours, [batch], counts)
    completions = batch.completions
    assert completions is not None and completions.advantages is not None

    trainer.loss_type = loss_type
    trainer.importance_sampling_level = level
    trainer.epsilon_low = 0.1
    trainer.epsilon_high = 0.15
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    trainer.args.use_bias_correction_kl = corrects
    trainer._metrics["train"].clear()
    trainer.model.train()
    inputs = their_inputs(ours, prompts, ids, trainer.model.config.image_token_id)
    completions.logprobs = prepared(trainer, inputs, completions.advantages)

    ours.zero_grad(set_to_none=True)
    loss = objective(ours, batch, counts)
    mean = loss.sum / counts.items
    mean.backward()
    gradients = {
        their_name(name): parameter.grad.clone()
        for name, parameter in ours.named_parameters()
        if parameter.grad is not None
    }
    theirs = trainer._compute_loss(trainer.model, inputs)
    assert float(mean.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    metrics = trainer._metrics["train"]
    clipped = float(loss.metrics["clip_ratio/region_mean"][0])
    assert 0 < clipped < (PROMPTS * MEMBERS if level == "sequence" else int(batch.supervised))
    for name in ("kl", *(f"clip_ratio/{each}_mean" for each in ("low", "high", "region"))):
        total, number = loss.metrics[name]
        assert float(total) / float(number) == pytest.approx(metrics[name][0], rel=1e-5)
    expected = their_gradients(trainer, theirs)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    assert_close(gradients, expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(trainer: Any, scale: str) -> None:
    """TRL computes them inside the method that generates, which is given what it would call."""
    rewards = torch.rand(PROMPTS * MEMBERS, 2, generator=torch.Generator().manual_seed(1))
    rewards[2, 0] = rewards[5] = torch.nan
    rewards[8:] = 0.25  # a group of equal rewards
    weights = torch.tensor([1.0, 0.5])
    total = summed_rewards(rewards, weights)
    groups = total.view(-1, MEMBERS)
    scales = {"group": deviation(groups)[:, None], "batch": deviation(total), "none": None}
    advantages = advantages_of(groups, scales[scale])

    ids = [[5]] * len(rewards)
    row = {"prompt": [{"role": "user", "content": "a"}]}
    stand_in: Any = SimpleNamespace(**vars(trainer))
    stand_in.scale_rewards = scale
    stand_in.beta = 0.0
    stand_in.reward_weights = weights
    stand_in.reward_func_names = ["one", "other"]
    stand_in.reward_funcs = [None, None]
    stand_in._generate = lambda prompts: (
        ids,
        ids,
        None,
        [[{"role": "assistant", "content": "b"}]] * len(ids),
        None,
        {},
        None,
        None,
    )
    stand_in._calculate_rewards = lambda *_: rewards
    theirs = type(trainer)._generate_and_score_completions(stand_in, [row] * len(rewards))
    torch.testing.assert_close(advantages, theirs["advantages"], rtol=1e-5, atol=1e-6)
    assert float(advantages[5]) == 0 and advantages.abs().max() > 0.1
