"""Our losses of preferences against TRL's trainers, on an exported model with the same adapters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.preference_samples import awake, examples_of, step
from tests.helpers.tiny_models import assert_close, batch_of
from tests.helpers.trl_trainers import (
    exported_llava,
    lora_recipe,
    their_gradients,
    their_inputs,
    their_name,
    trainer_of,
    trl_settings,
)
from vlm_tune.data.packing import separate_rows, with_mismatched
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.train.preference_losses import orpo_losses, simpo_losses

LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "sigmoid_norm",
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of ours as transformers' LLaVA."""
    return exported_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def ours(llava: Path) -> VisionLanguageModel:
    return awake(lora_recipe(llava, "{kind: dpo}"))


@pytest.fixture(scope="module")
def dpo_trainer(
    llava: Path, ours: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    from trl import DPOConfig, DPOTrainer

    config = trl_settings(DPOConfig, tmp_path_factory.mktemp("trl"))
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    return trainer_of(llava, ours, DPOTrainer, config, row)


@pytest.mark.parametrize("loss_type", [*LOSSES, "sigmoid + sft"])
def test_dpo_equals_trl(
    llava: Path, ours: VisionLanguageModel, dpo_trainer: Any, loss_type: str
) -> None:
    types = loss_type.split(" + ")
    weights = [0.7, 0.4][: len(types)]
    smoothing = 0.1 if loss_type in ("robust", "exo_pair") else 0.0
    recipe = lora_recipe(
        llava,
        f"{{kind: dpo, loss_type: [{', '.join(types)}], loss_weights: {weights}, beta: 0.3, "
        f"label_smoothing: {smoothing}}}",
    )
    examples = examples_of(ours, recipe)[:4]
    (loss,), gradients = step(ours, recipe, [batch_of(ours, examples)])

    dpo_trainer.loss_types = types
    dpo_trainer.loss_weights = weights
    dpo_trainer.beta = 0.3
    dpo_trainer.label_smoothing = smoothing
    dpo_trainer._metrics["train"].clear()
    pairs = [separate_rows(example) for example in examples]
    rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    inputs = their_inputs(ours, rows, dpo_trainer.model.config.image_token_id)
    dpo_trainer.model.train()
    theirs = dpo_trainer._compute_loss(dpo_trainer.model, inputs, False)
    assert float(loss.sum.detach()) / loss.count == pytest.approx(float(theirs.detach()), rel=1e-5)
    metrics = dpo_trainer._metrics["train"]
    for name, (total, number) in loss.metrics.items():
        assert float(total) / float(number) == pytest.approx(metrics[name][0], rel=1e-5, abs=1e-6)
    expected = their_gradients(dpo_trainer, theirs)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    assert_close({their_name(name): each for name, each in gradients.items()}, expected)


def test_kto_equals_trl(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from trl import KTOConfig, KTOTrainer

    recipe = lora_recipe(
        llava, "{kind: kto, beta: 0.3, desirable_weight: 1.3, undesirable_weight: 0.8}", judged=True
    )
    ours = awake(recipe)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.neg_()  # so that the divergence is over 0
    config = trl_settings(
        KTOConfig,
        tmp_path_factory.mktemp("trl"),
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
    )
    row = {"prompt": "a", "completion": "b", "label": True}
    trainer = trainer_of(llava, ours, KTOTrainer, config, row)
    plain = examples_of(ours, recipe)[:4]
    units = [
        with_mismatched([example], [plain[place - 1]], "causal")[0]
        for place, example in enumerate(plain)
    ]
    (loss,), gradients = step(ours, recipe, [batch_of(ours, units)])

    rows = [separate_rows(unit) for unit in units]
    image = trainer.model.config.image_token_id
    inputs = their_inputs(ours, [judged for judged, _ in rows], image)
    mismatched = their_inputs(ours, [other for _, other in rows], image)
    inputs |= {
        f"KL_{name}": mismatched[name]
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    inputs["label"] = torch.tensor([example.answers.max() == 0 for example in plain])  # type: ignore[union-attr]
    trainer.model.train()
    theirs = trainer._compute_loss(trainer.model, inputs, False)
    assert float(loss.sum.detach()) / loss.count == pytest.approx(float(theirs.detach()), rel=1e-5)
    metrics = trainer._metrics["train"]
    assert metrics["kl"][0] > 0
    for name, (total, number) in loss.metrics.items():
        if name != "rewards/accuracies":  # ours alone
            assert float(total) / float(number) == pytest.approx(metrics[name][0], rel=1e-4)
    expected = their_gradients(trainer, theirs)
    assert_close({their_name(name): each for name, each in gradients.items()}, expected)


def logprobs() -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities of pairs, and numbers of tokens."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 9, (16, 2), generator=generator)
    return -lengths * torch.rand(16, 2, generator=generator) * 3, lengths


def test_simpo_equals_trls_cpo_loss() -> None:
    from trl.experimental.cpo import CPOTrainer

    policy, lengths = logprobs()
    trainer: Any = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        beta=2.0,
        simpo_gamma=0.7,
        label_smoothing=0.1,
        accelerator=SimpleNamespace(device="cpu"),
    )
    # TRL gives SimPO the means over tokens.
    expected, *_ = CPOTrainer.cpo_loss(trainer, *(policy / lengths).unbind(1))
    losses = simpo_losses(policy, lengths, beta=2.0, gamma=0.7, smoothing=0.1)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def test_orpo_equals_trls_odds_ratio_loss() -> None:
    from trl.experimental.orpo import ORPOTrainer

    policy, lengths = logprobs()
    trainer: Any = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    expected, *_ = ORPOTrainer.odds_ratio_loss(trainer, *(policy / lengths).unbind(1))
    # TRL subtracts them from the cross-entropy.
    torch.testing.assert_close(orpo_losses(policy, lengths, beta=0.4), -expected, rtol=1e-5, atol=0)
