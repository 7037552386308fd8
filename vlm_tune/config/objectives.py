"""The recipe's `objective`: what the training minimises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Discriminator, Field, RootModel, Tag

from vlm_tune.config.base import PositiveFloat
from vlm_tune.config.grpo import Grpo
from vlm_tune.config.objective_base import ObjectiveSection, ObjectiveTraits

LEAST_IMAGES = 3
"""Images of a batch from which on their differences give directions of noise."""


class LanguageModeling(ObjectiveSection):
    """Cross-entropy loss of the supervised tokens."""

    kind: Literal["language_modeling"] = "language_modeling"
    image_noise: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.0,
        description="largest noise of an image's tokens in training, in the directions in which "
        "the batch's images differ and as a multiple of the tokens' length; for few images",
    )


class Contrastive(ObjectiveSection):
    """Contrastive loss in the LLM's embedding space: images and captions that belong together.

    Or two augmented views of an image. The negatives are the other rows of a micro-batch; with
    clip, siglip and views those of all processes.
    """

    kind: Literal["contrastive"]
    loss: Literal["captions", "clip", "siglip"] = Field(
        default="captions",
        description="captions: each image among the batch's distinct captions of its category; "
        "clip: CLIP's softmax loss, images among captions and captions among images; siglip: "
        "SigLIP's sigmoid loss of each pair",
    )
    views: Literal["image_text", "image_image", "both"] = Field(
        default="image_text",
        description="what is brought together; image_text: an image and its caption, image_image: "
        "two augmentations of an image (SimCLR), both: the sum of the two losses",
    )
    temperature: PositiveFloat = Field(
        default=0.07,
        description="what similarities are divided by; learned from here on with clip and siglip, "
        "between images and captions",
    )
    bias: Annotated[float, Field(ge=-1e3, le=1e3)] | None = Field(
        default=None,
        description="siglip: what is added to the similarities, learned from here on; -10 by "
        "default",
    )

    @property
    def learns_scale(self) -> bool:
        """Whether the temperature is learned."""
        return self.loss != "captions" and self.views != "image_image"

    @property
    def two_views(self) -> bool:
        """Whether a second augmentation of each image is read."""
        return self.views != "image_text"

    @property
    def first_bias(self) -> float | None:
        """The bias before training; None for a loss without one."""
        if self.loss != "siglip":
            return None
        return -10.0 if self.bias is None else self.bias


class Matching(ObjectiveSection):
    """Image-text matching: the LLM reads an image and a caption and answers whether they match.

    Half of the rows of a micro-batch are shown with the image of another row. The loss is the
    binary cross-entropy of the two answers' log-probabilities.
    """

    kind: Literal["matching"]
    negatives: Literal["hard", "random"] = Field(
        default="hard",
        description="which row's image is taken; hard: the likelier, the more similar its vector "
        "is to the caption's, random: any whose caption is another",
    )
    temperature: PositiveFloat = Field(
        default=0.07, description="hard: what similarities are divided by, smaller is harder"
    )


class SpanCorruption(ObjectiveSection):
    """T5's pretraining task (masked language modelling): spans of an answer are predicted.

    The encoder reads the prompt with its images, and the answer with a sentinel token for each
    masked span; the decoder gives the spans. Validation is scored by its loss.
    """

    kind: Literal["span_corruption"]
    rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.15, description="share of an answer's tokens that is masked, at least one token"
    )
    mean_span: Annotated[float, Field(ge=1, le=1000)] = Field(
        default=3.0, description="mean number of tokens of a masked span"
    )

    @property
    def selects_by(self) -> str:
        """The loss: there are no answers to score."""
        return "loss"


Reference = Annotated[
    Literal["adapter_off", "copy", "precomputed"],
    Field(
        description="the model that answers are compared with, which is the model before training; "
        "adapter_off: its LoRA adapters switched off, copy: a copy of the weights that train, "
        "precomputed: its log-probabilities, computed once before training and stored on disk"
    ),
]
ScoredBy = Annotated[
    Literal["rewards/accuracies", "loss", "answers"],
    Field(
        description="what selects the best checkpoint on the validation part; answers: generated "
        "answers that equal the chosen ones"
    ),
]
Beta = Annotated[
    PositiveFloat,
    Field(
        description="factor of the log-ratios (dpo, kto; higher stays closer to the reference "
        "model), of the mean log-probabilities (simpo), or of the odds ratio's loss (orpo)"
    ),
]

DpoLoss = Literal[
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
    "sft",
]
"""TRL's loss types that add over pairs."""


class PreferenceSection(ObjectiveSection):
    """Base of the objectives of answers that are judged beforehand."""

    scored_by: ScoredBy = "rewards/accuracies"

    @property
    def selects_by(self) -> str:
        """The figure that the recipe sets."""
        return self.scored_by

    @property
    def uses_dropout(self) -> bool:
        """Never, as in TRL's trainers."""
        return False


