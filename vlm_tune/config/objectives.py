"""The recipe's `objective`: what the training minimises."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vlm_tune.config.base import Config, NonNegativeInt, PositiveFloat, PositiveInt

LEAST_IMAGES = 3
"""Images of a batch from which on their differences give directions of noise."""


class ObjectiveSection(Config):
    """Base of every objective: what the rest of the package asks of one, and the usual answers."""

    @property
    def selects_by(self) -> str:
        """The figure of validation: the score of `answers`, the `loss`, or a mean that is logged.

        It selects the best checkpoint. Answers are generated, chosen or retrieved.
        """
        return "answers"

    @property
    def reference_model(self) -> str | None:
        """The kind of reference model that answers are compared with; None without one."""
        return None

    @property
    def mismatches(self) -> bool:
        """Whether the loss also reads each prompt with an answer of another row."""
        return False

    @property
    def updates(self) -> int:
        """Updates of the weights in a step."""
        return 1

    @property
    def uses_dropout(self) -> bool:
        """Whether dropout is on; its noise would change how likely a model finds an answer."""
        return True


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

    The negatives are the other rows of a micro-batch; with clip and siglip those of all processes.
    """

    kind: Literal["contrastive"]
    loss: Literal["captions", "clip", "siglip"] = Field(
        default="captions",
        description="captions: each image among the batch's distinct captions of its category; "
        "clip: CLIP's softmax loss, images among captions and captions among images; siglip: "
        "SigLIP's sigmoid loss of each pair",
    )
    temperature: PositiveFloat = Field(
        default=0.07,
        description="what similarities are divided by; learned from here on with clip and siglip",
    )
    bias: Annotated[float, Field(ge=-1e3, le=1e3)] | None = Field(
        default=None,
        description="siglip: what is added to the similarities, learned from here on; -10 by "
        "default",
    )

    @property
    def learns_scale(self) -> bool:
        """Whether the temperature is learned."""
        return self.loss != "captions"

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


class RewardFunction(Config):
    """A function that rewards completions, which is made with arguments."""

    function: str = Field(
        description="format, or module:function; called with the arguments, it returns the "
        "function that rewards"
    )
    arguments: dict[str, Any] = Field(description="the keyword arguments")


GrpoLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
"""TRL's loss types, which differ in what the losses of tokens are divided by."""


class Grpo(ObjectiveSection):
    """Group relative policy optimisation: sampled answers that are rewarded become likelier.

    The answers to one prompt are a group, and each is compared with the group's mean reward. Names
    and defaults are those of TRL's GRPOConfig.
    """

    kind: Literal["grpo"]
    reward_funcs: Annotated[list[str | RewardFunction], Field(min_length=1)] = Field(
        default=["exact_match"],
        description="what rewards a completion: metrics of evaluate.metrics, format, or functions "
        "as TRL takes them, module:function",
    )
    reward_weights: list[Annotated[float, Field(ge=-1e6, le=1e6)]] | None = Field(
        default=None, description="weight of each function in the sum; 1 by default"
    )
    num_generations: Annotated[int, Field(ge=2, le=1024)] = Field(
        default=8, description="completions of each prompt"
    )
    max_completion_length: PositiveInt = Field(
        default=512, description="most tokens of a completion"
    )
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = Field(default=0, description="likeliest tokens to draw from; 0: all")
    loss_type: GrpoLoss = Field(
        default="dapo",
        description="what the losses of tokens are divided by; grpo: their number in each "
        "completion, dr_grpo: max_completion_length, dapo and bnpo: their number in the step",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        default="token", description="sequence: GSPO, one ratio of probabilities per completion"
    )
    epsilon: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.2, description="how far under 1 a ratio of probabilities counts"
    )
    epsilon_high: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        default=None, description="how far over 1 a ratio counts; epsilon by default"
    )
    beta: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0, description="weight of the divergence from the reference model; 0: none"
    )
    reference: Literal["adapter_off", "copy"] = Field(
        default="adapter_off", description="with beta, as in the other objectives"
    )
    use_bias_correction_kl: bool = Field(
        default=True, description="multiply the divergence by the ratio of probabilities"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        default="group",
        description="whose standard deviation rewards are divided by: the group's, or the step's",
    )
    num_iterations: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1, description="updates of the weights in a step, all by its completions"
    )
    mask_truncated_completions: bool = Field(
        default=False, description="completions that max_completion_length ended train nothing"
    )

    @property
    def reference_model(self) -> str | None:
        """The one that the recipe sets, with a weight of the divergence from it."""
        return self.reference if self.beta else None

    @property
    def updates(self) -> int:
        """The iterations over a step's completions."""
        return self.num_iterations

    @property
    def uses_dropout(self) -> bool:
        """Never: the ratio of probabilities is that of the weights alone."""
        return False

    @property
    def functions(self) -> list[RewardFunction]:
        """The reward functions, those that are only named without arguments."""
        return [
            each
            if isinstance(each, RewardFunction)
            else RewardFunction(function=each, arguments={})
            for each in self.reward_funcs
        ]

    @property
    def names(self) -> list[str]:
        """The name of each reward function in figures; a second one of a name has its place."""
        names = [each.function.rpartition(":")[2] for each in self.functions]
        return [
            name if name not in names[:place] else f"{name}_{place + 1}"
            for place, name in enumerate(names)
        ]

    @property
    def weights(self) -> list[float]:
        """The weight of each reward function."""
        return self.reward_weights or [1.0] * len(self.reward_funcs)

    @property
    def clip(self) -> tuple[float, float]:
        """The bounds of the ratio of probabilities."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1 - self.epsilon, 1 + high


PreferenceConfig = Dpo | Kto | SimPo | Orpo
AnyObjective = LanguageModeling | Contrastive | Matching | SpanCorruption | PreferenceConfig | Grpo

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
