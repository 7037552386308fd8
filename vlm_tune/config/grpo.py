"""The objective of sampled answers that are rewarded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vlm_tune.config.base import Config, NonNegativeInt, PositiveInt
from vlm_tune.config.objective_base import ObjectiveSection


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
        default=512, description="maximum tokens of a completion"
    )
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = Field(
        default=0, description="number of likeliest tokens to sample from; 0 for all"
    )
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
        description="divide rewards by the standard deviation of the group, or of the step (batch)",
    )
    num_iterations: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1, description="weight updates per step, all with its completions"
    )
    mask_truncated_completions: bool = Field(
        default=False, description="completions that reached max_completion_length train nothing"
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
