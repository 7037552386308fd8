"""Our losses of preferences against TRL's trainers, on an exported model with the same adapters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.export_samples import opened
from tests.helpers.preference_samples import awake, examples_of, preference_text, step
from tests.helpers.tiny_models import assert_close, batch_of, built, parsed
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.packing import separate_rows, with_mismatched
from vlm_tune.data.types import IGNORE_INDEX, Example
from vlm_tune.exporting import export
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.train.preference_losses import orpo_losses, simpo_losses

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
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
    folder = tmp_path_factory.mktemp("llava")
    text = tiny_text("causal", write_color_rows(folder), folder / "run")
    model = built(parsed(text.replace("norm: true", "depth: 2")))
    with torch.no_grad():
        for parameter in (*model.llm.parameters(), *model.connector.parameters()):
            parameter.mul_(2.0)
    model.changed |= {"llm", "tower"}
    model.save_pretrained(folder / "model")
    export(folder / "model", folder / "hf", verify=False)
    return folder


def recipe_of(folder: Path, objective: str, *, judged: bool = False) -> Recipe:
    """A recipe that trains LoRA on the exported model's own weights."""

    def make(kind: str) -> str:
        text = tiny_text(kind, folder / "messages.jsonl", folder / "run")
        head, _, rest = text.partition("\nmodel:")
        return (
            f"{head}\nmodel: {{pretrained: {folder / 'model'}}}\ndata:{rest.partition('data:')[2]}"
        )

    return parsed(preference_text(make, "causal", objective, judged=judged))


@pytest.fixture(scope="module")
def ours(llava: Path) -> VisionLanguageModel:
    return awake(recipe_of(llava, "{kind: dpo}"))


def their_name(name: str) -> str:
    """TRL's name of one of our LoRA parameters."""
    return f"base_model.model.model.language_model{name.removeprefix('llm.model.model')}"


def their_inputs(model: VisionLanguageModel, rows: list[Example], image: int) -> dict[str, Any]:
    """Separate rows of ours as TRL's trainers take them from their collators."""
    whole = [
        # Ours end before the last label, theirs with it.
        [*row.input_ids.tolist(), int(row.labels[-1])]
        for row in rows
    ]
    length = max(map(len, whole))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    attended = torch.zeros_like(ids)
    answered = torch.zeros_like(ids)
    for place, (row, tokens) in enumerate(zip(rows, whole, strict=True)):
        ids[place, : len(tokens)] = torch.tensor(tokens)
        ids[place, : len(row.image_mask)][torch.tensor(row.image_mask)] = image
        attended[place, : len(tokens)] = 1
        labelled = torch.tensor(row.labels != IGNORE_INDEX)
        answered[place, 1 : len(tokens)] = labelled.long()
    batch = batch_of(model, rows)
    assert batch.pixels is not None
    tower: Any = model.tower
    pixels = (batch.pixels.float() * tower.scale - tower.offset)[batch.media_index]
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "completion_mask": answered,
        "pixel_values": pixels,
    }


def trainer_of(folder: Path, model: VisionLanguageModel, trainer: Any, config: Any) -> Any:
    """One of TRL's trainers with the model's base weights and adapters."""
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image

    theirs, processor = opened(folder / "hf")
    # The export's token of images would be one more in the denominator of all probabilities.
    theirs.resize_token_embeddings(model.llm.vocabulary)
    theirs.config.image_token_id = processor.tokenizer.unk_token_id
    image = Image.new("RGB", (32, 32))
    row = {"prompt": "a", "completion": "b", "label": True}
    if "DPO" in trainer.__name__:
        row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer_with_lora = trainer(
        model=theirs,
        args=config,
        train_dataset=Dataset.from_list([{**row, "images": [image]}] * 2),
        processing_class=processor,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    )
    parameters = dict(trainer_with_lora.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameters[their_name(name)].copy_(parameter)
    return trainer_with_lora


@pytest.fixture(scope="module")
def dpo_trainer(
    llava: Path, ours: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    from trl import DPOConfig, DPOTrainer

    return trainer_of(llava, ours, DPOTrainer, settings(DPOConfig, tmp_path_factory))


def settings(config: Any, tmp_path_factory: pytest.TempPathFactory, **changes: Any) -> Any:
    return config(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        **changes,
    )


def gradients_of(trainer_with_lora: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer_with_lora.model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in trainer_with_lora.model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("loss_type", [*LOSSES, "sigmoid + sft"])
def test_dpo_equals_trl(
    llava: Path, ours: VisionLanguageModel, dpo_trainer: Any, loss_type: str
) -> None:
    types = loss_type.split(" + ")
    weights = [0.7, 0.4][: len(types)]
    smoothing = 0.1 if loss_type in ("robust", "exo_pair") else 0.0
    recipe = recipe_of(
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
    expected = gradients_of(dpo_trainer, theirs)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    assert_close({their_name(name): each for name, each in gradients.items()}, expected)


def test_kto_equals_trl(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from trl import KTOConfig, KTOTrainer

    recipe = recipe_of(
        llava, "{kind: kto, beta: 0.3, desirable_weight: 1.3, undesirable_weight: 0.8}", judged=True
    )
    ours = awake(recipe)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.neg_()  # so that the divergence is over 0
    config = settings(
        KTOConfig,
        tmp_path_factory,
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
    )
    trainer = trainer_of(llava, ours, KTOTrainer, config)
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
    expected = gradients_of(trainer, theirs)
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