class Dpo(PreferenceSection):
    """Direct preference optimisation: chosen answers become likelier than rejected ones.

    Each is compared with its likelihood under a reference model. Names are those of TRL's
    DPOConfig.
    """

    kind: Literal["dpo"]
    loss_type: DpoLoss | Annotated[list[DpoLoss], Field(min_length=1)] = Field(
        default="sigmoid", description="one loss, or several that are added by loss_weights"
    )
    loss_weights: list[PositiveFloat] | None = Field(
        default=None, description="weight of each loss of the list; 1 by default"
    )
    beta: Beta = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0,
        description="robust: share of pairs whose order is wrong; exo_pair: its epsilon, over 0",
    )
    reference: Reference = "adapter_off"

    @property
    def reference_model(self) -> str:
        """The one that the recipe sets."""
        return self.reference

    @property
    def losses(self) -> list[tuple[DpoLoss, float]]:
        """The losses with their weights."""
        types: list[DpoLoss] = (
            self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        )
        return list(zip(types, self.loss_weights or [1.0] * len(types), strict=True))


class Kto(PreferenceSection):
    """Kahneman-Tversky optimisation: liked answers become likelier, disliked ones less likely.

    Answers are judged one by one. Names are those of TRL's KTOConfig.
    """

    kind: Literal["kto"]
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: Beta = 0.1
    desirable_weight: PositiveFloat = Field(default=1.0, description="weight of liked answers")
    undesirable_weight: PositiveFloat = Field(default=1.0, description="weight of disliked answers")
    reference: Reference = "adapter_off"

    @property
    def reference_model(self) -> str:
        """The one that the recipe sets."""
        return self.reference

    @property
    def mismatches(self) -> bool:
        """Whether the divergence is estimated, from answers of other rows."""
        return self.loss_type == "kto"


class SimPo(PreferenceSection):
    """Simple preference optimisation: mean log-probabilities of answers, and no reference model.

    Names are those of TRL's CPOConfig with `loss_type: simpo`.
    """

    kind: Literal["simpo"]
    beta: Beta = 0.1
    simpo_gamma: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.5, description="target margin between the rewards of chosen and rejected answers"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    cpo_alpha: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0, description="weight of the chosen answers' cross-entropy"
    )


class Orpo(PreferenceSection):
    """Odds ratio preference optimisation: cross-entropy of chosen answers, and an odds ratio.

    It has no reference model. Names are those of TRL's ORPOConfig.
    """

    kind: Literal["orpo"]
    beta: Beta = 0.1


PreferenceConfig = Dpo | Kto | SimPo | Orpo
OneObjective = LanguageModeling | Contrastive | Matching | SpanCorruption | PreferenceConfig | Grpo


TaggedObjective = Annotated[OneObjective, Field(discriminator="kind")]


class ObjectiveMixture(
    ObjectiveTraits, RootModel[Annotated[list[TaggedObjective], Field(min_length=1)]]
):
    """Objectives whose losses are added, each a mean over its own items and times its weight.

    Validation and test are scored as the first one's.
    """

    model_config = ConfigDict(frozen=True)

    @property
    def kind(self) -> Literal["mixture"]:
        """The name of a mixture among kinds of objectives."""
        return "mixture"


AnyObjective = OneObjective | ObjectiveMixture


def _number(objective: Any) -> str:
    """The tag of an objective's form in a recipe: a list, or one objective."""
    return "several" if isinstance(objective, list | ObjectiveMixture) else "one"


ObjectiveField = Annotated[
    Annotated[TaggedObjective, Tag("one")] | Annotated[ObjectiveMixture, Tag("several")],
    Discriminator(_number),
]
"""An objective of a recipe: one, or a list of several."""


def parts_of(objective: AnyObjective) -> Sequence[OneObjective]:
    """The objectives of a mixture; of another objective itself."""
    return objective.root if isinstance(objective, ObjectiveMixture) else (objective,)


Part = TypeVar("Part", bound=ObjectiveSection)


def part_of(objective: AnyObjective, section: type[Part]) -> Part | None:
    """The objective of a class, by itself or in a mixture; None without one."""
    return next((part for part in parts_of(objective) if isinstance(part, section)), None)


COMMANDS = {
    "language_modeling": "sft",
    "contrastive": "sft",
    "matching": "sft",
    "span_corruption": "sft",
    "dpo": "dpo",
    "simpo": "dpo",
    "orpo": "dpo",
    "kto": "kto",
    "grpo": "grpo",
    "mixture": "sft",
}
"""The command that trains an objective, by its kind."""

JUDGED_FORMS = {
    "dpo": ("preference",),
    "simpo": ("preference",),
    "orpo": ("preference",),
    "kto": ("preference", "unpaired_preference"),
    "matching": ("match",),
}
"""The forms of rows that an objective of two answers to one prompt trains on, by its kind."""


def reads_two_views(objective: AnyObjective) -> bool:
    """Whether an objective reads two augmentations of each image."""
    contrastive = part_of(objective, Contrastive)
    return contrastive is not None and contrastive.two_views
